"""What leaves a model and what comes in: the checks that every format needs."""

import collections
from collections.abc import Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import PyTree

from .._arrays.base import BASE, roles
from .._model.merge import origin
from .._model.paths import is_array, leaves_of, named
from .._model.together import whole
from .files import refuse


def to_numpy(path: str, x) -> np.ndarray:
    """Its numbers. One that several processes hold, each of them has to ask for."""
    if isinstance(x, jax.ShapeDtypeStruct | Tracer):
        what = "traced" if isinstance(x, Tracer) else "abstract"
        raise TypeError(
            f"{named(path)} is {what}, so that there are no numbers to write. Save a "
            "concrete model, outside of `jax.jit` and of other transformations."
        )
    return whole(x)


def cast(path: str, x: Any, dtype: np.dtype) -> Any:
    """An array in another type of number.

    **Raises:** `OverflowError` if a number is too large for it.
    """
    if x.dtype == dtype:
        return x
    with np.errstate(over="ignore"):
        out = x.astype(dtype)
    if (_is_finite(x) & ~_is_finite(out)).any():
        raise OverflowError(
            f"{named(path)} has numbers that are too large for {dtype.name}, of which "
            f"the largest is {float(jnp.finfo(dtype).max):.5g}."
        )
    return out


def _is_finite(x) -> Any:
    # NumPy asks this of its own types alone.
    return np.isfinite(x if x.dtype.kind in "biufc" else x.astype(np.float32))


def refuse_changed(model: PyTree, base: PyTree) -> None:
    """**Raises:** `ValueError` if what would not be written is not as in `base`."""
    before = {leaf.path: origin(leaf.value) for leaf in leaves_of(base)}
    changed = [
        named(leaf.path)
        for leaf in leaves_of(model)
        if is_array(leaf.value)
        and BASE in jax.tree.leaves(roles(leaf.value))
        and not same_bits(origin(leaf.value), before.get(leaf.path))
    ]
    if changed:
        raise ValueError(
            f"{', '.join(changed)} would not be written, and are not what they are in "
            "`base`. Train them with the spec 'full' of `loraify`, or leave them as "
            "they are: `lora_quax.partition` gives an optimiser what trains."
        )


def same_bits(x, y) -> bool:
    return jax.tree.structure(x) == jax.tree.structure(y) and all(
        u is v or _bits(u) == _bits(v)
        for u, v in zip(jax.tree.leaves(x), jax.tree.leaves(y))
    )


def _bits(x) -> tuple:
    if eqx.is_array(x) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    x = whole(x)
    return x.shape, x.dtype, x.tobytes()


def refuse_non_finite(tensors: dict[str, np.ndarray]) -> None:
    """**Raises:** `ValueError` if a number is infinite, or not a number."""
    bad = [named(name) for name, x in tensors.items() if not np.isfinite(x).all()]
    if bad:
        more = f" and {len(bad) - 8} more" if len(bad) > 8 else ""
        raise ValueError(
            f"Not written, because {', '.join(bad[:8])}{more} have infinities or NaNs. "
            "`check_finite=False` writes them all the same."
        )


def refuse_ambiguous(paths: Iterable[str]) -> None:
    twice = [named(path) for path, n in collections.Counter(paths).items() if n > 1]
    if twice:
        raise ValueError(
            f"Several arrays of the model have the path {', '.join(twice)}, so that a "
            "name does not say which is meant: a dictionary has a key with a dot in "
            "it, or keys that differ in type alone."
        )


def too_wide(name: str, dtype: np.dtype) -> list[str]:
    """The problem, if there is one, that JAX would narrow an array without a word."""
    if jax.dtypes.canonicalize_dtype(dtype) == dtype:
        return []
    return [
        f"`{name}` is of type {dtype.name}, which JAX has with `jax_enable_x64` alone"
    ]


def refuse_misfit(path, problems: list[str]) -> None:
    """**Raises:** `AdapterError`, which lists the problems, if there are any."""
    what = f"The adapter {path} does not fit the model, of which nothing was changed"
    refuse(what, problems)
