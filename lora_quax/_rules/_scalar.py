"""Casts, signs and scalars. A scalar is taken up by `b`, so that it may be traced."""

import jax.numpy as jnp
from jax import lax

from .._array import LowRankArray
from ._join import times
from ._register import linear, NotLazy


@linear(lax.convert_element_type_p)
def convert_element_type(w: LowRankArray, *, new_dtype, **params):
    del params
    if not jnp.issubdtype(new_dtype, jnp.floating):
        raise NotLazy(f"a cast to {jnp.dtype(new_dtype).name} is not linear")
    return w.replace(a=w.a.astype(new_dtype), b=w.b.astype(new_dtype))


@linear(lax.neg_p)
def neg(w: LowRankArray):
    return w.replace(b=-w.b)


def _multiply(w: LowRankArray, x, params):
    if jnp.shape(x) or any(value is not None for value in params.values()):
        raise NotLazy("a product element by element has no low rank")
    return w.replace(b=times(w.b, x))


@linear(lax.mul_p)
def mul(w: LowRankArray, x, **params):
    return _multiply(w, x, params)


@linear(lax.mul_p, operand=1)
def rmul(x, w: LowRankArray, **params):
    return _multiply(w, x, params)


@linear(lax.div_p)
def div(w: LowRankArray, x, **params):
    if jnp.shape(x) or any(value is not None for value in params.values()):
        raise NotLazy("a quotient element by element has no low rank")
    return w.replace(b=w.b / jnp.asarray(x, w.b.dtype))
