"""`python -m benchmarks`: lora_quax against the frozen model and its peers.

Each case is a kind of work; its claims are what is said of the library, each with the
figure measured. All cases are run several times, each time in a process of its own. A
file of results for each case, with all that was measured and on what, a page of them
and the plots are left in `benchmarks/results`.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from . import _markdown, _plots, _report, _results
from ._harness import measure
from ._transformer import SIZES
from ._work import Absent, Case
from .cases import all_cases


RESULTS = Path(__file__).parent / "results"
README = RESULTS.parents[1] / "README.md"


def _at_least(least: int):
    def count(text: str) -> int:
        if (count := int(text)) < least:
            raise argparse.ArgumentTypeError(f"at least {least}, got {count}")
        return count

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
        "--runs",
        type=_at_least(1),
        help="how many processes measure everything anew (5; with --quick 1)",
    )
    parser.add_argument(
        "--append",
        action="store_true",
        help="add to the runs whose results are there already",
    )
    parser.add_argument(
        "--rounds",
        type=_at_least(2),  # Quartiles take two.
        help="how often a run times each row, if not as often as its case says",
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
        arguments.runs = arguments.runs or 1
    arguments.runs = arguments.runs or 5
    if arguments.results is None and not arguments.quick:
        arguments.results = RESULTS
    if arguments.results is None and arguments.runs > 1:
        parser.error("several runs need --results, where they meet")
    return arguments


def main() -> None:
    """Runs the cases, and prints a table of each and of its claims."""
    arguments = _arguments()
    console = Console()
    cases = all_cases(arguments.quick, arguments.torch, arguments.size)
    chosen = [c for c in cases if not arguments.cases or c.name in arguments.cases]
    if arguments.runs > 1:
        _start_runs(arguments.runs)
        for case in chosen:
            result = _results.read(arguments.results / f"{case.name}.json")
            console.print(_report.claims(case.title, _results.claims(result)))
    else:
        _run(chosen, arguments, console)
    if arguments.results is not None:
        plots = list(_plots.draw(arguments.results))
        names = [case.name for case in cases]
        path = _markdown.write(arguments.results, names, plots)
        console.print(f"All results: {path}")
        if path.parent == RESULTS:
            _markdown.into_readme(README, _markdown.readme_table(RESULTS))


def _start_runs(runs: int) -> None:
    """Runs this very command in as many processes, one after the other."""
    command = [sys.executable, "-m", "benchmarks", *sys.argv[1:], "--runs", "1"]
    for run in range(runs):
        # The first begins anew, unless this command was told to add to what is there.
        subprocess.run(command if run == 0 else [*command, "--append"], check=True)


def _run(cases: list[Case], arguments: argparse.Namespace, console: Console) -> None:
    facts = _report.facts()
    for name, fact in facts.items():
        console.print(f"{name:>10}: {fact}", highlight=False)
    for case in cases:
        result = _measure(case, arguments.rounds, console)
        claimed = [
            (
                claim.text,
                claim.bound,
                None if value is None else _results.spread([value]),
            )
            for claim, value in _report.evaluate(result)
        ]
        console.print(_report.claims("", claimed))
        if arguments.results is not None:
            path = _report.save(
                arguments.results, result, facts, fresh=not arguments.append
            )
            console.print(f"Saved as {path}")


def _measure(case: Case, rounds: int | None, console: Console) -> _report.Result:
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
