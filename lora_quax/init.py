"""Initialisers for the factors: any function of `jax.nn.initializers` serves."""

import functools as ft
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, PRNGKeyArray


Initialiser: TypeAlias = Callable[[PRNGKeyArray, Sequence[int], Any], Array]

uniform: Initialiser = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""Uniform on ±1/√fan_in, with fan_in the product of `a`'s columns: PEFT's default."""

zeros: Initialiser = jax.nn.initializers.zeros
"""All zeros: the default for `b`, so that a fresh adapter changes no output."""


# One function object per value, so that a second call finds the first one compiled.
@ft.cache
def gaussian(stddev: float) -> Initialiser:
    """Normal with mean zero and standard deviation `stddev`.

    PEFT's `init_lora_weights="gaussian"` is `gaussian(1 / rank)`.
    """
    return jax.nn.initializers.normal(stddev)


def draw(
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
