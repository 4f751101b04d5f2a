"""LoKr: the Kronecker product of a small matrix and a larger one."""

import functools as ft
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, PRNGKeyArray

from .. import init as _init
from .._arrays.base import AbstractDelta, make, role
from .._arrays.check import check_alpha, check_axes, check_flag, check_rank, wider
from .._arrays.low_rank import LowRankArray


class LoKr(AbstractDelta):
    """The update `scaling · w1 ⊗ w2`, the Kronecker product of two arrays.

    ```python
    model = lora_quax.loraify(model, rank=8, key=key, update=lora_quax.LoKr)
    ```

    Of a weight `(p · o, q · i)` the first is `(p, q)` and the second `(o, i)`; of a
    kernel, or of other axes of rows, the product is taken along the first axis of each.
    Either of the two may be a `LowRankArray`; most often the second is, and the first
    is a plain matrix.

    It is exactly of rank `rank(w1) · rank(w2)`, and of that rank it is computed: with a
    plain `w1` of `(64, 64)` and a `w2` of rank 8, of rank 512.

    Yeh et al., *Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to
    Model Evaluation*, arXiv 2309.14859, as PEFT has it.
    """

    form = "lokr"

    rank: int = eqx.field(static=True)
    alpha: float = eqx.field(static=True)
    rows: int = eqx.field(static=True)
    cols: int = eqx.field(static=True)
    w1: Array | LowRankArray = role("w1")  # (*batch, p, q)
    w2: Array | LowRankArray = role("w2")  # (*batch, o, *rows, i, *cols)

    def __check_init__(self):
        axes = (self.w1, 1, 1), (self.w2, self.rows, self.cols)
        for w, rows, cols in axes:
            if isinstance(w, LowRankArray) and (w.rows, w.cols) != (rows, cols):
                raise ValueError(
                    f"A factor of LoKr has {rows} axes of rows and {cols} of columns; "
                    f"got one of {w.rows} and {w.cols}."
                )
        w1, w2 = (len(_shape(w)) - rows - cols for w, rows, cols in axes)
        if w1 != w2 or w1 < 0 or _shape(self.w1)[:w1] != _shape(self.w2)[:w2]:
            raise ValueError(
                "`w1` must be (*batch, p, q) and `w2` (*batch, *rows, *cols); got "
                f"arrays of shapes {_shape(self.w1)} and {_shape(self.w2)}, of which "
                f"the second has {self.rows} axes of rows and {self.cols} of columns."
            )

    @classmethod
    def init(
        cls,
        shape: tuple[int, ...],
        *,
        rank: int,
        key: PRNGKeyArray,
        alpha: Any = None,
        factor: int = -1,
        both: bool = False,
        dtype: Any = jnp.float32,
        rows: int = 1,
        cols: int = 1,
        allow_materialise: bool = False,
    ) -> "LoKr":
        """Draws an update of zero, as PEFT does: all is uniform on ±1/√fan_in but `w1`,
        or its factor `b`, which is zero.

        **Arguments:**

        - `shape`: of the weight, `(*batch, *rows, *cols)`.
        - `rank`: of `w2`. Where that would not make it smaller, which is from half of
            its longer side on, it is a plain array.
        - `alpha`: the update is scaled by `alpha / rank`; defaults to the rank.
        - `factor`: the size of `w1`, PEFT's `decompose_factor`: of each side the factor
            itself, if it divides that, and else the largest divisor that is less and
            that is not above the square root. -1 is for the square root.
        - `both`: whether `w1` is of this rank as well, by the same rule: PEFT's
            `decompose_both`.
        - the others: as for `LoraArray`.

        **Raises:** as `LoraArray`; `ValueError` if `factor` is no size.
        """
        rank = check_rank(rank)
        alpha = check_alpha(alpha, rank)
        both = check_flag("both", both)
        is_size = isinstance(factor, int) and not isinstance(factor, bool)
        if not is_size or factor < 1 and factor != -1:
            raise ValueError(
                f"`factor` must be a positive integer or -1, got {factor!r}."
            )
        check_axes(shape, rows, cols, least=1)
        n = len(shape) - rows - cols
        p, o = divided(shape[n], factor)
        q, i = divided(shape[n + rows], factor)
        draw = ft.partial(_drawn, batch=shape[:n], rank=rank, dtype=dtype)
        small = (p,), (q,)
        large = (o, *shape[n + 1 : n + rows]), (i, *shape[n + rows + 1 :])
        k1, k2 = jr.split(key)
        return cls(
            rank=rank,
            alpha=alpha,
            rows=rows,
            cols=cols,
            w1=draw(k1, *small, factored=both and 2 * rank < max(p, q), zero=True),
            w2=draw(k2, *large, factored=2 * rank < max(o, i)),
            allow_materialise=allow_materialise,
        )

    @property
    def scaling(self) -> float:
        """`alpha / rank`."""
        return self.alpha / self.rank

    def lower(self) -> LowRankArray:
        a1, b1, scaling1 = _factors(self.w1, 1, 1)
        a2, b2, scaling2 = _factors(self.w2, self.rows, self.cols)

        # Σ_kr (b1[p, k] b2[o, r]) (a1[k, q] a2[r, i]).
        def product(a1, b1, a2, b2):
            b = jnp.einsum("pk,o...r->po...kr", b1, b2)
            a = jnp.einsum("kq,ri...->krqi...", a1, a2)
            (p, o, *rows), (k, r) = b.shape[:-2], b.shape[-2:]
            q, i, *cols = a.shape[2:]
            return a.reshape(k * r, q * i, *cols), b.reshape(p * o, *rows, k * r)

        for _ in range(a1.ndim - 2):
            product = jax.vmap(product)
        dtype = wider(a1.dtype, b1.dtype, a2.dtype, b2.dtype)
        a, b = product(*(x.astype(dtype) for x in (a1, b1, a2, b2)))
        rank = b.shape[-1]
        return make(
            LowRankArray,
            a=a,
            b=b,
            rank=rank,
            alpha=self.scaling * scaling1 * scaling2 * rank,
            rows=self.rows,
            cols=self.cols,
            allow_materialise=self.allow_materialise,
        )


