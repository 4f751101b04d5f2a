"""From the update of an array to those of the parameters that it stands for."""

from typing import Any, NamedTuple

import numpy as np

from .._arrays.base import is_adapted
from .._arrays.full import FullArray
from .._arrays.lora import LoraArray
from .._arrays.low_rank import LowRankArray
from .._disk.exchange import same_bits, to_numpy
from .._forms.dora import DoRA
from .._model.names import split
from .._model.paths import named
from ._layout import Kind, kind_of, magnitude_shape, per_of, to_peft
from ._places import Place
from ._whole import has_own_base, lora_of


class ParameterUpdate(NamedTuple):
    """The update of one parameter, as PEFT has it."""

    kind: Kind
    A: np.ndarray
    B: np.ndarray
    rank: int
    alpha: float
    magnitude: np.ndarray | None = None  # of DoRA


UNCHANGED = object()  # In place of an initial update that left the base as it was.


def updates_of(place: Place, initial: Any) -> dict[str, ParameterUpdate]:
    """The updates of the parameters that an array stands for, by name.

    **Arguments:**

    - `place`: of an adapted array.
    - `initial`: the array as it was before training, if the initial update was taken
        out of the base: the updates then are those of the base as it was before that.

    **Raises:** `ValueError` if PEFT has no such update.
    """
    try:
        if any(not split(name)[0] for name in place.names.values()):
            raise ValueError(
                "in PEFT it would belong to the model itself, which cannot be adapted; "
                "`names={'': 'layer'}` puts the whole model into a module"
            )
        kind = kind_of(place.leaf, place.shape, place.transposed)
        lora = lora_of(place.leaf.value)
        delta = _delta(lora, place, kind)
        magnitude = _magnitude(place, kind)
        a, b = (to_numpy(place.path, x) for x in (delta.a, delta.b))
        rank, alpha = delta.rank, delta.alpha
        if initial is not UNCHANGED:
            initial = lora_of(initial)
            first = _delta(initial, place, kind)
            if (first.rank, first.alpha) != (rank, alpha):
                raise ValueError("`initial` has another rank or alpha for it")
            if not same_bits(lora.base, initial.base):
                raise ValueError("its base is not the one that it has in `initial`")
            a0, b0 = (to_numpy(place.path, x) for x in (first.a, first.b))
            a = np.concatenate([a, a0], axis=a.ndim - 1 - delta.cols)
            b = np.concatenate([b, -b0], axis=-1)
            rank, alpha = 2 * rank, 2 * alpha
    except ValueError as e:
        raise ValueError(
            f"{named(place.path)} cannot be exchanged with PEFT: {e}."
        ) from e
    out = {}
    for index, name in place.names.items():
        # A layer of several that has no update, as `load` leaves it.
        is_empty = index and not (a[index].any() or b[index].any())
        if is_empty and magnitude is None and not has_own_base(place):
            continue
        A, B = to_peft(kind, a[index], b[index], place.transposed)
        m = None
        if magnitude is not None:
            shape = magnitude_shape(kind, place.shape, place.transposed)
            m = magnitude[index].reshape(shape)
        out[name] = ParameterUpdate(kind, A, B, rank, alpha, m)
    return out


def _magnitude(place: Place, kind: Kind) -> np.ndarray | None:
    """The magnitudes of a weight that is adapted by DoRA, as they are here."""
    x = place.leaf.value
    if not isinstance(x, DoRA):
        return None
    magnitude_shape(kind, place.shape, place.transposed)  # Whether PEFT has any.
    per = per_of(kind, place.transposed)
    if x.per != per:
        raise ValueError(
            f"it has a magnitude for each of its {x.per}; PEFT has one for each of "
            f"its {per}"
        )
    return to_numpy(place.path, x.magnitude)


def _delta(x, place: Place, kind: Kind) -> LowRankArray:
    """The update of a weight, if it is one that PEFT can have."""
    if not isinstance(x, LoraArray):
        raise ValueError("there is no `LoraArray`, which has a base and an update")
    if is_adapted(x.base) and not isinstance(x.base, FullArray):
        raise ValueError("it is an adapter on an adapter; merge one of them first")
    wanted = 1, len(place.shape) - 1 if kind == "conv" else 1
    delta = x.delta.lower()
    if (delta.rows, delta.cols) != wanted:
        raise ValueError(
            f"it has {delta.rows} axes of rows and {delta.cols} of columns; PEFT has "
            f"{wanted[0]} and {wanted[1]}"
        )
    return delta
