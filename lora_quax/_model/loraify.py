"""From a model to a model whose weights have low-rank updates."""

import functools as ft
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import PRNGKeyArray, PyTree

from .. import init
from .._arrays.base import (
    AbstractDelta,
    AdaptedArray,
    checked,
    make,
    replace,
    with_base,
)
from .._arrays.check import (
    aval_of,
    check_alpha,
    check_dropout,
    check_factor_dtype,
    check_flag,
    check_key,
    check_number,
    check_rank,
    default_dtype,
)
from .._arrays.full import FullArray
from .._arrays.lora import LoraArray, unsummed
from .._arrays.low_rank import LowRankArray
from .._forms.dora import DoRA
from ..init import Initialiser
from .habits import answers_peft
from .paths import is_value, Leaf, named, words
from .placed import beside_base
from .select import select, with_biases
from .targets import Adapt, check_dora, Targets
from .together import described, in_step, is_shared
from .updates import read_update


class _Plan(NamedTuple):
    """All that the update of a weight depends on, but for the key."""

    shape: tuple[int, ...]
    update: Any  # as it was asked for
    told: tuple[tuple[str, Any], ...]  # what its `init` is told
    abstract: bool


@answers_peft
def loraify(
    model: PyTree,
    rank: int | None,
    key: PRNGKeyArray | jax.ShapeDtypeStruct,
    *,
    update: Any = LowRankArray,
    alpha: Any = None,
    targets: Targets | None = None,
    init_a: Initialiser | None = None,
    init_b: Initialiser = init.zeros,
    scale: Any = None,
    dtype: Any = None,
    dropout: Any = 0.0,
    stop_gradient: bool = True,
    allow_materialise: bool = False,
    use_dora: bool | Callable[[LoraArray], DoRA] = False,
    use_rslora: bool = False,
    bias: str = "none",
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
        `summary` marks where it does. `None` for forms of update that have none.
    - `key`: for the initialisers. What a weight gets depends on the key and its path
        alone, so that adapting fewer or more of the others changes nothing.
    - `update`: the form of the updates: `LowRankArray`, which is LoRA, or `LoHa`,
        `LoKr`, `VeRA`, `IA3` or `Rows`, or a class of your own that has a classmethod
        `init`. Options of that are given as
        `functools.partial(lora_quax.LoKr.init, factor=8)`.
    - `alpha`: the updates are scaled by `alpha / rank`; defaults to the rank of each.
        Not zero.
    - `use_rslora`: whether they are scaled by `alpha / √rank` instead, with which the
        learning rate does not depend on the rank (Kalajdzievski, arXiv 2312.03732).
    - `targets`: which weights: a target, a list of targets or of pairs `(target,
        spec)`, or a mapping from target to spec. Where several mean a weight, the last
        decides. By default every `eqx.nn.Linear`, `eqx.nn.Conv` and
        `eqx.nn.ConvTranspose`.
    - `dropout`: the part of what an update is given that is dropped in training, in a
        step that has a key: see `with_dropout_key`.
    - `init_a`, `init_b`, `scale`, `dtype`, `stop_gradient`, `allow_materialise`: as for
        `LoraArray`. By default the factor `a` of an `eqx.nn.Embedding` is drawn from a
        standard normal distribution, as PEFT does.
    - `use_dora`: whether the norms of the weights train apart from their directions:
        `DoRA`, with a magnitude for each row of a weight, and for each column of an
        `eqx.nn.Embedding`, as PEFT does. Or a function from a `LoraArray` to a
        `DoRA`, such as `functools.partial(DoRA, per="columns")`.
    - `bias`: which biases train in full where `targets` says nothing of them: `"none"`,
        `"all"`, or `"lora_only"`, those of the layers that are adapted.

    On a mesh what trains of a weight is laid out as the weight's own axes are, and its
    rank is on every device; `Adapt(spec=...)` says otherwise.

    **Returns:** the model with a `LoraArray` in place of each adapted weight, or a
    `DoRA`, or what another form of update makes of it, and a `FullArray` in place of
    each that trains in full.

    **Raises:** `ValueError` or `TypeError` if an argument is not what it should be, or
    is one that the form of the updates has not; if
    nothing, or one of the targets, matched nothing; if a selected weight is missing,
    adapted already, a vector, or not a floating-point array.
    """
    shared = is_shared(model)
    with in_step("loraify", shared) as said:
        if rank is not None:
            check_rank(rank)
        check_alpha(alpha, 1)
        stop_gradient = check_flag("stop_gradient", stop_gradient)
        allow_materialise = check_flag("allow_materialise", allow_materialise)
        use_rslora = check_flag("use_rslora", use_rslora)
        if not isinstance(key, jax.ShapeDtypeStruct):
            check_key(key)
        defaults = Adapt(
            rank,
            alpha,
            init_a,
            init_b,
            scale,
            dtype,
            dropout=check_dropout(dropout),
            use_dora=check_dora(use_dora),
            use_rslora=use_rslora,
        )
        _refuse_default(update, defaults)
        policy = dict(stop_gradient=stop_gradient, allow_materialise=allow_materialise)
        leaves, treedef = jax.tree.flatten(model, is_leaf=is_value)
        chosen = with_biases(select(model, targets), bias)
        plans = {
            i: _plan(leaf, choice.spec, defaults, update, policy)
            for i, (leaf, choice) in enumerate(chosen)
            if choice is not None and isinstance(choice.spec, Adapt)
        }
        if isinstance(key, jax.ShapeDtypeStruct):
            _refuse_concrete(chosen, plans)
        folds = words([leaf.path for leaf, _ in chosen])
        is_update = {i: read_update(plan.update).is_update for i, plan in plans.items()}
        drawn = {i: plan for i, plan in plans.items() if is_update[i]}
        deltas = _draw_all(drawn, folds, key, [leaf.path for leaf, _ in chosen])
        deltas = _shared(plans, deltas, key)
        if shared:
            said |= _said(chosen, plans, deltas, defaults, key)
    if allow_materialise:  # A form's `init` need not know of it.
        deltas = {i: replace(x, allow_materialise=True) for i, x in deltas.items()}
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
        base = jnp.asarray(leaf.value) if concrete else leaf.value
        own = choice.spec.dropout
        rate = defaults.dropout if own is None else own
        if not is_update[i]:
            if rate:
                raise ValueError(_no_update(leaf, plans[i], "dropout", "dropout=0"))
            if _use_dora(choice.spec, defaults):
                raise ValueError(_no_update(leaf, plans[i], "DoRA", "use_dora=False"))
            around = _around(base, plans[i], folds[i], key)
            leaves[i] = beside_base(leaf.path, around, choice.spec.spec)
            continue
        lora = unsummed(
            base,
            deltas[i],
            dropout=rate,
            stop_gradient=stop_gradient,
        )
        if not isinstance(deltas[i], LowRankArray):
            checked(lora)
        out = _with_magnitude(lora, leaf, choice.spec, defaults)
        leaves[i] = beside_base(leaf.path, out, choice.spec.spec)
    return jax.tree.unflatten(treedef, leaves)


def _said(chosen, plans, deltas, defaults: Adapt, key) -> dict[str, str]:
    """What several processes have to agree on."""
    out = described({"key": key})
    for i, (leaf, choice) in enumerate(chosen):
        if choice is None:
            continue
        out[leaf.path] = str(choice.spec)
        if i in plans:
            given = {k: v for k, v in vars(choice.spec).items() if v is not None}
            known = {**vars(defaults), **given, **dict(plans[i].told)}
            plain = bool | int | float | str | PartitionSpec
            known = {k: v for k, v in known.items() if isinstance(v, plain)}
            out[leaf.path] = f"{read_update(plans[i].update).cls.__name__} with {known}"
        if i in deltas:
            out |= described({leaf.path: deltas[i]})
    return out


def _refuse_default(update: Any, defaults: Adapt) -> None:
    given = defaults.of_update
    if defaults.init_b is init.zeros:  # Most likely nobody has said so.
        del given["init_b"]
    read_update(update).refuse(given)


def _plan(leaf: Leaf, spec: Adapt, defaults: Adapt, update: Any, policy) -> _Plan:
    """The spec of a weight, completed: its own, then loraify's, then the layer's."""
    aval = aval_of(leaf.value)
    update = update if spec.update is None else spec.update
    form = read_update(update)
    form.refuse(spec.of_update)
    if not (form.is_update or policy["stop_gradient"] or "stop_gradient" in form.takes):
        raise ValueError(f"The base of {form.cls.__name__} is always frozen.")
    alpha = defaults.alpha if spec.alpha is None else spec.alpha
    dtype = spec.dtype if spec.dtype is not None else defaults.dtype
    rows, cols = leaf.axes
    known: dict[str, Any] = dict(
        init_a=_init_a(spec) or _init_a(defaults) or _layer_init_a(leaf),
        init_b=spec.init_b or defaults.init_b or init.zeros,
        dtype=default_dtype(aval) if dtype is None else check_factor_dtype(dtype),
        rows=spec.rows or rows,
        cols=spec.cols or cols,
        **policy,
    )
    if "rank" in form.takes:
        known["rank"] = check_rank(defaults.rank if spec.rank is None else spec.rank)
    if "alpha" in form.takes:
        known["alpha"] = check_alpha(alpha, known.get("rank", 1))
    if defaults.use_rslora if spec.use_rslora is None else spec.use_rslora:
        if not known.keys() >= {"rank", "alpha"}:
            raise ValueError(
                f"{named(leaf.path)} cannot be scaled by alpha / √rank: "
                f"{form.cls.__name__} has not both. Give `Adapt(use_rslora=False)` for "
                "it, or leave `use_rslora` out."
            )
        known["alpha"] *= math.sqrt(known["rank"])
    inner = jax.tree.leaves(leaf.value)
    return _Plan(
        shape=tuple(aval.shape),
        update=update,
        told=tuple(form.told(known).items()),
        abstract=any(isinstance(x, jax.ShapeDtypeStruct) for x in inner),
    )


def _use_dora(spec: Adapt, defaults: Adapt) -> Any:
    return defaults.use_dora if spec.use_dora is None else spec.use_dora


def _with_magnitude(lora: LoraArray, leaf: Leaf, spec: Adapt, defaults: Adapt) -> Any:
    use = _use_dora(spec, defaults)
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


def _draw_all(
    plans: dict[int, _Plan], words, key, paths: list[str]
) -> dict[int, AbstractDelta]:
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
            try:
                drawn = draw(tuple(groups), key, stacked)
            except (TypeError, ValueError):
                for plan, group in groups.items():
                    _try_to_draw(plan, words[group[0]], key, paths[group[0]])
                raise
            for group, deltas in zip(groups.values(), drawn):
                out.update(zip(group, deltas))
    return out


def _try_to_draw(plan: _Plan, word, key, path: str) -> None:
    """**Raises:** what the form of an update has to say of a weight, with its name."""
    try:
        eqx.filter_eval_shape(_draw, (plan,), key, [word[None]])
    except (TypeError, ValueError) as e:
        if type(e) not in (TypeError, ValueError):
            raise
        raise type(e)(f"{named(path)}: {e}") from e


def _draw(plans: tuple[_Plan, ...], key, words) -> list[list[AbstractDelta]]:
    """For each plan, one update per row of words."""

    def one(plan: _Plan, word):
        form = read_update(plan.update)
        told = form.told({**dict(plan.told), "key": _folded(key, word)})
        return form.init(plan.shape, **told)

    out = []
    for plan, rows in zip(plans, words):
        # A loop, so that a hundred like weights compile as fast as one does; and not a
        # vmap, under which some of JAX's generators would draw other numbers.
        stacked = lax.map(ft.partial(one, plan), jnp.asarray(rows))
        out.append([jax.tree.map(lambda x: x[i], stacked) for i in range(len(rows))])
    return out


_draw_jit = eqx.filter_jit(_draw)


def _folded(key, word):
    for i in range(2):
        key = jr.fold_in(key, word[i])
    return key


def _around(base: Any, plan: _Plan, word, key) -> AdaptedArray:
    """What a form that is no update makes of a weight."""
    form = read_update(plan.update)

    def run(base, key):
        told = form.told({**dict(plan.told), "key": _folded(key, word)})
        return form.init(base, **told)

    out = eqx.filter_eval_shape(run, base, key) if plan.abstract else run(base, key)
    return checked(with_base(out, base))


def _no_update(leaf: Leaf, plan: _Plan, what: str, way_out: str) -> str:
    form = read_update(plan.update).cls.__name__
    return (
        f"{named(leaf.path)} cannot have {what}, which is for what is added to a "
        f"weight, and {form} is not. Give `Adapt({way_out})` for it."
    )


def _shared(plans: dict[int, _Plan], updates: dict[int, AbstractDelta], key):
    """Updates of forms that have parts in common, with these."""
    groups: dict[Any, list[int]] = {}
    for i in updates:
        share = getattr(read_update(plans[i].update).cls, "share", None)
        if share is not None:
            groups.setdefault((share, plans[i].abstract), []).append(i)
    out = dict(updates)
    for (share, abstract), group in groups.items():
        run = ft.partial(eqx.filter_eval_shape, share) if abstract else share
        out.update(zip(group, run([updates[i] for i in group], key)))
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
