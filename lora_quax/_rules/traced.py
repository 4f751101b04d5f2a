"""Functions of arrays of ours, traced again as functions of the leaves of these.

A call, a branch, a loop and a solver hold a jaxpr, which speaks of one operand where
there is now a base and two factors. Each is traced again, through Quax, on the leaves;
what binds the new one is the rule of that primitive.
"""

import functools as ft
from collections.abc import Callable
from typing import Any

import jax
import jax.tree_util as jtu
import quax
from jaxtyping import ArrayLike
from quax._dispatch import _default_process

from .._arrays.base import densify_or_refuse, is_adapted
from .._arrays.dropout import used
from .._arrays.quantised import QuantisedArray
from .._compat import as_function, core


def is_value(x) -> bool:
    return isinstance(x, quax.Value)


def is_ours(x) -> bool:
    return is_adapted(x) or isinstance(x, QuantisedArray)


def call_rule(primitive, quax_rule: Callable | None = None):
    """Registers `rule(*operands, **params)` for a call with an array of ours among its
    operands, of which the others may be anything.

    A call of plain operands alone is bound as it is. Quax would trace it again, which
    doubles the time to trace, turns compiled calls into loose primitives, and drops
    `out_shardings`. A call with somebody else's values, and none of ours, is left to
    `quax_rule`, the one that Quax has; by default it has none.

    Operands may be references (`jax.new_ref`), whose tracers have the type that tracers
    of arrays have. Quax remembers by type that no rule was found, so there has to be
    one for every type, and the same.
    """
    leave_to_quax = quax_rule or ft.partial(_default, primitive)

    def decorate(rule):
        def dispatched(*args, **params):
            if any(map(is_ours, args)):
                return rule(*used(args), **params)
            if any(map(is_value, args)):
                return leave_to_quax(*args, **params)
            return primitive.bind(*args, **params)

        # Once as specific as what Quax registers, for `cond` and for the others, so
        # that it is preferred to that, and once for operands that are no arrays. By
        # annotations alone, because a tracer of a reference passes for one of an array.
        def leading(index, *args, **params):
            return dispatched(index, *args, **params)

        def all_alike(*args, **params):
            return dispatched(*args, **params)

        def of_anything(*args, **params):
            return dispatched(*args, **params)

        values = ArrayLike | quax.ArrayValue
        leading.__annotations__.update(index=ArrayLike, args=values)
        all_alike.__annotations__.update(args=values)
        of_anything.__annotations__.update(args=object)
        for registered in leading, all_alike, of_anything:
            quax.register(primitive, precedence=1)(registered)
        return rule

    return decorate


def _default(primitive, *args, **params):
    return _default_process(primitive, args, params)


@ft.lru_cache(maxsize=512)
def _trace(run: Callable, treedef, avals, *static):
    def flat(*leaves):
        return run(*jtu.tree_unflatten(treedef, leaves), *static)

    jaxpr, out = jax.make_jaxpr(flat, return_shape=True)(*avals)
    out = jtu.tree_unflatten(jtu.tree_structure(out), jaxpr.out_avals)
    return jaxpr, out


def trace_on(run: Callable, operands, *static):
    """`run(*operands, *static)` as a jaxpr of leaves, and its results as types.

    Cached, because JAX compiles a loop again whenever its jaxpr is a new object.
    """
    leaves, treedef = jtu.tree_flatten(operands)
    return _trace(run, treedef, tuple(map(type_of, leaves)), *static)


def type_of(x) -> Any:
    return x if isinstance(x, core.AbstractValue) else jax.typeof(x)


def alike(x, y) -> bool:
    """Whether two operands have the same structure, and leaves of the same types."""
    x_leaves, x_def = jtu.tree_flatten(x)
    y_leaves, y_def = jtu.tree_flatten(y)
    x_types, y_types = map(type_of, x_leaves), map(type_of, y_leaves)
    return x_def == y_def and all(
        (u.shape, u.dtype) == (v.shape, v.dtype) for u, v in zip(x_types, y_types)
    )


def call(jaxpr, args) -> tuple:
    """The function of a jaxpr, on operands of any kind."""
    return tuple(quax.quaxify(as_function(jaxpr))(*args))


def run_call(args, jaxpr):
    return call(jaxpr, args)


def plain(x, operation, why: str):
    """`x` as a plain array, if that is allowed."""
    if is_adapted(x):
        return densify_or_refuse(str(operation), x, [x], why)
    return type(x).materialise(x) if is_value(x) else x


def own_plain(x, operation, why: str):
    """`x` as a plain array, if it is of a type of ours; the others have a say in it."""
    if is_value(x) and not is_ours(x):
        raise TypeError(f"A {type(x).__name__} met `{operation}`: {why}.")
    return plain(x, operation, why)
