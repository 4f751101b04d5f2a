"""Tensors on disk: safetensors, read as data and written whole.

Parsing and writing are the `safetensors` library's. What it leaves to its caller is
here: a name that is there twice, a file that is no such file, an array whose numbers do
not lie in a row, and a write that breaks off halfway.
"""

import collections
import contextlib
import functools as ft
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy


class AdapterError(ValueError):
    """A file that is not the adapter it should be, or does not fit the model."""


def refuse(what: str, problems: Iterable[str]) -> None:
    """**Raises:** `AdapterError`, which lists the problems, if there are any."""
    if lines := "".join(f"\n  - {problem}" for problem in sorted(problems)):
        raise AdapterError(f"{what}:{lines}")


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


def parse_json(text: str | bytes) -> Any:
    """**Raises:** `ValueError` if it is no JSON, has a name twice, an integer that
    Python alone could hold, or more levels than anything here has."""
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
        out = parse_json(path.read_bytes())
    except ValueError as e:
        raise AdapterError(f"{path} is not JSON: {e}.") from e
    if not isinstance(out, dict):
        raise AdapterError(f"{path} holds {type(out).__name__}, not a JSON object.")
    return out


def write_tensors(
    path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]
) -> None:
    # The library writes an array's memory as it lies, transposed or not; and were the
    # file its own, nobody else could read it.
    rows = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    rows = {name: x.reshape(tensors[name].shape) for name, x in rows.items()}
    path.write_bytes(safetensors.numpy.save(rows, metadata))


@contextlib.contextmanager
def written_whole(*paths: Path) -> Iterator[list[Path]]:
    """Files to write beside their goals, which are moved into place when all are done.

    If anything fails, what was at the goals is still there, and nothing else is. Only a
    machine that stops between two moves leaves one file new and another old.
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
        _move(dict(zip(beside, paths)))
    finally:
        for new in beside:
            new.unlink(missing_ok=True)


def _move(goals: dict[Path, Path]) -> None:
    """Moves each file to its goal; if one cannot be, those before it are taken back."""
    with contextlib.ExitStack() as always, contextlib.ExitStack() as on_failure:
        *first, (last, goal) = goals.items()
        for new, path in first:
            back = ft.partial(path.unlink)
            if path.exists():
                old = new.with_name(f"{new.name}.old")
                always.callback(old.unlink, missing_ok=True)
                _keep(path, old)
                back = ft.partial(old.replace, path)
            os.replace(new, path)
            on_failure.callback(back)
        os.replace(last, goal)
        on_failure.pop_all()


def _keep(path: Path, copy: Path) -> None:
    try:
        os.link(path, copy)
    except OSError:  # Not every file system has links.
        shutil.copy2(path, copy)
