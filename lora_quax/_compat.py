"""Everything that differs between JAX versions, or that JAX keeps to itself.

Each entry says which version changed what. Some primitives (`split_p`, `stack_p`,
`tile_p`, `optimization_barrier_p`) are in `jax.lax`, but not, as of JAX 0.12, listed in
`jax.extend.core.primitives`; the rules take them from there.
"""

from typing import Any

import jax

# Core JAX that Quax's own trace is built from, and of which `jax.extend` has no part.
# `jaxpr_as_fun` evaluates a jaxpr with its constants; `mapped_aval` is the type of one
# slice along an axis.
from jax._src import core as core

# In no public module at all, as of JAX 0.12. `auto_insert_reshard` is what
# `lax.dot_general` does first, inside `shard_map`: it makes its operands vary over the
# same mesh axes.
from jax._src.core import (
    auto_insert_reshard as auto_insert_reshard,
    pvary_p as pvary_p,
)
from jax._src.hijax import call_hi_primitive_p as call_hi_primitive_p
from jax._src.interpreters.partial_eval import (
    convert_constvars_jaxpr as _convert_constvars_jaxpr,
)
from jax._src.lax.lax import ragged_dot_general_p as ragged_dot_general_p
from jax._src.lax.parallel import psum_invariant_p as psum_invariant_p
from jax._src.pjit import reshard_p as reshard_p
from jax.core import ShapedArray
from jax.interpreters import xla
from jax.sharding import PartitionSpec


if jax.__version_info__ >= (0, 11):
    from jax._src.flattree import flatten as flat_tree
else:
    from jax._src import tree_util as _tree_util

    flat_tree = getattr(_tree_util, "FlatTree").flatten


def on_binding(kind: type, handler) -> None:
    """Has `handler(x)` run when a primitive is given an `x` of a type that JAX does not
    know. What it raises is what the user sees, unless it is a `TypeError`."""
    handlers = getattr(xla, "canonicalize_dtype_handlers", None)
    if handlers is not None:  # Without them JAX says in its own words what is wrong.
        handlers[kind] = handler


# One that does what a jaxpr says came with JAX 0.12.
eval_jaxpr_p: Any = getattr(core, "eval_jaxpr_p", None)


# Whether a barrier may stand behind a batched product. XLA of JAX 0.10 aborts where it
# wants the result of one laid out otherwise.
HOLDS_BATCHES = jax.__version_info__ >= (0, 11)


def partition_spec(x) -> tuple:
    """How the type of an array says it is sharded; on a mesh that is not explicit, and
    for an abstract stand-in, not at all."""
    if isinstance(x, jax.Array | ShapedArray):
        return tuple(_type(x).sharding.spec)
    return (None,) * len(x.shape)


def _type(x) -> ShapedArray:
    return x if isinstance(x, ShapedArray) else jax.typeof(x)  # pyright: ignore


def spec_axes(spec) -> set:
    """The mesh axes that a partition spec names."""
    names = [entry if isinstance(entry, tuple) else (entry,) for entry in spec]
    return {name for entry in names for name in entry if name is not None}


def varying_axes(x) -> frozenset:
    """The manual mesh axes over which an array differs from device to device."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def shaped_array(shape, dtype, spec, *like) -> ShapedArray:
    """An abstract value on the mesh of `like`, with the partition spec `spec`.

    It varies over the manual mesh axes that one of `like` varies over. How a
    `ShapedArray` is told of these is undocumented, and changed its name from `vma` to
    `manual_axis_type` in JAX 0.10; so the type is derived from one that knows.
    """
    types = [_type(x) for x in like if isinstance(x, jax.Array | ShapedArray)]
    if all(t.sharding.mesh.empty for t in types):
        return ShapedArray(shape, dtype)
    widest = max(types, key=lambda t: len(t.manual_axis_type.varying))
    sharding = widest.sharding.update(spec=PartitionSpec(*spec))
    return widest.update(shape=shape, dtype=dtype, weak_type=False, sharding=sharding)


def as_closed(jaxpr):
    """A jaxpr without constants, closed, as a higher primitive holds it."""
    if hasattr(jaxpr, "consts"):
        return jaxpr
    return core.ClosedJaxpr(jaxpr, ())  # pyright: ignore[reportAttributeAccessIssue]


def as_function(jaxpr):
    """The function of a jaxpr.

    `remat_p` holds an open `Jaxpr` and other primitives a `ClosedJaxpr`. JAX 0.12
    merged the two, and every jaxpr is closed.
    """
    return core.jaxpr_as_fun(as_closed(jaxpr))


def detach_consts(closed):
    """A closed jaxpr as one without constants, open before JAX 0.12; and the constants,
    which are its first arguments."""
    is_merged = closed.jaxpr is closed
    jaxpr = _convert_constvars_jaxpr(closed if is_merged else closed.jaxpr)
    return jaxpr, list(closed.consts)


def cotangents(out) -> list:
    """Those that the rule of a `custom_vjp` function returns, one for each operand.

    JAX 0.12 lets it write a log of the backward pass beside them.
    """
    if isinstance(out, tuple) and len(out) == 2 and isinstance(out[0], list):
        out, logs = out
        if logs is not None:
            raise NotImplementedError(
                "A rule with `defvjp_with_logs` is not carried through Quax's trace."
            )
    return list(out)
