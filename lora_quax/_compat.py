"""Everything that differs between JAX versions, or that JAX keeps out of its public API.

Each entry says which version changed what.
"""

import jax
from jax.sharding import PartitionSpec


def shaped_array(shape, dtype, *like) -> jax.core.ShapedArray:
    """An abstract value, which varies over the manual mesh axes that one of `like` does.

    How `ShapedArray` is told of these axes is undocumented, and changed its name from
    `vma` to `manual_axis_type` in JAX 0.10; so the type is derived from one that knows.
    """
    types = [jax.typeof(x) for x in like if isinstance(x, jax.Array)]
    varying = [t for t in types if t.manual_axis_type.varying]
    if not varying:
        return jax.core.ShapedArray(shape, dtype)
    widest = max(varying, key=lambda t: len(t.manual_axis_type.varying))
    sharding = widest.sharding.update(spec=PartitionSpec(*(None for _ in shape)))
    return widest.update(shape=shape, dtype=dtype, weak_type=False, sharding=sharding)


# In `jax.lax` under these names, but not listed in `jax.extend.core.primitives`, as of
# JAX 0.12: split_p, stack_p, tile_p, optimization_barrier_p. The rules take them there.
#
# In no public module at all, as of JAX 0.12. `auto_insert_reshard` is what `lax.dot_general`
# does first, inside `shard_map`: it makes its operands vary over the same mesh axes.
from jax._src.core import auto_insert_reshard as auto_insert_reshard  # noqa: E402
from jax._src.core import pvary_p as pvary_p  # noqa: E402
from jax._src.lax.lax import (  # noqa: E402
    ragged_dot_general_p as ragged_dot_general_p,
)

# Core JAX that Quax's own trace is built from, and of which `jax.extend` has no part.
# `eval_jaxpr` of a jaxpr with its constants; the type of one slice along the first axis.
from jax._src import core as core  # noqa: E402
from jax._src.interpreters.partial_eval import (  # noqa: E402
    convert_constvars_jaxpr as _convert_constvars_jaxpr,
)


def as_function(jaxpr):
    """The function of a jaxpr.

    `remat_p` holds an open `Jaxpr` and other primitives a `ClosedJaxpr`. JAX 0.12 merged
    the two, and every jaxpr is closed.
    """
    closed = hasattr(jaxpr, "consts")
    return core.jaxpr_as_fun(jaxpr if closed else core.ClosedJaxpr(jaxpr, ()))


def detach_consts(closed):
    """A closed jaxpr as one without constants, open before JAX 0.12; and the constants,
    which are its first arguments."""
    is_merged = closed.jaxpr is closed
    jaxpr = _convert_constvars_jaxpr(closed if is_merged else closed.jaxpr)
    return jaxpr, list(closed.consts)
