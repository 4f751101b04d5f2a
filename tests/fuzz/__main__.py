"""The command line: see the package."""

import argparse
import concurrent.futures as cf
import multiprocessing
import pathlib
import random
import sys
import time


# As pytest does: the tests are no package, and `conftest` sets JAX up when imported.
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import conftest  # noqa: E402, F401
from helpers import KINDS  # noqa: E402

from .search import Report, search, use_double_precision  # noqa: E402


_CHUNK = 50


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
    spawn = multiprocessing.get_context("spawn")
    # A process is replaced now and then: what is compiled stays in its memory.
    with cf.ProcessPoolExecutor(
        options.jobs,
        mp_context=spawn,
        max_tasks_per_child=10,
        initializer=use_double_precision,
    ) as pool:
        waiting = list(range(0, options.programs, _CHUNK))[::-1]
        running: set[cf.Future] = set()
        while waiting or running:
            while waiting and len(running) < options.jobs:
                first = waiting.pop()
                n = min(_CHUNK, options.programs - first)
                # Any two seeds have no chunk in common.
                own_seed = seed * 10**6 + first
                known = report.failures
                running.add(pool.submit(search, n, own_seed, options.kind, known))
            done, running = cf.wait(running, return_when=cf.FIRST_COMPLETED)
            for task in done:
                n_known = len(report.failures)
                report.add(task.result())
                for failure in report.failures[n_known:]:
                    print(f"\nFAILED: {failure.error}\n\n{failure.program}", flush=True)
                seconds = time.monotonic() - start
                print(
                    f"[{seconds:.0f} s] {report.outcomes.total()} programs", flush=True
                )
    total = report.outcomes.total()
    for outcome, count in report.outcomes.most_common():
        print(f"{count:6} {count / total:6.1%}  {outcome}")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
