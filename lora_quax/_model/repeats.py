"""What repeats in a list of paths, said once: `blocks.{0..31}.attn.q`."""

from collections.abc import Hashable, Iterable
from itertools import groupby
from typing import NamedTuple


class Group(NamedTuple):
    """Paths that differ in their numbers alone, and are all that these numbers give."""

    path: str
    places: tuple[int, ...]  # in the list


def group(items: Iterable[tuple[str, Hashable]]) -> list[Group]:
    """Groups of paths that are alike in what stands beside them, in the order in which
    they begin.

    A group has, in place of each number of the path, a set of numbers, and consists of
    their product. So from single paths, those that agree in all places but one are
    joined, one place after the other, the last place first.
    """
    found: dict[Hashable, dict[tuple[frozenset[int], ...], list[int]]] = {}
    for i, (path, beside) in enumerate(items):
        parts = path.split(".")
        template = tuple(None if _is_number(part) else part for part in parts)
        numbers = tuple(frozenset([int(part)]) for part in parts if _is_number(part))
        found.setdefault((template, beside), {}).setdefault(numbers, []).append(i)
    groups = []
    for (template, _), boxes in found.items():  # pyright: ignore
        for place in reversed(range(template.count(None))):
            boxes = _joined(boxes, place)
        groups += [
            Group(_written(template, numbers), tuple(sorted(places)))
            for numbers, places in boxes.items()
        ]
    return sorted(groups, key=lambda g: g.places[0])


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdigit() and str(int(part)) == part


def _joined(boxes, place: int):
    """Those that agree in all places but one as one, which has all numbers there."""
    alike: dict = {}
    for numbers in boxes:
        others = numbers[:place] + numbers[place + 1 :]
        alike.setdefault(others, []).append(numbers)
    out = {}
    for same in alike.values():
        union = frozenset().union(*(numbers[place] for numbers in same))
        key = (*same[0][:place], union, *same[0][place + 1 :])
        out[key] = [i for numbers in same for i in boxes[numbers]]
    return out


def _written(template: tuple, numbers: tuple[frozenset[int], ...]) -> str:
    sets = iter(numbers)
    return ".".join(_set(next(sets)) if part is None else part for part in template)


def _set(numbers: frozenset[int]) -> str:
    """`3`, `{0..31}` or `{0,2,5..7}`."""
    if len(numbers) == 1:
        return str(*numbers)
    ordered = sorted(numbers)
    # A run is of numbers that differ from their place by the same.
    runs = groupby(enumerate(ordered), key=lambda pair: pair[1] - pair[0])
    return "{" + ",".join(_run([n for _, n in run]) for _, run in runs) + "}"


def _run(numbers: list[int]) -> str:
    if len(numbers) < 3:
        return ",".join(map(str, numbers))
    return f"{numbers[0]}..{numbers[-1]}"
