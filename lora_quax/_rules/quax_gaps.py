"""What Quax 0.4.6 does not carry through yet, and how it is carried here.

Each part says what goes wrong without it, and can go when Quax has it. The first half
uses `quax.register` alone. The second reaches into Quax's trace, which has no public
extension point; a patch there is skipped where Quax has grown the method itself.
"""

import functools as ft
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.extend.linear_util as lu
import jax.numpy as jnp
import jax.tree_util as jtu
import quax
from jax import lax
from jax.extend.core.primitives import jit_p, remat_p
from jaxtyping import ArrayLike
from quax._compat import scan_bind_params, unpack_scan_args
from quax._primitives import cond_quax, scan_quax, while_quax
from quax._trace import _QuaxTrace, _QuaxTracer
from quax._values import _dense

from .._arrays.base import densify_or_refuse, is_adapted, lower_all, replace
from .._arrays.lora import add, LoraArray
from .._arrays.low_rank import LowRankArray
from .._arrays.scaled import ScaledArray
from .._compat import as_function, core, detach_consts
from .placement import leaf_specs


Operand = ArrayLike | quax.ArrayValue


# Nothing but plain arrays.
#
# Quax traces every nested call again, whether or not anything in it is a `Value`. That
# doubles the time to trace, turns compiled calls into loose primitives, and drops
# `out_shardings`. Without a `Value` among the operands there is nothing to do.


def _leave_alone(primitive):
    @quax.register(primitive, precedence=2)
    def _(*args: ArrayLike, **params):
        return primitive.bind(*args, **params)


for _primitive in (jit_p, remat_p, lax.cond_p, lax.scan_p, lax.while_p):
    _leave_alone(_primitive)


# Control flow.
#
# Quax has no rule for `remat_p`, so a checkpointed function sees the dense weight. Its
# caches of traced bodies look at the structure of the operands but not at the shapes of
# the leaves, so a second adapter of another rank meets the first one's body. It wants
# the branches of a `cond`, and a carry before and after, to have one structure, which
# `x + w` on one side changes. And a scan slices leaves, not arrays.


@ft.lru_cache(maxsize=512)
def _trace(run: Callable, treedef, avals, *static):
    """`run(*operands, *static)` as a jaxpr of leaves, and its results as types.

    Cached, because JAX compiles a loop again whenever its jaxpr is a new object.
    """

    def flat(*leaves):
        return run(*jtu.tree_unflatten(treedef, leaves), *static)

    jaxpr, out = jax.make_jaxpr(flat, return_shape=True)(*avals)
    out = jtu.tree_unflatten(jtu.tree_structure(out), jaxpr.out_avals)
    return jaxpr, out


def _trace_on(run: Callable, operands, *static):
    leaves, treedef = jtu.tree_flatten(operands)
    return _trace(run, treedef, tuple(map(_type, leaves)), *static)


def _type(x) -> Any:
    return x if isinstance(x, core.AbstractValue) else jax.typeof(x)


def _alike(x, y) -> bool:
    """Whether two operands have the same structure, and leaves of the same types."""
    x_leaves, x_def = jtu.tree_flatten(x)
    y_leaves, y_def = jtu.tree_flatten(y)
    x_types, y_types = map(_type, x_leaves), map(_type, y_leaves)
    return x_def == y_def and all(
        (u.shape, u.dtype) == (v.shape, v.dtype) for u, v in zip(x_types, y_types)
    )


def _call(jaxpr, args) -> tuple:
    """The function of a jaxpr, on operands of any kind."""
    return tuple(quax.quaxify(as_function(jaxpr))(*args))


def _plain(x, primitive, why: str):
    """`x` as a plain array, if that is allowed."""
    if is_adapted(x):
        return densify_or_refuse(str(primitive), x, [x], why)
    return type(x).materialise(x) if isinstance(x, quax.Value) else x


def _own_plain(x, primitive, why: str):
    """`x` as a plain array, if it is of a type of ours; the others have a say in it."""
    if isinstance(x, quax.Value) and not is_adapted(x):
        raise TypeError(f"A {type(x).__name__} met `{primitive}`: {why}.")
    return _plain(x, primitive, why)


def _plain_unless(keep, slots, primitive, why: str) -> tuple:
    return tuple(x if k else _own_plain(x, primitive, why) for x, k in zip(slots, keep))


def _unless_foreign(quax_rule):
    """Leaves a call without an array of ours to the rule that Quax has for it."""

    def decorate(rule):
        @ft.wraps(rule)
        def wrapper(*args: Operand, **params):
            own = any(is_adapted(x) for x in args)
            return (rule if own else quax_rule)(*args, **params)

        return wrapper

    return decorate


def _run(args, jaxpr):
    return _call(jaxpr, args)


