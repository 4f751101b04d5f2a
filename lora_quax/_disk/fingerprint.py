"""What an adapter was trained on, in a few bytes for each array: its type, and digests
of some of its numbers.

It tells another base from the same one, and what differs. It is no proof: numbers that
are not sampled may be others.
"""

import collections
import functools as ft
import hashlib
import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from .._arrays.base import BASE, roles
from .._arrays.check import aval_of
from .._model.merge import origin
from .._model.paths import is_array, is_value, leaves_of, named
from .._model.together import whole
from .files import AdapterError


_SAMPLES = 64  # Of each array, at even distances.
_UNKNOWN = "-"
_LINES = 8  # Of a message.


def fingerprint(model: PyTree) -> dict[str, str]:
    """Of each array before it was adapted, by its path: its type, a digest of samples
    as they are, and one of samples rounded to bfloat16.

    By the last a base that is loaded in another precision is known. An array of which
    the numbers are not at hand, or come with the adapter, has its type alone.
    """
    leaves = [leaf for leaf in leaves_of(model) if is_array(leaf.value)]
    often = collections.Counter(leaf.path for leaf in leaves)
    return {
        leaf.path: fingerprint_of(leaf.value)
        for leaf in leaves
        if often[leaf.path] == 1 and is_array(origin(leaf.value))
    }


def fingerprint_of(x) -> str:
    """That of one array: `float32[5,3] 0f3a... 77be...`."""
    return f"{_type(x)} {_digests(x)}"


def recorded(model: PyTree) -> dict[str, str] | None:
    """The fingerprint for a file; none of a model that is a plan, without numbers."""
    found = fingerprint(model)
    return found if any(not x.endswith(_UNKNOWN) for x in found.values()) else None


def check_base(path, before: Any, model: PyTree, same: bool) -> None:
    """Warns if a model is not what a fingerprint is of; a file may have none.

    **Raises:** `AdapterError` instead, if it has to be the `same`; and if what the file
    has is no fingerprint.
    """
    if before is None:
        return
    try:
        differ = base_differences(before, model)
    except TypeError as e:
        raise AdapterError(f"{path}: {e}.") from e
    if not differ:
        return
    if same:
        raise AdapterError(another_base(path, differ))
    warnings.warn(another_base(path, differ), stacklevel=3)


def another_base(path, differ: list[str]) -> str:
    """What there is to say of a base that differs so."""
    lines = [f"\n  - {line}" for line in differ[:_LINES]]
    if len(differ) > _LINES:
        lines.append(f"\n  - and {len(differ) - _LINES} more")
    return f"The adapter {path} was trained on another base:{''.join(lines)}"


def base_differences(before: Any, model: PyTree) -> list[str]:
    """In what the arrays of a model are not those of a fingerprint.

    **Raises:** `TypeError` if `before` is no fingerprint, as a file may have it.
    """
    before, now = checked(before), fingerprint(model)
    differ = [f"it has no {named(name)}" for name in before.keys() - now.keys()]
    differ += [f"it has {named(name)} as well" for name in now.keys() - before.keys()]
    for name in before.keys() & now.keys():
        was, here = before[name].split(" ")[0], now[name].split(" ")[0]
        if _shape(was) != _shape(here):
            differ.append(f"{named(name)} is {here}, and was {was:.40}")
        elif not may_be_same(before[name], now[name]):
            differ.append(f"{named(name)} has other numbers")
    return sorted(differ)


def checked(before: Any) -> dict[str, str]:
    """**Raises:** `TypeError` if it is no fingerprint, as a file may have it."""
    if not isinstance(before, dict) or any(
        not isinstance(x, str) or x.count(" ") != 2 for x in before.values()
    ):
        raise TypeError("what it says of its base is no fingerprint")
    return before


def may_be_same(before: str, now: str) -> bool:
    """Whether the fingerprints of two arrays are of the same, as far as they tell."""
    was, exact, rounded = before.split(" ")
    here, exact_here, rounded_here = now.split(" ")
    if _shape(was) != _shape(here):
        return False
    if _UNKNOWN in (exact, exact_here):
        return True
    return exact == exact_here if was == here else rounded == rounded_here


def _type(x) -> str:
    """`float32[5,3]`; of a value of another library its name, `Int8[5,3]`."""
    x = origin(x)
    shape = ",".join(map(str, aval_of(x).shape))
    kind = type(x).__name__ if is_value(x) else aval_of(x).dtype.name
    return f"{kind}[{shape}]"


def _shape(described: str) -> str:
    return described.partition("[")[2]


def _digests(x) -> str:
    parts = jax.tree.leaves(origin(x))
    known = all(name == BASE for name in jax.tree.leaves(origin(roles(x))))
    found = [_sampled(part) for part in parts] if known else []
    samples = [sample for sample in found if sample is not None]
    if not samples or len(samples) < len(parts):
        return f"{_UNKNOWN} {_UNKNOWN}"
    return f"{_digest(samples)} {_digest(map(_rounded, samples))}"


def _digest(samples) -> str:
    out = hashlib.sha256()
    for sample in samples:
        out.update(sample.astype(sample.dtype.newbyteorder("<")).tobytes())
    return out.hexdigest()[:12]


def _rounded(x: np.ndarray) -> np.ndarray:
    return x.astype(jnp.bfloat16) if jnp.issubdtype(x.dtype, jnp.floating) else x


def _sampled(x) -> np.ndarray | None:
    """Some numbers of an array, or nothing if it has none that can be read here."""
    if eqx.is_array(x) and jnp.issubdtype(x.dtype, jax.dtypes.extended):
        return None
    size = int(np.prod(x.shape))
    flat = np.unique(np.linspace(0, max(size - 1, 0), _SAMPLES).astype(np.int64))
    at = np.unravel_index(flat, x.shape) if size and x.shape else ()
    if isinstance(x, np.ndarray):
        return np.asarray(x[at])
    if not isinstance(x, jax.Array) or isinstance(x, Tracer):
        return None
    if x.is_deleted():
        return None
    devices = x.devices()
    if len(devices) == 1 and {d.platform for d in devices} == {"cpu"}:
        # The array is seen as it lies: nothing is copied, and nothing compiled.
        return np.asarray(np.asarray(x)[at])
    if not isinstance(x.sharding, NamedSharding):
        return whole(_taken(x, at, None))
    return whole(_taken(x, at, NamedSharding(x.sharding.mesh, PartitionSpec())))


@ft.partial(jax.jit, static_argnums=2)
def _taken(x, at, out_sharding):
    return x.at[at].get(out_sharding=out_sharding)
