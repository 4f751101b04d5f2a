"""The algebra of `scaling · b · a`, which knows of no base."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.core import ShapedArray
from jaxtyping import Array, Float, PRNGKeyArray

from .. import init as _init
from .._compat import partition_spec, shaped_array
from ..init import Initialiser
from .base import AbstractDelta, role
from .check import (
    check_alpha,
    check_axes,
    check_factor_dtype,
    check_flag,
    check_key,
    check_rank,
    read_alpha,
    wider,
)
from .show import show
from .thin_dot import arrange, contract


class LowRankArray(AbstractDelta):
    """The array `scaling · Σ_r b[..., r] · a[r, ...]`, kept as its two factors.

    Its shape is `(*batch, *rows, *cols)`. How many axes are rows and how many are
    columns is static and counted from the end, so that a leading axis added by
    `eqx.filter_vmap`, or removed by `jax.lax.scan`, is a batch axis: nothing changes.

    It stands alone as the weight of a layer, or is the update inside a `LoraArray`.
    Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, arXiv 2106.09685.
    """

    form = "low_rank"

    rank: int = eqx.field(static=True)
    alpha: float = eqx.field(static=True)
    rows: int = eqx.field(static=True)
    cols: int = eqx.field(static=True)
    a: Float[Array, "..."] = role("a")  # (*batch, rank, *cols)
    b: Float[Array, "..."] = role("b")  # (*batch, *rows, rank)

    def __init__(
        self,
        a: Float[Array, "..."],
        b: Float[Array, "..."],
        *,
        alpha: Any = None,
        rows: int = 1,
        cols: int = 1,
        allow_materialise: bool = False,
    ):
        """**Arguments:**

        - `a`: `(*batch, rank, *cols)`.
        - `b`: `(*batch, *rows, rank)`.
        - `alpha`: the product is scaled by `alpha / rank`; defaults to the rank.
        - `rows`, `cols`: how many axes of the array are rows, and how many are columns.
        - `allow_materialise`: whether an operation that has no rule may form the
            product (true), or raises `MaterialiseError` (false, the default).

        **Raises:** `ValueError` if the shapes of the factors do not fit each other.
        """
        self.a = a
        self.b = b
        self.rank = b.shape[-1] if b.ndim else 0
        self.alpha = read_alpha(alpha, self.rank)
        self.rows = rows
        self.cols = cols
        self.allow_materialise = check_flag("allow_materialise", allow_materialise)

    def __check_init__(self):
        a, b, rows, cols = self.a, self.b, self.rows, self.cols
        n = a.ndim - 1 - cols  # How many axes are batch.
        if not (
            min(n, rows, cols) >= 0
            and b.ndim == n + rows + 1
            and a.shape[: n + 1] == (*b.shape[:n], self.rank)
            and b.shape[-1] == self.rank
        ):
            raise ValueError(
                "`a` must be (*batch, rank, *cols) and `b` (*batch, *rows, rank), with "
                f"{rows} axes of rows and {cols} of columns; got a of shape {a.shape} "
                f"and b of shape {b.shape}."
            )
        check_rank(self.rank)
        read_alpha(self.alpha, self.rank)

    @classmethod
    def init(
        cls,
        shape: tuple[int, ...],
        *,
        rank: int,
        key: PRNGKeyArray,
        alpha: Any = None,
        init_a: Initialiser = _init.uniform,
        init_b: Initialiser = _init.zeros,
        dtype: Any = jnp.float32,
        rows: int = 1,
        cols: int = 1,
        allow_materialise: bool = False,
    ) -> "LowRankArray":
        """Draws the factors of an array of shape `(*batch, *rows, *cols)`.

        **Arguments:**

        - `shape`: the shape of the array.
        - the others: as for `LoraArray`.

        **Raises:** as `LoraArray`.
        """
        rank = check_rank(rank)
        check_alpha(alpha, rank)
        check_key(key)
        check_factor_dtype(dtype)
        check_axes(shape, rows, cols)
        n = len(shape) - rows - cols
        batch, row_shape, col_shape = shape[:n], shape[n : n + rows], shape[n + rows :]
        a_key, b_key = jr.split(key)
        # Drawn as the maps cols -> rank -> rows, then laid out.
        a = _draw(init_a, a_key, batch, math.prod(col_shape), rank, dtype)
        b = _draw(init_b, b_key, batch, rank, math.prod(row_shape), dtype)
        return cls(
            jnp.swapaxes(a, -1, -2).reshape(*batch, rank, *col_shape),
            jnp.swapaxes(b, -1, -2).reshape(*batch, *row_shape, rank),
            alpha=alpha,
            rows=rows,
            cols=cols,
            allow_materialise=allow_materialise,
        )

    def lower(self) -> "LowRankArray":
        return self

    @property
    def scaling(self) -> float:
        """`alpha / rank`."""
        return self.alpha / self.rank

    @property
    def n_batch(self) -> int:
        """How many leading axes are batch axes.

        **Raises:** `ValueError` if there are fewer axes than rows and columns.
        """
        n = self.a.ndim - 1 - self.cols
        if n < 0 or self.b.ndim - 1 - self.rows != n:
            raise ValueError(
                f"A low-rank array of {self.rows} axes of rows and {self.cols} of "
                f"columns has factors a of shape {self.a.shape} and b of shape "
                f"{self.b.shape}. Was it mapped along its rows by `jax.vmap` or "
                "`jax.lax.scan`? These map its leaves, of which `a` has no axis of "
                "rows; inside `quax.quaxify` they map the array: `quaxify(vmap(f))`."
            )
        if {self.a.shape[n], self.b.shape[-1]} != {self.rank}:
            raise ValueError(
                f"A low-rank array of rank {self.rank} has factors a of shape "
                f"{self.a.shape} and b of shape {self.b.shape}. To change the rank, "
                "make another one: `LowRankArray(a, b, alpha=...)`."
            )
        return n

    @property
    def labels(self):
        """Names of the axes: of `a`, of `b`, and of the array (its axis numbers)."""
        n, ndim = self.n_batch, self.n_batch + self.rows + self.cols
        batch, rows, cols = (
            range(n),
            range(n, n + self.rows),
            range(n + self.rows, ndim),
        )
        return [*batch, "rank", *cols], [*batch, *rows, "rank"], list(range(ndim))

    def aval(self) -> ShapedArray:
        n = self.n_batch
        shape = self.b.shape[:-1] + self.a.shape[n + 1 :]
        dtype = wider(self.a.dtype, self.b.dtype)
        spec = (*partition_spec(self.b)[:-1], *partition_spec(self.a)[n + 1 :])
        return shaped_array(shape, dtype, spec, self.a, self.b)

    def between(self, z: Any, axis: int) -> Any:
        """What one factor made of an activation, as the other one is given it.

        Here it is the same. `axis` is that of the rank, or of several in a row.
        """
        del axis
        return z

    def dense(self) -> Array:
        return self.product().astype(wider(self.a.dtype, self.b.dtype))

    def product(self) -> Array:
        """The dense array, in the type that it is computed in."""
        a_labels, b_labels, labels = self.labels
        dtype = wider(self.a.dtype, self.b.dtype)
        b, a = scaled(self.b.astype(dtype), self.a.astype(dtype), self.scaling)
        out, out_labels = contract(b, b_labels, a, a_labels, keep=range(self.n_batch))
        return arrange(out, out_labels, labels)

    def __pdoc__(self, **kwargs):
        return show(self, self.a, self.b, **kwargs)


def scaled(u, v, scaling: float):
    """Two factors of a product, the first of them scaled.

    In 16 bits a scaling would be rounded to three digits, or overflow; so from there on
    both are wide.
    """
    if scaling == 1:
        return u, v
    wide = wider(u.dtype, jnp.float32)
    return u.astype(wide) * jnp.asarray(scaling, wide), v.astype(wide)


def preferred(dtype, x) -> Any:
    """The `preferred_element_type` of a product in between, with `x`, where the result
    is wanted in `dtype`: a type narrower than an operand's is an error."""
    return None if dtype is None else wider(dtype, x.dtype)


def _draw(
    init: Initialiser,
    key: PRNGKeyArray,
    batch: tuple[int, ...],
    fan_in: int,
    fan_out: int,
    dtype: Any,
) -> Array:
    """One matrix per batch index, each drawn apart, as `(*batch, fan_in, fan_out)`.

    `(fan_in, fan_out)` is the convention of `jax.nn.initializers`, which would take a
    leading axis for a receptive field; hence the `vmap`.
    """

    def one(key):
        out = jnp.asarray(init(key, (fan_in, fan_out), dtype))
        if out.shape != (fan_in, fan_out):
            raise ValueError(
                f"The initialiser {init!r} was asked for shape {(fan_in, fan_out)} and "
                f"returned {out.shape}."
            )
        return out.astype(dtype)

    if not batch:
        return one(key)
    keys = jr.split(key, math.prod(batch))
    return jax.vmap(one)(keys).reshape(*batch, fan_in, fan_out)