@quax.register(remat_p)
def _(*args: Operand, jaxpr, prevent_cse, **params):
    closed, out = _trace_on(_run, (args,), jaxpr)
    new_jaxpr, consts = detach_consts(closed)
    if isinstance(prevent_cse, tuple):  # One flag per operand; now one per leaf.
        per_leaf = [c for x, c in zip(args, prevent_cse) for _ in jtu.tree_leaves(x)]
        prevent_cse = (*(False for _ in consts), *per_leaf)
    leaves = remat_p.bind(
        *consts,
        *jtu.tree_leaves(args),
        jaxpr=new_jaxpr,
        prevent_cse=prevent_cse,
        **params,
    )
    return jtu.tree_unflatten(jtu.tree_structure(out), leaves)


_BRANCHES = "the branches return different kinds of array in this place"


def _common(slot: Sequence):
    """What the branches of a `cond` can all return in one place.

    `True`: what each returns, for they are alike. A type, as a structure and its
    leaves: a `LoraArray` with its base stopped, for a plain array is one too, of update
    zero (in a gradient it stands for a weight that one branch saves and the other does
    not). Or `False`: a plain array.
    """
    if all(_alike(slot[0], x) for x in slot):
        return True
    slot = [_trace_on(lower_all, (x,))[1] for x in slot]
    if is_adapted(slot[0]) and all(_alike(slot[0], x) for x in slot):
        leaves, treedef = jtu.tree_flatten(slot[0])
        return treedef, tuple(leaves)
    common = next((x for x in slot if isinstance(x, LoraArray)), None)
    if common is None or isinstance(common.base, quax.Value):
        return False
    common = replace(common, stopped=True)
    for x in slot:
        if isinstance(x, LoraArray):
            same = _alike(replace(x, stopped=True), common)
        else:
            same = _alike(x, common.base)
        if not same:
            return False
    leaves, treedef = jtu.tree_flatten(common)
    return treedef, tuple(leaves)


def _become(x, common):
    """What one branch returns, as what they can all return."""
    if isinstance(common, bool):
        return x if common else _own_plain(x, lax.cond_p, _BRANCHES)
    x, like = lower_all(x), jtu.tree_unflatten(*common)
    if _alike(x, like):
        return x
    if isinstance(x, LoraArray):
        return _stop(x)
    zero = jtu.tree_map(lambda t: jnp.zeros(t.shape, t.dtype), like.delta)
    return replace(like, base=x, delta=zero)


def _run_branch(args, jaxpr, common):
    return tuple(map(_become, _call(jaxpr, args), common))


@quax.register(lax.cond_p, precedence=1)
@_unless_foreign(cond_quax)
def _(index: ArrayLike, *args: Operand, branches, **params):
    as_is = (True,) * len(branches[0].out_avals)
    outs = [_trace_on(_run_branch, (args,), j, as_is)[1] for j in branches]
    common = tuple(map(_common, zip(*outs)))
    traced = [_trace_on(_run_branch, (args,), j, common) for j in branches]
    leaves = lax.cond_p.bind(
        index,
        *jtu.tree_leaves(args),
        branches=tuple(jaxpr for jaxpr, _ in traced),
        **params,
    )
    return jtu.tree_unflatten(jtu.tree_structure(traced[0][1]), leaves)


_CARRY = "a carry must be of one kind from step to step, and the body changes it"


def _settle(step: Callable, carry: Sequence, primitive) -> tuple[list, tuple]:
    """A carry that the body returns as it was given; and which of it are values.

    What the body changes becomes a plain array, if that is allowed; or its base is
    stopped now, if that is all that is in the way.
    """
    while True:
        keep = tuple(isinstance(c, quax.Value) for c in carry)
        out = step(carry, keep)
        new = []
        for c, o in zip(carry, out):
            if isinstance(c, quax.Value) and not _alike(c, o):
                if is_adapted(c) and not _alike(c, lower_all(c)):
                    c = lower_all(c)
                elif isinstance(c, LoraArray) and _alike(_stop(c), o):
                    c = _stop(c)
                else:
                    c = _own_plain(c, primitive, _CARRY)
            new.append(c)
        if all(c is n for c, n in zip(carry, new)):
            return list(carry), keep
        carry = new


def _stop(w: LoraArray) -> LoraArray:
    return replace(w, base=w.frozen_base(), stopped=True)


def _run_step(consts, carry, jaxpr, keep):
    return _plain_unless(keep, _call(jaxpr, (*consts, *carry)), lax.while_p, _CARRY)


def _run_condition(consts, carry, jaxpr):
    return _call(jaxpr, (*consts, *carry))


