"""`merge`: a base model with an adapter folded in, written tensor by tensor.

A merged tensor has the shape and the type that it had, so that it takes the place that
it had: a file is copied, and what changes is written over. Names, order, metadata and
all other tensors stay byte for byte, and one tensor at a time is in memory.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.progress import Progress

from .._disk.files import (
    AdapterError,
    open_tensors,
    TensorFile,
)
from .._disk.shards import INDEX, read_index
from .._disk.whole import folder_whole, written_whole
from .console import console, namer, refuse_existing
from .content import is_finite, read_content
from .plan import plan, Square, Task, Tensor, Tensors


_SUFFIX = ".safetensors"
# Other copies of the weights: they would be those of the model before the merge.
_WEIGHTS = (
    ".bin .bin.index.json .ckpt .gguf .h5 .h5.index.json .index .msgpack "
    ".msgpack.index.json .npz .onnx .ot .pkl .pt .pth .safetensors.index.json .tflite"
).split()


class Base(NamedTuple):
    """The tensors of a model, and the files that make it up."""

    tensors: Tensors
    shards: list[Path]
    others: list[Path]  # configuration, tokeniser, index


def merge(
    base: Path, adapter: Path, out: Path, names: Path | None, square: Square
) -> int:
    """**Raises:** `AdapterError`, `OSError`; then nothing is written."""
    refuse_existing(out)
    model = read_base(base)
    tasks = plan(read_content(adapter), model.tensors, namer(names), square)
    files = [*model.shards, *model.others]
    to_folder = base.is_dir() or out.is_dir()
    whole = folder_whole(out, [file.name for file in files])
    whole = whole if to_folder else written_whole(out)
    with _progress(len(tasks)) as advance, whole as beside:
        for source, new in zip(files, beside):
            shutil.copyfile(source, new)
            if source in model.shards:
                _fold(source, new, model, tasks, advance)
    return 0


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    out = console(stderr=True)
    with Progress(console=out, disable=not out.is_terminal, transient=True) as bar:
        task = bar.add_task("merging", total=total)
        yield lambda: bar.advance(task)


def _fold(
    source: Path,
    new: Path,
    model: Base,
    tasks: dict[str, Task],
    advance: Callable[[], None],
) -> None:
    with open_tensors(source) as file, new.open("r+b") as out:
        for name in file.specs:
            if name in tasks:
                merged = _merged(file, name, tasks[name])
                out.seek(model.tensors[name].start)
                out.write(merged.tobytes())
                advance()


def _merged(file: TensorFile, name: str, task: Task) -> np.ndarray:
    base = file.read(name)
    value = base if task.value is None else task.value.reshape(base.shape)
    if base.dtype.kind in "biu":
        return value
    is_wide = np.float64 in (base.dtype, value.dtype)
    dtype = np.float64 if is_wide else np.float32
    # Rounded once, to the type of the base. Too large a number is an error below.
    with np.errstate(over="ignore"):
        out = _sum(value.astype(dtype), task).astype(base.dtype)
    if not is_finite(out) and is_finite(base):
        raise AdapterError(
            f"{file.path}: `{name}` with its update is not finite in the type of the "
            f"base, {base.dtype.name}."
        )
    return out


def _sum(x: np.ndarray, task: Task) -> np.ndarray:
    delta = np.zeros_like(x)
    for part in task.parts:
        update = part.update.dense(x.dtype, part.at)
        update = update.swapaxes(-1, -2) if part.turned else update
        delta += update.reshape(x.shape)
    for added in task.added:
        update = np.asarray(added.scaling, x.dtype) * added.x.astype(x.dtype)
        delta += update.reshape(x.shape)
    # -0 + 0 would be +0: a weight without an update stays bit for bit.
    return np.where(delta == 0, x, x + delta)


# The base: one file, or a folder of shards.


def read_base(path: Path) -> Base:
    """**Raises:** `FileNotFoundError`; `AdapterError` if a file is not sound, a tensor
    is in two files, or an index and its files are at odds."""
    if not path.exists():
        raise FileNotFoundError(f"There is no file or folder {path}.")
    if not path.is_dir():
        return Base(_tensors(path), [path], [])
    index = path / INDEX
    where = read_index(index) if index.is_file() else None
    files = sorted(path.iterdir())
    shards = [file for file in files if file.name.endswith(_SUFFIX)]
    if where is not None:
        shards = [path / name for name in sorted(set(where.values()))]
    if not shards:
        raise FileNotFoundError(f"There is no file *{_SUFFIX} in {path}.")
    tensors: Tensors = {}
    for shard in shards:
        for name, tensor in _tensors(shard).items():
            if name in tensors:
                raise AdapterError(
                    f"`{name}` is in {tensors[name].file} and in {shard}: which is "
                    f"meant? A file {INDEX} would say it."
                )
            tensors[name] = tensor
    for name, file in (where or {}).items():
        if name not in tensors or tensors[name].file.name != file:
            raise AdapterError(f"{index} says that `{name}` is in {file}; it is not.")
    others = [file for file in files if _is_other(file)]
    return Base(tensors, shards, [*others, *([index] if where is not None else [])])


def _is_other(file: Path) -> bool:
    ends = (_SUFFIX, *_WEIGHTS)
    return (
        file.is_file()
        and not file.name.startswith(".")
        and not file.name.endswith(ends)
    )


def _tensors(path: Path) -> Tensors:
    with open_tensors(path) as file:
        return {
            name: Tensor(path, dtype, shape, file.starts[name])
            for name, (dtype, shape) in file.specs.items()
        }
