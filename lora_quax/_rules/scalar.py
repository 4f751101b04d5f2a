"""Casts, signs, and products with scalars and diagonals.

A scalar is taken up by `b`, so that it may be traced. So is anything that is constant
along the columns, a scale for each row or batch index; and what is constant along the
rows is taken up by `a`. `vmap` of a scalar is such an array, `(batch, 1, 1)`.
"""

import jax.numpy as jnp
from jax import lax

from .._arrays.array import LowRankArray
from .layout import COL, expand, groups, ROW
from .register import linear, NotLazy


@linear(lax.convert_element_type_p)
def convert_element_type(w: LowRankArray, *, new_dtype, **params):
    del params
    if not jnp.issubdtype(new_dtype, jnp.inexact):
        raise NotLazy(f"a cast to {jnp.dtype(new_dtype).name} is not linear")
    return w.replace(a=w.a.astype(new_dtype), b=w.b.astype(new_dtype))


@linear(lax.neg_p)
def neg(w: LowRankArray):
    return w.replace(b=-w.b)


def _scale(w: LowRankArray, x, params, apply) -> LowRankArray:
    """`apply(factor, scale)` of the factor with all axes along which `x` varies."""
    shape = jnp.broadcast_shapes(w.shape, jnp.shape(x))
    x = jnp.broadcast_to(x, (1,) * (len(shape) - jnp.ndim(x)) + jnp.shape(x))
    w = expand(w, shape)
    varies = {group for group, n in zip(groups(w), x.shape) if n != 1}
    if {ROW, COL} <= varies or any(value is not None for value in params.values()):
        raise NotLazy("a product element by element with a full array has no low rank")
    a_labels, b_labels, _ = w.labels

    def on(factor, labels):
        # Axes of x that the factor does not hold have length 1; its rank axis is new.
        axes = [i for i in labels if i != "rank"]
        scale = x.reshape([x.shape[i] for i in axes])
        scale = jnp.expand_dims(scale, labels.index("rank"))
        return apply(factor, scale.astype(factor.dtype))

    if COL in varies:
        return w.replace(a=on(w.a, a_labels))
    return w.replace(b=on(w.b, b_labels))


@linear(lax.mul_p)
def mul(w: LowRankArray, x, **params):
    return _scale(w, x, params, jnp.multiply)


@linear(lax.mul_p, operand=1)
def rmul(x, w: LowRankArray, **params):
    return _scale(w, x, params, jnp.multiply)


@linear(lax.div_p)
def div(w: LowRankArray, x, **params):
    return _scale(w, x, params, jnp.divide)
