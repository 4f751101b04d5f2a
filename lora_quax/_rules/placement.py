"""Operations that leave every value as it is: they act on each part of an array alike.

A sharding is that of the dense array. Each factor takes the entries of the axes that it
holds, and its rank axis is replicated.
"""

import jax
import jax.tree_util as jtu
import quax
from jax import lax
from jax.extend.core.primitives import (
    copy_p,
    device_put_p,
    name_p,
    sharding_constraint_p,
    stop_gradient_p,
)
from jax.sharding import NamedSharding, PartitionSpec

from .._arrays.array import FactoredArray, LoraArray, LowRankArray
from .._compat import pvary_p, reshard_p
from .register import variadic


def _on_each_part(primitive):
    @quax.register(primitive)
    def _(w: FactoredArray, **params):
        return jtu.tree_map(lambda x: primitive.bind(x, **params), w)


for _primitive in (copy_p, name_p, stop_gradient_p, pvary_p):
    _on_each_part(_primitive)


def factor_specs(w: LowRankArray, spec) -> LowRankArray:
    """The partition specs of the factors of an array that is partitioned by `spec`."""
    entries = [*spec, *(None,) * (w.ndim - len(spec))]
    a_labels, b_labels, _ = w.labels
    a, b = (
        PartitionSpec(*(None if i == "rank" else entries[i] for i in labels))
        for labels in (a_labels, b_labels)
    )
    return w.replace(a=a, b=b)


def _place(w: FactoredArray, sharding, bind):
    """`bind(part, sharding)` for the base, and for each factor with its sharding."""
    if isinstance(w, LoraArray):
        base = quax.quaxify(bind)(w.base, sharding)
        return w.replace(base=base, delta=_place(w.delta, sharding, bind))
    assert isinstance(w, LowRankArray)
    if not isinstance(sharding, NamedSharding):
        return w.replace(a=bind(w.a, sharding), b=bind(w.b, sharding))
    specs = factor_specs(w, sharding.spec)

    def by(spec):
        return NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)

    a, b = bind(w.a, by(specs.a)), bind(w.b, by(specs.b))
    return w.replace(a=a, b=b)


@quax.register(sharding_constraint_p)
def _(w: FactoredArray, *, sharding, **params):
    del params  # A context mesh and what it leaves open; the sharding names all else.
    return _place(w, sharding, lax.with_sharding_constraint)


@quax.register(reshard_p)
def _(w: FactoredArray, *, dst_sharding, **params):
    del params  # The mesh, which the sharding names too.
    return _place(w, dst_sharding, jax.reshard)


@variadic(device_put_p)
def device_put(*operands, devices, srcs, copy_semantics):
    out = []
    for x, *of_x in zip(operands, devices, srcs, copy_semantics):

        def bind(x, device, src=of_x[1], semantics=of_x[2]):
            params = dict(devices=(device,), srcs=(src,), copy_semantics=(semantics,))
            return device_put_p.bind(x, **params)[0]

        factored = isinstance(x, FactoredArray)
        out.append(_place(x, of_x[0], bind) if factored else bind(x, of_x[0]))
    return out
