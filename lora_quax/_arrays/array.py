"""The arrays: a low-rank update, and the sum of a frozen weight and an update.

Almost everything a program does to a weight is linear in it, and a linear operation
goes through a sum. So there are two types, each with one job:

- `LowRankArray` is the algebra of `scaling · b · a` and knows of no base.
- `LoraArray` is the sum of a base and such an update, with the policy: stop the
  gradient at the base, and refuse or allow the dense weight.

What each primitive does to them stands in `_rules`.
"""

import abc
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import quax
import wadler_lindig as wl
from jax import lax
from jax.core import ShapedArray
from jaxtyping import Array, Float, PRNGKeyArray

from .. import init
from .._compat import partition_spec, shaped_array
from ..init import Initialiser
from .check import aval_of, check_alpha, check_key, check_rank, check_weight
from .thin_dot import arrange, contract


class MaterialiseError(RuntimeError):
    """An operation needs the dense weight, and the array does not allow it."""


# Rules for primitives of packages that need not be installed, by the primitive's name:
# `rule(primitive, values, params)`.
late_rules: dict[str, Callable] = {}


class FactoredArray(quax.ArrayValue):
    """What `LowRankArray` and `LoraArray` share: the policy."""

    rank: eqx.AbstractVar[int]
    allow_materialise: eqx.AbstractVar[bool]

    @abc.abstractmethod
    def dense(self) -> Array:
        """The dense array, whatever `allow_materialise` says."""

    def materialise(self) -> Array:
        """The dense array, in the dtype of the base.

        **Raises:** `MaterialiseError` if `allow_materialise` is false. To fold an
        update into its weight on purpose, use `lora_quax.merge`.
        """
        if not self.allow_materialise:
            raise refusal("materialise", [self], "`materialise` was called")
        return self.dense()

    @staticmethod
    def default(primitive, values, params):
        if (rule := late_rules.get(primitive.name)) is not None:
            return rule(primitive, values, params)
        return materialise_or_refuse(
            primitive, values, params, f"there is no low-rank rule for `{primitive}`"
        )


def _describe(x) -> str:
    aval = x.aval() if isinstance(x, quax.ArrayValue) else jax.typeof(x)
    if isinstance(x, FactoredArray):
        return f"{type(x).__name__} {aval.str_short()} of rank {x.rank}"
    return aval.str_short()


def refusal(operation: str, values, why: str) -> MaterialiseError:
    """The error for an operation that has to have the dense weight and may not."""
    return MaterialiseError(
        f"`{operation}` needs the dense weight, base + scaling * b @ a, and this array "
        "has `allow_materialise=False`.\n"
        f"  operands: {', '.join(map(_describe, values))}\n"
        f"  reason:   {why}\n"
        "Ways out: `allow_materialise=True`, given to `loraify` or to the array, forms "
        "the dense weight for such operations; `lora_quax.merge(model)` forms it once "
        "and for all; `targets` of `loraify` can leave this weight alone."
    )


def materialise_or_refuse(primitive, values, params, why: str):
    """What becomes of an operation that cannot stay factored: the policy."""
    dense = [densify_or_refuse(str(primitive), x, values, why) for x in values]
    return quax.quaxify(primitive.bind)(*dense, **params)


def densify_or_refuse(operation: str, x, values, why: str):
    """`x`, dense if it is factored and that is allowed; other values are untouched."""
    if not isinstance(x, FactoredArray):
        return x
    if not x.allow_materialise:
        raise refusal(operation, values, why)
    return x.dense()


def make(cls, **fields):
    """An instance of an array type from fields that are known to fit.

    Rules make many, inside traces; the checks of the constructors, and equinox's, are
    for what comes from outside.
    """
    self = object.__new__(cls)
    for name, value in fields.items():
        object.__setattr__(self, name, value)
    return self


