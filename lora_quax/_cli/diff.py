"""`diff`: in what two adapters differ."""

from pathlib import Path

import numpy as np

from ..peft._initial import INITIALISATIONS
from .content import read_content
from .norm import distance, distance_of_values, same, same_bits
from .update import Content, Update


def diff(one: Path, other: Path) -> int:
    """Prints what differs, a line each. **Returns:** 0 if nothing does, 1 otherwise."""
    first, second = read_content(one), read_content(other)
    lines = [
        *_between(_settings(first), _settings(second), one, other, _of_settings),
        *_between(first.updates, second.updates, one, other, _of_updates),
        *_between(_whole(first), _whole(second), one, other, _of_values),
    ]
    print(*lines, sep="\n", end="\n" if lines else "")
    return 1 if lines else 0


def _settings(content: Content) -> dict[str, str]:
    """What changes the base, where others leave it as it is."""
    by = content.initialisation
    return {"init_lora_weights": str(by)} if by in INITIALISATIONS else {}


def _of_settings(x: str, y: str) -> list[str]:
    return [f"{x} and {y}"] if x != y else []


def _whole(content: Content) -> dict[str, np.ndarray]:
    """The arrays given whole, and what is added to biases."""
    added = {
        f"{name} (added)": np.multiply(x, scaling, dtype=np.float64)
        for name, (x, scaling) in content.added.items()
    }
    return content.values | added


def _between(first: dict, second: dict, one: Path, other: Path, compare) -> list[str]:
    lines = [
        f"{name or '(the model)'}: only in {where}"
        for names, where in ((first, one), (second, other))
        for name in names
        if (name in first) != (name in second)
    ]
    for name in first:
        if name in second and (found := compare(first[name], second[name])):
            lines.append(f"{name or '(the model)'}: {', '.join(found)}")
    return lines


def _of_updates(x: Update, y: Update) -> list[str]:
    out = _unequal(x, y, ("rank", "alpha", "shape", "dtype", "has_base"))
    if x.shape == y.shape and not same(x, y):
        out.append(f"relative difference {distance(x, y):.3g}")
    return out


def _of_values(x: np.ndarray, y: np.ndarray) -> list[str]:
    out = _unequal(x, y, ("shape", "dtype"))
    if x.shape == y.shape and not same_bits(x, y):
        out.append(f"relative difference {distance_of_values(x, y):.3g}")
    return out


def _unequal(x, y, fields: tuple[str, ...]) -> list[str]:
    return [
        f"{field} {getattr(x, field)} and {getattr(y, field)}"
        for field in fields
        if getattr(x, field) != getattr(y, field)
    ]
