"""`python -m benchmarks`: a transformer's step, against the floor and the peers."""

import argparse
import dataclasses
import os
from pathlib import Path

from rich.console import Console

from . import _report, _transformer
from ._harness import measure


RESULTS = Path(__file__).parent / "results"


def _count(text: str) -> int:
    # Quartiles take two.
    if (count := int(text)) < 2:
        raise argparse.ArgumentTypeError(f"at least 2 rounds are needed, got {count}")
    return count


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--size", choices=_transformer.SIZES, default="base")
    parser.add_argument(
        "--rounds", type=_count, default=21, help="how often each row is timed"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a small model and three rounds: does it run, not how fast",
    )
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.size, arguments.rounds = "small", 3
    return arguments


def main() -> None:
    """Measures, prints a table, and leaves a file of results."""
    arguments = _arguments()
    console = Console()
    facts = _report.facts()
    for name, fact in facts.items():
        console.print(f"{name:>10}: {fact}", highlight=False)
    size = _transformer.SIZES[arguments.size]
    measured = measure(_transformer.rows(size), arguments.rounds)
    title = f"A step of the {arguments.size} transformer, {arguments.rounds} rounds"
    console.print(_report.table(title, measured))
    path = RESULTS / f"transformer-{arguments.size}.json"
    settings = dict(vars(arguments), **dataclasses.asdict(size))
    _report.save(path, settings, facts, measured)
    console.print(f"Saved as {os.path.relpath(path)}")


if __name__ == "__main__":
    main()
