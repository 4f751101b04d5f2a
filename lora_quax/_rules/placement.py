"""Operations that leave every value as it is: they act on each part of an array alike.

A sharding is that of the dense array. Each factor takes the entries of the axes that it
holds, and its rank axis is replicated.
"""

import jax
import jax.tree_util as jtu
import quax
from jax import lax
from jax.extend.core.primitives import (
    all_gather_p,
    copy_p,
    device_put_p,
    name_p,
    sharding_constraint_p,
    stop_gradient_p,
)
from jax.sharding import NamedSharding, PartitionSpec

from .._arrays.base import lower_all, replace
from .._arrays.lora import LoraArray
from .._arrays.low_rank import LowRankArray
from .._arrays.scaled import ScaledArray
from .._compat import pvary_p, reshard_p
from .layout import on_factors
from .register import linear, NotLazy, variadic


Lowered = LowRankArray | LoraArray | ScaledArray


def _on_each_part(primitive):
    @quax.register(primitive)
    def _(w: Lowered, **params):
        return jtu.tree_map(lambda x: primitive.bind(x, **params), w)


for _primitive in (copy_p, name_p, stop_gradient_p, pvary_p):
    _on_each_part(_primitive)


@variadic(lax.optimization_barrier_p)
def optimization_barrier(*operands):
    parts, treedef = jtu.tree_flatten(operands)
    return jtu.tree_unflatten(treedef, lax.optimization_barrier_p.bind(*parts))


def leaf_specs(w, spec):
    """The partition spec of each leaf of an array that is partitioned by `spec`.

    The leaves are those of `lower_all(w)`. A leaf takes the entries of the axes that it
    holds.
    """
    entries = [*spec, *(None,) * (w.ndim - len(spec))]
    if isinstance(w, LoraArray):
        base, delta = leaf_specs(w.base, spec), leaf_specs(w.delta, spec)
        return replace(w, base=base, delta=delta)
    if isinstance(w, ScaledArray):
        scale = [e if n != 1 else None for e, n in zip(entries, w.scale.shape)]
        base = leaf_specs(w.base, spec)
        return replace(w, base=base, scale=PartitionSpec(*scale))
    if isinstance(w, LowRankArray):
        a_labels, b_labels, _ = w.labels
        a, b = (
            PartitionSpec(*(None if i == "rank" else entries[i] for i in labels))
            for labels in (a_labels, b_labels)
        )
        return replace(w, a=a, b=b)
    if not isinstance(w, quax.Value):
        return PartitionSpec(*spec)
    return jtu.tree_map(lambda x: _foreign_spec(w, x, entries), w)


def _foreign_spec(w, leaf, entries):
    """Of a leaf of a value that is not ours: a quantised weight and its scales, say."""
    if leaf.ndim == 0:
        return PartitionSpec()
    if leaf.ndim != w.ndim:
        raise TypeError(
            f"A {type(w).__name__} of shape {w.shape} has a leaf of shape "
            f"{leaf.shape}, and it is not known which of its axes are partitioned by "
            f"{entries}."
        )
    return PartitionSpec(*(e if n != 1 else None for e, n in zip(entries, leaf.shape)))


def _place(w, sharding, bind):
    """`bind(leaf, its sharding)` for each leaf."""
    w = lower_all(w)
    if not isinstance(sharding, NamedSharding):
        return jtu.tree_map(lambda x: bind(x, sharding), w)

    def place(leaf, spec):
        of_leaf = NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)
        return bind(leaf, of_leaf)

    return jtu.tree_map(place, w, leaf_specs(w, sharding.spec))


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


@quax.register(sharding_constraint_p)
def _(w: Lowered, *, sharding, **params):
    del params  # A context mesh and what it leaves open; the sharding names all else.
    return _place(w, sharding, lax.with_sharding_constraint)


@quax.register(reshard_p)
def _(w: Lowered, *, dst_sharding, **params):
    del params  # The mesh, which the sharding names too.
    return _place(w, dst_sharding, jax.reshard)


@variadic(device_put_p)
def device_put(*operands, devices, srcs, copy_semantics):
    out = []
    for x, *of_x in zip(operands, devices, srcs, copy_semantics):

        def bind(x, device, src=of_x[1], semantics=of_x[2]):
            params = dict(devices=(device,), srcs=(src,), copy_semantics=(semantics,))
            return device_put_p.bind(x, **params)[0]

        ours = isinstance(x, Lowered)
        out.append(_place(x, of_x[0], bind) if ours else bind(x, of_x[0]))
    return out
