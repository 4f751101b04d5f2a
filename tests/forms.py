"""Forms of adaptation that lora_quax has never heard of, each a class of a few lines.

Each comes with a function that makes one of a `LoraArray`, with other factors beside
those that it has there, and with its oracle: the dense array written out, apart from
`lower`. By its entry in `FORMS` it is a kind in the tables of `helpers`.
"""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array, lax

from lora_quax import (
    AbstractDelta,
    AdaptedArray,
    DoRA,
    LoraArray,
    LowRankArray,
    role,
    ScaledArray,
)


class Vera(AbstractDelta):
    """`diag(out) B diag(inner) A`: of factors that stay as they are, two vectors train.

    Kopiczko et al., *VeRA: Vector-based Random Matrix Adaptation*, arXiv 2310.11454.
    """

    shared: LowRankArray = role("frozen")
    inner: Array = role("inner")  # (*batch, rank)
    out: Array = role("out")  # (*batch, *rows)

    def lower(self):
        w = lax.stop_gradient(self.shared)
        a = w.a * jnp.expand_dims(self.inner, range(-w.cols, 0))
        b = w.b * self.out[..., None]
        return like(self, w, a, b)


class LoHa(AbstractDelta):
    """The product, element by element, of two low-rank arrays: of rank r².

    Hyeon-Woo et al., *FedPara*, arXiv 2108.06098.
    """

    x: LowRankArray
    y: LowRankArray

    def lower(self):
        x, y, n, r = self.x, self.y, self.x.n_batch, self.x.rank * self.y.rank
        b = x.b[..., :, None] * y.b[..., None, :]
        a = jnp.expand_dims(x.a, n + 1) * jnp.expand_dims(y.a, n)
        a = a.reshape(*a.shape[:n], r, *a.shape[n + 2 :])
        return like(self, x, a, b.reshape(*b.shape[:-2], r), y.scaling)


class LoKr(AbstractDelta):
    """The Kronecker product of a small matrix and a low-rank array, `c ⊗ (b · a)`.

    Of several axes of rows, and of columns, it is taken along the first. Of rank p · r:
    `Σ_{k,r} δ[p, k] b[o, r] · c[k, q] a[r, i]`.

    Yeh et al., *Navigating Text-To-Image Customization*, arXiv 2309.14859.
    """

    c: Array = role("c")  # (*batch, p, q)
    w: LowRankArray = role()

    def lower(self):
        def factors(c, a, b):
            (p, q), (r, i, *_), o = c.shape, a.shape, b.shape[0]
            b = jnp.einsum("pk,o...r->po...kr", jnp.eye(p, dtype=b.dtype), b)
            a = jnp.einsum("kq,ri...->krqi...", c, a)
            b = b.reshape(p * o, *b.shape[2:-2], p * r)
            return a.reshape(p * r, q * i, *a.shape[4:]), b

        for _ in range(self.w.n_batch):
            factors = jax.vmap(factors)
        return like(self, self.w, *factors(self.c, self.w.a, self.w.b))


class Chosen(AbstractDelta):
    """One of several updates, by its number: an adapter for each user, say."""

    updates: LowRankArray  # (*batch, number, *rows, *cols)
    index: Array = role("frozen")  # (*batch,)

    def lower(self):
        choose = lambda factor, i: factor[i]
        for _ in range(self.index.ndim):
            choose = jax.vmap(choose)
        w = self.updates
        return like(self, w, choose(w.a, self.index), choose(w.b, self.index))


class IA3(AdaptedArray):
    """A frozen weight of which the rows are scaled.

    Liu et al., *Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than
    In-Context Learning*, arXiv 2205.05638.
    """

    base: Array = role("base")  # (*batch, *rows, *cols)
    scale: Array = role("scale")  # (*batch, *rows)
    allow_materialise: bool = eqx.field(static=True, default=False)

    def lower(self):
        scale = self.scale
        scale = scale.reshape(*scale.shape, *(1,) * (self.base.ndim - scale.ndim))
        allow = self.allow_materialise
        return ScaledArray(self.base, scale, allow_materialise=allow)


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
    return _with(w, Vera, d, inner, _uneven(d.b.shape[:-1], d.b.dtype, 2.0))


