"""What was measured, as a table to read and as a file to compare."""

import dataclasses
import importlib.metadata
import json
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.box import SIMPLE
from rich.table import Table

import lora_quax

from ._harness import Measurement


PACKAGES = ("quax", "equinox", "jax", "jaxlib", "optax", "numpy")


def facts() -> dict[str, Any]:
    """What the times depend on besides the code."""
    device = jax.devices()[0]
    return dict(
        device=f"{device.platform}: {device.device_kind}",
        processor=_processor(),
        cores=_cores(),
        load=[round(x, 2) for x in os.getloadavg()],
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        packages={
            "lora_quax": lora_quax.__version__,
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
    )


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _cores() -> int | None:
    # Those this process may use, where the system can tell.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def table(title: str, measured: Sequence[Measurement]) -> Table:
    """A line for each row, the floor first."""
    out = Table(title=title, box=SIMPLE, padding=(0, 1, 0, 0))
    out.add_column("row", no_wrap=True)
    for header in ("÷ floor", "quartiles", "ms", "temp.\nMB", "args\nMB", "GFLOP"):
        out.add_column(header, justify="right", no_wrap=True)
    for m in measured:
        ratios = m.ratios(measured[0])
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        out.add_row(
            m.name,
            _against(middle, m.bound),
            f"{low:.2f}–{high:.2f}",
            f"{1e3 * m.time:.1f}",
            f"{m.temporary_memory / 1e6:.1f}",
            f"{m.argument_memory / 1e6:.1f}",
            f"{m.flops / 1e9:.1f}",
        )
    return out


def _against(ratio: float, bound: float | None) -> str:
    if bound is None:
        return f"{ratio:.2f}"
    colour, sign = ("green", "≤") if ratio <= bound else ("red", ">")
    return f"[{colour}]{ratio:.2f} {sign} {bound:.2f}[/{colour}]"


def save(
    path: Path,
    settings: dict[str, Any],
    facts: dict[str, Any],
    measured: Sequence[Measurement],
) -> None:
    """Everything, each single time included, as JSON."""
    rows = [
        dict(
            dataclasses.asdict(m),
            ratio=statistics.median(m.ratios(measured[0])),
            time=m.time,
        )
        for m in measured
    ]
    content = dict(settings=settings, facts=facts, rows=rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
