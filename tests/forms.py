"""Forms of adaptation: those of lora_quax, and two that it has never heard of, each of
which is a class of a few lines.

Each comes with a function that makes one of a `LoraArray`, with other factors beside
those that it has there, and with its oracle: the dense array written out, apart from
`lower`. By its entry in `FORMS` it is a kind in the tables of `helpers`.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from lora_quax import (
    AbstractDelta,
    AdaptedArray,
    DoRA,
    IA3,
    LoHa,
    LoKr,
    LoraArray,
    LowRankArray,
    role,
    Rows,
    ScaledArray,
    VeRA,
)


class OneOfSeveral(AbstractDelta):
    """One of several updates, by its number: an adapter for each user, say."""

    updates: LowRankArray  # (*batch, number, *rows, *cols)
    index: Array = role("frozen")  # (*batch,)

    def lower(self):
        choose = lambda factor, i: factor[i]
        for _ in range(self.index.ndim):
            choose = jax.vmap(choose)
        w = self.updates
        return like(self, w, choose(w.a, self.index), choose(w.b, self.index))


class ScaledRows(AdaptedArray):
    """A weight and its update, of whose sum the rows are scaled, as DoRA does."""

    w: LoraArray
    scale: Array = role("scale")  # (*batch, *rows)

    @property
    def allow_materialise(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.w.allow_materialise

    def lower(self):
        scale = self.scale
        scale = scale.reshape(*scale.shape, *(1,) * (self.w.ndim - scale.ndim))
        allow = self.allow_materialise
        return ScaledArray(self.w, scale, stop_gradient=False, allow_materialise=allow)


def like(delta: AbstractDelta, w: LowRankArray, a, b, scaling=1.0) -> LowRankArray:
    """What `delta` lowers to: factors laid out and scaled as those of `w`."""
    return LowRankArray(
        a,
        b,
        alpha=scaling * w.scaling * b.shape[-1],
        rows=w.rows,
        cols=w.cols,
        allow_materialise=delta.allow_materialise,
    )


# Each of a `LoraArray`, with numbers as uneven as the factors it has.


def _uneven(shape, dtype, seed: float):
    return jnp.cos(seed + jnp.arange(math.prod(shape))).reshape(shape).astype(dtype)


def _with(w: LoraArray, form: type, *parts) -> LoraArray:
    delta = form(*parts, allow_materialise=w.allow_materialise)
    return LoraArray.from_parts(w.base, delta, stop_gradient=w.stop_gradient)


def _factors(w: LowRankArray, a_shape, b_shape, seed: float) -> LowRankArray:
    a, b = _uneven(a_shape, w.a.dtype, seed), _uneven(b_shape, w.b.dtype, seed + 1)
    return LowRankArray(
        a,
        b,
        alpha=1.5 * b.shape[-1],
        rows=w.rows,
        cols=w.cols,
        allow_materialise=w.allow_materialise,
    )


def vera(w: LoraArray) -> LoraArray:
    d, n = w.delta, w.delta.n_batch
    inner = _uneven(d.a.shape[: n + 1], d.a.dtype, 1.0)
    return _with(w, VeRA, d, inner, _uneven(d.b.shape[:-1], d.b.dtype, 2.0))


def loha(w: LoraArray) -> LoraArray:
    return _with(w, LoHa, w.delta, _factors(w.delta, w.a.shape, w.b.shape, 3.0))


def _divisor(n: int) -> int:
    return next((k for k in (2, 3) if n and n % k == 0), 1)


def lokr(w: LoraArray) -> LoraArray:
    n, (r, i, *cols) = w.delta.n_batch, w.a.shape[w.delta.n_batch :]
    batch, (o, *rows) = w.b.shape[:n], w.b.shape[n:-1]
    p, q = _divisor(o), _divisor(i)
    inner = (*batch, r, i // q, *cols), (*batch, o // p, *rows, r)
    small = _uneven((*batch, p, q), w.a.dtype, 4.0)
    large, d = _factors(w.delta, *inner, 5.0), w.delta
    return _with(w, LoKr, d.rank, d.alpha, d.rows, d.cols, small, large)


def rows(w: LoraArray) -> LoraArray:
    """The first and the last row. Of several axes of rows none is chosen."""
    n, d = w.delta.n_batch, w.delta
    batch, size = w.b.shape[:n], w.b.shape[n]
    if d.rows != 1 or size < 2:
        return w
    values = _uneven((*batch, 2, *w.a.shape[n + 1 :]), w.a.dtype, 9.0)
    indices = jnp.broadcast_to(jnp.array([size - 1, 0], jnp.int32), (*batch, 2))
    return _with(w, Rows, size, d.cols, values, indices)


def chosen(w: LoraArray) -> LoraArray:
    n, number = w.delta.n_batch, 3
    a, b = ((*y.shape[:n], number, *y.shape[n:]) for y in (w.a, w.b))
    index = jnp.arange(math.prod(w.a.shape[:n])).reshape(w.a.shape[:n]) + 1
    index = index.astype(jnp.int32) % number
    return _with(w, OneOfSeveral, _factors(w.delta, a, b, 6.0), index)


def ia3(w: LoraArray) -> IA3:
    scale = _uneven(w.b.shape[:-1], w.b.dtype, 7.0) + 1.5
    scale = scale.reshape(*scale.shape, *(1,) * w.delta.cols)
    make: Any = IA3  # A type checker takes the policy for a field of every form.
    return make(False, True, w.allow_materialise, w.base, scale)


def scaled_rows(w: LoraArray) -> ScaledRows:
    make: Any = ScaledRows
    return make(w, _uneven(w.b.shape[:-1], w.b.dtype, 8.0) + 1.5)


def dora(w: LoraArray) -> DoRA:
    return DoRA.from_parts(w, _uneven(w.b.shape[:-1], w.b.dtype, 9.0) + 1.5)


FORMS = {
    "vera": vera,
    "loha": loha,
    "lokr": lokr,
    "rows": rows,
    "chosen": chosen,
    "ia3": ia3,
    "scaled rows": scaled_rows,
    "dora": dora,
}
SCALED = "ia3", "scaled rows", "dora"  # That lower to a `ScaledArray`.


# The oracles: functions of the array, and of one for the arrays inside it.


def _dense_vera(x: VeRA, dense):
    w = lax.stop_gradient(x.shared)
    n, r = w.n_batch, w.rank
    batch, rows, cols = w.b.shape[:n], w.b.shape[n:-1], w.a.shape[n + 1 :]
    out, b = x.lambda_b.reshape(*batch, -1), w.b.reshape(*batch, -1, r)
    a = w.a.reshape(*batch, r, -1)
    total = jnp.einsum("...o,...or,...r,...ri->...oi", out, b, x.lambda_d, a)
    return total.reshape(*batch, *rows, *cols) * (w.alpha / r)


def _dense_lokr(x: LoKr, dense):
    w1, w2 = dense(x.w1), dense(x.w2)
    n, (p, q) = w1.ndim - 2, w1.shape[-2:]
    batch, (o, *rows), (i, *cols) = (
        w2.shape[:n],
        w2.shape[n : n + x.rows],
        w2.shape[n + x.rows :],
    )
    flat = w2.reshape(*batch, o, math.prod(rows), i, math.prod(cols))
    out = jnp.einsum("...pq,...oris->...porqis", w1, flat) * (x.alpha / x.rank)
    return out.reshape(*batch, p * o, *rows, q * i, *cols)


def _dense_rows(x: Rows, dense):
    n = x.indices.ndim - 1
    shape = x.values.shape[:n], (x.n_rows, *x.values.shape[n + 1 :])
    flat = (
        x.values.reshape(-1, *x.values.shape[n:]),
        x.indices.reshape(-1, x.indices.shape[-1]),
    )
    zeros = jnp.zeros(shape[1], x.values.dtype)
    out = [zeros.at[ids].add(values) for values, ids in zip(*flat)]
    return jnp.stack(out).reshape(*shape[0], *shape[1]) if out else zeros[None][:0]


def _dense_one_of_several(x: OneOfSeveral, dense):
    """The sum over all updates, of which one is taken once, and the others never."""
    w, n = dense(x.updates), x.index.ndim
    one_hot = jax.nn.one_hot(x.index, w.shape[n], dtype=w.dtype)
    flat = w.reshape(*w.shape[: n + 1], -1)
    out = jnp.einsum("...k,...kx->...x", one_hot, flat)
    return out.reshape(*w.shape[:n], *w.shape[n + 1 :])


def _rows_scaled(w, scale):
    labels = "abcdefgh"[: w.ndim]
    out = jnp.einsum(f"{labels},{labels[: scale.ndim]}->{labels}", w, scale)
    return out.astype(w.dtype)


def _dense_dora(x: DoRA, dense):
    w = dense(x.lora)
    if x.per == "rows":
        over = range(x.magnitude.ndim, w.ndim)
    else:  # Of rows there is one axis.
        over = [x.lora.b.ndim - 2]
    norm = jnp.sqrt(jnp.square(w).sum(tuple(over), keepdims=True))
    norm = lax.stop_gradient(norm) if x.detached else norm
    return (w * x.magnitude.reshape(norm.shape) / norm).astype(w.dtype)


ORACLES = {
    VeRA: _dense_vera,
    LoHa: lambda x, dense: dense(x.w1) * dense(x.w2),
    LoKr: _dense_lokr,
    Rows: _dense_rows,
    OneOfSeveral: _dense_one_of_several,
    IA3: lambda x, dense: (lax.stop_gradient(dense(x.base)) * x.scale).astype(x.dtype),
    ScaledRows: lambda x, dense: _rows_scaled(dense(x.w), x.scale),
    DoRA: _dense_dora,
}
