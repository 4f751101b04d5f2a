"""Initialisers for the factors: any function of `jax.nn.initializers` serves."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
from jaxtyping import Array, PRNGKeyArray


__all__ = ["Initialiser", "gaussian", "uniform", "zeros"]

Initialiser: TypeAlias = Callable[[PRNGKeyArray, Sequence[int], Any], Array]

uniform: Initialiser = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""Uniform on ±1/√fan_in, with fan_in the product of `a`'s columns: PEFT's default."""

zeros: Initialiser = jax.nn.initializers.zeros
"""All zeros: the default for `b`, so that a fresh adapter changes no output."""


# One function object per value, so that a second call finds the first one compiled.
@functools.cache
def gaussian(stddev: float) -> Initialiser:
    """Normal with mean zero and standard deviation `stddev`.

    PEFT's `init_lora_weights="gaussian"` is `gaussian(1 / rank)`.
    """
    return jax.nn.initializers.normal(stddev)
