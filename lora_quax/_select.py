"""Which arrays of a model are adapted, and how: the reading of `targets`.

A model is walked once into a list of `Leaf`, one per array, each with its path and the
modules around it. `targets` is read into a list of `Entry`, each of which says which
leaves it means. The last entry that means a leaf decides what becomes of it.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import quax

from ._array import aval_of, check_alpha, check_rank, FactoredArray
from ._full import FullArray
from ._init import Initialiser


@dataclasses.dataclass(frozen=True)
class Adapt:
    """How one weight is adapted. What is `None` is as given to `loraify`.

    **Arguments:**

    - `rank`, `alpha`, `init_a`, `init_b`, `scale`, `dtype`: as for `LoraArray`.
    - `rows`, `cols`: how many axes of the weight are rows, and how many are columns.
        By default that of the layer; one and one for an array outside a known layer.

    **Raises:** `ValueError` or `TypeError` if a field is not what it should be.
    """

    rank: int | None = None
    alpha: int | float | None = None
    init_a: Initialiser | None = None
    init_b: Initialiser | None = None
    scale: int | float | None = None
    dtype: Any = None
    rows: int | None = None
    cols: int | None = None

    def __post_init__(self):
        if self.rank is not None:
            check_rank(self.rank)
        check_alpha(self.alpha, 1)
        for name in ("init_a", "init_b"):
            init = getattr(self, name)
            if init is not None and not callable(init):
                raise TypeError(
                    f"`{name}` must be a function as in `jax.nn.initializers`, got "
                    f"{init!r}."
                )
        if self.init_a is not None and self.scale is not None:
            raise ValueError("Give either `init_a` or `scale`, not both.")
        if self.scale is not None and (
            isinstance(self.scale, bool) or not isinstance(self.scale, int | float)
        ):
            raise TypeError(f"`scale` must be a Python number, got {self.scale!r}.")
        if self.dtype is not None and not jnp.issubdtype(self.dtype, jnp.floating):
            raise TypeError(
                f"`dtype` must be a floating-point type, got {self.dtype!r}."
            )
        for name in ("rows", "cols"):
            n = getattr(self, name)
            if n is not None and (isinstance(n, bool) or not isinstance(n, int)):
                raise TypeError(f"`{name}` must be an integer, got {n!r}.")
            if n is not None and n < 1:
                raise ValueError(f"`{name}` must be at least 1, got {n!r}.")


Spec: TypeAlias = Adapt | int | bool | Literal["full", "freeze"] | None
Target: TypeAlias = type | str | re.Pattern | Callable[[str, Any], Spec]
Targets: TypeAlias = (
    Target | list[Any] | tuple[Any, ...] | Mapping[Any, Spec]
)  # Of targets, and of pairs of a target and a spec.

DEFAULT_LAYERS = (eqx.nn.Linear, eqx.nn.Conv, eqx.nn.ConvTranspose)
_NORMS = (
    eqx.nn.LayerNorm,
    eqx.nn.RMSNorm,
    eqx.nn.GroupNorm,
    eqx.nn.BatchNorm,
)


def known_axes(layer) -> tuple[int, int] | None:
    """How many axes of a known layer's weight are rows, and how many columns."""
    if isinstance(layer, eqx.nn.Conv | eqx.nn.ConvTranspose):
        return 1, layer.num_spatial_dims + 1
    if isinstance(layer, eqx.nn.Linear | eqx.nn.Embedding):
        return 1, 1
    return None


def dotted(key_path) -> str:
    """A key path of JAX as it is written here: `blocks.0.attn.q_proj.weight`."""
    return ".".join(map(_segment, key_path))


def _segment(entry) -> str:
    for name in ("name", "idx", "key"):
        if hasattr(entry, name):
            return str(getattr(entry, name))
    return str(entry)


def named(path: str) -> str:
    """A path for a message; that of the model itself is empty."""
    return f"`{path}`" if path else "the model itself"


def is_value(x) -> bool:
    return isinstance(x, quax.Value)


def is_array(x) -> bool:
    return eqx.is_array(x) or isinstance(
        x, np.ndarray | jax.ShapeDtypeStruct | quax.ArrayValue
    )


def is_float(x) -> bool:
    return is_array(x) and jnp.issubdtype(aval_of(x).dtype, jnp.floating)


def is_adapted(x) -> bool:
    return isinstance(x, FactoredArray | FullArray)


