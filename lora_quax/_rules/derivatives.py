"""Tangents and cotangents of an array, and those of its leaves.

A function with a derivative of its own is written for one operand where there are now
several leaves. For `W = base + s · b · a`,

    dW = dbase + s · b · da + s · db · a,        a sum of arrays of low rank, unsummed,
    cotangents of a and of b: s · bᵀ · c and s · c · aᵀ, for a cotangent c of W,

so a rule for tangents is given one that is factored like the weight, and from a rule
for cotangents each factor is given its own.
"""

import functools as ft
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
import quax
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Literal

from .._arrays.base import replace
from .._arrays.check import aval_of
from .._arrays.lora import LoraArray, unsummed
from .._arrays.low_rank import LowRankArray, scaled
from .._arrays.thin_dot import arrange, contract


def tangent_of(x, dx) -> Any:
    """The tangent of an array whose leaves have the tangents `dx`, each an array or a
    `SymbolicZero`; itself an array, perhaps factored, or a `SymbolicZero`."""
    terms = _tangents(x, dx)
    aval = aval_of(x)
    if not terms:
        return SymbolicZero(aval.to_tangent_aval())
    total = ft.reduce(_plus, terms)
    if total.dtype == aval.dtype:
        return total
    cast: Any = quax.quaxify(lax.convert_element_type)
    return cast(total, aval.dtype)


def _tangents(x, dx) -> list:
    """The terms whose sum is the tangent, of which all but the first are low rank."""
    if isinstance(x, LoraArray):
        base = [] if x.stop_gradient else _tangents(x.base, dx.base)
        return [*base, *_tangents(x.delta, dx.delta)]
    if isinstance(x, LowRankArray):
        factors = dict(a=dx.a), dict(b=dx.b)
        known = (f for f in factors if not any(map(_is_zero, f.values())))
        return [replace(x, **f) for f in known]
    if isinstance(x, quax.Value):
        if all(map(_is_zero, jtu.tree_leaves(dx))):
            return []
        raise TypeError(
            f"A base of type {type(x).__name__} that is not frozen met a function with "
            "`custom_jvp`: only its own type knows the tangent of what it stands for."
        )
    return [] if _is_zero(dx) else [dx]


def _plus(x, delta) -> LoraArray:
    return unsummed(x, delta, stop_gradient=False)


def tangents_of_leaves(x, dx) -> list:
    """Of each leaf of `x`; that of a frozen base is zero."""
    if isinstance(x, LoraArray):
        base = tangents_of_leaves(x.base, dx.base)
        if x.stop_gradient:
            base = jtu.tree_leaves(zero_tangents(x.base), is_leaf=_is_zero)
        return [*base, *tangents_of_leaves(x.delta, dx.delta)]
    return jtu.tree_leaves(dx, is_leaf=_is_zero)


def zero_tangents(x):
    """Of an integer it is of no dtype that an array can have."""
    aval = lambda leaf: jax.typeof(leaf).to_tangent_aval()
    return jtu.tree_map(lambda leaf: SymbolicZero(aval(leaf)), x)


def _is_zero(dx) -> bool:
    return isinstance(dx, SymbolicZero)


def cotangent_of_leaves(x, ct) -> Any:
    """The cotangents of the leaves of `x`, in its structure; None where there is none.

    `ct` is the cotangent of what `x` stands for, an array.
    """
    if isinstance(x, LoraArray):
        base = None if x.stop_gradient else cotangent_of_leaves(x.base, ct)
        return replace(x, base=base, delta=cotangent_of_leaves(x.delta, ct))
    if isinstance(x, LowRankArray):
        a_labels, b_labels, labels = x.labels

        def factor(like, like_labels, other, other_labels):
            batch = range(x.n_batch)
            scaled_ct, other = scaled(ct, other.astype(ct.dtype), x.scaling)
            out, out_labels = contract(
                other, other_labels, scaled_ct, labels, keep=batch
            )
            return arrange(out, out_labels, like_labels).astype(like.dtype)

        a = factor(x.a, a_labels, x.b, b_labels)
        return replace(x, a=a, b=factor(x.b, b_labels, x.a, a_labels))
    if isinstance(x, quax.Value):
        trained, rest = eqx.partition(x, eqx.is_inexact_array)
        combined = lambda trained: eqx.combine(trained, rest)
        dense = lambda trained: type(x).materialise(combined(trained))
        return jax.vjp(dense, trained)[1](ct)[0]
    return ct


# Some functions return an operand as it is, and its tangent as it is: a cast that
# changes nothing, `nondifferentiable`, `eqx.error_if`. What they say of the whole holds
# of each part, so a weight goes through them factored.


def returned_operands(jaxpr) -> list[int | None]:
    """For each result of a jaxpr, which of its operands it is, if it is one.

    A branch that does nothing but raise an error of Equinox returns nothing.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    source: dict[Any, int | None] = {v: i for i, v in enumerate(jaxpr.invars)}
    read = lambda v: None if isinstance(v, Literal) else source.get(v)
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        operands = list(map(read, eqn.invars))
        if name == "stop_gradient":
            source[eqn.outvars[0]] = operands[0]
            continue
        if name in ("jit", "pjit"):
            inside = [eqn.params["jaxpr"]]
        elif name == "custom_jvp_call":
            inside = [eqn.params["call_jaxpr"]]
        elif name == "cond":
            operands = operands[1:]
            inside = [j for j in eqn.params["branches"] if not _raises(j)]
        else:
            continue
        sources = zip(*map(returned_operands, inside))
        for v, of_branches in zip(eqn.outvars, sources):
            [*which] = set(of_branches)
            if len(which) == 1 and which[0] is not None:
                source[v] = operands[which[0]]
    return list(map(read, jaxpr.outvars))


def _raises(jaxpr) -> bool:
    """Whether a branch is what `eqx.error_if` runs where there is an error."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if eqn.primitive.name == "pure_callback":
            function = getattr(eqn.params.get("callback"), "callback_func", None)
            return getattr(function, "__module__", None) == "equinox._errors"
    return False
