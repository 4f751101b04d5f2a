"""`cond`, `while` and `scan`, and what is built on them: `fori_loop`, `lax.map`, ….

Quax's caches of traced bodies look at the structure of the operands but not at the
shapes of the leaves, so a second adapter of another rank would meet the first one's
body. It wants the branches of a `cond`, and a carry before and after, to have one
structure, which `x + w` on one side changes. And it slices leaves, not arrays.
"""

from collections.abc import Callable, Iterable, Sequence

import equinox as eqx
import jax.tree_util as jtu
from jax import lax
from quax._compat import scan_bind_params, unpack_scan_args
from quax._primitives import cond_quax, scan_quax, while_quax

from .._arrays.base import lower_all
from .kinds import become, common_kind, kind_of
from .leaves import slices, split_for_scan, step_of_scan
from .traced import (
    alike,
    call,
    call_rule,
    is_value,
    own_plain,
    run_call,
    trace_on,
)


_BRANCHES = "the branches return different kinds of array in this place"


def _become_all(arrays, kinds, operation, why: str) -> tuple:
    """Each array as its kind; the kinds are hashable, as a structure and leaves."""
    kinds = jtu.tree_unflatten(*kinds)
    return tuple(become(x, k, operation, why) for x, k in zip(arrays, kinds))


def _hashable(kinds: Iterable):
    leaves, treedef = jtu.tree_flatten(tuple(kinds))
    return treedef, tuple(leaves)


def _run_branch(args, jaxpr, kinds):
    return _become_all(call(jaxpr, args), kinds, lax.cond_p, _BRANCHES)


@call_rule(lax.cond_p, cond_quax)
def cond(index, *args, branches, **params):
    outs = [trace_on(run_call, (args,), jaxpr)[1] for jaxpr in branches]
    slots = zip(zip(*outs), branches[0].out_avals)
    kinds = _hashable(common_kind(slot, aval) for slot, aval in slots)
    traced = [trace_on(_run_branch, (args,), jaxpr, kinds) for jaxpr in branches]
    leaves = lax.cond_p.bind(
        index,
        *jtu.tree_leaves(args),
        branches=tuple(jaxpr for jaxpr, _ in traced),
        **params,
    )
    return jtu.tree_unflatten(jtu.tree_structure(traced[0][1]), leaves)


_CARRY = "a carry must be of one kind from step to step, and the body changes it"


def _settle(step: Callable, carry: Sequence, avals, primitive) -> tuple[list, tuple]:
    """A carry that the body returns as it was given; and of which kinds it is.

    What the body changes becomes, before the loop, what it is changed into. That is
    tried once: a carry whose rank grows with each step would never settle. Then it has
    to be a plain array, and is made one in each step.
    """
    carry, tried = list(carry), set()
    while True:
        changed = False
        for i, (c, out) in enumerate(zip(carry, step(carry))):
            if not (is_value(c) or is_value(out) and i not in tried):
                continue
            kind = common_kind([c, out], avals[i])
            if alike(kind, c):
                continue
            if i in tried:
                carry[i] = own_plain(c, primitive, _CARRY)
            else:
                carry[i] = become(c, kind, primitive, _CARRY)
            tried.add(i)
            changed = True
        if not changed:
            return carry, _hashable(map(kind_of, carry))


def _lowered(consts: Sequence) -> tuple:
    """What a body reads in each step, such as the norms of a DoRA, computed once."""
    return tuple(map(lower_all, consts))


def _run_step(consts, carry, jaxpr):
    return call(jaxpr, (*consts, *carry))


def _run_settled_step(consts, carry, jaxpr, kinds):
    out = _run_step(consts, carry, jaxpr)
    return _become_all(out, kinds, lax.while_p, _CARRY)


@call_rule(lax.while_p, while_quax)
def while_(*args, cond_nconsts, cond_jaxpr, body_nconsts, body_jaxpr):
    n = cond_nconsts + body_nconsts
    consts = _lowered(args[:n])
    cond_consts, body_consts = consts[:cond_nconsts], consts[cond_nconsts:]

    def step(carry):
        return trace_on(_run_step, (body_consts, carry), body_jaxpr)[1]

    carry, kinds = _settle(step, args[n:], body_jaxpr.out_avals, lax.while_p)
    operands = (body_consts, carry)
    new_body, out = trace_on(_run_settled_step, operands, body_jaxpr, kinds)
    new_cond, _ = trace_on(_run_step, (cond_consts, carry), cond_jaxpr)
    leaves = lax.while_p.bind(
        *jtu.tree_leaves((cond_consts, body_consts, carry)),
        cond_nconsts=len(jtu.tree_leaves(cond_consts)),
        cond_jaxpr=new_cond,
        body_nconsts=len(jtu.tree_leaves(body_consts)),
        body_jaxpr=new_body,
    )
    return jtu.tree_unflatten(jtu.tree_structure(out), leaves)


def _run_scan(consts, shared, carry, sliced, jaxpr):
    xs = map(step_of_scan, eqx.combine(sliced, shared))
    return call(jaxpr, (*consts, *carry, *xs))


def _run_settled_scan(consts, shared, carry, sliced, jaxpr, kinds):
    out = _run_scan(consts, shared, carry, sliced, jaxpr)
    n = len(carry)
    return (*_become_all(out[:n], kinds, lax.scan_p, _CARRY), *out[n:])


@call_rule(lax.scan_p, scan_quax)
def scan(*args, jaxpr, length, **params):
    consts, carry, xs = unpack_scan_args(args, params)
    consts = _lowered(consts)
    sliced, shared = (
        zip(*(split_for_scan(lower_all(x), length) for x in xs)) if xs else ((), ())
    )
    steps = slices(sliced, length)

    def step(carry):
        operands = (consts, shared, carry, steps)
        return trace_on(_run_scan, operands, jaxpr)[1][: len(carry)]

    carry, kinds = _settle(step, carry, jaxpr.out_avals, lax.scan_p)
    operands = (consts, shared, carry, steps)
    new_jaxpr, out = trace_on(_run_settled_scan, operands, jaxpr, kinds)
    groups = [jtu.tree_leaves(group) for group in ((consts, shared), carry, sliced)]
    num_consts, num_carry, num_xs = map(len, groups)
    params = scan_bind_params(
        params,
        num_consts=num_consts,
        num_carry=num_carry,
        num_xs=num_xs,
        num_ys=len(new_jaxpr.out_avals) - num_carry,
    )
    leaves = lax.scan_p.bind(*sum(groups, []), jaxpr=new_jaxpr, length=length, **params)
    return jtu.tree_unflatten(jtu.tree_structure(out), leaves)
