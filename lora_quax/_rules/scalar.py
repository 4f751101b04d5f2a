"""Casts, signs, and products with scalars and diagonals.

A scalar is taken up by `b`, so that it may be traced. So is anything that is constant
along the columns, a scale for each row or batch index; and what is constant along the
rows is taken up by `a`. `vmap` of a scalar is such an array, `(batch, 1, 1)`.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax

from .._arrays.base import replace
from .._arrays.check import wider
from .._arrays.low_rank import LowRankArray
from .layout import COL, expand, groups, ROW
from .register import linear, NotLazy


@linear(lax.convert_element_type_p)
def convert_element_type(w: LowRankArray, *, new_dtype, **params):
    del params
    if not jnp.issubdtype(new_dtype, jnp.inexact):
        raise NotLazy(f"a cast to {jnp.dtype(new_dtype).name} is not linear")
    was_complex = jnp.issubdtype(w.dtype, jnp.complexfloating)
    if was_complex and not jnp.issubdtype(new_dtype, jnp.complexfloating):
        raise NotLazy("the real part of a product is not that of its factors")
    return replace(w, a=w.a.astype(new_dtype), b=w.b.astype(new_dtype))


@linear(lax.neg_p)
def neg(w: LowRankArray):
    return replace(w, b=-w.b)


def scaled_low_rank(w: LowRankArray, x, apply: Callable = jnp.multiply):
    """`apply(factor, scale)` of the factor with all axes along which `x` varies.

    **Raises:** `NotLazy` if it varies along rows and along columns.
    """
    shape = jnp.broadcast_shapes(w.shape, jnp.shape(x))
    x = jnp.broadcast_to(x, (1,) * (len(shape) - jnp.ndim(x)) + jnp.shape(x))
    w = expand(w, shape)
    varies = {group for group, n in zip(groups(w), x.shape) if n != 1}
    if {ROW, COL} <= varies:
        raise NotLazy("a product element by element with a full array has no low rank")
    a_labels, b_labels, _ = w.labels

    def on(factor, labels):
        # Axes of x that the factor does not hold have length 1; its rank axis is new.
        axes = [i for i in labels if i != "rank"]
        scale = x.reshape([x.shape[i] for i in axes])
        scale = jnp.expand_dims(scale, labels.index("rank"))
        # The scale is of the array's type, which may be wider than the factor's.
        wide = wider(factor.dtype, scale.dtype)
        return apply(factor.astype(wide), scale.astype(wide))

    if COL in varies:
        return replace(w, a=on(w.a, a_labels))
    return replace(w, b=on(w.b, b_labels))


@linear(lax.mul_p)
def mul(w: LowRankArray, x, **params):
    refuse_params(params)
    return scaled_low_rank(w, x)


@linear(lax.mul_p, operand=1)
def rmul(x, w: LowRankArray, **params):
    refuse_params(params)
    return scaled_low_rank(w, x)


@linear(lax.div_p)
def div(w: LowRankArray, x, **params):
    refuse_params(params)
    return scaled_low_rank(w, x, jnp.divide)


def refuse_params(params) -> None:
    """What a primitive without parameters may be given by a later JAX is not known."""
    given = [f"{name}={value!r}" for name, value in params.items() if value is not None]
    if given:
        raise NotLazy(f"it has {', '.join(given)}")
