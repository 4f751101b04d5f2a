"""Sums and joins: operations of several weights, or of weights and plain arrays.

A sum of low-rank arrays is low rank: their factors stand side by side along the rank. A
concatenation is a sum of padded arrays, and a selection a sum of masked ones. Arrays
that share a factor, such as the halves of a roll, need no more rank than one of them.
"""

import functools as ft
import math
from collections.abc import Sequence

import jax.numpy as jnp
import quax
from jax import lax

from .._arrays.base import lower, materialise_or_refuse, replace
from .._arrays.lora import LoraArray, unsummed
from .._arrays.low_rank import LowRankArray, scaled
from .._arrays.scaled import ScaledArray
from .layout import (
    BATCH,
    broadcast_in_dim,
    COL,
    contain,
    groups,
    in_groups,
    pad,
    refuse_growth,
    ROW,
)
from .register import NotLazy, variadic, with_zero_base
from .scaled import into_parts, multiplied_out


def _unscaled(d: LowRankArray) -> LowRankArray:
    """The same array, with its scaling in `b`."""
    b, a = scaled(d.b, d.a, d.scaling)
    del a  # The other factor stays the very same one.
    return replace(d, b=b, alpha=float(d.rank))


def _size(deltas: Sequence[LowRankArray]) -> int:
    return sum(d.a.size + d.b.size for d in deltas)


def _alike(deltas: Sequence[LowRankArray], operation: str) -> list[LowRankArray]:
    """Arrays of one shape, with the same axes as rows and columns, and one scaling."""
    found, error = [], None
    # One may be brought into the form of another, and not back.
    for form in dict.fromkeys(tuple(groups(d)) for d in deltas):
        try:
            found.append([in_groups(d, form, operation) for d in deltas])
        except NotLazy as why:
            error = why
    if not found:
        raise NotLazy(
            "the arrays differ in which axes are rows and which are columns, and "
            f"{error}"
        )
    deltas = min(found, key=_size)
    first = deltas[0]
    if any(d.scaling != first.scaling for d in deltas):
        deltas = [_unscaled(d) for d in deltas]
    return list(deltas)


def low_rank_sum(deltas: Sequence[LowRankArray], operation: str) -> LowRankArray:
    """One array with the ranks of all: `b = [b₁, b₂, …]`, `a = [a₁; a₂; …]`.

    Those that have a factor in common are added in the other one first.

    **Raises:** `NotLazy` if the factors would be larger than the array.
    """
    if len(deltas) == 1:
        return deltas[0]
    given = deltas = _alike(deltas, operation)
    for shared, other in (("a", "b"), ("b", "a")):
        sharing: dict[int, LowRankArray] = {}
        for d in deltas:
            same = sharing.get(id(getattr(d, shared)))
            if same is not None:
                d = replace(d, **{other: getattr(same, other) + getattr(d, other)})
            sharing[id(getattr(d, shared))] = d
        deltas = list(sharing.values())
    first = deltas[0]
    if len(deltas) == 1:
        return first
    refuse_growth(_size(deltas), given, math.prod(first.shape), operation)
    a = jnp.concatenate([d.a for d in deltas], first.n_batch)
    b = jnp.concatenate([d.b for d in deltas], -1)
    rank = sum(d.rank for d in deltas)
    return replace(first, a=a, b=b, rank=rank, alpha=first.scaling * rank)


def _each_once(fn, xs: Sequence) -> list:
    """`fn` of each, and the very same result for one that is there twice: what two
    operands share is seen by its identity."""
    done = {id(x): x for x in xs}
    done = {key: fn(x) for key, x in done.items()}
    return [done[id(x)] for x in xs]


def _join(primitive, operands, params, on_deltas, before=()):
    """The operation on the bases, plus `on_deltas(deltas)`, unsummed.

    A plain operand has no update, a low-rank one no base. The bases are stopped first:
    each has a flag of its own, and a plain array among them may train. What is joined
    is a new array of the program's own, so that a scale is multiplied out.
    """
    operands = _each_once(_into_parts, operands)
    summed = [with_zero_base(x) if isinstance(x, LowRankArray) else x for x in operands]
    ours = [x for x in summed if isinstance(x, LoraArray)]
    deltas = _each_once(_factors, [getattr(x, "delta", None) for x in summed])
    bases = [x.frozen_base() if isinstance(x, LoraArray) else x for x in summed]
    bases = [
        multiplied_out(x, primitive, operands) if isinstance(x, ScaledArray) else x
        for x in bases
    ]
    bind = quax.quaxify(primitive.bind)
    if not ours:
        return bind(*before, *bases, **params)
    try:
        delta = on_deltas(deltas)
    except NotLazy as why:
        values = (*before, *operands)
        return materialise_or_refuse(primitive, values, params, str(why))
    return unsummed(
        bind(*before, *bases, **params),
        replace(delta, allow_materialise=all(x.allow_materialise for x in ours)),
        stop_gradient=all(x.stop_gradient for x in ours),
        stopped=True,
    )


