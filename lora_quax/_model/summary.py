"""A table of what was adapted."""

import io
import math
from typing import Any, NamedTuple

import jax
import jax.tree_util as jtu
import numpy as np
import quax
from jax.core import Tracer
from jaxtyping import PyTree
from rich.box import SIMPLE
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from .._arrays.base import BASE, base_of, FROZEN, is_adapted, lowered_type, roles
from .._arrays.check import aval_of
from .._arrays.low_rank import LowRankArray
from .._arrays.quantised import QuantisedArray
from .merge import origin, refuse_missing
from .paths import dotted, is_array, is_float, size_of
from .repeats import group


class Row(NamedTuple):
    """An adapted weight: its place, shape, rank, and how many parameters it has."""

    path: str
    shape: tuple[int, ...]
    rank: int | None  # None for an array that has no update of some rank
    scaling: float | None
    trainable: int
    frozen: int
    max_rank: int | None  # what the weight can use
    bits: float | None = None  # of a number of a quantised base, scales and all

    @property
    def rank_in_excess(self) -> bool:
        """Whether the rank is above what the weight can use."""
        if self.rank is None or self.max_rank is None:
            return False
        return self.rank > self.max_rank


class Summary(NamedTuple):
    """What was adapted. Prints as a table; in a notebook it is one.

    Parameters are the elements of floating-point arrays and quantised weights. `rows`
    has the adapted weights; `trainable` and `frozen` count those of the whole model.
    Weights that are alike but for numbers in their paths are one line of the table,
    `blocks.{0..31}.attn.q_proj.weight`, which counts them all.

    Of a model with adapted quantised bases the table has the bits that a number takes,
    and the bytes of the model in memory, as the devices count them.
    """

    rows: tuple[Row, ...]
    trainable: int
    frozen: int
    grouped: bool = True  # whether that is so
    bytes: int | None = None  # in memory, of the whole model, if it is all there

    @property
    def share(self) -> float:
        """The share of all parameters that trains."""
        return self.trainable / max(1, self.trainable + self.frozen)

    def __rich__(self) -> Table:
        table = Table(box=SIMPLE, show_footer=True, caption_justify="left")
        if any(row.rank_in_excess for row in self.rows):
            table.caption = "* above the largest rank that the weight can use"
        if not self.rows:
            table.caption = "Nothing is adapted: `loraify` returns the adapted model."
        rest = self.frozen - sum(row.frozen for row in self.rows)
        table.add_column("path", footer="total")
        table.add_column("shape", footer="")
        table.add_column("rank", justify="right", footer="")
        table.add_column("scaling", justify="right", footer="")
        trains = f"{self.trainable:,} ({self.share:.3%})"
        table.add_column("trainable", justify="right", footer=trains)
        table.add_column("frozen", justify="right", footer=f"{self.frozen:,}")
        has_bits = any(row.bits is not None for row in self.rows)
        if has_bits:
            held = "" if self.bytes is None else decimal(self.bytes)
            table.add_column("bits", justify="right", footer=held)
        for row in _lines(self.rows) if self.grouped else self.rows:
            table.add_row(
                row.path or "(the model)",
                str(row.shape).replace("[", r"\["),
                _rank(row),
                "" if row.scaling is None else f"{row.scaling:.4g}",
                f"{row.trainable:,}",
                f"{row.frozen:,}",
                *([""] if has_bits and row.bits is None else []),
                *([] if row.bits is None else [f"{row.bits:.3g}"]),
            )
        table.add_row("everything else", "", "", "", "0", f"{rest:,}")
        return table

    def __str__(self) -> str:
        text = io.StringIO()
        _console(text, color_system=None).print(self)
        lines = text.getvalue().splitlines()
        return "\n".join(line.rstrip() for line in lines if line.strip())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        console = _console(io.StringIO(), record=True)
        console.print(self)
        return console.export_html(
            inline_styles=True, code_format='<pre style="line-height:1.2">{code}</pre>'
        )


def _lines(rows: tuple[Row, ...]) -> list[Row]:
    """Rows that are alike but for numbers in their paths as one, with their sums."""
    lines = []
    for path, places in group((row.path, row[1:]) for row in rows):
        first, n = rows[places[0]], len(places)
        sums = dict(trainable=n * first.trainable, frozen=n * first.frozen)
        lines.append(first._replace(path=path, **sums))
    return lines