class LowRankArray(FactoredArray):
    """The array `scaling · Σ_r b[..., r] · a[r, ...]`, kept as its two factors.

    Its shape is `(*batch, *rows, *cols)`. How many axes are rows and how many are
    columns is static and counted from the end, so that a leading axis added by
    `eqx.filter_vmap`, or removed by `jax.lax.scan`, is a batch axis: nothing changes.

    It stands alone as the weight of a layer, or is the update inside a `LoraArray`.
    Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, arXiv 2106.09685.
    """

    a: Float[Array, "..."]  # (*batch, rank, *cols)
    b: Float[Array, "..."]  # (*batch, *rows, rank)
    rank: int = eqx.field(static=True)
    alpha: float = eqx.field(static=True)
    rows: int = eqx.field(static=True)
    cols: int = eqx.field(static=True)
    allow_materialise: bool = eqx.field(static=True)

    def __init__(
        self,
        a: Float[Array, "..."],
        b: Float[Array, "..."],
        *,
        alpha: int | float | None = None,
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
        n = a.ndim - 1 - cols  # How many axes are batch.
        if not (
            min(n, rows, cols) >= 0
            and b.ndim == n + rows + 1
            and a.shape[: n + 1] == (*b.shape[:n], b.shape[-1])
        ):
            raise ValueError(
                "`a` must be (*batch, rank, *cols) and `b` (*batch, *rows, rank), with "
                f"{rows} axes of rows and {cols} of columns; got a of shape {a.shape} "
                f"and b of shape {b.shape}."
            )
        self.a = a
        self.b = b
        self.rank = check_rank(b.shape[-1])
        self.alpha = check_alpha(alpha, self.rank)
        self.rows = rows
        self.cols = cols
        self.allow_materialise = allow_materialise

    @classmethod
    def init(
        cls,
        shape: tuple[int, ...],
        *,
        rank: int,
        key: PRNGKeyArray,
        alpha: int | float | None = None,
        init_a: Initialiser = init.uniform,
        init_b: Initialiser = init.zeros,
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
        check_key(key)
        if min(rows, cols) < 0 or len(shape) < rows + cols:
            raise ValueError(
                f"An array of shape {tuple(shape)} cannot have {rows} axes of rows and "
                f"{cols} of columns."
            )
        n = len(shape) - rows - cols
        batch, row_shape, col_shape = shape[:n], shape[n : n + rows], shape[n + rows :]
        a_key, b_key = jr.split(key)
        # Drawn as the maps cols -> rank -> rows, then laid out.
        a = init.draw(init_a, a_key, batch, math.prod(col_shape), rank, dtype)
        b = init.draw(init_b, b_key, batch, rank, math.prod(row_shape), dtype)
        return cls(
            jnp.swapaxes(a, -1, -2).reshape(*batch, rank, *col_shape),
            jnp.swapaxes(b, -1, -2).reshape(*batch, *row_shape, rank),
            alpha=alpha,
            rows=rows,
            cols=cols,
            allow_materialise=allow_materialise,
        )

    @property
    def scaling(self) -> float:
        """`alpha / rank`."""
        return self.alpha / self.rank

    @property
    def n_batch(self) -> int:
        """How many leading axes are batch axes."""
        return self.a.ndim - 1 - self.cols

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
        dtype = jnp.promote_types(self.a.dtype, self.b.dtype)
        spec = (*partition_spec(self.b)[:-1], *partition_spec(self.a)[n + 1 :])
        return shaped_array(shape, dtype, spec, self.a, self.b)

    def dense(self) -> Array:
        a_labels, b_labels, labels = self.labels
        batch = range(self.n_batch)
        out, out_labels = contract(self.b, b_labels, self.a, a_labels, keep=batch)
        return scale(arrange(out, out_labels, labels), self.scaling)

    def replace(self, **changes) -> "LowRankArray":
        """A copy with some fields changed; the new ones must fit."""
        return make(LowRankArray, **{**vars(self), **changes})

    def __pdoc__(self, **kwargs):
        return _summary(self, **kwargs)


class LoraArray(FactoredArray):
    """A frozen weight and its low-rank update, unsummed: `base + scaling · b · a`.

    Inside `quax.quaxify` it stands for the sum, of the base's shape and dtype, and what
    a program does to it is done to the parts, so that the sum is never formed:

    ```python
    linear = eqx.nn.Linear(10, 12, key=key1)
    weight = LoraArray(linear.weight, rank=2, key=key2)
    linear = eqx.tree_at(lambda l: l.weight, linear, weight)
    quax.quaxify(linear)(x)
    ```

    Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, arXiv 2106.09685.
    """

    base: Array | quax.ArrayValue
    delta: LowRankArray
    stop_gradient: bool = eqx.field(static=True)
    allow_materialise: bool = eqx.field(static=True)

    def __init__(
        self,
        weight: Any,
        *,
        rank: int,
        key: PRNGKeyArray,
        alpha: int | float | None = None,
        init_a: Initialiser | None = None,
        init_b: Initialiser = init.zeros,
        scale: int | float | None = None,
        dtype: Any = None,
        rows: int = 1,
        cols: int = 1,
        stop_gradient: bool = True,
        allow_materialise: bool = False,
    ):
        """**Arguments:**

        - `weight`: the weight to adapt, `(*batch, *rows, *cols)`: an array, or any
            `quax.ArrayValue`. A `eqx.nn.Linear` has one axis of rows (its outputs) and
            one of columns; a convolution's columns are its inputs and its kernel. What
            is left over in front is batch, with separate factors for each index.
        - `rank`: the rank of the update. It may exceed what the weight can use.
        - `key`: for the initialisers.
        - `alpha`: the update is scaled by `alpha / rank`; defaults to the rank, so that
            the scaling is 1.
        - `init_a`, `init_b`: functions as in `jax.nn.initializers`, for the maps from
            columns to rank and from rank to rows. By default `a` is uniform on
            ±1/√fan_in, as in PEFT, and `b` is zero, so a fresh array equals its base.
        - `scale`: short for `init_a=gaussian(scale)`.
        - `dtype`: of the factors. By default the weight's, but at least float32, as in
            PEFT: small steps are lost in a bfloat16 factor.
        - `rows`, `cols`: how many axes of `weight` are rows, and how many are columns.
        - `stop_gradient`: whether the base is frozen: no gradient reaches it.
        - `allow_materialise`: whether an operation that has no rule may form the dense
            weight (true), or raises `MaterialiseError` (false, the default).

        **Raises:** `TypeError` or `ValueError` if `weight` is no floating-point array,
        has too few axes, or if `rank`, `alpha` or `key` is not what it should be.
        """
        weight = check_weight(weight)
        if init_a is not None and scale is not None:
            raise ValueError("Give either `init_a` or `scale`, not both.")
        if init_a is None:
            init_a = init.uniform if scale is None else init.gaussian(scale)
        if dtype is None:
            wide = jnp.dtype(weight.dtype).itemsize >= 4
            dtype = weight.dtype if wide else jnp.float32
        self.base = weight
        self.delta = LowRankArray.init(
            weight.shape,
            rank=rank,
            key=key,
            alpha=alpha,
            init_a=init_a,
            init_b=init_b,
            dtype=dtype,
            rows=rows,
            cols=cols,
            allow_materialise=allow_materialise,
        )
        self.stop_gradient = stop_gradient
        self.allow_materialise = allow_materialise

    @property
    def a(self) -> Any:
        """The factor `(*batch, rank, *cols)`."""
        return self.delta.a

    @property
    def b(self) -> Any:
        """The factor `(*batch, *rows, rank)`."""
        return self.delta.b

    @property
    def rank(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The rank of the update."""
        return self.delta.rank

    @property
    def alpha(self) -> float:
        """The numerator of the scaling."""
        return self.delta.alpha

    @property
    def scaling(self) -> float:
        """`alpha / rank`."""
        return self.delta.scaling

    def aval(self) -> ShapedArray:
        return aval_of(self.base)

    def frozen_base(self) -> Any:
        """The base as it enters a result: behind `stop_gradient`, if that is set."""
        if not self.stop_gradient:
            return self.base
        return jax.tree.map(lax.stop_gradient, self.base)

    def dense(self) -> Array:
        base = self.frozen_base()
        if isinstance(base, FactoredArray):
            base = base.dense()
        elif isinstance(base, quax.ArrayValue):
            base = type(base).materialise(base)
        return add(base, self.delta.dense())

    def replace(self, **changes) -> "LoraArray":
        """A copy with some fields changed; the new ones must fit."""
        return make(LoraArray, **{**vars(self), **changes})

    def __pdoc__(self, **kwargs):
        return _summary(self, **kwargs)


def scale(x, scaling: float):
    """`scaling · x`, in the dtype of `x`."""
    return x if scaling == 1 else x * jnp.asarray(scaling, x.dtype)


def add(base, delta):
    """`base + delta`, added in the wider dtype and returned in the base's."""
    dtype = base.dtype
    wide = jnp.promote_types(dtype, delta.dtype)
    total = quax.quaxify(lambda x, y: x.astype(wide) + y.astype(wide))(base, delta)
    return quax.quaxify(lax.convert_element_type)(total, dtype)


def _summary(x: LowRankArray | LoraArray, indent: int = 2, **kwargs):
    """A line with what matters, for an array whose leaves may be filtered out."""
    del kwargs
    docs = [wl.TextDoc(f"rank={x.rank}"), wl.TextDoc(f"alpha={x.alpha:g}")]
    if all(hasattr(leaf, "dtype") for leaf in (x.a, x.b, getattr(x, "base", x.a))):
        aval = x.aval()
        docs.insert(0, wl.array_summary(aval.shape, aval.dtype.name, kind=None))
        if (factors := jnp.dtype(x.a.dtype)) != aval.dtype:
            docs.append(wl.TextDoc(f"factors={factors.name}"))
    name = wl.TextDoc(f"{type(x).__name__}(")
    return wl.bracketed(name, docs, wl.comma, wl.TextDoc(")"), indent)
