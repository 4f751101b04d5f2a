"""From a model to a model whose weights have low-rank updates."""

import collections
import functools as ft
import hashlib
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jaxtyping import PRNGKeyArray, PyTree

from .. import init
from .._arrays.base import make
from .._arrays.check import (
    aval_of,
    check_alpha,
    check_factor_dtype,
    check_flag,
    check_key,
    check_number,
    check_rank,
    default_dtype,
)
from .._arrays.full import FullArray
from .._arrays.lora import LoraArray
from .._arrays.low_rank import LowRankArray
from .._forms.dora import DoRA
from ..init import Initialiser
from .habits import answers_peft
from .paths import is_value, Leaf, named
from .select import select
from .targets import Adapt, check_dora, Targets


class _Plan(NamedTuple):
    """All that the factors of a weight depend on, but for the key."""

    shape: tuple[int, ...]
    rank: int
    alpha: float
    init_a: Initialiser
    init_b: Initialiser
    dtype: np.dtype
    rows: int
    cols: int
    allow_materialise: bool
    abstract: bool


@answers_peft
def loraify(
    model: PyTree,
    rank: int,
    key: PRNGKeyArray | jax.ShapeDtypeStruct,
    *,
    alpha: Any = None,
    targets: Targets | None = None,
    init_a: Initialiser | None = None,
    init_b: Initialiser = init.zeros,
    scale: Any = None,
    dtype: Any = None,
    stop_gradient: bool = True,
    allow_materialise: bool = False,
    use_dora: bool | Callable[[LoraArray], DoRA] = False,
) -> PyTree:
    """Gives weights of a model a low-rank update each. The model is not changed.

    ```python
    model = loraify(model, rank=8, key=key)
    quax.quaxify(model)(x)
    ```

    A target is one of

    - a layer type: the weights of such layers. A type that is not `eqx.nn.Linear`, a
        convolution or `eqx.nn.Embedding` stands for the linear layers and convolutions
        inside it, and the matrices that it holds itself.
    - a name, which is matched with the last segments of a dotted path, as PEFT does:
        `"q_proj"` or `"attn.q_proj"` for `blocks.0.attn.q_proj`. The path may be that
        of a layer or of any array, such as `"weight_ih"`.
    - `"all-linear"`, as PEFT has it: every `eqx.nn.Linear`. PEFT leaves out the head of
        a model; here `("lm_head", "freeze")` does.
    - a regular expression, which has to match the whole path: a string with one of the
        characters `\\ * + ? [ ] ( ) { } | ^ $`, or an `re.Pattern`. It passes over
        vectors.
    - a function of path and array, called with each floating-point array, which returns
        a spec, or `None` or `False` for an array that it does not mean.

    A spec says what becomes of a weight: a rank; an `Adapt` with a rank, `alpha` or
    initialisers of its own; `"full"`, to train it as a whole; `"freeze"` (or `False`),
    to leave it alone; `True`, to adapt it as the other arguments say. With `"full"` or
    `"freeze"` a target means everything in a module: `{"head": "full"}`.

    ```python
    targets=["q_proj", "v_proj"]
    targets={eqx.nn.Linear: 8, "head": "full", "bias": "full"}
    targets=[eqx.nn.Linear, (r"blocks\\.[0-3]\\..*", "freeze")]
    targets=lambda path, x: 16 if "attn" in path and x.ndim >= 2 else None
    ```

    **Arguments:**

    - `model`: any PyTree. Its arrays may be `jax.ShapeDtypeStruct`s.
    - `rank`: the rank of the updates. It may exceed what a small weight can use;
        `summary` marks where it does.
    - `key`: for the initialisers. What a weight gets depends on the key and its path
        alone, so that adapting fewer or more of the others changes nothing.
    - `alpha`: the updates are scaled by `alpha / rank`; defaults to the rank of each.
        Not zero.
    - `targets`: which weights: a target, a list of targets or of pairs `(target,
        spec)`, or a mapping from target to spec. Where several mean a weight, the last
        decides. By default every `eqx.nn.Linear`, `eqx.nn.Conv` and
        `eqx.nn.ConvTranspose`.
    - `init_a`, `init_b`, `scale`, `dtype`, `stop_gradient`, `allow_materialise`: as for
        `LoraArray`. By default the factor `a` of an `eqx.nn.Embedding` is drawn from a
        standard normal distribution, as PEFT does.
    - `use_dora`: whether the norms of the weights train apart from their directions:
        `DoRA`, with a magnitude for each row of a weight, and for each column of an
        `eqx.nn.Embedding`, as PEFT does. Or a function from a `LoraArray` to a
        `DoRA`, such as `functools.partial(DoRA, per="columns")`.

    **Returns:** the model with a `LoraArray`, or a `DoRA`, in place of each adapted
    weight, and a `FullArray` in place of each that trains in full.

    **Raises:** `ValueError` or `TypeError` if an argument is not what it should be; if
    nothing, or one of the targets, matched nothing; if a selected weight is missing,
    adapted already, a vector, or not a floating-point array.
    """
    rank = check_rank(rank)
    check_alpha(alpha, rank)
    stop_gradient = check_flag("stop_gradient", stop_gradient)
    allow_materialise = check_flag("allow_materialise", allow_materialise)
    if not isinstance(key, jax.ShapeDtypeStruct):
        check_key(key)
    defaults = Adapt(
        rank, alpha, init_a, init_b, scale, dtype, use_dora=check_dora(use_dora)
    )
    leaves, treedef = jax.tree.flatten(model, is_leaf=is_value)
    chosen = select(model, targets)
    plans = {
        i: _plan(leaf, choice.spec, defaults, allow_materialise)
        for i, (leaf, choice) in enumerate(chosen)
        if choice is not None and isinstance(choice.spec, Adapt)
    }
    if isinstance(key, jax.ShapeDtypeStruct):
        _refuse_concrete(chosen, plans)
    deltas = _draw_all(plans, _words([leaf.path for leaf, _ in chosen]), key)
    for i, (leaf, choice) in enumerate(chosen):
        if choice is None or choice.spec == "freeze":
            continue
        _warn_of_wrapper(leaf)
        if choice.spec == "full":
            abstract = isinstance(leaf.value, jax.ShapeDtypeStruct)
            leaves[i] = (
                make(FullArray, base=leaf.value, value=leaf.value)
                if abstract
                else FullArray(leaf.value)
            )
            continue
        concrete = isinstance(leaf.value, np.ndarray)
        lora = make(
            LoraArray,
            base=jnp.asarray(leaf.value) if concrete else leaf.value,
            delta=deltas[i],
            stop_gradient=stop_gradient,
            stopped=False,
        )
        leaves[i] = _with_magnitude(lora, leaf, choice.spec, defaults)
    return jax.tree.unflatten(treedef, leaves)


