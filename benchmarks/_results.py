"""Results on file: those of several runs, and what they come to together.

A run is a process of its own. It has its own layout of memory and its own neighbours on
the machine, so that rounds of one run lie closer together than runs do. A figure is
the median of a run's rounds; of several runs it is the median of theirs, with the least
and the greatest beside it.
"""

import json
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Spread(NamedTuple):
    """The median of what several runs gave, and the least and the greatest."""

    low: float
    middle: float
    high: float

    def __str__(self) -> str:
        return f"{self.low:.2f}–{self.high:.2f}"


def spread(figures: Sequence[float]) -> Spread:
    return Spread(min(figures), statistics.median(figures), max(figures))


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def add(path: Path, run: dict[str, Any], fresh: bool) -> None:
    """Adds a run to those on file, or begins anew.

    What is said of a case (its title, its claims) is that of the latest run.
    """
    runs = [] if fresh or not path.exists() else read(path)["runs"]
    said = {key: run.pop(key) for key in ("case", "title", "claims")}
    text = json.dumps(
        {**said, "runs": [*runs, run]}, indent=1, ensure_ascii=False, allow_nan=False
    )
    # A list of numbers is a line.
    text = re.sub(r"\[[\s\d.,e+-]+\]", lambda found: " ".join(found[0].split()), text)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def claims(result: dict[str, Any]) -> list[tuple[str, float | None, Spread | None]]:
    """What is claimed, the bound, and what the runs gave, if all of them did."""
    out = []
    for claim in result["claims"]:
        figures = [run["claimed"].get(claim["text"]) for run in result["runs"]]
        known = None not in figures
        out.append((claim["text"], claim["bound"], spread(figures) if known else None))
    return out


def over(
    result: dict[str, Any], point: str, first: str | None = None
) -> dict[str, Spread]:
    """The time of each row of a point over that of `first`, or of the first of them.

    A row that only some of the runs have is left out.
    """

    def ratio(row, rows) -> float:
        other = rows[next(iter(rows)) if first is None else first]
        return statistics.median(x / y for x, y in zip(row["times"], other["times"]))

    return {name: spread(found) for name, found in _each_row(result, point, ratio)}


def figures(
    result: dict[str, Any], point: str, figure: Callable
) -> dict[str, Spread | None]:
    """A spread of `figure(row)` for each row of a point, or `None` without one."""
    rows = _each_row(result, point, lambda row, rows: figure(row))
    return {name: None if None in found else spread(found) for name, found in rows}


def _each_row(
    result: dict[str, Any], point: str, figure: Callable
) -> Iterator[tuple[str, list]]:
    runs = [
        {row["name"]: row for row in run["points"][point]} for run in result["runs"]
    ]
    for name in runs[0]:
        if all(name in rows for rows in runs):
            yield name, [figure(rows[name], rows) for rows in runs]
