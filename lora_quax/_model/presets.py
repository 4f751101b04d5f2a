"""Targets that are meant by what modules do: "attention" and "mlp".

What a module does is read off the name of its type, or of the field that holds it, of
which the end says it: `MultiheadAttention`, `self_attn`, `SwiGLU` in the field `mlp`.
Families of models agree in these, if in nothing else. Where a block has no MLP by name,
what stands beside its attention is taken for one, whatever it is called.
"""

import re
from collections.abc import Callable, Sequence

from .._arrays.check import aval_of
from .paths import is_linear, Leaf


# Of `attn2` and `Attention2d` too; not of `AttentionBlock`, which holds more.
_ATTENTION = re.compile(r"(attn|attention)(_?\d+d?)?$", re.IGNORECASE)
_MLP = re.compile(r"(mlp|ffn|feed_?forward)(_?\d+d?)?$", re.IGNORECASE)


def _attention(leaves: Sequence[Leaf]) -> set[str]:
    return _called(_ATTENTION, leaves)


def _mlp(leaves: Sequence[Leaf]) -> set[str]:
    attention = _called(_ATTENTION, leaves)
    outside = [leaf for leaf in leaves if is_linear(leaf) and not _in(leaf, attention)]
    named = _called(_MLP, outside)
    out = set(named)
    for path in attention:
        beside = _beside(path, leaves, outside)
        if not any(_in(leaf, named) for leaf in beside):
            out |= {leaf.layer[0] for leaf in beside if leaf.layer}
    return out


PRESETS: dict[str, Callable[[Sequence[Leaf]], set[str]]] = {
    "attention": _attention,
    "mlp": _mlp,
}
"""By its name, a function from the leaves of a model to the paths of the modules that
a preset means."""


def _called(name: re.Pattern, leaves: Sequence[Leaf]) -> set[str]:
    """The modules of which the field or the type is called so."""
    return {
        path
        for leaf in leaves
        for path, module in leaf.modules
        if name.search(path.rpartition(".")[2]) or name.search(type(module).__name__)
    }


def _beside(attention: str, leaves: Sequence[Leaf], outside: list[Leaf]) -> list[Leaf]:
    """The linear layers beside an attention in the smallest module that has any.

    Beyond a list of blocks, or a stack, there is no looking: a head is no MLP.
    """
    inside = [leaf for leaf in leaves if _in(leaf, {attention})]
    stacked = {_stacked(leaf) for leaf in inside if is_linear(leaf)}
    around = inside[0].modules
    paths = [path for path, _ in around]
    for block, module in reversed(around[: paths.index(attention)]):
        found = [leaf for leaf in outside if _in(leaf, {block})]
        if stacked and any(_stacked(leaf) not in stacked for leaf in found):
            return []
        if found or isinstance(module, list | tuple):
            return found
    return []


def _stacked(leaf: Leaf) -> int:
    """How many axes of a stack a layer's weight has."""
    return 0 if leaf.value is None else aval_of(leaf.value).ndim - sum(leaf.axes)


def _in(leaf: Leaf, modules: set[str]) -> bool:
    return any(path in modules for path, _ in leaf.modules)