def _plan(leaf: Leaf, spec: Adapt, defaults: Adapt, allow_materialise: bool) -> _Plan:
    """The spec of a weight, completed: its own, then loraify's, then the layer's."""
    aval = aval_of(leaf.value)
    rank = check_rank(defaults.rank if spec.rank is None else spec.rank)
    alpha = defaults.alpha if spec.alpha is None else spec.alpha
    dtype = spec.dtype if spec.dtype is not None else defaults.dtype
    rows, cols = leaf.axes
    inner = jax.tree.leaves(leaf.value)
    return _Plan(
        shape=tuple(aval.shape),
        rank=rank,
        alpha=check_alpha(alpha, rank),
        init_a=_init_a(spec) or _init_a(defaults) or _layer_init_a(leaf),
        init_b=spec.init_b or defaults.init_b or init.zeros,
        dtype=default_dtype(aval) if dtype is None else check_factor_dtype(dtype),
        rows=spec.rows or rows,
        cols=spec.cols or cols,
        allow_materialise=allow_materialise,
        abstract=any(isinstance(x, jax.ShapeDtypeStruct) for x in inner),
    )


def _with_magnitude(lora: LoraArray, leaf: Leaf, spec: Adapt, defaults: Adapt) -> Any:
    use = defaults.use_dora if spec.use_dora is None else spec.use_dora
    if use is True:
        return DoRA(lora, per="columns" if _is_embedding(leaf) else "rows")
    if not use:
        return lora
    out = use(lora)
    if not isinstance(out, DoRA):
        raise TypeError(f"`use_dora` must give a `DoRA`, and {use!r} gave {out!r:.80}.")
    return out


