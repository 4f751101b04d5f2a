"""What was measured, as tables to read and as files to compare."""

import dataclasses
import importlib.metadata
import os
import platform
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from rich.box import SIMPLE
from rich.table import Table

import lora_quax

from . import _results
from ._work import Case, Claim, cores, Measurement, Point


PACKAGES = ("quax", "equinox", "jax", "jaxlib", "optax", "numpy", "flax", "qwix")


@dataclass(frozen=True)
class Result:
    """What came of a case."""

    case: Case
    rounds: int
    points: Mapping[str, Point]
    absent: Mapping[str, str]  # The rows that were left out, and why.


def facts() -> dict[str, Any]:
    """What the times depend on besides the code."""
    device = jax.devices()[0]
    return dict(
        device=f"{device.platform}: {device.device_kind}",
        processor=_processor(),
        cores=cores(),
        load=[round(x, 2) for x in os.getloadavg()],
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        packages={"lora_quax": lora_quax.__version__, **dict(_versions())},
    )


def _versions():
    for name in PACKAGES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass  # Its row is named as left out.


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


# Header, the figure that stands under it, and its format.
COLUMNS = {
    "ms": (lambda m: 1e3 * m.time, ".1f"),
    "temp. MB": (lambda m: m.temporary_memory / 1e6, ".1f"),
    "args MB": (lambda m: m.argument_memory / 1e6, ".1f"),
    "GFLOP": (lambda m: m.flops / 1e9, ".2f"),
}
APART = {
    "trace ms": (lambda m: 1e3 * m.trace_time, ".0f"),
    "lower ms": (lambda m: 1e3 * m.lower_time, ".0f"),
    "compile ms": (lambda m: 1e3 * m.compile_time, ".0f"),
    "grads kB": (lambda m: m.facts["gradient"] / 1e3, ".0f"),
    "optim. kB": (lambda m: m.facts["optimiser"] / 1e3, ".0f"),
}


def tables(title: str, measured: Sequence[Measurement]) -> Iterator[Table]:
    """What a step takes, and apart from it what it takes to make one.

    There is a line for each row, which is compared with the first.
    """
    first = measured[0]
    comparison = [_compare(m.ratios(first)) for m in measured]
    headers = [f"÷ {first.name}", "quartiles"]
    yield _table(title, measured, COLUMNS, headers, comparison)
    if first.trace_time is not None:
        yield _table("", measured, APART, [], [[]] * len(measured))


def _compare(ratios: list[float]) -> list[str]:
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return [f"{middle:.2f}", f"{low:.2f}–{high:.2f}"]


def _table(title, measured, columns, headers, cells) -> Table:
    out = Table(title=title, box=SIMPLE, padding=(0, 1, 0, 0))
    out.add_column("row", no_wrap=True)
    for header in (*headers, *columns):
        out.add_column(header, justify="right", no_wrap=True)
    for m, row in zip(measured, cells):
        out.add_row(m.name, *row, *(_cell(m, *column) for column in columns.values()))
    return out


def _cell(m: Measurement, figure: Callable, form: str) -> str:
    try:
        return f"{figure(m):{form}}"
    except (TypeError, KeyError):  # It is None, or there is no such fact.
        return ""


def evaluate(result: Result) -> list[tuple[Claim, float | None]]:
    """The claims of a case, each with the figure that was measured."""
    return [(claim, claim.value(result.points)) for claim in result.case.claims]


def claims(title: str, claimed: Iterable[tuple]) -> Table:
    """What is claimed, what was asked, and what was measured in one run or several."""
    out = Table(title=title, box=SIMPLE, padding=(0, 1, 0, 0))
    for header in ("claim", "at most", "measured", "runs"):
        out.add_column(header, justify="left" if header == "claim" else "right")
    for text, bound, measured in claimed:
        asked = "" if bound is None else digits(bound)
        if measured is None:
            out.add_row(text, asked, "not measured", "")
            continue
        missed = bound is not None and not measured.middle <= bound
        colour = "red" if missed else "green"
        figure = f"[{colour}]{digits(measured.middle)}[/{colour}]"
        runs = f"{digits(measured.low)}–{digits(measured.high)}"
        out.add_row(text, asked, figure, runs)
    return out


def digits(x: float) -> str:
    """Three digits or so, as the tables and README give a figure."""
    return f"{x:.0f}" if x == 0 or abs(x) >= 100 else f"{x:#.3g}"


def save(folder: Path, result: Result, facts: dict[str, Any], fresh: bool) -> Path:
    """Everything, each single time included, beside the runs that are there already.

    **Arguments:**

    - `fresh`: whether to begin anew.

    **Returns:** the file, of JSON.
    """
    case, evaluated = result.case, evaluate(result)
    run = dict(
        case=case.name,
        title=case.title,
        claims=[dict(text=claim.text, bound=claim.bound) for claim, _ in evaluated],
        rounds=result.rounds,
        facts=facts,
        absent=result.absent,
        claimed={claim.text: value for claim, value in evaluated},
        points={
            point: [dataclasses.asdict(m) for m in rows.values()]
            for point, rows in result.points.items()
        },
    )
    path = folder / f"{case.name}.json"
    _results.add(path, run, fresh)
    return path
