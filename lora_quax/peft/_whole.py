"""What PEFT writes whole: biases, and modules that are trained in full."""

from collections.abc import Set
from typing import Any, NamedTuple

import equinox as eqx
import numpy as np
import quax

from .._arrays.full import FullArray
from .._arrays.lora import LoraArray
from .._disk.exchange import to_numpy
from .._forms.dora import DoRA
from .._model.names import is_in, split
from .._model.paths import named
from ._places import Place


class Whole(NamedTuple):
    """The modules that are saved whole, and the biases, with PEFT's mode for these."""

    modules: Set[str]
    bias: str  # "none", "lora_only" or "all"
    biases: Set[str]


def whole(places: list[Place], adapted: Set[str]) -> Whole:
    """What has to be written whole, so that all that is trained in full is.

    **Arguments:**

    - `places`: of the arrays of the model.
    - `adapted`: the modules that have an update.

    **Raises:** `ValueError` if PEFT cannot save an array that is trained in full.
    """
    saved = _saved(places, adapted)
    trained = {
        name: isinstance(place.leaf.value, FullArray)
        for place in places
        for name in place.names.values()
        if split(name)[1] == "bias" and not any(is_in(name, m) for m in saved)
    }
    of_adapted = {name for name in trained if split(name)[0] in adapted}
    if not any(trained.values()):
        return Whole(saved, "none", set())
    if not any(trained[name] for name in trained.keys() - of_adapted):
        return Whole(saved, "lora_only", of_adapted)
    return Whole(saved, "all", trained.keys())


def _saved(places: list[Place], adapted: Set[str]) -> set[str]:
    """The modules that have an array, not a bias, that is trained in full."""
    trained = {
        split(name)[0]: place
        for place in places
        for name in place.names.values()
        if isinstance(place.leaf.value, FullArray) and split(name)[1] != "bias"
    }
    for module, place in trained.items():
        if why := _why_not(module, place):
            raise ValueError(
                f"{named(place.path)} is trained in full and cannot be written among "
                f"`modules_to_save`: {why}."
            )
    # PEFT means every module whose name ends in one of these, dot or no dot.
    ends = tuple(trained)
    saved = {module for module in modules_of(places) if module.endswith(ends)}
    outermost = {m for m in saved if not any(is_in(m, n) for n in saved - {m})}
    for module in outermost:
        for inside in sorted(name for name in adapted if is_in(name, module)):
            raise ValueError(
                f"PEFT would save the module `{module}` whole, for an array in it is "
                f"trained in full, or in a module whose name is the end of this one; "
                f"but `{inside}` is adapted."
            )
    return outermost


def _why_not(module: str, place: Place) -> str | None:
    holder = place.leaf.holder
    if not module:
        return "it is no part of a module"
    if isinstance(holder, eqx.nn.BatchNorm):
        return "PyTorch keeps running statistics with it, which are not here"
    if isinstance(holder, eqx.nn.ConvTranspose):
        return "PyTorch lays out the kernel of a transposed convolution otherwise"
    return None


def modules_of(places: list[Place]) -> set[str]:
    """All modules of the PyTorch model that hold an array, near or far."""
    segments = [split(name)[0].split(".") for p in places for name in p.names.values()]
    return {".".join(x[: i + 1]) for x in segments for i in range(len(x))} - {""}


def lora_of(x: Any) -> Any:
    """The weight and its update, of which a `DoRA` has the norms besides."""
    return x.lora if isinstance(x, DoRA) else x


def has_own_base(place: Place) -> bool:
    """Whether the base of an update may not be that of the model that was adapted."""
    x = lora_of(place.leaf.value)
    return isinstance(x.base, FullArray) or not x.stop_gradient


def value_of(place: Place, index: tuple[int, ...], conv1d: bool) -> np.ndarray:
    """What a parameter itself is now, in PyTorch's layout: see `Place.to_torch`."""
    x = lora_of(place.leaf.value)
    x = x.base if isinstance(x, LoraArray) else x
    x = x.value if isinstance(x, FullArray) else x
    if isinstance(x, quax.Value):
        raise ValueError(
            f"{named(place.path)} would have to be written whole, and is no plain "
            f"array but a {type(x).__name__}."
        )
    return place.to_torch(to_numpy(place.path, x)[index], conv1d)
