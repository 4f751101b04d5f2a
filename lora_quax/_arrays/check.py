"""What comes from outside is checked here, at once, with an error that names it."""

import math
import operator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import quax
from jax.core import ShapedArray


def aval_of(x) -> ShapedArray:
    """The type of an array, of a value, or of the abstract stand-in for an array."""
    if isinstance(x, quax.ArrayValue):
        return x.aval()
    if isinstance(x, jax.ShapeDtypeStruct):
        return ShapedArray(x.shape, x.dtype)
    return jax.typeof(x)


def check_rank(rank) -> int:
    if isinstance(rank, bool) or not hasattr(rank, "__index__") or rank < 1:
        raise ValueError(f"`rank` must be a positive integer, got {rank!r}.")
    return operator.index(rank)


def check_alpha(alpha, rank: int) -> float:
    if alpha is None:
        return float(rank)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise TypeError(f"`alpha` must be a Python number, got {alpha!r}.")
    if not math.isfinite(alpha):
        raise ValueError(f"`alpha` must be finite, got {alpha!r}.")
    return float(alpha)


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
