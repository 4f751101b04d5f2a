"""Tensors on disk: safetensors, read as data, in bounded time and memory.

Parsing and writing are the `safetensors` library's. What it leaves to its caller is
here: a name that is there twice, a file that is no such file, a header or a message of
any size, and an array whose numbers do not lie in a row.
"""

import collections
import contextlib
import json
import math
import os
import reprlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy


class AdapterError(ValueError):
    """A file that is not the adapter or the model that it should be, or does not fit
    the model that it is for."""

    def __init__(self, message: str):
        # What it quotes of a file may be of any length, and steer a terminal.
        super().__init__(legible(message, _LONGEST_MESSAGE))


_LONGEST_MESSAGE = 20_000
_LONGEST_PROBLEM = 300
_MOST_PROBLEMS = 50


def refuse(what: str, problems: Iterable[str], in_order: bool = False) -> None:
    """**Raises:** `AdapterError`, which lists the problems, if there are any; sorted,
    if they come in no order of their own."""
    problems = problems if in_order else sorted(problems)
    lines = [legible(problem, _LONGEST_PROBLEM) for problem in problems]
    if len(lines) > _MOST_PROBLEMS:
        rest = f"and {len(lines) - _MOST_PROBLEMS:,} more"
        lines = [*lines[:_MOST_PROBLEMS], rest]
    if lines:
        raise AdapterError(what + ":" + "".join(f"\n  - {line}" for line in lines))


def legible(text: str, length: int) -> str:
    """A text without what is not to be seen, but for the ends of lines, and no longer
    than that."""
    if len(text) > length:
        text = f"{text[:length]}... ({len(text) - length:,} characters more)"
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


_LARGEST_HEADER = 100_000_000  # Of the format itself.
_MOST_VALUES = 2_000_000  # Of JSON: more than a model of a hundred thousand tensors.


# By its names for types of number, those of NumPy and of ml_dtypes, which JAX uses.
_TYPES = dict(
    BOOL="bool",
    **{f"I{n}": f"int{n}" for n in (8, 16, 32, 64)},
    **{f"U{n}": f"uint{n}" for n in (8, 16, 32, 64)},
    **{f"F{n}": f"float{n}" for n in (16, 32, 64)},
    BF16="bfloat16",
    F8_E4M3="float8_e4m3fn",
    F8_E5M2="float8_e5m2",
    C64="complex64",
)


def refuse_type(dtype: np.dtype, what: str) -> None:
    """**Raises:** `TypeError` for a type of number that is not written."""
    if dtype.name not in _TYPES.values():
        raise TypeError(f"{what} is of type {dtype.name}, which the format has not.")


class TensorFile(NamedTuple):
    """An open safetensors file; a tensor is read when it is asked for."""

    path: Path
    specs: dict[str, tuple[str, tuple[int, ...]]]  # name -> dtype as written, shape
    metadata: dict[str, str]
    starts: dict[str, int]  # name -> where its numbers begin
    handle: Any

    def dtype(self, name: str) -> np.dtype:
        """**Raises:** `AdapterError` for a type of number that is not known here."""
        written = self.specs[name][0]
        if written not in _TYPES:
            raise AdapterError(
                f"{self.path}: `{name}` is of type {written}, which is not known here."
            )
        return jnp.dtype(_TYPES[written])

    def view(self, name: str) -> np.ndarray:
        """A tensor in the file, of which is read what is looked at.

        **Raises:** as `dtype`.
        """
        dtype, shape = self.dtype(name), self.specs[name][1]
        start, size = self.starts[name], math.prod(shape)
        if not size:
            return np.empty(shape, dtype)
        rows = np.memmap(self.path, np.uint8, "r", start, (size * dtype.itemsize,))
        return np.asarray(rows).view(dtype).reshape(shape)

    def read(self, name: str) -> np.ndarray:
        """**Raises:** `AdapterError` for a type of number that NumPy does not have."""
        try:
            return self.handle.get_tensor(name)
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            dtype, shape = self.specs[name]
            raise AdapterError(
                f"{self.path}: `{name}` is of type {dtype} and shape {shape}, which "
                "NumPy does not have."
            ) from e