class Leaf(NamedTuple):
    """A leaf of the model and where it stands."""

    path: str
    value: Any  # None for the weight of a known layer that is missing
    modules: tuple[tuple[str, Any], ...]  # those around it, outermost first
    layer: tuple[str, Any] | None  # the known layer that it is the weight of

    @property
    def axes(self) -> tuple[int, int]:
        return (known_axes(self.layer[1]) if self.layer else None) or (1, 1)

    @property
    def holder(self) -> Any:
        """The module that holds it, be it in a list or a dictionary."""
        for _, module in reversed(self.modules):
            if not isinstance(module, list | tuple | dict):
                return module
        return None

    @property
    def is_bias(self) -> bool:
        """Whether it is the bias of a known layer; a convolution's has three axes."""
        name = self.path.rpartition(".")[2]
        return name == "bias" and known_axes(self.holder) is not None

    @property
    def is_vector(self) -> bool:
        """Whether it is a bias or a norm: stacked, these have two axes, but no rank."""
        name = self.path.rpartition(".")[2]
        too_few = aval_of(self.value).ndim < sum(self.axes)
        return too_few or name.startswith("bias") or isinstance(self.holder, _NORMS)


def walk(model) -> list[Leaf]:
    """The leaves of a model in the order of `jax.tree.flatten`, values being leaves."""
    leaves = []

    def visit(keys, node, modules, layer):
        path = dotted(keys)
        if is_value(node):
            leaves.append(Leaf(path, node, modules, layer))
            return
        children = jtu.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)[0]
        if len(children) == 1 and children[0][0] == ():
            leaves.append(Leaf(path, node, modules, layer))
            return
        known = known_axes(node) is not None
        inner = (*modules, (path, node))
        if known and node.weight is None:
            leaves.append(Leaf(_join(path, "weight"), None, inner, (path, node)))
        for key, child in children:
            is_weight = known and dotted(key) == "weight"
            visit((*keys, *key), child, inner, (path, node) if is_weight else layer)

    visit((), model, (), None)
    return _largest_in_wrappers(leaves)


def _largest_in_wrappers(leaves: list[Leaf]) -> list[Leaf]:
    """Where a wrapper stands for a layer's weight, the weight is its largest array.

    Beside it there may be others, such as the norms of a weight normalisation.
    """
    sizes: dict[str, int] = {}
    for leaf in leaves:
        if leaf.layer is not None and is_float(leaf.value):
            path, size = leaf.layer[0], math.prod(aval_of(leaf.value).shape)
            sizes[path] = max(size, sizes.get(path, 0))

    def is_other(leaf: Leaf) -> bool:
        if leaf.layer is None or not is_float(leaf.value):
            return False
        return math.prod(aval_of(leaf.value).shape) < sizes[leaf.layer[0]]

    return [leaf._replace(layer=None) if is_other(leaf) else leaf for leaf in leaves]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


class Entry(NamedTuple):
    """One of the targets, read."""

    target: Any  # a type or tuple of types, a compiled pattern, or a function
    spec: Adapt | Literal["full", "freeze"] | None  # None for a function
    shown: str  # as the user wrote it
    is_name: bool = False


def read_targets(targets: Any) -> list[Entry]:
    """`targets` as entries, the later of which win."""
    if targets is None:
        return [Entry(DEFAULT_LAYERS, Adapt(), "the default targets")]
    if isinstance(targets, Mapping):
        entries = [_read_target(*item) for item in targets.items()]
    elif isinstance(targets, list | tuple):
        entries = [_read_item(item) for item in targets]
    else:
        entries = [_read_target(targets, True)]
    if not entries:
        raise ValueError("`targets` is empty, so that nothing would be adapted.")
    return entries


def _read_item(item) -> Entry:
    if not isinstance(item, tuple):
        return _read_target(item, True)
    if len(item) != 2:
        raise TypeError(
            f"An entry of `targets` is a target or a pair (target, spec), got {item!r}."
        )
    return _read_target(*item)


def _read_target(target, spec) -> Entry:
    if isinstance(target, type):
        return Entry(target, read_spec(spec, target.__name__), target.__name__)
    if isinstance(target, str | re.Pattern):
        pattern, is_name = _read_pattern(target)
        shown = repr(target if isinstance(target, str) else target.pattern)
        return Entry(pattern, read_spec(spec, shown), shown, is_name)
    if callable(target):
        if spec is not True:
            raise TypeError(
                f"A function says the spec itself, so that {spec!r} beside {target!r} "
                "in `targets` has no meaning."
            )
        return Entry(target, None, repr(target))
    raise TypeError(
        "A target must be a layer type, a name or a pattern, or a function of path and "
        f"array; got {target!r}. Pairs (target, spec) stand inside a list."
    )


