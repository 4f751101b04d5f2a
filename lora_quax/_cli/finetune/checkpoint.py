"""A run on disk: its log, and checkpoints that are there whole or not at all."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from shutil import rmtree
from typing import Any, NamedTuple

import jax
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from ..._disk.adapter import load_adapter, save_adapter
from ..._disk.files import (
    AdapterError,
    parse_json,
    read_json,
    read_tensors,
    write_tensors,
)
from ..._disk.whole import folder_whole, written_whole
from ..._model.paths import dotted, named
from .step import State


_BEGINNING = "step-"
_NAME = re.compile(_BEGINNING + r"\d{8}")
_ADAPTER, _OPTIMISER, _RUN = "adapter.safetensors", "optimiser.safetensors", "run.json"


class Found(NamedTuple):
    """A checkpoint, and what it says of the run that wrote it."""

    folder: Path
    step: int
    about: dict[str, Any]


def save_checkpoint(
    folder: Path, state: State, about: dict[str, Any], keep: int
) -> None:
    """Writes the state of a run, and takes away all but the newest checkpoints.

    **Raises:** `ValueError` if a number is not finite; `OSError`.
    """
    goal = folder / f"{_BEGINNING}{state.step:08}"
    with folder_whole(goal, [_ADAPTER, _OPTIMISER, _RUN]) as (adapter, optimiser, run):
        save_adapter(adapter, state.model)
        tensors = {name: np.asarray(x) for name, x in _leaves(state.opt_state)}
        write_tensors(optimiser, tensors, {})
        run.write_text(json.dumps(about, indent=2) + "\n")
    kept = [*filter(_is_whole, _checkpoints(folder))][-keep:]
    for path in _checkpoints(folder):
        if path not in kept and path.name < goal.name:
            # One that is taken away in part is none.
            (path / _RUN).unlink(missing_ok=True)
            rmtree(path, ignore_errors=True)


def newest(folder: Path) -> Found | None:
    """**Raises:** `AdapterError` if what it says cannot be read."""
    found = [*filter(_is_whole, _checkpoints(folder))]
    if not found:
        return None
    step = int(found[-1].name.removeprefix(_BEGINNING))
    return Found(found[-1], step, read_json(found[-1] / _RUN))


def load_checkpoint(found: Found, state: State) -> State:
    """**Arguments:**

    - `state`: of the same run before its first step.

    **Raises:** `AdapterError` if the files are damaged, or of another base or
    optimiser.
    """
    model = load_adapter(found.folder / _ADAPTER, state.model, same_base=True)
    path = found.folder / _OPTIMISER
    tensors, _ = read_tensors(path)
    leaves = []
    for name, x in _leaves(state.opt_state):
        value = tensors.get(name)
        if value is None or (value.shape, value.dtype) != (x.shape, x.dtype):
            got = "nothing" if value is None else f"{value.dtype}{list(value.shape)}"
            raise AdapterError(
                f"{path} has {got} for {named(name)} of the optimiser, which has "
                f"{x.dtype}{[*x.shape]}."
            )
        leaves.append(jax.numpy.asarray(value))
    opt_state = jax.tree.unflatten(jax.tree.structure(state.opt_state), leaves)
    return State(found.step, model, opt_state)


def differences(before: Any, now: Any, path: str = "") -> Iterator[str]:
    """In what two descriptions of a run differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in before | now:
            inner = f"{path}.{key}" if path else key
            yield from differences(before.get(key), now.get(key), inner)
    elif before != now:
        yield f"{path} was {before!r:.80}, and is {now!r:.80}"


def _checkpoints(folder: Path) -> list[Path]:
    """In their order, with what is left of those that were taken away in part."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if _NAME.fullmatch(path.name))


def _is_whole(checkpoint: Path) -> bool:
    return (checkpoint / _RUN).is_file()


def _leaves(opt_state: PyTree) -> list[tuple[str, Any]]:
    return [(dotted(keys), x) for keys, x in jtu.tree_flatten_with_path(opt_state)[0]]


class Log:
    """A line of JSON for each step and each evaluation."""

    def __init__(self, path: Path):
        self._path = path
        self.evaluated: set[int] = set()  # After which steps.

    def begin(self, step: int | None) -> None:
        """Forgets what comes after a step, which is to be done again; or all of it."""
        lines = []
        is_there = step is not None and self._path.is_file()
        for line in self._path.read_text().splitlines() if is_there else ():
            try:
                found = parse_json(line)
                if found["step"] > step:
                    break
            except (KeyError, TypeError, ValueError):  # Cut off, when it was killed.
                break
            lines.append(f"{line}\n")
            if "valid_loss" in found:
                self.evaluated.add(found["step"])
        with written_whole(self._path) as (new,):
            new.write_text("".join(lines))

    def add(self, **values: Any) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(values) + "\n")