def loha(w: LoraArray) -> LoraArray:
    return _with(w, LoHa, w.delta, _factors(w.delta, w.a.shape, w.b.shape, 3.0))


def _divisor(n: int) -> int:
    return next((k for k in (2, 3) if n and n % k == 0), 1)


def lokr(w: LoraArray) -> LoraArray:
    n, (r, i, *cols) = w.delta.n_batch, w.a.shape[w.delta.n_batch :]
    batch, (o, *rows) = w.b.shape[:n], w.b.shape[n:-1]
    p, q = _divisor(o), _divisor(i)
    inner = (*batch, r, i // q, *cols), (*batch, o // p, *rows, r)
    c = _uneven((*batch, p, q), w.a.dtype, 4.0)
    return _with(w, LoKr, c, _factors(w.delta, *inner, 5.0))


def chosen(w: LoraArray) -> LoraArray:
    n, number = w.delta.n_batch, 3
    a, b = ((*y.shape[:n], number, *y.shape[n:]) for y in (w.a, w.b))
    index = jnp.arange(math.prod(w.a.shape[:n])).reshape(w.a.shape[:n]) + 1
    index = index.astype(jnp.int32) % number
    return _with(w, Chosen, _factors(w.delta, a, b, 6.0), index)


def ia3(w: LoraArray) -> IA3:
    scale = _uneven(w.b.shape[:-1], w.b.dtype, 7.0) + 1.5
    make: Any = IA3  # A type checker takes the policy for a field of every form.
    return make(w.base, scale, w.allow_materialise)


def scaled_rows(w: LoraArray) -> ScaledRows:
    make: Any = ScaledRows
    return make(w, _uneven(w.b.shape[:-1], w.b.dtype, 8.0) + 1.5)


def dora(w: LoraArray) -> DoRA:
    return DoRA.from_parts(w, _uneven(w.b.shape[:-1], w.b.dtype, 9.0) + 1.5)


FORMS = {
    "vera": vera,
    "loha": loha,
    "lokr": lokr,
    "chosen": chosen,
    "ia3": ia3,
    "scaled rows": scaled_rows,
    "dora": dora,
}
SCALED = "ia3", "scaled rows", "dora"  # That lower to a `ScaledArray`.


# The oracles: functions of the array, and of one for the arrays inside it.


def _dense_vera(x: Vera, dense):
    w = lax.stop_gradient(x.shared)
    n, r = w.n_batch, w.rank
    batch, rows, cols = w.b.shape[:n], w.b.shape[n:-1], w.a.shape[n + 1 :]
    out, b = x.out.reshape(*batch, -1), w.b.reshape(*batch, -1, r)
    a = w.a.reshape(*batch, r, -1)
    total = jnp.einsum("...o,...or,...r,...ri->...oi", out, b, x.inner, a)
    return total.reshape(*batch, *rows, *cols) * (w.alpha / r)


def _dense_lokr(x: LoKr, dense):
    n, w, (p, q) = x.w.n_batch, dense(x.w), x.c.shape[-2:]
    batch, (o, *rows), (i, *cols) = (
        w.shape[:n],
        w.shape[n : n + x.w.rows],
        w.shape[n + x.w.rows :],
    )
    flat = w.reshape(*batch, o, math.prod(rows), i, math.prod(cols))
    out = jnp.einsum("...pq,...oris->...porqis", x.c, flat)
    return out.reshape(*batch, p * o, *rows, q * i, *cols)


def _dense_chosen(x: Chosen, dense):
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
    Vera: _dense_vera,
    LoHa: lambda x, dense: dense(x.x) * dense(x.y),
    LoKr: _dense_lokr,
    Chosen: _dense_chosen,
    IA3: lambda x, dense: _rows_scaled(lax.stop_gradient(x.base), x.scale),
    ScaledRows: lambda x, dense: _rows_scaled(dense(x.w), x.scale),
    DoRA: _dense_dora,
}
