"""Calls that run what is inside them once: `jax.jit`, `jax.checkpoint`; and a barrier,
which is a call of nothing."""

import jax.tree_util as jtu
from jax import lax
from jax.extend.core.primitives import jit_p, remat_p
from jax.sharding import NamedSharding
from quax._compat import is_early_inline
from quax._primitives import jit_quax

from .._compat import detach_consts
from .kinds import kind_of
from .leaves import leaf_shardings
from .traced import call, call_rule, is_value, run_call, trace_on


@call_rule(jit_p, jit_quax)
def jit(
    *args,
    jaxpr,
    inline,
    in_shardings,
    out_shardings,
    in_layouts,
    out_layouts,
    donated_invars,
    **params,
):
    """Compiled on its own, as it would be. Quax drops shardings and donations.

    What is said of an operand, or of a result, is said of each of its leaves; but a
    layout in memory, which would be the whole array's, of none.
    """
    if is_early_inline(inline):
        return call(jaxpr, args)
    new_jaxpr, out = trace_on(run_call, (args,), jaxpr)
    kinds = list(map(kind_of, out))
    leaves = jit_p.bind(
        *jtu.tree_leaves(args),
        jaxpr=new_jaxpr,
        inline=inline,
        in_shardings=_per_leaf(args, in_shardings, _sharding_of_leaves),
        out_shardings=_per_leaf(kinds, out_shardings, _sharding_of_leaves),
        in_layouts=_per_leaf(args, in_layouts, _layout_of_leaves),
        out_layouts=_per_leaf(out, out_layouts, _layout_of_leaves),
        donated_invars=_per_leaf(args, donated_invars, _same_for_leaves),
        **params,
    )
    return jtu.tree_unflatten(jtu.tree_structure(out), leaves)


def _per_leaf(values, entries, of_leaves) -> tuple:
    """An entry for each value, as an entry for each of their leaves."""
    return tuple(e for x, entry in zip(values, entries) for e in of_leaves(x, entry))


def _same_for_leaves(x, entry) -> list:
    return [entry for _ in jtu.tree_leaves(x)]


def _sharding_of_leaves(x, sharding) -> list:
    if not isinstance(sharding, NamedSharding):  # One device, or none was named.
        return _same_for_leaves(x, sharding)
    return leaf_shardings(x, sharding)


def _layout_of_leaves(x, layout) -> list:
    leaves = jtu.tree_leaves(x)
    return [None for _ in leaves] if is_value(x) else [layout]


@call_rule(remat_p)
def remat(*args, jaxpr, prevent_cse, **params):
    """Without this a checkpointed function sees the dense weight."""
    closed, out = trace_on(run_call, (args,), jaxpr)
    new_jaxpr, consts = detach_consts(closed)
    if isinstance(prevent_cse, tuple):  # One flag per operand; now one per leaf.
        per_leaf = _per_leaf(args, prevent_cse, _same_for_leaves)
        prevent_cse = (*(False for _ in consts), *per_leaf)
    leaves = remat_p.bind(
        *consts,
        *jtu.tree_leaves(args),
        jaxpr=new_jaxpr,
        prevent_cse=prevent_cse,
        **params,
    )
    return jtu.tree_unflatten(jtu.tree_structure(out), leaves)


@call_rule(lax.optimization_barrier_p)
def optimization_barrier(*operands):
    leaves, treedef = jtu.tree_flatten(operands)
    return jtu.tree_unflatten(treedef, lax.optimization_barrier_p.bind(*leaves))
