"""How a rule is written once and serves both a low-rank array and its sum with a base.

Almost every rule says what a linear operation does to a `LowRankArray`. For a
`LoraArray` nothing more needs saying: the operation is dispatched again on the base,
and the sum stays unsummed if the update stayed low rank, or is taken if it did not.
"""

import functools as ft
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import quax
from jaxtyping import ArrayLike

from .._arrays.base import AdaptedArray, lower, materialise_or_refuse, replace
from .._arrays.check import wider
from .._arrays.dropout import DropoutArray, dropped, used
from .._arrays.lora import add, LoraArray, unsummed
from .._arrays.low_rank import LowRankArray
from .._arrays.stored import stored


class NotLazy(Exception):
    """Raised by a rule whose result is not low rank; the message says why."""


def linear(
    primitive,
    *,
    operand: int = 0,
    affine: Callable[[dict], bool] = lambda params: False,
    product: bool = False,
):
    """Registers `rule(*operands, **params)`, of which number `operand` is low rank.

    The rule returns a `LowRankArray`, or a dense array, or a list of them for a
    primitive of several results, or raises `NotLazy`.

    With some parameters an operation may be `affine`, as a `pad` that fills with ones.
    The rule gives the linear part. The rest, what the operation does to zero, falls to
    the base; an array without a base is then given one of zeros.

    What comes before a weight in a `product` is an activation: with dropout the update
    is given another one.
    """

    def decorate(rule):
        def on_low_rank(*args, **params):
            if affine(params):
                w = with_zero_base(args[operand])
                return on_lora(*args[:operand], w, *args[operand + 1 :], **params)
            try:
                out = rule(*args, **params)
            except NotLazy as why:
                return materialise_or_refuse(primitive, args, params, str(why))
            dtype = _result_type(args, operand, params)
            if isinstance(out, list):
                return [_of_type(x, dtype) for x in out]
            return _of_type(out, dtype)

        def on_lora(*args, drop=lambda x: x, **params):
            # What a weight is multiplied with comes before it. Its cotangent, a sum
            # over both parts, is stored as the result is.
            before = tuple(map(stored, args[:operand]))
            w, after = args[operand], args[operand + 1 :]
            try:
                delta = rule(*map(drop, before), lower(w.delta), *after, **params)
            except NotLazy as why:
                return materialise_or_refuse(primitive, args, params, str(why))

            def on_base(base):
                bind = quax.quaxify(primitive.bind)
                return bind(*before, base, *after, **params)

            return distribute(w, on_base, delta, (*before, *after))

        def with_dropout(x, w, *after, **params):
            w = used(w)
            return on_lora(x, w.w, *after, drop=ft.partial(dropped, w=w), **params)

        register(primitive, operand, LowRankArray, on_low_rank)
        register(primitive, operand, LoraArray, on_lora)
        if product:
            register(primitive, operand, DropoutArray, with_dropout)
        return rule

    return decorate


def _result_type(args, operand: int, params):
    """The type of a dense result. A rule gives it as it was computed, perhaps wider."""
    dtype = args[operand].dtype
    if operand == 1:
        dtype = wider(args[0].dtype, dtype)
    return params.get("preferred_element_type") or dtype


def _of_type(x, dtype):
    return x if isinstance(x, LowRankArray) else x.astype(dtype)


def register(primitive, operand: int, kind: type, rule):
    """Registers `rule` where operand number `operand` is of a kind of ours, and the
    others are plain."""
    if operand == 0:

        @quax.register(primitive)
        def _(w: kind, *rest: ArrayLike, **params):  # pyright: ignore
            return rule(w, *map(as_array, rest), **params)

    else:
        assert operand == 1

        @quax.register(primitive)
        def _(x: ArrayLike, w: kind, *rest: ArrayLike, **params):  # pyright: ignore
            return rule(as_array(x), w, *map(as_array, rest), **params)


def as_array(x) -> jax.Array:
    """A plain operand. It may be a literal of a jaxpr, or a number of Python's."""
    return x if isinstance(x, jax.Array) else jnp.asarray(x, jax.typeof(x).dtype)


def with_zero_base(delta: LowRankArray) -> LoraArray:
    zeros = jnp.zeros(delta.shape, delta.dtype)
    return unsummed(zeros, delta, stopped=True)


def variadic(primitive):
    """Registers `rule(*operands, **params)`, of which any may be ours or plain."""

    def decorate(rule):
        @quax.register(primitive)
        def _(*operands: AdaptedArray | ArrayLike, **params):
            return rule(*map(lowered_or_array, operands), **params)

        # Of plain arrays alone it is JAX's business, and must cost nothing.
        @quax.register(primitive, precedence=1)
        def _(*operands: ArrayLike, **params):
            return primitive.bind(*operands, **params)

        return rule

    return decorate


def lowered_or_array(x):
    return lower(x) if isinstance(x, AdaptedArray) else as_array(x)


def distribute(w: LoraArray, on_base, delta, others: Sequence):
    """`on_base(base) + delta`, unsummed where `delta` is still low rank.

    A result that is still a `LoraArray` stops the gradient at its base when it is used.
    If something that may itself be differentiated went into the base, only the old base
    must be stopped, so that is done now. What may be is told by its type, and not by
    whether it is traced: a program gives the same structures eagerly and compiled.
    """
    several = isinstance(delta, list)
    deltas = delta if several else [delta]
    lazy = all(isinstance(d, LowRankArray) for d in deltas)
    alone = lazy and not any(jnp.issubdtype(x.dtype, jnp.inexact) for x in others)
    bases = on_base(w.base if alone else w.frozen_base())
    out = [
        replace(w, base=base, delta=d, stopped=w.stopped or not alone)
        if isinstance(d, LowRankArray)
        else stored(add(base, d))
        for base, d in zip(bases if several else [bases], deltas)
    ]
    return out if several else out[0]


def settle(delta: LowRankArray):
    """An array without rows, or without columns, is a vector: nothing is saved."""
    return delta if delta.rows and delta.cols else delta.product()