def _refuse_concrete(chosen, plans: dict[int, _Plan]) -> None:
    concrete = [named(chosen[i][0].path) for i in plans if not plans[i].abstract]
    if concrete:
        raise TypeError(
            "`key` is abstract, and the model is not: no factors can be drawn for "
            f"{', '.join(concrete[:8])}. Give a key from `jax.random.key`."
        )


def _init_a(spec: Adapt) -> Initialiser | None:
    if spec.scale is None:
        return spec.init_a
    return init.gaussian(check_number("scale", spec.scale))


def _layer_init_a(leaf: Leaf) -> Initialiser:
    return init.gaussian(1.0) if _is_embedding(leaf) else init.uniform


def _is_embedding(leaf: Leaf) -> bool:
    return leaf.layer is not None and isinstance(leaf.layer[1], eqx.nn.Embedding)


def _draw_all(plans: dict[int, _Plan], words, key) -> dict[int, LowRankArray]:
    """The updates of all weights, by number of the leaf, in one compiled call."""
    out = {}
    for abstract in (False, True):
        groups: dict[_Plan, list[int]] = {}
        for i, plan in plans.items():
            if plan.abstract == abstract:
                groups.setdefault(plan, []).append(i)
        if groups:
            stacked = [np.stack([words[i] for i in group]) for group in groups.values()]
            draw = ft.partial(eqx.filter_eval_shape, _draw) if abstract else _draw_jit
            drawn = draw(tuple(groups), key, stacked)
            for group, deltas in zip(groups.values(), drawn):
                out.update(zip(group, deltas))
    return out


def _draw(plans: tuple[_Plan, ...], key, words) -> list[list[LowRankArray]]:
    """For each plan, one update per row of words."""

    def one(plan: _Plan, word):
        fields = plan._asdict()
        del fields["abstract"]
        for i in range(2):
            fields["key"] = jr.fold_in(fields.get("key", key), word[i])
        return LowRankArray.init(**fields)

    out = []
    for plan, rows in zip(plans, words):
        # A loop, so that a hundred like weights compile as fast as one does; and not a
        # vmap, under which some of JAX's generators would draw other numbers.
        stacked = lax.map(ft.partial(one, plan), jnp.asarray(rows))
        out.append([jax.tree.map(lambda x: x[i], stacked) for i in range(len(rows))])
    return out


_draw_jit = eqx.filter_jit(_draw)


def _words(paths: list[str]) -> list[np.ndarray]:
    """Each path as 64 bits, to be folded into a key.

    Of several arrays with one path, as `{"a.b": x, "a": {"b": y}}` has, the later ones
    are told apart by their order.
    """
    out, seen = [], collections.Counter()
    for path in paths:
        text = path if not seen[path] else f"{path}\0{seen[path]}"
        seen[path] += 1
        digest = hashlib.sha256(text.encode()).digest()
        out.append(np.frombuffer(digest[:8], dtype="<u4").astype(np.uint32))
    return out


def _warn_of_wrapper(leaf: Leaf) -> None:
    """A wrapper that stops the gradient of what it holds stops that of the factors."""
    for path, module in leaf.modules:
        kind = type(module)
        if kind.__name__ == "NonTrainable" and kind.__module__.startswith("paramax"):
            warnings.warn(
                f"{named(leaf.path)} was selected, but the `paramax.NonTrainable` at "
                f"{named(path)} around it stops its gradient, and so that of its "
                "update. Unwrap it first: the base of an adapted weight is frozen "
                "anyway.",
                stacklevel=3,
            )