@contextlib.contextmanager
def open_tensors(path: str | os.PathLike) -> Iterator[TensorFile]:
    """Opens a safetensors file, once its header is known to be in order.

    **Raises:** `FileNotFoundError`; `AdapterError` if the file is truncated, of another
    format, or has a name twice.
    """
    path = Path(path)
    while True:
        before = _identity(path)
        header, data = read_header(path)
        try:
            file = safetensors.safe_open(path, framework="numpy")
        except safetensors.SafetensorError as e:
            raise AdapterError(f"{path} is no sound safetensors file: {e}.") from e
        if _identity(path) == before:  # Or another was moved there in the meantime.
            break
    metadata = header.pop("__metadata__", {})
    specs = {name: (x["dtype"], tuple(x["shape"])) for name, x in header.items()}
    starts = {name: data + x["data_offsets"][0] for name, x in header.items()}
    with file as handle:
        yield TensorFile(path, specs, metadata, starts, handle)


def _identity(path: Path) -> tuple[int, ...] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def read_tensors(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict]:
    """All tensors of a file, by name, and its metadata.

    **Raises:** as `open_tensors` and `TensorFile.read`.
    """
    with open_tensors(path) as file:
        return {name: file.read(name) for name in file.specs}, file.metadata


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header, and where the numbers begin.

    **Raises:** as `open_tensors`.
    """
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
        is_whole = len(start) == 8 and 8 + length <= size
        text = file.read(length) if is_whole else b""
    if not is_whole:
        raise AdapterError(
            f"{path} is truncated: it ends after {size:,} bytes, within its header."
        )
    try:
        header = parse_json(text)
    except ValueError as e:
        raise AdapterError(f"{path} has a header that cannot be read: {e}.") from e
    return _check_header(path, header, size - 8 - length), 8 + length


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
                f"{path} is no safetensors file: its header has {reprlib.repr(x)} for "
                f"`{name}`."
            ) from e
    if end > n_bytes:
        raise AdapterError(
            f"{path} is truncated: its tensors need {end:,} bytes, and {n_bytes:,} are "
            "there."
        )
    return header


def parse_json(text: str | bytes) -> Any:
    """**Raises:** `ValueError` if it is no JSON, has a name twice, an integer that
    Python alone could hold, or more levels or values than anything here has."""
    marks = ("[", "{", ",") if isinstance(text, str) else (b"[", b"{", b",")
    if sum(text.count(mark) for mark in marks) > _MOST_VALUES:  # type: ignore
        raise ValueError(f"it holds more than {_MOST_VALUES:,} values")
    try:
        return json.loads(text, object_pairs_hook=_once, parse_int=_bounded)
    except RecursionError as e:
        raise ValueError("it is nested too deeply") from e


def _bounded(digits: str) -> int:
    out = int(digits)
    if abs(out) >= 2**63:
        raise ValueError(f"the number {digits:.20}... is too large")
    return out


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, each of whose names must be there once."""
    out = dict(pairs)
    if len(out) < len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        twice = [repr(name) for name, n in counts.items() if n > 1]
        raise ValueError(f"it has {', '.join(twice)} twice")
    return out


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object.

    **Raises:** `AdapterError` if it holds anything else.
    """
    size = path.stat().st_size
    if size > _LARGEST_HEADER:
        raise AdapterError(f"{path} is of {size:,} bytes, too many for such a file.")
    try:
        out = parse_json(path.read_bytes())
    except ValueError as e:
        raise AdapterError(f"{path} is not JSON: {e}.") from e
    if not isinstance(out, dict):
        raise AdapterError(f"{path} holds {type(out).__name__}, not a JSON object.")
    return out


def write_tensors(
    path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]
) -> None:
    """**Raises:** `TypeError` for a type of number that the format does not have;
    `OSError`."""
    # The library writes an array's memory as it lies, transposed or not.
    rows = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    rows = {name: x.reshape(tensors[name].shape) for name, x in rows.items()}
    try:
        safetensors.numpy.save_file(rows, path, metadata)
    except safetensors.SafetensorError as e:  # A full disk, say.
        raise OSError(f"{path} cannot be written: {e}") from e
    _sort_metadata(path, metadata)


def _sort_metadata(path: Path, metadata: dict[str, str]) -> None:
    """The library has it in any order; equal adapters are to be equal files."""
    if len(metadata) < 2:
        return
    with path.open("r+b") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
        start = header.index(b"{", 1)
        found, end = json.JSONDecoder().raw_decode(header[start:].decode())
        text = json.dumps(found, sort_keys=True, separators=(",", ":"))
        if len(text) == end:  # All of it is ASCII, and written in the same way.
            file.seek(8 + start)
            file.write(text.encode())
