"""`python -m benchmarks`: lora_quax against the floor and its peers.

Each case is a kind of work; its claims are what is said of the library, each with the
figure measured. A file of results for each case, with all that was measured and on
what, and the plots, are left in `benchmarks/results`.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from . import _markdown, _plots, _report
from ._harness import measure
from ._transformer import SIZES
from ._work import Absent, Case
from .cases import all_cases


RESULTS = Path(__file__).parent / "results"


def _count(text: str) -> int:
    # Quartiles take two.
    if (count := int(text)) < 2:
        raise argparse.ArgumentTypeError(f"at least 2 rounds are needed, got {count}")
    return count


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [case.name for case in all_cases(quick=True, torch=sys.executable)]
    parser.add_argument(
        "cases", nargs="*", metavar="case", help=f"some of: {', '.join(names)}"
    )
    parser.add_argument(
        "--size",
        choices=SIZES,
        default="base",
        help="of the transformer in the cases that train one",
    )
    parser.add_argument(
        "--rounds",
        type=_count,
        help="how often each row is timed, if not as often as its case says",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="small models, two rounds: does it run, not how fast",
    )
    parser.add_argument(
        "--torch",
        metavar="PYTHON",
        default=sys.executable,
        help="an interpreter that has torch and peft, if this one has not",
    )
    parser.add_argument(
        "--results",
        type=Path,
        help="where to leave them; nothing is left with --quick alone",
    )
    arguments = parser.parse_args()
    if unknown := set(arguments.cases) - set(names):
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    if arguments.size != "base":
        sized = {"transformer", "bfloat16"}
        if not set(arguments.cases) or set(arguments.cases) - sized:
            parser.error(f"--size is for the cases {' and '.join(sorted(sized))}")
        arguments.cases = [f"{case}-{arguments.size}" for case in arguments.cases]
    if arguments.quick:
        arguments.rounds = arguments.rounds or 2
    elif arguments.results is None:
        arguments.results = RESULTS
    return arguments


def main() -> None:
    """Runs the cases, and prints a table of each and of its claims."""
    arguments = _arguments()
    console = Console()
    facts = _report.facts()
    for name, fact in facts.items():
        console.print(f"{name:>10}: {fact}", highlight=False)
    cases = all_cases(arguments.quick, arguments.torch, arguments.size)
    for case in cases:
        if arguments.cases and case.name not in arguments.cases:
            continue
        result = _run(case, arguments.rounds, console)
        console.print(_report.claims(result))
        if arguments.results is not None:
            path = _report.save(arguments.results, result, facts)
            console.print(f"Saved as {path}")
    if arguments.results is not None:
        plots = list(_plots.draw(arguments.results))
        names = [case.name for case in cases]
        path = _markdown.write(arguments.results, names, plots)
        console.print(f"All results: {path}")


def _run(case: Case, rounds: int | None, console: Console) -> _report.Result:
    rounds = rounds or case.rounds
    points, absent = {}, {}
    for name, make in case.points.items():
        rows = make()
        measured = measure(rows, rounds, case.measure, case.rtol)
        points[name] = {m.name: m for m in measured}
        absent |= {row.name: row.why for row in rows if isinstance(row, Absent)}
        title = case.title if len(case.points) == 1 else f"{case.title}: {name}"
        for table in _report.tables(title, measured):
            console.print(table)
    for name, why in absent.items():
        console.print(f"Left out: {name} ({why})", highlight=False)
    return _report.Result(case, rounds, points, absent)


if __name__ == "__main__":
    main()
