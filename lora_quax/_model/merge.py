"""Out of the adapted model: with the updates folded in, or taken out."""

import collections
from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import quax
from jax.core import Tracer
from jaxtyping import PyTree

from .._arrays.base import (
    BASE,
    base_of,
    dense,
    fields_of,
    is_adapted,
    lower,
    lowered_type,
    roles,
    with_base,
)
from .._arrays.check import is_abstract, wider
from .._arrays.lora import add, LoraArray
from .._arrays.scaled import ScaledArray, times
from .paths import dotted, join, named


def merge(model: PyTree, *, donate: bool = False, check_finite: bool = False) -> PyTree:
    """Folds the updates into the weights. The result needs no Quax.

    **Arguments:**

    - `model`: a model with adapted weights, abstract or not.
    - `donate`: whether to free each base, or write over it, as its merged weight is
        made, so that at no time two copies of the model are held. The model passed is
        dead afterwards, and with it the one that `loraify` was given, whose arrays are
        the bases: using one of them is an error. Bases that appear more than once in
        the model are left alone. Has no effect under `jax.jit`.
    - `check_finite`: whether to refuse an update that is not finite. Not under
        `jax.jit`, which cannot know.

    **Returns:** the model with plain arrays, in the dtype of the bases, in place of its
    `LoraArray`s, and the trained values in place of its `FullArray`s. A weight whose
    update is still zero is bit-identical to its base.

    **Raises:** `ValueError` if a leaf is missing, or, with `check_finite`, if a factor
    or a value trained in full is infinite or not a number; nothing is merged then.
    """
    leaves, treedef = _adapted(model)
    if check_finite:
        _refuse_non_finite(leaves)
    seen = collections.Counter(map(id, jax.tree.leaves(model)))

    def merged(x):
        if not is_adapted(lowered_type(x)):
            return lower(x)
        base = base_of(x)
        once = all(seen[id(y)] == 1 for y in jax.tree.leaves(base))
        if donate and once and not is_adapted(base):
            return _run_donating(x, base)
        return _run(x)

    return jax.tree.unflatten(
        treedef, [merged(x) if is_adapted(x) else x for _, x in leaves]
    )


def unload(model: PyTree) -> PyTree:
    """Takes the updates out.

    **Arguments:**

    - `model`: a model with adapted weights, abstract or not.

    **Returns:** the model with the bases, and the originals of what trained in full, as
    they are now: what `lora_quax.loraify` was given, bit for bit, if only what
    `lora_quax.partition` gives was trained. An optimiser that was given all of the
    model has trained biases as well, and may have moved what is frozen:
    `lora_quax.save_adapter(..., base=...)` says whether it has, and what.

    **Raises:** `ValueError` if a leaf is missing, or if a weight is a `LowRankArray`
    alone, which was put there by other means and has no base to go back to.
    """
    leaves, treedef = _adapted(model)
    return jax.tree.unflatten(treedef, [_base(path, x) for path, x in leaves])


def origin(x) -> Any:
    """What an array was before it was adapted; an update alone was nothing."""
    while is_adapted(x) and (base := base_of(x)) is not None:
        x = base
    return x


def _base(path: str, x) -> Any:
    x = origin(x)
    if is_adapted(x):
        raise ValueError(
            f"{named(path)} is a low-rank array with no base, so that nothing would be "
            "left of it. `lora_quax.merge` gives its dense array."
        )
    return x


def refuse_partial(model: PyTree) -> None:
    """**Raises:** `ValueError` if a leaf of an adapted weight is missing."""
    _adapted(model)


def _adapted(model) -> tuple[list[tuple[str, Any]], Any]:
    """The leaves of a model with their paths; an adapted weight is one leaf."""
    found, treedef = jtu.tree_flatten_with_path(model, is_leaf=is_adapted)
    leaves = [(dotted(keys), x) for keys, x in found]
    for path, x in leaves:
        refuse_missing(path, x)
    return leaves, treedef


def refuse_missing(path: str, x) -> None:
    """**Raises:** `ValueError` if a field of an adapted weight has lost its array."""
    for name in _missing(x):
        raise ValueError(
            f"{named(path)} has None for its `{name}`: the model has been partitioned "
            "or filtered. Put the parts together first, with `equinox.combine`."
        )


def _missing(x) -> Iterator[str]:
    """The fields of an adapted weight that hold nothing.

    A value of another library may have optional parts, so of its leaves one is enough.
    """
    if not is_adapted(x):
        return
    for field in fields_of(type(x), static=False):
        value = getattr(x, field.name)
        if is_adapted(value):
            yield from (join(field.name, name) for name in _missing(value))
        elif not jax.tree.leaves(value):
            yield field.name


@jax.custom_jvp
def _sum(base, delta):
    """`base + delta`, and the base, bit for bit, where the update is zero.

    For -0 + 0 is +0. The selection is not differentiated: it would cut off the gradient
    of an update that is still zero.
    """
    return jnp.where(delta == 0, base, add(base, delta))


@_sum.defjvp
def _(primals, tangents):
    return _sum(*primals), add(*tangents)


def _merged(x):
    """The dense array, in which a zero update leaves no trace."""
    x = lower(x)
    if isinstance(x, LoraArray):
        return _sum(_merged(x.frozen_base()), x.delta.lower().product())
    if isinstance(x, ScaledArray):  # Rounded once, to the type of the base.
        wide = wider(x.dtype, x.scale.dtype)
        base = quax.quaxify(lambda y: y.astype(wide))(x.frozen_base())
        return times(_merged(base), x.scale).astype(x.dtype)
    return dense(x)


_merged_jit = eqx.filter_jit(_merged)


@eqx.filter_jit(donate="all-except-first")
def _merged_donating(x, base):
    return _merged(with_base(x, base))


def _run(x):
    if is_abstract(x):
        return eqx.filter_eval_shape(_merged, x)
    return _merged_jit(x)


def _run_donating(x, base):
    leaves = jax.tree.leaves(base)
    if not all(isinstance(y, jax.Array) for y in leaves) or any(
        isinstance(y, Tracer) for y in leaves
    ):
        return _run(x)
    if isinstance(base, quax.Value):
        # Of another type than the merged weight, so it can be freed but not reused.
        out = _merged_jit(x)
        for y in leaves:
            y.delete()
        return out
    return _merged_donating(with_base(x, None), base)


@eqx.filter_jit
def _is_finite(arrays):
    return [
        jnp.array([jnp.isfinite(y).all() for y in jax.tree.leaves(x)]).all()
        for x in arrays
    ]


def _refuse_non_finite(leaves) -> None:
    adapted = [(path, x) for path, x in leaves if is_adapted(x)]
    finite = jax.device_get(_is_finite([_learnt(x) for _, x in adapted]))
    bad = [named(path) for (path, _), ok in zip(adapted, finite) if not ok]
    if bad:
        raise ValueError(
            "Not merged, because the updates of these weights have infinities or NaNs: "
            f"{', '.join(bad)}."
        )


def _learnt(x) -> list[Any]:
    """What training has put into an adapted weight."""
    return jax.tree.leaves(eqx.filter(x, jax.tree.map(lambda r: r != BASE, roles(x))))
