"""Numbers that several leaves have in common, as VeRA's factors are: written once."""

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np


def without_repeats(
    tensors: dict[str, np.ndarray], names: Iterable[str]
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors without those of these names that repeat one before; and of each that
    is left out, the name of the one that it repeats."""
    first: dict[Any, str] = {}
    repeats = {}
    for name in names:
        x = tensors[name]
        numbers = x.dtype.name, x.shape, hashlib.sha256(x.tobytes()).digest()
        of = first.setdefault(numbers, name)
        if of != name:
            repeats[name] = of
    return {name: x for name, x in tensors.items() if name not in repeats}, repeats


def with_repeats(tensors: dict[str, np.ndarray], repeats: Any) -> dict[str, np.ndarray]:
    """The tensors with those that were left out: one array under several names.

    **Raises:** `KeyError`, `TypeError` or `ValueError` if these are no such names.
    """
    if not isinstance(repeats, dict):
        raise TypeError(f"what repeats is {repeats!r:.40}")
    if twice := sorted(tensors.keys() & repeats.keys()):
        raise ValueError(f"`{twice[0]:.40}` is there, and repeats another one")
    return tensors | {name: tensors[of] for name, of in repeats.items()}
