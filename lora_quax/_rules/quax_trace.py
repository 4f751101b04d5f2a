"""Patches of Quax's trace, which has no public point of extension.

Functions with derivatives of their own, and `shard_map`, never reach a registered rule:
the trace has a method for each, or has none. A patch runs where an array of ours is
among the operands; without one Quax's own method runs, if it has one.
"""

import functools as ft
import itertools as it
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.interpreters.ad import Zero
from quax._trace import _QuaxTrace, _QuaxTracer
from quax._values import _dense

from .._arrays.base import is_adapted, lower_all, refusal
from .._arrays.dropout import refuse_dropout
from .._arrays.scaled import ScaledArray
from .._compat import core, cotangents, flat_tree, spec_axes, varying_axes
from .derivatives import (
    cotangent_of_leaves,
    returned_operands,
    tangent_of,
    tangents_of_leaves,
    zero_tangents,
)
from .kinds import kind_of
from .leaves import leaf_specs
from .traced import is_ours, is_value, plain


_DenseValue = type(_dense(np.zeros(())))  # Of NumPy: an import starts no backend.


def _array(value):
    """A plain array out of Quax's wrapper for one; literals of a jaxpr among them."""
    if type(value) is not _DenseValue:
        return value
    x = value.array
    return x if eqx.is_array(x) else jnp.asarray(x, jax.typeof(x).dtype)


def _values(trace: _QuaxTrace, tracers) -> list:
    with core.set_current_trace(trace.parent_trace):
        return [lower_all(_array(trace.to_value(t))) for t in tracers]


def _own_or_plain(trace: _QuaxTrace, values) -> list:
    """Somebody else's values are made dense, beside ours."""
    with core.set_current_trace(trace.parent_trace):
        return [x if is_adapted(x) else plain(x, "", "") for x in values]


def _sums_or_plain(trace: _QuaxTrace, values, operation: str) -> list:
    """So are scaled arrays, if that is allowed: their tangents are no such sums."""
    with core.set_current_trace(trace.parent_trace):
        return [
            plain(x, operation, "a scale is multiplied out before its derivative")
            if isinstance(x, ScaledArray) or not is_adapted(x)
            else x
            for x in values
        ]


def _retrace(tag, f: Callable, args) -> Any:
    """`f` of operands of any kind, in Quax's trace; its results are of any kind too.

    The trace is that which the function was found in, by its tag, since it may close
    over tracers of that.
    """
    with core.take_current_trace() as parent:
        trace = _QuaxTrace(parent, tag)
        with core.set_current_trace(trace):
            out = f(*(_wrap(trace, x) for x in args))
        with core.set_current_trace(parent):
            return jtu.tree_map(lambda x: _unwrap(trace, x), out, is_leaf=_is_tracer)


def _wrap(trace: _QuaxTrace, x):
    if isinstance(x, bool | SymbolicZero):  # What JAX says of an operand beside it.
        return x
    return _QuaxTracer(trace, x if is_value(x) else _dense(x))


def _unwrap(trace: _QuaxTrace, x) -> Any:
    return _array(x.value) if _is_tracer(x) and x._trace.tag is trace.tag else x


def _is_tracer(x) -> bool:
    return isinstance(x, _QuaxTracer)


# A rule says of a result what holds of the whole, and nothing of its parts. Where that
# is not asked for, since nothing is differentiated, a result may stay factored.

_OF_THE_WHOLE = (
    "what its rule says of a derivative it says of the whole, and nothing of the parts"
)


def _results(values, operation: str) -> list:
    """The results of a function, plain where that is allowed."""
    return [
        x
        if is_adapted(x) and not x.allow_materialise
        else plain(x, operation, _OF_THE_WHOLE)
        for x in values
    ]


# Functions with `custom_jvp` of a weight are silently wrong in Quax: it rebuilds the
# tangent as another `LoraArray`, of factors `da` and `db`, which then stands for the
# base's tangent plus `db · da`, not for `db · a + b · da`.

_quax_custom_jvp = _QuaxTrace.process_custom_jvp_call


