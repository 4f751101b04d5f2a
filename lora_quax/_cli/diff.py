"""`diff`: in what two adapters differ."""

from pathlib import Path

import numpy as np

from .._disk.exchange import same_bits
from ..peft._initial import INITIALISATIONS
from .console import namer
from .content import Content, norm_of_product, read_content, Update


def diff(one: Path, other: Path, names: Path | None = None) -> int:
    """Prints what differs, a line each. **Returns:** 0 if nothing does, 1 otherwise."""
    first, second = read_content(one), read_content(other)
    called = namer(names, [*first.updates, *first.values, *first.added])
    first = first._replace(
        updates={called(name): x for name, x in first.updates.items()},
        values={called(name): x for name, x in first.values.items()},
        added={called(name): x for name, x in first.added.items()},
        magnitudes={called(name): x for name, x in first.magnitudes.items()},
    )
    called.check()
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
    """The arrays given whole, magnitudes, and what is added to biases."""
    added = {
        f"{name} (added)": np.multiply(x, scaling, dtype=np.float64)
        for name, (x, scaling) in content.added.items()
    }
    magnitudes = {f"{name} (magnitude)": x for name, x in content.magnitudes.items()}
    return content.values | magnitudes | added


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
    if x.shape == y.shape and not _same(x, y):
        out.append(f"relative difference {_distance(x, y):.3g}")
    return out


def _of_values(x: np.ndarray, y: np.ndarray) -> list[str]:
    out = _unequal(x, y, ("shape", "dtype"))
    if x.shape == y.shape and not same_bits(x, y):
        out.append(f"relative difference {_distance_of_values(x, y):.3g}")
    return out


def _unequal(x, y, fields: tuple[str, ...]) -> list[str]:
    return [
        f"{field} {getattr(x, field)} and {getattr(y, field)}"
        for field in fields
        if getattr(x, field) != getattr(y, field)
    ]


def _distance(one: Update, other: Update) -> float:
    """The norm of the difference of two updates of one shape, relative to the larger.

    It is NaN if either is not finite.
    """
    (a1, b1), (a2, b2) = one.factors(), other.factors()
    most = max(norm_of_product(a1, b1), norm_of_product(a2, b2))
    if most == 0:
        return 0.0
    # b1 @ a1 - b2 @ a2 is itself a product, of both ranks together.
    a = np.concatenate([a1, a2], axis=-2)
    b = np.concatenate([b1, -b2], axis=-1)
    return norm_of_product(a, b) / most


def _same(one: Update, other: Update) -> bool:
    pairs = (one.a, other.a), (one.b, other.b)
    return one.alpha == other.alpha and all(same_bits(x, y) for x, y in pairs)


def _distance_of_values(x: np.ndarray, y: np.ndarray) -> float:
    """As `_distance`, of two arrays of one shape."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    most = max(float(np.linalg.norm(x)), float(np.linalg.norm(y)))
    return float(np.linalg.norm(x - y)) / most if most else 0.0