@quax.register(lax.while_p, precedence=1)
@_unless_foreign(while_quax)
def _(*args: Operand, cond_nconsts, cond_jaxpr, body_nconsts, body_jaxpr):
    n = cond_nconsts + body_nconsts
    cond_consts, body_consts = args[:cond_nconsts], args[cond_nconsts:n]
    carry = args[n:]

    def step(carry, keep):
        _, out = _trace_on(_run_step, (body_consts, list(carry)), body_jaxpr, keep)
        return out

    carry, keep = _settle(step, carry, lax.while_p)
    new_body, out = _trace_on(_run_step, (body_consts, carry), body_jaxpr, keep)
    new_cond, _ = _trace_on(_run_condition, (cond_consts, carry), cond_jaxpr)
    leaves = lax.while_p.bind(
        *jtu.tree_leaves((cond_consts, body_consts, carry)),
        cond_nconsts=len(jtu.tree_leaves(cond_consts)),
        cond_jaxpr=new_cond,
        body_nconsts=len(jtu.tree_leaves(body_consts)),
        body_jaxpr=new_body,
    )
    return jtu.tree_unflatten(jtu.tree_structure(out), leaves)


def _sliced(x):
    """For each leaf of an array that is scanned over, whether the scan slices it.

    The leaves of a stacked weight all have the stacking axis in front. If the first
    axis is one of rows, the factor `a` does not have it, and every step shares `a`.
    """
    if isinstance(x, LoraArray):
        return replace(x, base=_sliced(x.base), delta=_sliced(x.delta))
    if isinstance(x, LowRankArray):
        return replace(x, a=x.n_batch > 0, b=True)
    if isinstance(x, ScaledArray):  # A scale that does not vary is the same for all.
        return replace(x, base=_sliced(x.base), scale=x.scale.shape[0] == x.shape[0])
    return jtu.tree_map(lambda _: True, x)


def _stacked(x) -> bool:
    """Whether the first axis of what is scanned over is one of batch."""
    if isinstance(x, LoraArray | ScaledArray):
        return _stacked(x.delta if isinstance(x, LoraArray) else x.base)
    return not is_adapted(x) or x.n_batch > 0


def _row(x, stacked: bool):
    """One slice of an array, whose leaves are sliced where `_sliced` says so."""
    if isinstance(x, ScaledArray):
        base = _row(x.base, stacked)
        shared = x.scale.ndim > base.ndim
        return replace(x, base=base, scale=x.scale.squeeze(0) if shared else x.scale)
    if stacked or not is_adapted(x):
        return x
    if isinstance(x, LoraArray):
        base, delta = _row(x.base, stacked), _row(x.delta, stacked)
        if isinstance(delta, LowRankArray):
            return replace(x, base=base, delta=delta)
        return add(replace(x, base=base).frozen_base(), delta)
    assert isinstance(x, LowRankArray)
    row = replace(x, rows=x.rows - 1)
    return row if row.rows else row.dense()


def _run_scan(consts, shared, carry, sliced, jaxpr, stacked, keep):
    xs = [_row(x, s) for x, s in zip(eqx.combine(sliced, shared), stacked)]
    out = _call(jaxpr, (*consts, *carry, *xs))
    n = len(carry)
    return (*_plain_unless(keep, out[:n], lax.scan_p, _CARRY), *out[n:])


@quax.register(lax.scan_p, precedence=1)
@_unless_foreign(scan_quax)
def _(*args: Operand, jaxpr, **params):
    consts, carry, xs = unpack_scan_args(args, params)
    xs = [lower_all(x) for x in xs]
    stacked = tuple(map(_stacked, xs))
    sliced, shared = eqx.partition(xs, [_sliced(x) for x in xs])
    slices = jtu.tree_map(lambda x: core.mapped_aval(len(x), 0, _type(x)), sliced)

    def trace(carry, keep):
        operands = (consts, shared, list(carry), slices)
        return _trace_on(_run_scan, operands, jaxpr, stacked, keep)

    carry, keep = _settle(lambda *args: trace(*args)[1], carry, lax.scan_p)
    new_jaxpr, out = trace(carry, keep)
    groups = [jtu.tree_leaves(group) for group in ((consts, shared), carry, sliced)]
    num_consts, num_carry, num_xs = map(len, groups)
    leaves = lax.scan_p.bind(
        *sum(groups, []),
        jaxpr=new_jaxpr,
        **scan_bind_params(
            params,
            num_consts=num_consts,
            num_carry=num_carry,
            num_xs=num_xs,
            num_ys=len(new_jaxpr.out_avals) - num_carry,
        ),
    )
    return jtu.tree_unflatten(jtu.tree_structure(out), leaves)


# Quax's trace.


