"""The results as a page to read, written from the files of results."""

import json
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ._report import digits


def write(folder: Path, names: Iterable[str], plots: Iterable[Path]) -> Path:
    """A page of all the results in a folder, in the order of `names`."""
    found = [folder / f"{name}.json" for name in names]
    results = [json.loads(path.read_text()) for path in found if path.exists()]
    path = folder / "README.md"
    path.write_text("\n".join(_page(results, plots)) + "\n")
    return path


def _page(results: list[dict[str, Any]], plots: Iterable[Path]) -> Iterator[str]:
    yield "# Results"
    yield ""
    yield "Written by `python -m benchmarks`, as are the files beside this one, which"
    yield "hold every single time, and the versions and the machine it was taken on."
    yield ""
    yield "| claim | at most | measured | |"
    yield "|---|---|---|---|"
    for result in results:
        for claim in result["claims"]:
            yield _claim(claim)
    for plot in plots:
        yield ""
        yield f"![{plot.stem}]({plot.name})"
    for result in results:
        yield from _case(result)


def _claim(claim: dict[str, Any]) -> str:
    value, bound = claim["value"], claim["bound"]
    asked = "" if bound is None else digits(bound)
    missed = None not in (value, bound) and not value <= bound
    cells = [claim["text"], asked, digits(value), "**missed**" if missed else ""]
    return f"| {' | '.join(cells)} |"


def _case(result: dict[str, Any]) -> Iterator[str]:
    facts, rounds = result["facts"], result["rounds"]
    packages = facts["packages"]
    yield ""
    yield f"## {result['title']}"
    yield ""
    yield (
        f"{rounds} rounds, {facts['cores']} cores ({facts['processor']}), "
        f"Python {facts['python']}, JAX {packages['jax']}."
    )
    for name, why in result["absent"].items():
        yield f"Left out: {name} ({why})."
    yield ""
    yield from _rows(result["points"])


def _rows(points: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    yield "| | | ÷ first | quartiles | ms | temp. MB | GFLOP | trace + lower, ms |"
    yield "|---|---|---|---|---|---|---|---|"
    for point, rows in points.items():
        for row in rows:
            yield _row(point, row, rows[0])


def _row(point: str, row: dict[str, Any], first: dict[str, Any]) -> str:
    ratios = [x / y for x, y in zip(row["times"], first["times"])]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    cells = [
        point,
        row["name"],
        f"{middle:.2f}",
        f"{low:.2f}–{high:.2f}",
        f"{1e3 * statistics.median(row['times']):.1f}",
        *("", "", ""),
    ]
    if row["flops"] is not None:
        cells[-3:] = (
            f"{row['temporary_memory'] / 1e6:.1f}",
            f"{row['flops'] / 1e9:.2f}",
            f"{1e3 * (row['trace_time'] + row['lower_time']):.0f}",
        )
    return f"| {' | '.join(cells)} |"
