"""The command line: see the package."""

import argparse
import concurrent.futures as cf
import itertools
import multiprocessing
import pathlib
import random
import sys
import time
from concurrent.futures.process import BrokenProcessPool


# As pytest does: the tests are no package, and `conftest` sets JAX up when imported.
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import conftest  # noqa: E402, F401
from helpers import KINDS  # noqa: E402

from .search import Report, search, use_double_precision  # noqa: E402


_CHUNK = 50


def _pool(jobs: int) -> cf.ProcessPoolExecutor:
    return cf.ProcessPoolExecutor(
        jobs,
        mp_context=multiprocessing.get_context("spawn"),
        # A process is replaced now and then: what is compiled stays in its memory.
        max_tasks_per_child=10,
        initializer=use_double_precision,
    )


def _add(report: Report, other: Report) -> None:
    n_known = len(report.failures)
    report.add(other)
    for failure in report.failures[n_known:]:
        print(f"\nFAILED: {failure.error}\n\n{failure.program}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--programs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--kind", choices=list(KINDS), default=None)
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.randrange(10**6)
    print(f"{options.programs} programs, --seed {seed}", flush=True)
    start, report = time.monotonic(), Report()
    # Any two seeds have no chunk in common. Of a chunk fewer programs may be new.
    chunks = itertools.count(seed * 10**6, _CHUNK)
    wants_more = lambda: report.outcomes.total() < options.programs
    while wants_more():
        running: dict[cf.Future, int] = {}
        with _pool(options.jobs) as pool:
            try:
                while running or wants_more():
                    while wants_more() and len(running) < options.jobs:
                        known, chunk = report.failures, next(chunks)
                        n = min(_CHUNK, options.programs)
                        task = search, n, chunk, options.kind, known
                        running[pool.submit(*task)] = chunk
                    for task in cf.wait(running, return_when=cf.FIRST_COMPLETED).done:
                        _add(report, task.result())
                        del running[task]
                        seconds = time.monotonic() - start
                        done = report.outcomes.total()
                        print(f"[{seconds:.0f} s] {done} programs", flush=True)
            except BrokenProcessPool:
                # XLA aborts on some programs, of dense weights as well. Which it was is
                # for a reader to find out; others are drawn in the place of theirs.
                print(f"STOPPED in one of the chunks {[*running.values()]}", flush=True)
    total = report.outcomes.total()
    for outcome, count in report.outcomes.most_common():
        print(f"{count:6} {count / total:6.1%}  {outcome}")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
