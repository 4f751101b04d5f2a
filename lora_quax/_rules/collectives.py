"""Collectives of a weight, inside `shard_map`.

They act on the base as they would on the weight. Each device has factors of its own; of
one without the axis that is sharded, all have the same.
"""

import functools

from jax import lax
from jax.extend.core.primitives import all_gather_p, ppermute_p, psum_p

from .._arrays.base import replace
from .._arrays.low_rank import LowRankArray
from .._compat import psum_invariant_p, varying_axes
from .layout import on_factors
from .register import linear, NotLazy


@linear(all_gather_p)
def all_gather(w: LowRankArray, *, all_gather_dimension, tiled, **params):
    """Inside `shard_map`: of the factors, those that hold the axis are gathered."""
    if not tiled:
        raise NotLazy("an untiled `all_gather` adds an axis")
    marks = [i == all_gather_dimension for i in range(w.ndim)]

    def fn(factor, marks):
        at = dict(all_gather_dimension=marks.index(True), tiled=True)
        return all_gather_p.bind(factor, **at, **params)

    return on_factors(w, {all_gather_dimension}, fn, (marks, False))


@linear(ppermute_p)
def ppermute(w: LowRankArray, *, axis_name, **params):
    """A device sends what it has of its own. Who is sent nothing has zero, and zero
    times the factor that all have."""

    def send(factor):
        return ppermute_p.bind(factor, axis_name=axis_name, **params)

    names = {axis_name} if isinstance(axis_name, str) else set(axis_name)
    a_varies, b_varies = (varying_axes(x) & names for x in (w.a, w.b))
    if a_varies and not b_varies:
        return replace(w, a=send(w.a))
    if b_varies and not a_varies:
        return replace(w, b=send(w.b))
    return replace(w, a=send(w.a), b=send(w.b))


def _check_names(axes) -> None:
    if any(isinstance(axis, int) for axis in axes):
        raise NotLazy("it sums over axes of the array, of which `vmap` made it")


@linear(psum_invariant_p)
def psum_invariant(w: LowRankArray, *, axes):
    """Of a factor that is the same everywhere, the sum is with that of the other."""
    _check_names(axes)
    a_varies, b_varies = (varying_axes(x) & set(axes) for x in (w.a, w.b))
    if a_varies and b_varies:
        raise NotLazy("both factors differ from device to device")
    if a_varies:
        return replace(w, a=psum_invariant_p.bind(w.a, axes=axes))
    if b_varies:
        return replace(w, b=psum_invariant_p.bind(w.b, axes=axes))
    return replace(w, b=w.b * lax.axis_size(axes))


@linear(psum_p)
def psum(w: LowRankArray, *, axes, axis_index_groups):
    """Where nothing says which factor is the same everywhere: `Σ_d b_d · a_d` is one
    product, of the factors of all devices side by side along the rank."""
    _check_names(axes)
    gather = functools.partial(
        lax.all_gather, axis_name=axes, axis_index_groups=axis_index_groups, tiled=True
    )
    a, b = gather(w.a, axis=w.n_batch), gather(w.b, axis=w.b.ndim - 1)
    return replace(w, a=a, b=b, rank=b.shape[-1], alpha=w.scaling * b.shape[-1])