def _process_custom_jvp_call(self, primitive, fun, jvp, tracers, *, symbolic_zeros):
    values = _values(self, tracers)
    if not any(map(is_ours, values)):
        return _quax_custom_jvp(
            self, primitive, fun, jvp, tracers, symbolic_zeros=symbolic_zeros
        )
    refuse_dropout(values, "custom_jvp")
    retrace = ft.partial(_retrace, self.tag, fun.call_wrapped)
    retrace_rule = ft.partial(_retrace, self.tag, jvp.call_wrapped)

    @jax.custom_jvp
    def call(*values):
        return _results(retrace(values), "custom_jvp")

    def rule(values, dots):
        # The tangents of the leaves of each value, and from these that of the whole.
        if not symbolic_zeros:
            dots = jtu.tree_map(_instantiated, dots, is_leaf=_is_symbolic)
        tangents = list(map(tangent_of, values, dots))
        out = retrace_rule((*values, *tangents))
        n = len(out) // 2
        primals = _results(out[:n], "custom_jvp")
        if any(map(is_value, primals)):
            returned = _returned(retrace, values, out[:n])
            tangent_rule = lambda tangents: retrace_rule((*values, *tangents))[n:]
            returned_tangents = _returned(tangent_rule, tangents, out[n:])
        else:
            returned = returned_tangents = [None] * n
        out_dots = []
        for x, t, i, j in zip(primals, out[n:], returned, returned_tangents):
            if not is_value(x):
                t = plain(_instantiated(t), "custom_jvp", _OF_THE_WHOLE)
            elif _is_symbolic(t):
                t = zero_tangents(x)
            elif i is not None and i == j:
                of_leaves = tangents_of_leaves(values[i], dots[i])
                t = jtu.tree_unflatten(jtu.tree_structure(x), of_leaves)
            else:
                raise refusal("custom_jvp", [x], _OF_THE_WHOLE)
            out_dots.append(t)
        return primals, out_dots

    call.defjvp(rule, symbolic_zeros=True)
    with core.set_current_trace(self.parent_trace):
        out = call(*_sums_or_plain(self, values, "custom_jvp"))
    return [_wrap(self, x) for x in out]


def _returned(function, operands, results) -> list[int | None]:
    """Which operand each result is, if the function returns one as it was given."""
    known = [None if _is_symbolic(x) else x for x in operands]
    given = lambda xs: [o if x is None else x for o, x in zip(operands, xs)]
    jaxpr = jax.make_jaxpr(lambda xs: _leaves_of(function(given(xs))))(known)
    numbers, sources = it.count(), iter(returned_operands(jaxpr))
    of_operands: list = [[next(numbers) for _ in jtu.tree_leaves(x)] for x in known]
    of_results = [[next(sources) for _ in _leaves_of([x])] for x in results]
    return [of_operands.index(s) if s in of_operands else None for s in of_results]


def _leaves_of(results) -> list:
    return jtu.tree_leaves([_instantiated(x) for x in results])


def _is_symbolic(x) -> bool:
    return isinstance(x, SymbolicZero)


def _instantiated(x):
    return jnp.zeros(x.aval.shape, x.aval.dtype) if _is_symbolic(x) else x


# Functions with `custom_vjp`, even of activations alone, raise NotImplementedError.
# Where a method for them comes with a later Quax, leaf by leaf, it is as wrong for a
# weight as that above.


def _process_custom_vjp_call(
    self, primitive, fun, fwd, bwd, tracers, /, *, out_trees, symbolic_zeros, **params
):
    values = _values(self, tracers)
    if not any(map(is_ours, values)) and (
        _quax_custom_vjp is not core.Trace.process_custom_vjp_call
        or any(map(is_value, values))
    ):
        return _quax_custom_vjp(
            self,
            primitive,
            fun,
            fwd,
            bwd,
            tracers,
            out_trees=out_trees,
            symbolic_zeros=symbolic_zeros,
            **params,
        )

    refuse_dropout(values, "custom_vjp")

    @jax.custom_vjp
    def call(*values):
        out = _retrace(self.tag, fun.call_wrapped, values)
        return _results(out, "custom_vjp")

    def forward(*primals):
        values, perturbed = _primals(primals) if symbolic_zeros else (primals, None)
        args = [
            x for pair in zip(values, perturbed or [True] * len(values)) for x in pair
        ]
        out = _retrace(self.tag, fwd.call_wrapped, args)
        _, residual_tree, forwarded = out_trees()
        # A residual that is an operand is not returned, but named by its number.
        n = residual_tree.num_leaves - sum(i is not None for i in forwarded)
        new = iter(out[:n])
        residuals = [next(new) if i is None else values[i] for i in forwarded]
        out = [plain(x, "custom_vjp", _OF_THE_WHOLE) for x in out[n:]]
        return out, (values, residuals)

    def backward(saved, cts):
        values, residuals = saved
        out = _retrace(self.tag, bwd.call_wrapped, (*residuals, *cts))
        cts = [plain(ct, "custom_vjp", _OF_THE_WHOLE) for ct in cotangents(out)]
        return tuple(
            None if ct is None or isinstance(ct, Zero) else cotangent_of_leaves(x, ct)
            for x, ct in zip(values, cts)
        )

    call.defvjp(forward, backward, symbolic_zeros=symbolic_zeros)
    with core.set_current_trace(self.parent_trace):
        out = call(*_sums_or_plain(self, values, "custom_vjp"))
    return [_wrap(self, x) for x in out]


