"""`merge`: a base model with an adapter folded in, written tensor by tensor.

A merged tensor has the shape and the type that it had, so that it takes the place that
it had: a file is copied, and what changes is written over. Names, order, metadata and
all other tensors stay byte for byte, and one tensor at a time is in memory.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from rich.progress import Progress

from .._disk.files import AdapterError, open_tensors, TensorFile, written_whole
from .base import Base, read_base
from .console import console
from .content import is_finite, read_content
from .names import namer
from .out import refuse_existing
from .plan import plan, Square, Task


def merge(
    base: Path, adapter: Path, out: Path, names: Path | None, square: Square
) -> int:
    """**Raises:** `AdapterError`, `OSError`; then nothing is written."""
    refuse_existing(out)
    model = read_base(base)
    tasks = plan(read_content(adapter), model, namer(names), square)
    with _folder(base, out), _progress(len(tasks)) as advance:
        goals = _goals(base, model, out)
        with written_whole(*goals.values()) as beside:
            for source, new in zip(goals, beside):
                shutil.copyfile(source, new)
                if source in model.shards:
                    _fold(source, new, model, tasks, advance)
    return 0


def _goals(base: Path, model: Base, out: Path) -> dict[Path, Path]:
    """Which file goes where."""
    if base.is_dir() or out.is_dir():
        return {file: out / file.name for file in (*model.shards, *model.others)}
    return {base: out}


@contextlib.contextmanager
def _folder(base: Path, out: Path) -> Iterator[None]:
    """Makes the folder for a folder's files, and takes it away if anything fails."""
    is_new = base.is_dir() and not out.exists()
    if is_new:
        out.mkdir()
    try:
        yield
    except BaseException:
        if is_new:
            out.rmdir()
        raise


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
