"""From a model to a model whose weights have low-rank updates."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import PRNGKeyArray, PyTree

from .. import init
from .._arrays.base import AbstractDelta, checked, make, replace
from .._arrays.check import (
    check_alpha,
    check_dropout,
    check_flag,
    check_key,
    check_rank,
)
from .._arrays.full import FullArray
from .._arrays.lora import LoraArray, unsummed
from .._arrays.low_rank import LowRankArray
from .._forms.dora import DoRA
from ..init import Initialiser
from .draw import around, draw, is_embedding, Plan, plan_of
from .habits import answers_peft
from .paths import is_value, Leaf, named, words
from .placed import beside_base
from .select import select, with_biases
from .targets import Adapt, check_dora, Targets
from .together import described, in_step, is_shared
from .updates import read_update


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
            use_rslora=check_flag("use_rslora", use_rslora),
        )
        _refuse_default(update, defaults)
        policy = dict(stop_gradient=stop_gradient, allow_materialise=allow_materialise)
        leaves, treedef = jax.tree.flatten(model, is_leaf=is_value)
        chosen = with_biases(select(model, targets), bias)
        plans = {
            i: plan_of(leaf, choice.spec, defaults, update, policy)
            for i, (leaf, choice) in enumerate(chosen)
            if choice is not None and isinstance(choice.spec, Adapt)
        }
        paths = [leaf.path for leaf, _ in chosen]
        folds = words(paths)
        deltas = draw(plans, folds, key, paths)
        if shared:
            said |= _said(chosen, plans, deltas, defaults, key)
    if allow_materialise:  # A form's `init` need not know of it.
        deltas = {i: replace(x, allow_materialise=True) for i, x in deltas.items()}
    for i, (leaf, choice) in enumerate(chosen):
        if choice is None or choice.spec == "freeze":
            continue
        _warn_of_wrapper(leaf)
        if choice.spec == "full":
            leaves[i] = _in_full(leaf.value)
            continue
        spec = _completed(choice.spec, defaults)
        if i in deltas:
            out = _lora(leaf, deltas[i], spec, stop_gradient)
        else:
            _refuse_of_update(leaf, plans[i], spec)
            out = around(_base(leaf), plans[i], folds[i], key)
        leaves[i] = beside_base(leaf.path, out, spec.spec)
    return jax.tree.unflatten(treedef, leaves)


def _completed(spec: Adapt, defaults: Adapt) -> Adapt:
    """A spec with the dropout and the DoRA of `loraify`, where it says neither."""
    return dataclasses.replace(
        spec,
        dropout=defaults.dropout if spec.dropout is None else spec.dropout,
        use_dora=defaults.use_dora if spec.use_dora is None else spec.use_dora,
    )


def _base(leaf: Leaf) -> Any:
    concrete = isinstance(leaf.value, np.ndarray)
    return jnp.asarray(leaf.value) if concrete else leaf.value


def _in_full(value: Any) -> FullArray:
    if isinstance(value, jax.ShapeDtypeStruct):
        return make(FullArray, base=value, value=value)
    return FullArray(value)


def _lora(leaf: Leaf, delta: AbstractDelta, spec: Adapt, stop_gradient: bool) -> Any:
    """A weight and its update, and a magnitude if there is to be one."""
    lora = unsummed(
        _base(leaf), delta, dropout=spec.dropout, stop_gradient=stop_gradient
    )
    if not isinstance(delta, LowRankArray):
        checked(lora)
    return _with_magnitude(lora, leaf, spec.use_dora)


def _refuse_of_update(leaf: Leaf, plan: Plan, spec: Adapt) -> None:
    """**Raises:** `ValueError` for what is of updates, beside a form that is none."""
    of_updates = [
        ("dropout", spec.dropout, "dropout=0"),
        ("DoRA", spec.use_dora, "use_dora=False"),
    ]
    form = read_update(plan.update).cls.__name__
    for what, given, way_out in of_updates:
        if given:
            raise ValueError(
                f"{named(leaf.path)} cannot have {what}, which is for what is added to "
                f"a weight, and {form} is not. Give `Adapt({way_out})` for it."
            )


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


def _with_magnitude(lora: LoraArray, leaf: Leaf, use: Any) -> Any:
    if use is True:
        return DoRA(lora, per="columns" if is_embedding(leaf) else "rows")
    if not use:
        return lora
    out = use(lora)
    if not isinstance(out, DoRA):
        raise TypeError(f"`use_dora` must give a `DoRA`, and {use!r} gave {out!r:.80}.")
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
