"""Of one kind: what the branches of a `cond`, or the steps of a loop, have to return.

JAX wants leaves of the same structure and types from each. Two arrays that differ may
both become a third: a plain array is a `LoraArray` of update zero, a smaller rank is
filled up with zeros, a narrower dtype is widened, and which axes are rows may change.
What can't become one kind becomes a plain array, if that is allowed.

A kind is written as an array that has types for leaves.
"""

import functools as ft
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from .._arrays.base import lower_all, make, replace
from .._arrays.check import wider
from .._arrays.dropout import DropoutArray
from .._arrays.lora import LoraArray, unsummed
from .._arrays.low_rank import LowRankArray
from .._arrays.scaled import ScaledArray
from .layout import groups, in_groups
from .register import NotLazy, with_zero_base
from .traced import alike, own_plain


_WHAT = "one kind of array for all"


def kind_of(x) -> Any:
    def type_of_leaf(leaf):
        # A literal of a jaxpr has a dtype, and no shape.
        known = leaf if hasattr(leaf, "shape") else jax.typeof(leaf)
        return jax.ShapeDtypeStruct(known.shape, known.dtype)

    return jtu.tree_map(type_of_leaf, x)


def common_kind(arrays: Sequence, aval) -> Any:
    """What all of the arrays can become; at worst a plain array, of type `aval`."""
    first, *rest = arrays = [kind_of(x) for x in arrays]
    if all(alike(first, x) for x in rest):
        return first
    kind = ft.reduce(_common, [kind_of(_lowered(x)) for x in arrays])
    return kind_of(aval) if kind is None else kind


def _lowered(kind) -> Any:
    """The kind of what an array of this kind lowers to."""
    return jax.eval_shape(lower_all, kind)


def become(x, kind, operation, why: str):
    """`x` as what `common_kind` found, which it can become."""
    if alike(x, kind):
        return x
    x = lower_all(x)
    if isinstance(x, DropoutArray):
        if isinstance(kind, DropoutArray):
            return replace(kind, w=become(x.w, kind.w, operation, why), key=x.key)
        x = x.w
    if isinstance(kind, ScaledArray) and isinstance(x, ScaledArray):
        base = become(x.frozen_base(), kind.base, operation, why)
        return replace(kind, base=base, scale=x.scale.astype(kind.scale.dtype))
    if isinstance(kind, LoraArray) and not isinstance(x, ScaledArray):
        x = _as_sum(x, kind)
        base = become(x.frozen_base(), kind.base, operation, why)
        return replace(kind, base=base, delta=_fit(x.delta, kind.delta))
    if isinstance(kind, LowRankArray) and isinstance(x, LowRankArray):
        return _fit(x, kind)
    return own_plain(x, operation, why)


def _common(x, y) -> Any:
    """A kind for both, or None, if there is none.

    A plain array may well stand beside a weight: in a gradient it does for a weight
    that one branch saves and the other does not.
    """
    if x is None:
        return None
    if isinstance(x, DropoutArray) and isinstance(y, DropoutArray):
        w = _common(x.w, y.w)
        alike_in_keys = (x.rate, x.key.shape) == (y.rate, y.key.shape)
        return replace(x, w=w) if alike_in_keys and isinstance(w, LoraArray) else w
    # What has dropout on one side alone has none.
    x, y = (z.w if isinstance(z, DropoutArray) else z for z in (x, y))
    if isinstance(x, LowRankArray) and isinstance(y, LowRankArray):
        return _common_factors(x, y)
    if isinstance(x, ScaledArray) and isinstance(y, ScaledArray):
        return _common_scaled(x, y)
    like = next((z for z in (x, y) if isinstance(z, LoraArray | LowRankArray)), None)
    if like is None or isinstance(x, ScaledArray) or isinstance(y, ScaledArray):
        return x if alike(x, y) else None
    x, y = (jax.eval_shape(lambda z=z: _as_sum(_zeros(z), like)) for z in (x, y))
    base, delta = _common(x.base, y.base), _common_factors(x.delta, y.delta)
    if base is None or delta is None:
        return None
    return unsummed(
        base,
        delta,
        stop_gradient=x.stop_gradient and y.stop_gradient,
        stopped=True,
    )


def _common_scaled(x: ScaledArray, y: ScaledArray) -> ScaledArray | None:
    base = _common(x.base, y.base)
    if base is None or x.scale.shape != y.scale.shape:
        return None
    dtype = wider(x.scale.dtype, y.scale.dtype)
    return make(
        ScaledArray,
        base=base,
        scale=jax.ShapeDtypeStruct(x.scale.shape, dtype),
        stop_gradient=x.stop_gradient and y.stop_gradient,
        stopped=True,
        allow_materialise=x.allow_materialise and y.allow_materialise,
    )


def _as_sum(x, like) -> LoraArray:
    """Any array as the sum of a base and an update; of a plain one that is zero."""
    if isinstance(x, LoraArray):
        return x
    if isinstance(x, LowRankArray):
        return with_zero_base(x)
    delta = getattr(like, "delta", like)
    return unsummed(x, _zeros(delta), stopped=True)


def _zeros(x):
    return jtu.tree_map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), kind_of(x))


def _common_factors(x: LowRankArray, y: LowRankArray) -> LowRankArray | None:
    for target in (groups(x), groups(y)):
        regrouped = lambda w, target=target: in_groups(_zeros(w), target, _WHAT)
        try:
            u, v = (jax.eval_shape(ft.partial(regrouped, w)) for w in (x, y))
        except NotLazy:
            continue
        rank, n = max(u.rank, v.rank), u.n_batch
        same_scaling = (u.rank, u.alpha) == (v.rank, v.alpha)
        a_shape = (*u.a.shape[:n], rank, *u.a.shape[n + 1 :])
        b_shape = (*u.b.shape[:-1], rank)
        return replace(
            u,
            a=jax.ShapeDtypeStruct(a_shape, wider(u.a.dtype, v.a.dtype)),
            b=jax.ShapeDtypeStruct(b_shape, wider(u.b.dtype, v.b.dtype)),
            rank=rank,
            alpha=u.alpha if same_scaling else float(rank),
            allow_materialise=u.allow_materialise and v.allow_materialise,
        )
    return None


def _fit(delta: LowRankArray, kind: LowRankArray) -> LowRankArray:
    """The factors in the groups, of the rank, of the scaling and dtypes of `kind`."""
    delta = in_groups(delta, groups(kind), _WHAT)
    a, b = delta.a.astype(kind.a.dtype), delta.b.astype(kind.b.dtype)
    if delta.scaling != kind.scaling:
        b = b * jnp.asarray(delta.scaling / kind.scaling, b.dtype)
    if missing := kind.rank - delta.rank:
        n, last = delta.n_batch, b.ndim - 1
        a = jnp.pad(a, [(0, missing if i == n else 0) for i in range(a.ndim)])
        b = jnp.pad(b, [(0, missing if i == last else 0) for i in range(b.ndim)])
    return replace(kind, a=a, b=b)
