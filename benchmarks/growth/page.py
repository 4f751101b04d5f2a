"""The tables of `docs/guide/sharding.md`, from the file of results."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from .laws import exponents, fit, LAWS, Program, terms_of


PAGE = Path(__file__).parents[2] / "docs" / "guide" / "sharding.md"
SENT = "| step | split | collective | bytes | within | devices | layers | width |"
MEMORY = "| step | split | memory | bytes | within | devices | layers | width |"


def tables(programs: Sequence[Program]) -> dict[str, str]:
    """Each with its head as the key."""
    rows = {SENT: [], MEMORY: []}
    for step, split in LAWS:
        found = [p for p in programs if (p["step"], p["split"]) == (step, split)]
        # One device sends nothing.
        several = [p for p in found if p["devices"] > 1]
        for name, terms in terms_of(step, split).items():
            fitted = fit(several, name, terms)
            law = " + ".join(f"{c:.2f} {x}" for x, c in fitted.coefficients.items())
            within = f"{100 * fitted.off:.1f} %"
            cells = [step, split, name, law, within, *_powers(several, name)]
            head = SENT if "-" in name else MEMORY
            rows[head].append(f"| {' | '.join(cells)} |")
    line = "|---|---|---|---|--:|--:|--:|--:|"
    return {head: "\n".join([head, line, *of, ""]) for head, of in rows.items()}


def _powers(programs: Sequence[Program], name: str) -> Iterator[str]:
    for power in exponents(programs, name).values():
        yield f"{round(power, 2) + 0:.2f}"  # Zero has no sign.


def write(programs: Sequence[Program]) -> None:
    """Puts the tables in the place of those on the page."""
    text = PAGE.read_text()
    for head, table in tables(programs).items():
        pattern = re.compile(rf"^{re.escape(head)}\n(\|.*\n)*", re.M)
        text = pattern.sub(lambda _, table=table: table, text)
    PAGE.write_text(text)
