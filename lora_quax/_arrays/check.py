"""The types of what is given, and what comes from outside checked at once, by name."""

import functools as ft
import math
import operator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import quax
from jax.core import ShapedArray, Tracer


def aval_of(x) -> Any:
    """The type of an array, of a value, or of an abstract stand-in for one.

    **Raises:** `ValueError` for a part of an adapted array that has been taken out.
    """
    if x is None:
        raise ValueError(
            "An adapted weight has None for one of its parts: the model has been "
            "partitioned or filtered. Put the parts together before it is used: "
            "`equinox.combine(params, frozen)`."
        )
    if isinstance(x, quax.ArrayValue):
        return type(x).aval(x)
    if isinstance(x, jax.ShapeDtypeStruct):
        return ShapedArray(x.shape, x.dtype)
    return x if isinstance(x, ShapedArray) else jax.typeof(x)


def is_abstract(tree: Any) -> bool:
    """Whether there are types in the place of arrays."""
    return any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(tree))


def check_axes(shape, rows: int, cols: int, *, least: int = 0) -> None:
    """Axes of batch, of rows and of columns, of the last two at least so many."""
    if min(rows, cols) < least or len(shape) < rows + cols:
        raise ValueError(
            f"An array of shape {tuple(shape)} cannot have {rows} axes of rows and "
            f"{cols} of columns."
        )


def check_rank(rank) -> int:
    return check_count("rank", rank)


def check_count(name: str, n) -> int:
    try:
        out = 0 if isinstance(n, bool) else operator.index(n)
    except TypeError:
        out = 0
    if out < 1:
        raise ValueError(f"`{name}` must be a positive integer, got {n!r}.")
    return out


def check_number(name: str, x) -> float:
    """A finite number of Python's, NumPy's or JAX's as one of Python's."""
    scalar = isinstance(x, int | float | np.number | np.ndarray | jax.Array)
    if (
        not scalar
        or isinstance(x, bool | Tracer)
        or np.ndim(x) != 0
        or not (isinstance(x, int) or jnp.issubdtype(np.asarray(x).dtype, np.number))
        or np.iscomplexobj(x)
    ):
        raise TypeError(f"`{name}` must be a number that is not traced, got {x!r}.")
    try:
        out = float(x)
    except OverflowError:
        out = math.inf
    if not math.isfinite(out):
        raise ValueError(f"`{name}` must be finite, got {str(x)[:40]}.")
    return out


def check_dropout(rate) -> float:
    """The part of what an update is given that is dropped in training."""
    rate = check_number("dropout", rate)
    if not 0 <= rate < 1:
        raise ValueError(
            f"`dropout` must be at least 0 and less than 1, got {rate}: it is the part "
            "of the numbers that an update is given which is dropped."
        )
    return rate


def read_alpha(alpha, rank: int) -> float:
    """That of an update that is known, which may be switched off by a zero."""
    return float(rank) if alpha is None else check_number("alpha", alpha)


def check_alpha(alpha, rank: int) -> float:
    """That of an update to be trained."""
    out = read_alpha(alpha, rank)
    if out == 0:
        raise ValueError(
            "`alpha` is 0, and so would be the update, alpha / rank · b · a, whatever "
            "it learnt: nothing would train. Without `alpha` the scaling is 1."
        )
    return out


def wider(*dtypes) -> np.dtype:
    """The type that these are promoted to, in a program too that promotes nothing by
    itself (`jax.numpy_dtype_promotion("strict")`). Floating point of 8 bits, which JAX
    promotes nowhere, gives way to any other type."""
    small = lambda x: jnp.issubdtype(x, jnp.floating) and jnp.dtype(x).itemsize == 1
    dtypes = tuple(x for x in dtypes if not small(x)) or dtypes
    with jax.numpy_dtype_promotion("standard"):
        return ft.reduce(jnp.promote_types, dtypes)


def check_flag(name: str, x) -> bool:
    """A text, say, would be true whatever it says."""
    if not isinstance(x, bool | np.bool_):
        raise TypeError(f"`{name}` must be True or False, got {x!r}.")
    return bool(x)


def check_float_dtype(dtype) -> np.dtype:
    try:
        out = jnp.dtype(dtype)
    except TypeError:  # A name that NumPy does not know, such as "bf16".
        out = None
    if out is None or not jnp.issubdtype(out, jnp.floating):
        raise TypeError(
            "`dtype` must be a floating-point type, such as `jax.numpy.bfloat16` or "
            f"'bfloat16', got {dtype!r}."
        )
    return out


def check_factor_dtype(dtype) -> np.dtype:
    """A type that factors can be computed with."""
    out = check_float_dtype(dtype)
    if out.itemsize < 2:
        raise TypeError(
            f"`dtype`, of the factors, must be of 16 bits or more, got {out.name}."
        )
    return out


def default_dtype(weight) -> np.dtype:
    """The type of a weight's factors: its own, but at least float32, as in PEFT."""
    dtype = jnp.dtype(aval_of(weight).dtype)
    return dtype if dtype.itemsize >= 4 else jnp.dtype(jnp.float32)


def check_key(key) -> None:
    aval = jax.typeof(key) if eqx.is_array(key) else None
    typed = aval is not None and jnp.issubdtype(aval.dtype, jax.dtypes.prng_key)
    raw = aval is not None and aval.dtype == jnp.uint32
    if aval is None or not (aval.ndim == 0 if typed else raw and aval.ndim == 1):
        raise TypeError(f"`key` must be one key from `jax.random.key`, got {key!r}.")


def check_weight(weight) -> Any:
    """An array or value of floating-point numbers."""
    if not isinstance(weight, quax.ArrayValue):
        if not eqx.is_array_like(weight):
            raise TypeError(f"A weight must be an array, got {weight!r}.")
        weight = jnp.asarray(weight)
    if not jnp.issubdtype(weight.dtype, jnp.floating):
        raise TypeError(
            f"A weight must be a floating-point array, got {aval_of(weight)}."
        )
    return weight