def _read_pattern(target: str | re.Pattern) -> tuple[re.Pattern, bool]:
    """A name matches the last segments of a path, a regular expression all of it."""
    if isinstance(target, re.Pattern):
        return target, False
    if not target:
        raise ValueError("A target is the empty string, which names nothing.")
    if not set(target) & set(r"\*+?[](){}|^$"):
        return re.compile(rf"(?:.*\.)?{re.escape(target)}", re.DOTALL), True
    try:
        return re.compile(target), False
    except re.error as e:
        raise ValueError(
            f"The target {target!r} is not a regular expression: {e}."
        ) from e


def read_spec(spec, where: str) -> Adapt | Literal["full", "freeze"]:
    if isinstance(spec, bool | np.bool_) or spec is None:
        return Adapt() if spec else "freeze"
    if isinstance(spec, int):
        return Adapt(rank=spec)
    if isinstance(spec, Adapt) or (
        isinstance(spec, str) and spec in ("full", "freeze")
    ):
        return spec
    raise TypeError(
        f"The spec of {where} must be a rank, an `Adapt`, True, False, 'full' or "
        f"'freeze'; got {spec!r}."
    )


class Choice(NamedTuple):
    """What becomes of a leaf, and which entry said so."""

    spec: Adapt | Literal["full", "freeze"]
    entry: Entry


def select(model, targets: Targets | None) -> list[tuple[Leaf, Choice | None]]:
    """What becomes of each leaf of a model.

    **Returns:** the leaves in the order of `jax.tree.flatten` with values as leaves,
    each with its choice: an `Adapt` or `"full"` with everything about it checked, or
    `"freeze"`, or `None` if no target means it.

    **Raises:** `ValueError` or `TypeError` if nothing, or one of the targets, matches
    nothing; if a weight is missing, adapted already, or has too few axes; if it is not
    a floating-point array.
    """
    entries = read_targets(targets)
    leaves = walk(model)
    choices: list[Choice | None] = [None] * len(leaves)
    for entry in entries:
        said = [_say(entry, leaf) for leaf in leaves]
        if all(spec is None for spec in said) and entry.spec is not None:
            raise _nothing(entry, leaves)
        for i, spec in enumerate(said):
            if spec is not None:
                choices[i] = Choice(spec, entry)
    out = list(zip(leaves, choices))
    if all(choice is None or choice.spec == "freeze" for choice in choices):
        raise ValueError(
            "`targets` leaves nothing to train: no array of the model is selected, or "
            f"all that are have the spec 'freeze'. {_what_there_is(leaves)}"
        )
    for leaf, choice in out:
        if choice is not None and choice.spec != "freeze":
            _check(leaf, choice)
    return [(leaf, choice) for leaf, choice in out if leaf.value is not None]


def _say(entry: Entry, leaf: Leaf) -> Adapt | Literal["full", "freeze"] | None:
    """What an entry says of a leaf; `None` if it does not mean it."""
    if entry.spec is None:
        if not (is_adapted(leaf.value) or is_float(leaf.value)):
            return None
        said = entry.target(leaf.path, leaf.value)
        if said is None or isinstance(said, bool | np.bool_) and not said:
            return None
        return read_spec(said, named(leaf.path))
    if isinstance(entry.spec, Adapt):
        means = _means_weight(entry, leaf)
    else:
        means = _means_anything(entry, leaf)
    return entry.spec if means else None


def _means_weight(entry: Entry, leaf: Leaf) -> bool:
    """Whether a low-rank entry means this leaf."""
    if isinstance(entry.target, re.Pattern):
        paths = [leaf.path]
        if leaf.layer is not None:
            paths += [leaf.layer[0], _join(leaf.layer[0], "weight")]
        if not any(map(entry.target.fullmatch, paths)):
            return False
        # A name is meant literally. A regular expression, which may well be `.*`,
        # passes over what cannot be adapted; so do both inside a wrapped weight.
        literal = entry.is_name and entry.target.fullmatch(leaf.path)
        if literal and (leaf.value is None or is_array(leaf.value)):
            return True
        return _can_adapt(leaf)
    if not any(isinstance(module, entry.target) for _, module in leaf.modules):
        return False
    if leaf.layer is not None:
        layer = leaf.layer[1]
        return isinstance(layer, (entry.target, DEFAULT_LAYERS)) and _can_adapt(leaf)
    held = isinstance(leaf.holder, entry.target) and known_axes(leaf.holder) is None
    return held and _can_adapt(leaf)


def _can_adapt(leaf: Leaf) -> bool:
    """Whether a leaf that is not named itself can be meant.

    The missing, or integer, weight of a layer is meant too, and then refused by name.
    """
    if leaf.value is None:
        return True
    own = leaf.layer is not None and leaf.path == _join(leaf.layer[0], "weight")
    if own and is_array(leaf.value):
        return True
    return is_float(leaf.value) and not leaf.is_vector


