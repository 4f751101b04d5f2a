"""`merge`: a base model with an adapter folded in, written tensor by tensor.

A merged tensor has the shape and the type that it had, so that it takes the place that
it had: a file is copied, and what changes is written over. Names, order, metadata and
all other tensors stay byte for byte, and some rows at a time are in memory.
"""

import contextlib
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from rich.progress import Progress

from .._disk.files import (
    AdapterError,
    open_tensors,
)
from .._disk.fingerprint import another_base
from .._disk.shards import INDEX, read_index, SINGLE
from .._disk.whole import folder_whole, written_whole
from .console import console, namer, refuse_existing
from .content import is_finite, read_content, refuse_state
from .known import compare
from .merge_plan import Part, plan, Task, Tensor, Tensors
from .tied import settled


_SUFFIX = ".safetensors"
_BLOCK = 1 << 22  # Numbers of a tensor that are in memory at a time.
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
    base: Path,
    adapter: Path,
    out: Path,
    names: Path | None,
    tied: bool = False,
) -> int:
    """**Raises:** `AdapterError`, `OSError`; then nothing is written."""
    refuse_existing(out)
    refuse_state(adapter)
    model, content = read_base(base), read_content(adapter)
    called = namer(names, [*content.updates, *content.values, *content.added])
    content = settled(base, content, model.tensors, called, tied)
    known = compare(content, model.tensors, called)
    tasks = plan(content, model.tensors, called, known.turned)
    if known.differ:
        print(f"lora_quax: {another_base(adapter, known.differ)}", file=sys.stderr)
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
                _merge_tensor(
                    out, name, model.tensors[name], file.dtype(name), tasks[name]
                )
                advance()


def _merge_tensor(
    file: BinaryIO, name: str, tensor: Tensor, dtype: Any, task: Task
) -> None:
    """Writes a merged tensor over what it was, a block of rows at a time."""
    sizes = {_sizes(part) for part in task.parts}
    # Updates that split a weight in different ways have no rows in common.
    size = math.prod(tensor.shape)
    n, rows, cols = sizes.pop() if len(sizes) == 1 else (1, size, 1)
    step = max(1, _BLOCK // max(1, cols)) if not sizes else size
    for i in range(n):
        for start in range(0, rows, max(1, step)):
            block = Block(i, start, min(start + step, rows), rows, cols)
            position = tensor.start + block.first * dtype.itemsize
            file.seek(position)
            data = file.read(block.size * dtype.itemsize)
            merged = _merged(np.frombuffer(data, dtype), block, task)
            if merged is None:
                raise AdapterError(
                    f"{tensor.file}: `{name}` with its update is not finite in the "
                    f"type of the base, {dtype.name}."
                )
            file.seek(position)
            file.write(merged.tobytes())


def _sizes(part: Part) -> tuple[int, int, int]:
    """How many weights in a row, their rows and their columns."""
    b, a = part.update.sides(part.at, part.turned)
    return len(b), b.shape[1], a.shape[2]


class Block(NamedTuple):
    """Some rows of one of the weights that a tensor has in a row."""

    weight: int
    start: int
    stop: int
    rows: int  # of the weight
    cols: int

    @property
    def first(self) -> int:
        """Of its numbers among those of the tensor."""
        return (self.weight * self.rows + self.start) * self.cols

    @property
    def size(self) -> int:
        return (self.stop - self.start) * self.cols

    def of(self, x: np.ndarray) -> np.ndarray:
        """The block of another array of the tensor's size."""
        return x.reshape(-1)[self.first : self.first + self.size]


def _merged(base: np.ndarray, block: Block, task: Task) -> np.ndarray | None:
    """A block of a merged tensor; `None` if it is not finite, and was before."""
    value = base if task.value is None else block.of(task.value)
    if base.dtype.kind in "biu":
        return value
    is_wide = np.float64 in (base.dtype, value.dtype)
    dtype = np.float64 if is_wide else np.float32
    # Rounded once, to the type of the base. Too large a number is no result.
    with np.errstate(over="ignore"):
        out = _sum(value.astype(dtype), block, task).astype(base.dtype)
    return out if is_finite(out) or not is_finite(base) else None


def _sum(x: np.ndarray, block: Block, task: Task) -> np.ndarray:
    delta = np.zeros_like(x)
    for part in task.parts:
        b, a = part.update.sides(part.at, part.turned)
        scaling = np.asarray(part.update.scaling, x.dtype)
        if _sizes(part) == (len(b), block.rows, block.cols):
            b, a = b[block.weight, block.start : block.stop], a[block.weight]
        delta += (scaling * (b.astype(x.dtype) @ a.astype(x.dtype))).reshape(-1)
    for added in task.added:
        delta += np.asarray(added.scaling, x.dtype) * block.of(added.x).astype(x.dtype)
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
    index, single = path / INDEX, path / SINGLE
    # As `load_model` has it: what is in one file is not in several.
    where = read_index(index) if index.is_file() and not single.is_file() else None
    files = sorted(path.iterdir())
    shards = [file for file in files if _is_shard(file)]
    if where is not None:
        shards = [path / name for name in sorted(set(where.values()))]
    elif single.is_file():
        shards = [single]
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


# An adapter beside its base, which would be added twice; and another copy of the base.
_BESIDE = ("adapter_", "consolidated")


def _is_shard(file: Path) -> bool:
    return file.name.endswith(_SUFFIX) and not file.name.startswith(_BESIDE)


def _is_other(file: Path) -> bool:
    ends = (_SUFFIX, *_WEIGHTS)
    return (
        file.is_file()
        and not file.name.startswith((".", *_BESIDE))
        and not file.name.endswith(ends)
    )


def _tensors(path: Path) -> Tensors:
    with open_tensors(path) as file:
        return {
            name: Tensor(path, dtype, shape, file.starts[name])
            for name, (dtype, shape) in file.specs.items()
        }
