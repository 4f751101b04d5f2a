"""What an adapter holds, whichever of the two formats it is in."""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .._disk.files import AdapterError
from ..peft import _read
from . import ours, peft
from .update import Content


def read_content(path: Path) -> Content:
    """The content of a file of ours, or of a folder of PEFT's.

    **Raises:** `FileNotFoundError`; `AdapterError` if it is no adapter.
    """
    if not path.exists():
        raise FileNotFoundError(f"There is no file or folder {path}.")
    if path.is_dir():
        return peft.read_content(path)
    if path.name == _read.FILE:
        raise AdapterError(
            f"{path} is half of an adapter of PEFT; give its folder, {path.parent}, "
            "which has the configuration as well."
        )
    return ours.read_content(path)


class Totals(NamedTuple):
    parameters: int
    bytes: int


def totals(content: Content) -> Totals:
    arrays = arrays_of(content).values()
    sizes = [math.prod(x.shape) for x in arrays]
    return Totals(sum(sizes), sum(x.nbytes for x in arrays))


def arrays_of(content: Content) -> dict[str, np.ndarray]:
    """Every array of an adapter, by what it is for."""
    out = {}
    for name, update in content.updates.items():
        out |= {f"{name}, a": update.a, f"{name}, b": update.b}
    out |= content.values
    return out | {f"{name}, added": added.x for name, added in content.added.items()}


def is_finite(x: np.ndarray) -> bool:
    # NumPy tells this of its own types of number alone: bfloat16 is none of them.
    wide = x if x.dtype.kind in "biufc" else x.astype(np.float32)
    return bool(np.isfinite(wide).all())