def _primals(primals) -> tuple[list, list[bool]]:
    """The operands, and whether they are differentiated: if any leaf is."""
    is_leaf = lambda x: isinstance(x, CustomVJPPrimal)
    values = jtu.tree_map(lambda x: x.value, primals, is_leaf=is_leaf)
    perturbed = jtu.tree_map(lambda x: x.perturbed, primals, is_leaf=is_leaf)
    return list(values), [any(jtu.tree_leaves(x)) for x in perturbed]


# `shard_map` raises AttributeError. An array stays factored: each of its leaves is
# given the partition spec of the axes that it holds.


def _returned_by_device(x, spec, params):
    """A weight stays factored if a leaf without a sharded axis is the same everywhere,
    which the types say, if they are checked."""
    if not is_adapted(x):
        return plain(x, "", "")
    for leaf, of_leaf in zip(jtu.tree_leaves(x), leaf_specs(x, spec)):
        if not params["check_vma"] or varying_axes(leaf) - spec_axes(of_leaf):
            return plain(x, "shard_map", _VARIES)
    return x


_VARIES = (
    "it is returned, and nothing says that a factor without the axis that is sharded "
    "is the same on each device"
)


def _process_shard_map(self, primitive, fun, tracers, *, in_specs, **params):
    values = _values(self, tracers)
    if not any(map(is_ours, values)) and _quax_shard_map is not None:
        return _quax_shard_map(
            self, primitive, fun, tracers, in_specs=in_specs, **params
        )
    values = _own_or_plain(self, values)
    specs = [s for x, spec in zip(values, in_specs) for s in leaf_specs(x, spec)]
    leaves, treedef = jtu.tree_flatten(values)
    out_tree: Any = None  # The tree that the function returns,
    kinds: list = []  # and of which kind each of its leaves is.

    def run(*args):
        nonlocal out_tree
        out_tree, specs = fun(*args).unpack_aux()
        return list(out_tree), list(specs)

    def inner(*leaves):
        nonlocal kinds
        out, specs = _retrace(self.tag, run, jtu.tree_unflatten(treedef, leaves))
        out = [_returned_by_device(x, spec, params) for x, spec in zip(out, specs)]
        kinds = list(map(kind_of, out))
        specs = [s for x, spec in zip(out, specs) for s in leaf_specs(x, spec)]
        return flat_tree(jtu.tree_leaves(out)).with_aux(tuple(specs))

    params["debug_info"] = params["debug_info"].with_unknown_names()
    with core.set_current_trace(self.parent_trace):
        out = primitive.bind(*leaves, subfuns=(inner,), in_specs=tuple(specs), **params)
    out = iter(jtu.tree_unflatten(jtu.tree_structure(kinds), list(out)))
    return out_tree.map(lambda _: _wrap(self, next(out)))


# Until JAX 0.11 what is known of a checkpointed loop, when it is differentiated inside
# `quaxify`, is a call that is no primitive like others. It raises NotImplementedError.


def _process_call(self, primitive, fun, tracers, params):
    values = _values(self, tracers)
    if any(map(is_value, values)) and not any(map(is_ours, values)):
        return _quax_call(self, primitive, fun, tracers, params)
    with core.set_current_trace(self):
        return fun.call_wrapped(*tracers)


_quax_call: Any = getattr(_QuaxTrace, "process_call", None)
if _quax_call is not None:
    setattr(_QuaxTrace, "process_call", _process_call)


# JAX 0.12 expands a higher primitive for a trace that does not ask for it, and with it
# loses the derivative that it was given: of `lax.custom_root`, even of plain arrays.

if hasattr(core.Trace, "requires_low"):
    _is_low = property(lambda self: False, lambda self, value: None)
    setattr(_QuaxTrace, "requires_low", _is_low)


_quax_custom_vjp = _QuaxTrace.process_custom_vjp_call
_quax_shard_map = getattr(_QuaxTrace, "process_shard_map", None)
setattr(_QuaxTrace, "process_custom_jvp_call", _process_custom_jvp_call)
setattr(_QuaxTrace, "process_custom_vjp_call", _process_custom_vjp_call)
setattr(_QuaxTrace, "process_shard_map", _process_shard_map)