def _shape(w) -> tuple[int, ...]:
    return tuple(w.aval().shape if isinstance(w, LowRankArray) else w.shape)


def _factors(w, rows: int, cols: int) -> tuple[Array, Array, float]:
    """An array as two factors, and a scaling: a plain one is one of them, and the other
    is an identity."""
    if isinstance(w, LowRankArray):
        return w.a, w.b, w.scaling
    n = w.ndim - rows - cols
    batch, row_shape = w.shape[:n], w.shape[n : n + rows]
    col_shape = w.shape[n + rows :]
    o, i = math.prod(row_shape), math.prod(col_shape)
    rank = min(o, i)
    one = jnp.broadcast_to(jnp.eye(rank, dtype=w.dtype), (*batch, rank, rank))
    a, b = (w, one) if o <= i else (one, w)
    a, b = a.reshape(*batch, rank, *col_shape), b.reshape(*batch, *row_shape, rank)
    return a, b, 1.0


def _drawn(
    key: PRNGKeyArray,
    row_shape: tuple[int, ...],
    col_shape: tuple[int, ...],
    *,
    batch: tuple[int, ...],
    rank: int,
    dtype: Any,
    factored: bool,
    zero: bool = False,
) -> Array | LowRankArray:
    init = _init.zeros if zero else _init.uniform
    shape = (*batch, *row_shape, *col_shape)
    if factored:
        rows, cols = len(row_shape), len(col_shape)
        return LowRankArray.init(
            shape, rank=rank, key=key, init_b=init, dtype=dtype, rows=rows, cols=cols
        )
    # A matrix of the initialisers is (fan_in, fan_out), the transpose of ours.
    sizes = math.prod(col_shape), math.prod(row_shape)
    keys = jr.split(key, math.prod(batch))
    x = jax.vmap(lambda key: init(key, sizes, dtype).T)(keys)
    return x.reshape(shape)


def divided(n: int, factor: int) -> tuple[int, int]:
    """`n` as a product: the factor and the rest, or else two divisors as near to one
    another as can be, of which the smaller is at most the factor."""
    if factor > 0 and n % factor == 0:
        return factor, n // factor
    most = math.isqrt(n) if factor == -1 else min(factor, math.isqrt(n))
    small = next(k for k in range(max(1, most), 0, -1) if n % k == 0)
    return small, n // small
