"""`inspect`: what an adapter holds, as a table."""

from pathlib import Path

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from ..peft._initial import INITIALISATIONS
from .console import console, show
from .content import (
    arrays_of,
    Content,
    is_finite,
    norm_of_product,
    read_content,
    totals,
)


_MARK = "not finite"
_COLUMNS = ("path", "kind", "shape", "rank", "alpha", "scaling", "dtype", "norm", "")
_NUMBERS = ("rank", "alpha", "scaling", "norm")
# In fewer columns the path has a line of its own, and these stand below it.
_NARROW, _BELOW = 120, ("kind", "shape", "dtype")


def inspect(path: Path) -> int:
    """Prints the table. **Returns:** 1 if anything in it is not finite, 0 otherwise."""
    content = read_content(path)
    bad = {name for name, x in arrays_of(content).items() if not is_finite(x)}
    show(_table(content, bad))
    return 1 if bad else 0


def _table(content: Content, bad: set[str]) -> Table:
    total = totals(content)
    table = Table(box=SIMPLE, show_footer=True, title_justify="left")
    initialised = f", initialised by {content.initialisation}"
    shown = initialised if content.initialisation in INITIALISATIONS else ""
    table.title = Text(f"{content.path}, an adapter of {content.format}{shown}")
    sizes = f"{total.parameters:,} parameters, {total.bytes:,} bytes"
    columns = dict.fromkeys(_COLUMNS, "")
    columns["path"], columns[""] = sizes, f"{_MARK}: {len(bad)}" if bad else ""
    below = _BELOW if console().width < _NARROW else ()
    for name, footer in columns.items():
        if name not in below:
            side = "right" if name in _NUMBERS else "left"
            table.add_column(name, footer=footer, justify=side, overflow="fold")
    for row in _rows(content, bad):
        cells: dict[str, str] = dict(zip(_COLUMNS, row, strict=True))
        under = " ".join(filter(None, (cells.pop(name) for name in below)))
        cells["path"] += f"\n  {under}" if under else ""
        table.add_row(*map(Text, cells.values()))
    return table


def _rows(content: Content, bad: set[str]) -> list[tuple[str, ...]]:
    rows = []
    for name, x in content.updates.items():
        sides = [side for side in "ab" if f"{name}, {side}" in bad]
        rows.append(
            (
                _of(name, x.weights),
                x.kind if x.has_base else f"{x.kind}, no base",
                str(x.shape),
                str(x.rank),
                f"{x.alpha:g}",
                f"{x.scaling:.4g}",
                x.dtype,
                "" if sides else f"{norm_of_product(*x.factors()):.4g}",
                f"{_MARK}: {' and '.join(sides)}" if sides else "",
            )
        )
    for name, x in content.values.items():
        mark = _MARK if name in bad else ""
        shape, dtype = str(x.shape), x.dtype.name
        rows.append((_shown(name), "whole", shape, "", "", "", dtype, "", mark))
    for name, x in content.magnitudes.items():
        mark = _MARK if f"{name}, magnitude" in bad else ""
        shape, dtype = str(x.shape), x.dtype.name
        rows.append((_shown(name), "magnitude", shape, "", "", "", dtype, "", mark))
    for name, (x, scaling) in content.added.items():
        mark = _MARK if f"{name}, added" in bad else ""
        shape, dtype = str(x.shape), x.dtype.name
        scaled = f"{scaling:.4g}"
        rows.append((_shown(name), "added", shape, "", "", scaled, dtype, "", mark))
    return rows


def _of(name: str, weights: tuple[str, ...]) -> str:
    if len(weights) == 1:
        return _shown(name)
    return f"{name} (of {' or '.join(weights)})"


def _shown(name: str) -> str:
    return name or "(the model)"