def _bind_dense(trace: _QuaxTrace, tracers, operation: str) -> list:
    """The operands of a function that has to have plain arrays."""
    why = f"a `{operation}` function is given plain arrays alone"
    with core.set_current_trace(trace.parent_trace):
        return [_plain(_array(trace.to_value(t)), operation, why) for t in tracers]


def _array(value):
    """A plain array out of Quax's wrapper for one; literals of a jaxpr among them."""
    if type(value) is not type(_dense(0)):
        return value
    x = value.array
    return x if eqx.is_array(x) else jnp.asarray(x, jax.typeof(x).dtype)


# Functions with `custom_jvp` of a weight are silently wrong: Quax rebuilds the tangent
# as another `LoraArray`, of factors `da` and `db`, which then stands for the base's
# tangent plus `db · da`, not for `db · a + b · da`. They are given the dense weight.

_quax_custom_jvp = _QuaxTrace.process_custom_jvp_call


def _process_custom_jvp_call(self, primitive, fun, jvp, tracers, *, symbolic_zeros):
    if any(is_adapted(self.to_value(t)) for t in tracers):
        dense = _bind_dense(self, tracers, "custom_jvp")
        tracers = [_QuaxTracer(self, _dense(x)) for x in dense]
    return _quax_custom_jvp(
        self, primitive, fun, jvp, tracers, symbolic_zeros=symbolic_zeros
    )


# Functions with `custom_vjp`, even of activations alone, raise NotImplementedError.
# They are bound on the trace below. Inside, Quax's trace is set up again, since such a
# function may close over its tracers.


@lu.transformation2
def _requaxify(f, tag, *args):
    with core.take_current_trace() as parent:
        trace = _QuaxTrace(parent, tag)
        with core.set_current_trace(trace):
            out = f(*args)
        with core.set_current_trace(parent):
            return jtu.tree_map(
                lambda x: _unwrap(trace, x, "custom_vjp"),
                out,
                is_leaf=lambda x: isinstance(x, _QuaxTracer),
            )


def _unwrap(trace: _QuaxTrace, x, operation: str) -> Any:
    if isinstance(x, _QuaxTracer) and x._trace.tag is trace.tag:  # pyright: ignore
        return _plain(_array(x.value), operation, "its result must be a plain array")
    return x


def _process_custom_vjp_call(self, primitive, fun, fwd, bwd, tracers, /, **params):
    args = _bind_dense(self, tracers, "custom_vjp")
    subfuns = tuple(_requaxify(f, self.tag) for f in (fun, fwd, bwd))
    with core.set_current_trace(self.parent_trace):
        outs = primitive.bind(*args, subfuns=subfuns, **params)
    return [_QuaxTracer(self, _dense(x)) for x in outs]


# `shard_map` raises AttributeError. An array stays factored: each of its leaves is
# given the partition spec of the axes that it holds.


def _process_shard_map(self, primitive, fun, tracers, *, in_specs, **params):
    values, specs = [], []
    for tracer, spec in zip(tracers, in_specs):
        value = _array(self.to_value(tracer))
        with core.set_current_trace(self.parent_trace):
            value = lower_all(value)
            if not is_adapted(value):
                value = _plain(value, primitive, "")
        values.append(value)
        specs.append(leaf_specs(value, spec))
    leaves, treedef = jtu.tree_flatten(values)
    is_spec = lambda x: isinstance(x, jax.sharding.PartitionSpec)

    def inner(*leaves):
        with core.take_current_trace() as parent:
            trace = _QuaxTrace(parent, self.tag)
            tracers = [
                _QuaxTracer(trace, x if isinstance(x, quax.Value) else _dense(x))
                for x in jtu.tree_unflatten(treedef, leaves)
            ]
            with core.set_current_trace(trace):
                out, out_specs = fun(*tracers).unpack_aux()
            unwrap = lambda x: _unwrap(trace, x, "shard_map")
            with core.set_current_trace(parent):
                return out.map(unwrap).with_aux(out_specs)

    params["debug_info"] = params["debug_info"].with_unknown_names()
    with core.set_current_trace(self.parent_trace):
        out = primitive.bind(
            *leaves,
            subfuns=(inner,),
            in_specs=tuple(jtu.tree_leaves(specs, is_leaf=is_spec)),
            **params,
        )
    return out.map(lambda x: _QuaxTracer(self, _dense(x)))


_QuaxTrace.process_custom_jvp_call = _process_custom_jvp_call
if _QuaxTrace.process_custom_vjp_call is core.Trace.process_custom_vjp_call:
    _QuaxTrace.process_custom_vjp_call = _process_custom_vjp_call
if not hasattr(_QuaxTrace, "process_shard_map"):
    setattr(_QuaxTrace, "process_shard_map", _process_shard_map)
