"""Tensors on disk: safetensors, read as data and written whole.

Parsing and writing are the `safetensors` library's. What it leaves to its caller is
here: a name that is there twice, a file that is no such file, an array whose numbers do
not lie in a row, and a write that breaks off halfway.
"""

import collections
import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy


class AdapterError(ValueError):
    """A file that is not the adapter it should be, or does not fit the model."""


_LARGEST_HEADER = 100_000_000  # Of the format itself.


class TensorFile(NamedTuple):
    """An open safetensors file; a tensor is read when it is asked for."""

    path: Path
    specs: dict[str, tuple[str, tuple[int, ...]]]  # name -> dtype as written, shape
    metadata: dict[str, str]
    handle: Any

    def read(self, name: str) -> np.ndarray:
        """**Raises:** `AdapterError` for a type of number that NumPy does not have."""
        try:
            return self.handle.get_tensor(name)
        except (AttributeError, KeyError, TypeError) as e:
            dtype = self.specs[name][0]
            raise AdapterError(
                f"{self.path}: `{name}` is of type {dtype}, which is not supported."
            ) from e


@contextlib.contextmanager
def open_tensors(path: str | os.PathLike) -> Iterator[TensorFile]:
    """Opens a safetensors file, once its header is known to be in order.

    **Raises:** `FileNotFoundError`; `AdapterError` if the file is truncated, of another
    format, or has a name twice.
    """
    path = Path(path)
    header = read_header(path)
    metadata = header.pop("__metadata__", {})
    try:
        file = safetensors.safe_open(path, framework="numpy")
    except safetensors.SafetensorError as e:
        raise AdapterError(f"{path} is no sound safetensors file: {e}.") from e
    specs = {name: (x["dtype"], tuple(x["shape"])) for name, x in header.items()}
    with file as handle:
        yield TensorFile(path, specs, metadata, handle)


def read_tensors(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict]:
    """All tensors of a file, by name, and its metadata.

    **Raises:** as `open_tensors` and `TensorFile.read`.
    """
    with open_tensors(path) as file:
        return {name: file.read(name) for name in file.specs}, file.metadata


def read_header(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"There is no file {path}.")
    if not path.is_file():
        raise AdapterError(f"{path} is not a file.")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) == 8 and length > _LARGEST_HEADER:
            what = f"as one it would have a header of {length:,} bytes"
            if start.startswith((b"PK", b"\x80")):
                what = "but a pickle, or an archive of one, which can run any code"
            raise AdapterError(f"{path} is no safetensors file: {what}.")
        text = file.read(length) if len(start) == 8 else b""
    if len(start) < 8 or len(text) < length:
        raise AdapterError(
            f"{path} is truncated: it ends after {size:,} bytes, within its header."
        )
    try:
        header = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as e:
        raise AdapterError(f"{path} has a header that cannot be read: {e}.") from e
    return _check_header(path, header, size - 8 - length)


def _check_header(path: Path, header, n_bytes: int) -> dict[str, Any]:
    """The rest of what a header can have wrong is for the library to find."""
    end = 0
    for name, x in header.items() if isinstance(header, dict) else [("", header)]:
        if name == "__metadata__" and isinstance(x, dict):
            continue
        try:
            end = max(end, *x["data_offsets"])
        except (IndexError, KeyError, TypeError) as e:
            raise AdapterError(
                f"{path} is no safetensors file: its header has {x!r} for `{name}`."
            ) from e
    if end > n_bytes:
        raise AdapterError(
            f"{path} is truncated: its tensors need {end:,} bytes, and {n_bytes:,} are "
            "there."
        )
    return header


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, each of whose names must be there once."""
    counts = collections.Counter(name for name, _ in pairs)
    twice = [repr(name) for name, n in counts.items() if n > 1]
    if twice:
        raise ValueError(f"it has {', '.join(twice)} twice")
    return dict(pairs)


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object.

    **Raises:** `AdapterError` if it holds anything else.
    """
    try:
        out = json.loads(path.read_bytes(), object_pairs_hook=_once)
    except (ValueError, RecursionError) as e:
        raise AdapterError(f"{path} is not JSON: {e}.") from e
    if not isinstance(out, dict):
        raise AdapterError(f"{path} holds {type(out).__name__}, not a JSON object.")
    return out


def write_tensors(
    path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]
) -> None:
    # The library writes an array's memory as it lies, transposed or not.
    rows = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    rows = {name: x.reshape(tensors[name].shape) for name, x in rows.items()}
    safetensors.numpy.save_file(rows, path, metadata=metadata)


@contextlib.contextmanager
def written_whole(*paths: Path) -> Iterator[list[Path]]:
    """Files to write beside their goals, which are moved into place when all are done.

    If anything fails, what was at the goals is still there, and nothing else is.
    """
    for path in paths:
        if not path.parent.is_dir():
            raise FileNotFoundError(f"There is no folder {path.parent} to write to.")
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder; a file is to be written.")
    beside = [path.with_name(f".{path.name}.{secrets.token_hex(4)}") for path in paths]
    try:
        yield beside
        for new in beside:
            with new.open("rb") as file:
                os.fsync(file.fileno())
        for new, path in zip(beside, paths):
            os.replace(new, path)
    finally:
        for new in beside:
            new.unlink(missing_ok=True)
