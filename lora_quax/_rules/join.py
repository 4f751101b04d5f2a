"""Sums and joins: operations of several weights, or of weights and plain arrays.

A sum of low-rank arrays is low rank: their factors stand side by side along the rank. A
concatenation is a sum of padded arrays, and a selection a sum of masked ones.
"""

import functools as ft
from collections.abc import Sequence

import jax.numpy as jnp
import quax
from jax import lax

from .._arrays.array import (
    FactoredArray,
    LoraArray,
    LowRankArray,
    make,
    materialise_or_refuse,
    scale,
)
from .layout import BATCH, broadcast_in_dim, groups, pad
from .register import NotLazy, variadic, with_zero_base


def low_rank_sum(deltas: Sequence[LowRankArray]) -> LowRankArray:
    """One array with the ranks of all: `b = [s₁b₁, s₂b₂, …]`, `a = [a₁; a₂; …]`."""
    first = deltas[0]
    if len(deltas) == 1:
        return first
    if any(groups(d) != groups(first) for d in deltas):
        raise NotLazy("the arrays differ in which axes are rows and which are columns")
    a = jnp.concatenate([d.a for d in deltas], first.n_batch)
    b = jnp.concatenate([scale(d.b, d.scaling) for d in deltas], -1)
    rank = sum(d.rank for d in deltas)
    return first.replace(a=a, b=b, rank=rank, alpha=float(rank))


def _join(primitive, operands, params, on_deltas, before=()):
    """The operation on the bases, plus `on_deltas(deltas)`, unsummed.

    A plain operand has no update, a low-rank one no base. The bases are stopped first:
    each has a flag of its own, and a plain array among them may train.
    """
    summed = [with_zero_base(x) if isinstance(x, LowRankArray) else x for x in operands]
    deltas = [x.delta if isinstance(x, LoraArray) else None for x in summed]
    bases = [x.frozen_base() if isinstance(x, LoraArray) else x for x in summed]
    try:
        delta = on_deltas(deltas)
    except NotLazy as why:
        values = (*before, *operands)
        return materialise_or_refuse(primitive, values, params, str(why))
    return make(
        LoraArray,
        base=quax.quaxify(primitive.bind)(*before, *bases, **params),
        delta=delta,
        stop_gradient=False,
        allow_materialise=all(
            x.allow_materialise for x in operands if isinstance(x, FactoredArray)
        ),
    )


def _register_sum(primitive, sign: int):
    def on_deltas(deltas):
        x, y = deltas
        if y is not None and sign < 0:
            y = y.replace(b=-y.b)
        return low_rank_sum([d for d in (x, y) if d is not None])

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
    like = {(d.rank, d.scaling, tuple(groups(d))) for d in known}
    alike = len(known) == len(deltas) and len(like) == 1
    if groups(known[0])[dimension] == BATCH and alike:
        # Along a batch axis the factors lie side by side, and the rank stays.
        a = jnp.concatenate([d.a for d in known], dimension)
        b = jnp.concatenate([d.b for d in known], dimension)
        return known[0].replace(a=a, b=b)
    padded, start, total = [], 0, sum(shape[dimension] for shape in shapes)
    for delta, shape in zip(deltas, shapes):
        end = start + shape[dimension]
        if delta is not None:
            config = [(0, 0, 0)] * len(shape)
            config[dimension] = (start, total - end, 0)
            padded.append(pad(delta, 0, padding_config=config))
        start = end
    return low_rank_sum(padded)


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
    def on_deltas(deltas):
        if which.ndim != 0:
            raise NotLazy("an array masked element by element has no low rank")
        masked = [
            d.replace(b=jnp.where(which.astype(jnp.int32) == i, d.b, 0))
            for i, d in enumerate(deltas)
            if d is not None
        ]
        return low_rank_sum(masked)

    return _join(lax.select_n_p, cases, {}, on_deltas, before=(which,))