def _console(file: io.StringIO, **options) -> Console:
    # Wide, so that no path is cut or folded. In a notebook rich would show the table
    # there and then, and write nothing to the file.
    return Console(file=file, width=1000, force_jupyter=False, **options)


def _rank(row: Row) -> str:
    if row.rank is None:
        # Of an array that trains in full nothing else is used; a scaled one has a base.
        return "" if row.frozen else "full"
    return f"{row.rank} > {row.max_rank} *" if row.rank_in_excess else str(row.rank)


def summary(model: PyTree, *, grouped: bool = True) -> Summary:
    """What of a model is adapted, and how many of its parameters train.

    ```python
    print(lora_quax.summary(model))
    ```

    An array trained in full counts as trainable alone; its original, which is kept for
    `lora_quax.unload`, is no parameter of the model.

    **Arguments:**

    - `model`: a model, abstract or not.
    - `grouped`: whether weights that are alike but for numbers in their paths, such as
        those of 32 blocks, are one line of the table (true), or one each (false).

    **Returns:** a `Summary`, which prints as a table. A rank above what a small weight
    can use is marked with an asterisk.

    **Raises:** `ValueError` if an adapted weight has a leaf missing.
    """
    rows, trains, frozen = [], 0, 0
    leaves = jtu.tree_flatten_with_path(
        model, is_leaf=lambda x: isinstance(x, quax.Value)
    )[0]
    for keys, x in leaves:
        path = dotted(keys)
        refuse_missing(path, x)
        x_trains, x_frozen = _count(x)
        trains, frozen = trains + x_trains, frozen + x_frozen
        if is_adapted(x):
            shape, update = tuple(aval_of(x).shape), _update(lowered_type(x))
            facts = (None, None, None)  # Of an array that has no update of some rank.
            if update is not None:
                facts = update.rank, update.scaling, _max_rank(update)
            counts = x_trains, x_frozen, facts[2]
            rows.append(Row(path, shape, *facts[:2], *counts, _bits(x)))
    return Summary(tuple(rows), trains, frozen, grouped, _held(model))


def _update(lowered) -> LowRankArray | None:
    """The update in a lowered array, if there is one: that which was put on last."""
    while is_adapted(lowered) and not isinstance(lowered, LowRankArray):
        lowered = lowered_type(getattr(lowered, "delta", lowered.base))
    return lowered if is_adapted(lowered) else None


def _max_rank(update: LowRankArray) -> int:
    shape = update.shape[update.n_batch :]
    return min(math.prod(shape[: update.rows]), math.prod(shape[update.rows :]))


def _count(x) -> tuple[int, int]:
    """How many parameters of a leaf of the model train, and how many do not.

    Of a value of another library the elements count, not what they are stored as.
    """
    if not is_adapted(x):
        is_parameter = isinstance(x, quax.ArrayValue) or is_float(x)
        return 0, size_of(x) if is_parameter else 0
    names = jtu.tree_leaves(roles(x))
    sizes = [math.prod(leaf.shape) for leaf in jtu.tree_leaves(x)]
    trains = sum(n for n, name in zip(sizes, names) if name not in (BASE, FROZEN))
    frozen = sum(n for n, name in zip(sizes, names) if name == FROZEN)
    used = _used(x) if BASE in names else None
    return trains, frozen + (0 if used is None else size_of(used))


def _bits(x) -> float | None:
    base = origin(x)
    if not isinstance(base, QuantisedArray):
        return None
    held = _held(base)
    return None if held is None else 8 * held / max(1, size_of(base))


def _held(tree) -> int | None:
    """The bytes of the arrays of a tree, each counted once; `None` if some are not
    there."""
    arrays = {id(x): x for x in jtu.tree_leaves(tree) if is_array(x)}
    if any(not isinstance(x, jax.Array | np.ndarray) for x in arrays.values()):
        return None
    if any(isinstance(x, Tracer) for x in arrays.values()):
        return None
    return sum(
        x.on_device_size_in_bytes() if isinstance(x, jax.Array) else x.nbytes
        for x in arrays.values()
    )


def _used(x) -> Any:
    """The weight that is still used of what an array is around: an original beside the
    value that has taken its place is not."""
    while is_adapted(x):
        x = base_of(x) if is_adapted(lowered_type(x)) else None
    return x
