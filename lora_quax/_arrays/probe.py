"""An update that is zero, and whose gradient says what it is multiplied with."""

import functools as ft
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import quax

from .base import make, replace
from .check import aval_of, default_dtype
from .low_rank import LowRankArray


# How many random numbers a vector is counted by.
_MARKS = 8


class Probe(LowRankArray):
    """The update `b · a` with `b = 0`, and `a` the identity with a few rows below it.

    A product takes `z = a · x` and then `b · z`, which is zero, so nothing changes. But
    the cotangent of `z` is another one: of the part of `z` that is `x` it is `x`. So
    the gradient of `a`, which is `Σ z̄ · xᵀ`, has the rows

        Σ x · xᵀ,  Σ 1 · xᵀ,  Σ (y / |y|²) · xᵀ,  where y = R · x,

    and autodiff takes the sum over every vector, loop, batch and use of the weight. `R`
    is random, and the trace of the last part times `Rᵀ` is how many vectors there were
    that are not zero. What stands with a convolution is a patch of its input.

    A weight that is kept as `(in, out)` is multiplied with data along its rows. There
    `a` and `b` change places.
    """

    form = "probe"

    # How many ranks belong together: weights that are joined have several times as
    # many.
    unit: int = eqx.field(static=True, kw_only=True)
    in_out: bool = eqx.field(static=True, kw_only=True)

    @property
    def factor(self) -> jax.Array:
        """The one of the two that data are multiplied with."""
        return self.b if self.in_out else self.a

    def with_factor(self, factor: jax.Array) -> "Probe":
        return replace(self, **{"b" if self.in_out else "a": factor})

    def read(self, gradient: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The number of vectors, their sum, and that of their products, `(*batch,)`,
        `(*batch, n)` and `(*batch, n, n)`, by the gradient of the factor."""
        n = self.n_batch
        if self.in_out:
            gradient = jnp.moveaxis(gradient, -1, n)
        rows = gradient.reshape(*gradient.shape[: n + 1], -1)
        size = rows.shape[-1]
        second, first, rest = jnp.split(rows, [size, size + 1], axis=-2)
        marks = _marks(size, gradient.dtype)
        count = jnp.round(jnp.sum(rest * marks, axis=(-2, -1)))
        return count, first[..., 0, :], second

    def between(self, z: Any, axis: int) -> Any:
        if isinstance(z, quax.Value):  # A product of two weights, and no data.
            return z
        # A convolution with groups has `z` for each of them.
        axis %= z.ndim
        shape = (*z.shape[:axis], -1, self.unit, *z.shape[axis + 1 :])
        return _recorded(z.reshape(shape), axis + 1).reshape(z.shape)


def probe(w: Any, delta: LowRankArray, *, in_out: bool) -> Probe:
    """That in the place of an update."""
    n = delta.n_batch
    batch, row_shape = w.shape[:n], w.shape[n : n + delta.rows]
    col_shape = w.shape[n + delta.rows :]
    size = math.prod(row_shape if in_out else col_shape)
    dtype = default_dtype(aval_of(w))
    unit = size + 1 + _MARKS
    below = jnp.zeros((1, size), dtype)
    x = jnp.concatenate([jnp.eye(size, dtype=dtype), below, _marks(size, dtype)])
    a, b = jnp.zeros((unit, *col_shape), dtype), jnp.zeros((*row_shape, unit), dtype)
    if in_out:
        b = x.T.reshape(b.shape)
    else:
        a = x.reshape(a.shape)
    return make(
        Probe,
        a=jnp.broadcast_to(a, (*batch, *a.shape)),
        b=jnp.broadcast_to(b, (*batch, *b.shape)),
        rank=unit,
        alpha=float(unit),
        rows=delta.rows,
        cols=delta.cols,
        allow_materialise=delta.allow_materialise,
        unit=unit,
        in_out=in_out,
    )


def _marks(size: int, dtype):
    return jr.normal(jr.key(0), (_MARKS, size), dtype)


@ft.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _recorded(z, axis):
    del axis
    return z


def _forward(z, axis):
    del axis
    return z, z


def _backward(axis, z, _):
    n = z.shape[axis] - 1 - _MARKS
    x, one, y = jnp.split(z, [n, n + 1], axis=axis)
    squares = jnp.sum(y**2, axis, keepdims=True)
    y = jnp.where(squares > 0, y / jnp.where(squares > 0, squares, 1), 0)
    return (_once(jnp.concatenate([x, jnp.ones_like(one), y], axis)),)


_recorded.defvjp(_forward, _backward)


@jax.custom_jvp
def _once(x):
    return x


@_once.defjvp
def _(primals, tangents):
    raise ValueError(
        "The function given to `input_moments` takes a derivative of what a weight "
        "computes; there the moments would be mixed into it. Give it the part that "
        "takes none."
    )
