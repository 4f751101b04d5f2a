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
from jax.sharding import NamedSharding

from .._arrays.base import lower_all
from .._arrays.dropout import DropoutArray
from .._arrays.lora import LoraArray
from .._arrays.low_rank import LowRankArray
from .._arrays.quantised import QuantisedArray
from .._arrays.scaled import ScaledArray
from .._compat import pvary_p, reshard_p
from .leaves import leaf_shardings
from .register import variadic


OfParts = LowRankArray | LoraArray | ScaledArray | QuantisedArray
# Those that are placed leaf by leaf.
Placed = OfParts | DropoutArray


def _on_each_part(primitive):
    @quax.register(primitive)
    def _(w: OfParts, **params):
        return jtu.tree_map(lambda x: primitive.bind(x, **params), w)


for _primitive in (copy_p, name_p, stop_gradient_p, pvary_p):
    _on_each_part(_primitive)


def _place(w, sharding, bind):
    """`bind(leaf, its sharding)` for each leaf."""
    w = lower_all(w)
    leaves, treedef = jtu.tree_flatten(w)
    named = isinstance(sharding, NamedSharding)
    shardings = leaf_shardings(w, sharding) if named else [sharding] * len(leaves)
    return jtu.tree_unflatten(treedef, map(bind, leaves, shardings))


@quax.register(sharding_constraint_p)
def _(w: Placed, *, sharding, **params):
    del params  # A context mesh and what it leaves open; the sharding names all else.
    return _place(w, sharding, lax.with_sharding_constraint)


@quax.register(reshard_p)
def _(w: Placed, *, dst_sharding, **params):
    del params  # The mesh, which the sharding names too.
    return _place(w, dst_sharding, jax.reshard)


@variadic(device_put_p)
def device_put(*operands, devices, srcs, copy_semantics):
    out = []
    for x, *of_x in zip(operands, devices, srcs, copy_semantics):

        def bind(x, device, src=of_x[1], semantics=of_x[2]):
            params = dict(devices=(device,), srcs=(src,), copy_semantics=(semantics,))
            return device_put_p.bind(x, **params)[0]

        ours = isinstance(x, Placed)
        out.append(_place(x, of_x[0], bind) if ours else bind(x, of_x[0]))
    return out
