"""The results as a page to read, and as the table in README; from the files of them."""

import re
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from . import _results
from ._report import digits
from ._results import Spread
from ._work import STRICT


def write(folder: Path, names: Iterable[str], plots: Iterable[Path]) -> Path:
    """A page of all the results in a folder, in the order of `names`."""
    found = [folder / f"{name}.json" for name in names]
    results = [_results.read(path) for path in found if path.exists()]
    path = folder / "README.md"
    path.write_text("\n".join(_page(results, plots)) + "\n")
    return path


def _page(results: list[dict[str, Any]], plots: Iterable[Path]) -> Iterator[str]:
    yield "# Results"
    yield ""
    yield "Written by `python -m benchmarks`, as are the files beside this one, which"
    yield "hold every single time, and the versions and the machine it was taken on."
    yield "A figure is the median of all runs; beside it stand the least and the"
    yield "greatest."
    yield ""
    yield "| claim | at most | measured | runs | |"
    yield "|---|---|---|---|---|"
    for result in results:
        for claim in _results.claims(result):
            yield _claim(*claim)
    for plot in plots:
        yield ""
        yield f"![{plot.stem}]({plot.name})"
    for result in results:
        yield from _case(result)


def _claim(text: str, bound: float | None, measured: Spread | None) -> str:
    asked = "" if bound is None else digits(bound)
    if measured is None:
        return f"| {text} | {asked} | not measured | | |"
    missed = bound is not None and not measured.middle <= bound
    cells = [
        text,
        asked,
        digits(measured.middle),
        f"{digits(measured.low)}–{digits(measured.high)}",
        "**missed**" if missed else "",
    ]
    return f"| {' | '.join(cells)} |"


def _case(result: dict[str, Any]) -> Iterator[str]:
    runs = result["runs"]
    facts = runs[0]["facts"]
    packages = facts["packages"]
    yield ""
    yield f"## {result['title']}"
    yield ""
    yield (
        f"{len(runs)} runs of {runs[0]['rounds']} rounds, {facts['cores']} cores "
        f"({facts['processor']}), Python {facts['python']}, JAX {packages['jax']}."
    )
    for name, why in runs[0]["absent"].items():
        yield f"Left out: {name} ({why})."
    yield ""
    yield "| | | ÷ first | runs | ms | temp. MB | GFLOP | trace + lower, ms |"
    yield "|---|---|---|---|---|---|---|---|"
    for point in runs[0]["points"]:
        yield from _rows(result, point)


# Figures of a row, in the order of the columns; `None` where they are not known.
FIGURES = {
    "ms": (lambda row: 1e3 * statistics.median(row["times"]), ".1f"),
    "temp. MB": (lambda row: _scaled(row["temporary_memory"], 1e-6), ".1f"),
    "GFLOP": (lambda row: _scaled(row["flops"], 1e-9), ".2f"),
    "trace + lower, ms": (
        lambda row: row["flops"] and 1e3 * (row["trace_time"] + row["lower_time"]),
        ".0f",
    ),
}


def _scaled(figure: float | None, by: float) -> float | None:
    return None if figure is None else by * figure


def _rows(result: dict[str, Any], point: str) -> Iterator[str]:
    columns = [
        (_results.figures(result, point, figure), form)
        for figure, form in FIGURES.values()
    ]
    for name, ratio in _results.over(result, point).items():
        cells = [point, name, f"{ratio.middle:.2f}", str(ratio)]
        for column, form in columns:
            figure = column[name]
            cells.append("" if figure is None else f"{figure.middle:{form}}")
        yield f"| {' | '.join(cells)} |"


# Rows that README leaves out, being much like another.
_LIKE_BY_HAND = "by hand, Equinox", "quax.examples.lora"


def readme_table(folder: Path) -> list[str]:
    """A training step in float32, with one in bfloat16 beside it."""
    step, narrow = (
        _results.read(folder / f"{name}.json") for name in ("transformer", "bfloat16")
    )
    strict = _results.over(step, "step", STRICT)
    in_bfloat16 = _results.over(narrow, "step")
    memory, flops = (
        _results.figures(step, "step", FIGURES[name][0])
        for name in ("temp. MB", "GFLOP")
    )
    lines = [
        "| | ÷ frozen | runs | ÷ strict floor | bfloat16 ÷ frozen | runs "
        "| temporary MB | GFLOP |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, ratio in _results.over(step, "step").items():
        if name in _LIKE_BY_HAND:
            continue
        cells = [
            name,
            *_with_range(ratio),
            _with_range(strict[name])[0],
            *_with_range(in_bfloat16.get(name)),
            *(
                f"{known.middle:.1f}" if (known := figure[name]) else ""
                for figure in (memory, flops)
            ),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _with_range(ratio: Spread | None) -> tuple[str, str]:
    return ("", "") if ratio is None else (f"{ratio.middle:.2f}", str(ratio))


def into_readme(path: Path, table: list[str]) -> None:
    """Puts the table in the place of the one in README's section on speed."""
    before, heading, after = path.read_text().partition("## Speed\n")
    lines = "\n".join(table) + "\n"
    after = re.sub(r"(?:^\|.*\n)+", lambda _: lines, after, count=1, flags=re.M)
    path.write_text(before + heading + after)