def _into_parts(x):
    return into_parts(x) if isinstance(x, ScaledArray) else x


def _factors(delta) -> LowRankArray | None:
    return None if delta is None else lower(delta)


def _register_sum(primitive, sign: int):
    def on_deltas(deltas):
        x, y = deltas
        if y is not None and sign < 0:
            y = replace(y, b=-y.b)
        return low_rank_sum([d for d in (x, y) if d is not None], "a sum")

    def rule(*operands, **params):
        shape = jnp.broadcast_shapes(*map(jnp.shape, operands))
        operands = [quax.quaxify(jnp.broadcast_to)(x, shape) for x in operands]
        return _join(primitive, operands, params, on_deltas)

    variadic(primitive)(rule)


_register_sum(lax.add_p, 1)
_register_sum(lax.sub_p, -1)


@variadic(lax.concatenate_p)
def concatenate(*operands, dimension):
    on_deltas = ft.partial(_concatenate, dimension, [x.shape for x in operands])
    params = dict(dimension=dimension)
    return _join(lax.concatenate_p, operands, params, on_deltas)


def _concatenate(dimension, shapes, deltas):
    known = [d for d in deltas if d is not None]
    group = groups(known[0])[dimension]
    if len({(d.rank, d.scaling, tuple(groups(d))) for d in known}) == 1:
        if group == BATCH and len(known) == len(deltas):
            return _side_by_side(deltas, shapes, dimension, "a", "b")
        if group == ROW and len({id(d.a) for d in known}) == 1:
            return _side_by_side(deltas, shapes, dimension, "b")
        if group == COL and len({id(d.b) for d in known}) == 1:
            return _side_by_side(deltas, shapes, dimension, "a")
    padded, start, total = [], 0, sum(shape[dimension] for shape in shapes)
    for delta, shape in zip(deltas, shapes):
        end = start + shape[dimension]
        if delta is not None:
            config = [(0, 0, 0)] * len(shape)
            config[dimension] = (start, total - end, 0)
            padded.append(pad(delta, 0, padding_config=config))
        start = end
    return low_rank_sum(padded, "a concatenation")


def _side_by_side(deltas, shapes, dimension, *names: str) -> LowRankArray:
    """The concatenation of arrays that share the factor not named, of those named.

    A plain array among them has zeros for its part of the factor.
    """
    if None in deltas:
        deltas = [d if d is None else contain(d, {dimension}) for d in deltas]
    first = next(d for d in deltas if d is not None)
    a_labels, b_labels, _ = first.labels
    out = {}
    for name, labels in ("a", a_labels), ("b", b_labels):
        if name in names:
            at, like = labels.index(dimension), getattr(first, name)
            parts = []
            for d, shape in zip(deltas, shapes):
                size = (*like.shape[:at], shape[dimension], *like.shape[at + 1 :])
                zeros = jnp.zeros(size, like.dtype)
                parts.append(zeros if d is None else getattr(d, name))
            out[name] = jnp.concatenate(parts, at)
    return replace(first, **out)


@variadic(lax.stack_p)
def stack(*operands, axis):
    on_deltas = ft.partial(_stack, axis, [x.shape for x in operands])
    return _join(lax.stack_p, operands, dict(axis=axis), on_deltas)


def _stack(axis, shapes, deltas):
    shape = (*shapes[0][:axis], 1, *shapes[0][axis:])
    kept = [i for i in range(len(shape)) if i != axis]
    params = dict(shape=shape, broadcast_dimensions=kept, sharding=None)
    deltas = [d if d is None else broadcast_in_dim(d, **params) for d in deltas]
    return _concatenate(axis, [shape] * len(deltas), deltas)


@variadic(lax.select_n_p)
def select_n(which, *cases):
    return _join(lax.select_n_p, cases, {}, ft.partial(_select, which), before=(which,))


def _select(which, deltas):
    if which.ndim != 0:
        raise NotLazy("an array masked element by element has no low rank")
    if None not in deltas:
        alike = _alike(deltas, "a selection")
        for shared, other in (("a", "b"), ("b", "a")):
            if len({id(getattr(d, shared)) for d in alike}) == 1:
                selected = lax.select_n(which, *(getattr(d, other) for d in alike))
                return replace(alike[0], **{other: selected})
    masked = [
        _masked(d, which.astype(jnp.int32) == i)
        for i, d in enumerate(deltas)
        if d is not None
    ]
    return low_rank_sum(masked, "a selection")


def _masked(d: LowRankArray, selected) -> LowRankArray:
    # Both factors, because zero beside an infinity is not zero.
    return replace(d, a=jnp.where(selected, d.a, 0), b=jnp.where(selected, d.b, 0))