def _means_anything(entry: Entry, leaf: Leaf) -> bool:
    """Whether an entry 'full' or 'freeze' means this leaf."""
    if isinstance(entry.target, re.Pattern):
        if entry.is_name and entry.target.fullmatch(leaf.path):
            return leaf.value is None or is_array(leaf.value)
        paths = [leaf.path, *(path for path, _ in leaf.modules)]
        means = any(map(entry.target.fullmatch, paths))
    else:
        modules = [module for _, module in leaf.modules]
        means = any(isinstance(module, entry.target) for module in modules)
    # What is frozen may be anything; what trains is of floating point.
    return means and (entry.spec == "freeze" or is_float(leaf.value))


def _check(leaf: Leaf, choice: Choice) -> None:
    where = f"{named(leaf.path)}, selected by {choice.entry.shown},"
    x = leaf.value
    if x is None:
        raise ValueError(
            f"{where} is missing: the tree has None in its place. Adapt the whole "
            "model, before it is partitioned or filtered."
        )
    if is_adapted(x):
        raise ValueError(
            f"{where} is already adapted: it is {x!r}. Use `lora_quax.merge` or "
            "`lora_quax.unload` first, or leave it out of `targets`."
        )
    if not is_float(x):
        raise TypeError(f"{where} is not a floating-point array: it is {aval_of(x)}.")
    if isinstance(choice.spec, Adapt):
        rows, cols = leaf.axes
        rows, cols = choice.spec.rows or rows, choice.spec.cols or cols
        aval = aval_of(x)
        if leaf.is_bias or aval.ndim < rows + cols:
            why = "is a bias" if leaf.is_bias else f"needs at least {rows + cols} axes"
            raise ValueError(
                f"{where} of shape {aval.shape} has no low-rank update: it {why}. A "
                "bias or another vector can be trained in full, with the spec 'full'."
            )


def _nothing(entry: Entry, leaves: list[Leaf]) -> ValueError:
    if isinstance(entry.target, re.Pattern):
        vectors = [
            named(leaf.path)
            for leaf in leaves
            if is_float(leaf.value) and entry.target.fullmatch(leaf.path)
        ]
        if vectors:
            return ValueError(
                f"The target {entry.shown} matches only vectors, which have no "
                f"low-rank update: {_some(vectors)}. To train them in full give the "
                "target the spec 'full'."
            )
        numbers = [
            f"{named(leaf.path)} is {aval_of(leaf.value)}"
            for leaf in leaves
            if is_array(leaf.value) and entry.target.fullmatch(leaf.path)
        ]
        if numbers:
            return ValueError(
                f"The target {entry.shown} matches no floating-point array: "
                f"{_some(numbers)}."
            )
    near = _near(entry, leaves)
    hint = f"Near it are {_some(near)}." if near else _what_there_is(leaves)
    return ValueError(f"{entry.shown} of `targets` matched nothing. {hint}")


def _paths(leaves: list[Leaf]) -> list[str]:
    paths = {}
    for leaf in leaves:
        if is_float(leaf.value):
            paths.update(dict.fromkeys(path for path, _ in leaf.modules if path))
            paths[leaf.path] = None
    return list(paths)


def _near(entry: Entry, leaves: list[Leaf]) -> list[str]:
    """Paths that resemble a pattern, compared over as many last segments as it has."""
    if not isinstance(entry.target, re.Pattern):
        return []
    wanted = entry.shown.strip("'\"")
    n = wanted.count(".") + 1
    tails: dict[str, str] = {}
    for path in _paths(leaves):
        tail = ".".join(path.split(".")[-n:]) if entry.is_name else path
        tails.setdefault(tail, path)
    near = difflib.get_close_matches(wanted, tails, n=5, cutoff=0.5)
    return [f"`{tails[tail]}`" for tail in near]


def _what_there_is(leaves: list[Leaf]) -> str:
    layers = {
        type(module).__name__
        for leaf in leaves
        for _, module in leaf.modules
        if isinstance(module, eqx.Module)
    }
    paths = [f"`{leaf.path}`" for leaf in leaves if is_float(leaf.value)]
    if not paths:
        return "The model has no floating-point array."
    return (
        f"The model has the arrays {_some(paths)}"
        + (f" in modules of type {_some(sorted(layers))}" if layers else "")
        + "."
    )


def _some(items: list[str], n: int = 8) -> str:
    more = f" and {len(items) - n} more" if len(items) > n else ""
    return ", ".join(items[:n]) + more
