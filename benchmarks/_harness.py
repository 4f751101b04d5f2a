"""Compiling and timing several ways of doing one thing, side by side.

A machine's speed drifts by more than what is to be told apart, so nothing is timed on
its own: every round runs every row once, in an order drawn anew, and what is compared
is a row's time over another's *in the same round*.
"""

import contextlib
import random
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import jax
from tqdm import tqdm

from ._compiled import product_flops
from ._work import Absent, External, Measurement, Row


class Runner(Protocol):
    """A row that is ready to be timed."""

    measurement: Measurement
    warm_up: int  # How many steps are taken first.

    def step(self) -> tuple[float, float]:
        """Takes a step, and returns its time and its check."""
        ...


# Steps of Adam before anything is timed. The first compares the models, the others
# compare their gradients.
CHECKED = 3


class Compiled:
    """A compiled row, and the state it has reached."""

    warm_up = CHECKED

    def __init__(self, row: Row):
        start = time.perf_counter()
        traced = jax.jit(row.step, donate_argnums=0).trace(row.state, row.fixed)
        after_trace = time.perf_counter()
        lowered = traced.lower()
        after_lower = time.perf_counter()
        self.compiled = lowered.compile()
        after_compile = time.perf_counter()
        # What is timed is this executable, the one that the sizes are of. The copy is
        # what gets donated: rows share arrays.
        self.state = jax.tree.map(lambda x: x.copy(), row.state)
        self.fixed = row.fixed
        cost, memory = self.compiled.cost_analysis(), self.compiled.memory_analysis()
        assert cost is not None and memory is not None, "this backend tells neither"
        self.measurement = Measurement(
            name=row.name,
            facts=dict(row.facts),
            trace_time=after_trace - start,
            lower_time=after_lower - after_trace,
            compile_time=after_compile - after_lower,
            flops=cost["flops"],
            product_flops=product_flops(self.compiled),
            bytes_accessed=cost["bytes accessed"],
            temporary_memory=memory.temp_size_in_bytes,
            argument_memory=memory.argument_size_in_bytes,
            checks=[],
            times=[],
        )

    def step(self) -> tuple[float, float]:
        start = time.perf_counter()
        self.state, check, *_ = jax.block_until_ready(
            self.compiled(self.state, self.fixed)
        )
        return time.perf_counter() - start, float(check)


class Remote:
    """A row in another process, which says itself how long a step took."""

    warm_up = CHECKED

    def __init__(self, row: External):
        self.process = row.start()
        self.measurement = Measurement(
            row.name, versions=self.process.ready["versions"]
        )
        self.step = self.process.step


class Traced:
    """A row that is traced and lowered anew every time, as in a fresh process."""

    warm_up = 1

    def __init__(self, row: Row):
        self.row = row
        self.measurement = Measurement(row.name, dict(row.facts))

    def lower(self):
        # A new function, for JAX remembers those it has seen.
        new = lambda state, fixed: self.row.step(state, fixed)
        return jax.jit(new, donate_argnums=0).lower(self.row.state, self.row.fixed)

    def step(self) -> tuple[float, float]:
        jax.clear_caches()
        start = time.perf_counter()
        self.lower()
        return time.perf_counter() - start, 0.0


class Recompiled(Traced):
    """A row that is compiled anew every time."""

    def step(self) -> tuple[float, float]:
        lowered = self.lower()
        start = time.perf_counter()
        lowered.compile()
        return time.perf_counter() - start, 0.0


class Called:
    """A row that is a call from Python, as it is."""

    warm_up = 1

    def __init__(self, row: Row):
        self.row = row
        self.measurement = Measurement(row.name, dict(row.facts))

    def step(self) -> tuple[float, float]:
        start = time.perf_counter()
        jax.block_until_ready(self.row.step(self.row.state, self.row.fixed))
        return time.perf_counter() - start, 0.0


RUNNERS: dict[str, Callable[[Row], Runner]] = {
    "run": Compiled,
    "trace": Traced,
    "compile": Recompiled,
    "call": Called,
}


def _prepare(row: Row | External, kind: str) -> Runner:
    return Remote(row) if isinstance(row, External) else RUNNERS[kind](row)


def measure(
    rows: Sequence[Row | External | Absent],
    rounds: int,
    kind: str = "run",
    rtol: float = 1e-5,
    cold: bool = True,
) -> list[Measurement]:
    """Compiles every row, checks that they agree, and times them, interleaved.

    **Arguments:**

    - `rows`: those that are absent are passed over.
    - `rounds`: how often each is timed.
    - `kind`: what is timed: `"run"`, a compiled step; `"trace"`, tracing and lowering
        it; `"compile"`, compiling it; `"call"`, a call that is not compiled.
    - `rtol`: within which the checks of adapted rows are to agree.
    - `cold`: whether JAX forgets before each row what it has traced for others. Times
        to trace and to lower are true only then.

    **Raises:** `RuntimeError` if rows that are `adapted` alike do not compute the same.
    """
    present = [row for row in rows if not isinstance(row, Absent)]
    runners = []
    with contextlib.ExitStack() as stack:
        for row in tqdm(present, "compiling", leave=False):
            if cold:
                jax.clear_caches()
            runners.append(_prepare(row, kind))
            if isinstance(runners[-1], Remote):
                stack.enter_context(runners[-1].process)
        _time(runners, present, rounds, rtol)
    return [runner.measurement for runner in runners]


def _time(runners: list[Runner], rows: list[Row | External], rounds: int, rtol: float):
    for runner in tqdm(runners, "warming up", leave=False):
        runner.measurement.checks = [runner.step()[1] for _ in range(runner.warm_up)]
    for model in {row.adapted for row in rows if row.adapted}:
        alike = [r.measurement for r, row in zip(runners, rows) if row.adapted == model]
        check_agreement(alike, rtol)
    order = random.Random(0)
    for _ in tqdm(range(rounds), "rounds", leave=False):
        for runner in order.sample(runners, len(runners)):
            runner.measurement.times.append(runner.step()[0])


def check_agreement(measured: Sequence[Measurement], rtol: float) -> None:
    """That all had the same checks while warming up.

    The first compares the models; the later ones, after steps of the optimiser, their
    gradients.
    """
    for other in measured[1:]:
        first = measured[0]
        for i, (x, y) in enumerate(zip(first.checks, other.checks)):
            if not abs(x - y) <= rtol * abs(x):  # Also catches NaN.
                raise RuntimeError(
                    f"Rows that should compute the same model differ at step {i}: "
                    f"{x!r} of {first.name!r}, but {y!r} of {other.name!r}."
                )
