"""Primitives of Equinox, and one of lineax that is built as these are.

Their operands are pytrees with anything at the leaves, of which the primitive binds the
arrays. An array of ours becomes a node of such a tree, and its leaves are bound.
"""

from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.tree_util as jtu
import quax
from equinox.internal._loop.common import select_if_vmap_p
from equinox.internal._noinline import noinline_p
from equinox.internal._nontraceable import (
    nonbatchable_p,
    nondifferentiable_backward_p,
    nontraceable_p,
)
from equinox.internal._primitive import _combine, _vprim_p

from .._arrays.base import is_adapted, late_rules, lower_all, materialise_or_refuse
from .._arrays.check import aval_of
from .._arrays.low_rank import LowRankArray
from .._arrays.scaled import ScaledArray
from .kinds import become, common_kind
from .traced import call_rule, is_value


def _identity(primitive):
    """Primitives that return their operand, or complain of how it is transformed."""

    @call_rule(primitive)
    def _(w, **params):
        return jtu.tree_map(lambda leaf: primitive.bind(leaf, **params), w)


for _primitive in (nonbatchable_p, nondifferentiable_backward_p, nontraceable_p):
    _identity(_primitive)


@call_rule(select_if_vmap_p)
def select_if_vmap(which, *cases, **params):
    """One or the other, as a whole; so one or the other of each leaf."""
    kind = common_kind(cases, aval_of(cases[0]))
    why = "the two cases are different kinds of array"
    cases = [become(x, kind, select_if_vmap_p, why) for x in cases]

    def of_leaf(x, y):
        return select_if_vmap_p.bind(which, x, y, **params)

    return jtu.tree_map(of_leaf, *cases)


def _operands(values, treedef, static) -> tuple:
    return jtu.tree_unflatten(treedef, _combine(values, static))


def _results(out, flatten) -> list:
    """The arrays of a result, whose structure `flatten` is told."""
    aval = lambda x: x.aval() if is_value(x) else x
    flatten(jtu.tree_map(aval, out, is_leaf=is_value))
    arrays = [x for x in jtu.tree_leaves(out, is_leaf=is_value) if _is_array(x)]
    return arrays


def _is_array(x) -> bool:
    return is_value(x) or eqx.is_array(x)


@call_rule(noinline_p)
def noinline(*values, treedef, static, flatten):
    """The function that is not inlined is wrapped in `quaxify`, where it is called."""
    index, abstract_fn, transforms, args = _operands(values, treedef, static)
    transforms = [*transforms, quax.quaxify]
    out = eqxi.filter_primitive_bind(noinline_p, index, abstract_fn, transforms, args)
    return _results(out, flatten)


@call_rule(_vprim_p)
def vprim(*values, prim, params, **batch):
    """A batch of such a primitive: the rule for one, mapped."""
    values, axes = list(map(lower_all, values)), batch["__batch_axes"]
    if not all(map(_can_map, values, axes)):
        params = dict(prim=prim, params=params, **batch)
        why = "a weight is mapped over an axis that is no batch axis of it"
        return materialise_or_refuse(_vprim_p, values, params, why)

    def bind(*values):
        return quax.quaxify(prim.bind)(*values, **dict(params))

    size, name = batch["__axis_size"], batch["__axis_name"]
    return jax.vmap(bind, in_axes=axes, axis_size=size, axis_name=name)(*values)


def _can_map(x, axis: int | None) -> bool:
    """Whether all leaves of an array have the axis, in front."""
    if axis is None or not is_adapted(x):
        return True
    if isinstance(x, LowRankArray):
        return axis == 0 and x.n_batch > 0
    if isinstance(x, ScaledArray):
        return x.scale.shape[0] == x.shape[0] and _can_map(x.base, axis)
    return axis == 0 and _can_map(x.base, axis) and _can_map(x.delta, axis)


def _linear_solve(primitive, values, params) -> Any:
    """`lineax.linear_solve`: an operator made of a weight becomes a function, which is
    closed over the leaves of that."""
    import lineax as lx

    args = _operands(values, params["treedef"], params["static"])
    operator, state, vector, options, solver, throw = args

    def has_ours(x) -> bool:
        return any(map(is_adapted, jtu.tree_leaves(x, is_leaf=is_value)))

    def is_operator(x) -> bool:
        return isinstance(x, lx.AbstractLinearOperator)

    def on_leaves(x):
        if not (is_operator(x) and has_ours(x)):
            return x
        holds = {tag: quax.quaxify(is_so) for tag, is_so in _tags(lx).items()}
        tags = frozenset(tag for tag, is_so in holds.items() if is_so(x))
        structure = quax.quaxify(lambda operator: operator.in_structure())
        apply = quax.quaxify(lambda operator, vector: operator.mv(vector))
        function = lambda vector: apply(x, vector)
        return lx.FunctionLinearOperator(function, structure(x), tags)

    operator, state, options = jtu.tree_map(
        on_leaves, (operator, state, options), is_leaf=is_operator
    )
    if has_ours((operator, state, options, vector, solver)):
        why = "its vector and what the solver has computed must be plain arrays"
        return materialise_or_refuse(primitive, values, params, why)
    out = eqxi.filter_primitive_bind(
        primitive, operator, state, vector, options, solver, throw
    )
    return _results(out, params["flatten"])


def _tags(lx) -> dict:
    return {
        lx.symmetric_tag: lx.is_symmetric,
        lx.diagonal_tag: lx.is_diagonal,
        lx.tridiagonal_tag: lx.is_tridiagonal,
        lx.unit_diagonal_tag: lx.has_unit_diagonal,
        lx.lower_triangular_tag: lx.is_lower_triangular,
        lx.upper_triangular_tag: lx.is_upper_triangular,
        lx.positive_semidefinite_tag: lx.is_positive_semidefinite,
        lx.negative_semidefinite_tag: lx.is_negative_semidefinite,
    }


late_rules["linear_solve"] = _linear_solve
