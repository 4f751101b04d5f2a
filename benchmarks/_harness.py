"""Compiling and timing several ways of doing one thing, side by side.

A machine's speed drifts by more than what is to be told apart, so nothing is timed on
its own: every round runs every row once, in an order drawn anew, and what is compared
is a row's time over the floor's *in the same round*.
"""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from tqdm import tqdm


WARM_UP = 3


@dataclass(frozen=True)
class Row:
    """One way of doing it: `step(state, fixed) -> (state, loss, *rest)`.

    Every array is an argument, for XLA would fold constants. `state` is donated and fed
    back, as in a training loop; `fixed` (frozen weights and data) is lent every time.
    """

    name: str
    step: Callable
    state: Any
    fixed: Any
    bound: float | None = None  # What the ratio to the floor is to stay within.
    adapted: bool = False  # Rows that compute the same adapted model.


@dataclass
class Measurement:
    """What was found about a row. Times in seconds, sizes in bytes."""

    name: str
    bound: float | None
    trace_time: float
    compile_time: float
    flops: float
    bytes_accessed: float
    temporary_memory: int
    argument_memory: int
    losses: list[float]  # Of the warm-up steps.
    times: list[float]  # One per round.

    @property
    def time(self) -> float:
        """The median time of a step."""
        return statistics.median(self.times)

    def ratios(self, floor: "Measurement") -> list[float]:
        """This row's time over the floor's, round by round."""
        return [mine / theirs for mine, theirs in zip(self.times, floor.times)]


class _Runner:
    """A compiled row, and the state it has reached."""

    def __init__(self, row: Row):
        start = time.perf_counter()
        lowered = jax.jit(row.step, donate_argnums=0).lower(row.state, row.fixed)
        traced = time.perf_counter()
        self.compiled = lowered.compile()
        compiled = time.perf_counter()
        # What is timed is this executable, the one that the sizes are of. The copy is
        # what gets donated: rows share arrays.
        self.state = jax.tree.map(lambda x: x.copy(), row.state)
        self.fixed = row.fixed
        cost, memory = self.compiled.cost_analysis(), self.compiled.memory_analysis()
        assert cost is not None and memory is not None, "this backend tells neither"
        self.measurement = Measurement(
            name=row.name,
            bound=row.bound,
            trace_time=traced - start,
            compile_time=compiled - traced,
            flops=cost["flops"],
            bytes_accessed=cost["bytes accessed"],
            temporary_memory=memory.temp_size_in_bytes,
            argument_memory=memory.argument_size_in_bytes,
            losses=[],
            times=[],
        )

    def step(self) -> tuple[float, float]:
        """Takes a step, and returns its time and its loss."""
        start = time.perf_counter()
        self.state, loss, *_ = jax.block_until_ready(
            self.compiled(self.state, self.fixed)
        )
        return time.perf_counter() - start, float(loss)


def measure(rows: Sequence[Row], rounds: int) -> list[Measurement]:
    """Compiles every row, checks that they agree, and times them, interleaved.

    **Arguments:**

    - `rows`: the first is the floor.
    - `rounds`: how often each is timed.

    **Raises:** `RuntimeError` if the rows with `adapted` set do not compute the same.
    """
    runners = [_Runner(row) for row in tqdm(rows, "compiling", leave=False)]
    for runner in tqdm(runners, "warming up", leave=False):
        runner.measurement.losses = [runner.step()[1] for _ in range(WARM_UP)]
    measured = [runner.measurement for runner in runners]
    check_agreement([m for m, row in zip(measured, rows) if row.adapted])
    order = random.Random(0)
    for _ in tqdm(range(rounds), "rounds", leave=False):
        for runner in order.sample(runners, len(runners)):
            runner.measurement.times.append(runner.step()[0])
    return measured


def check_agreement(measured: Sequence[Measurement], rtol: float = 1e-4) -> None:
    """That all had the same losses while warming up.

    The first loss compares the models; the later ones, after steps of the optimiser,
    their gradients.
    """
    for other in measured[1:]:
        first = measured[0]
        for i, (x, y) in enumerate(zip(first.losses, other.losses)):
            if not abs(x - y) <= rtol * abs(x):  # Also catches NaN.
                raise RuntimeError(
                    f"Rows that should compute the same model differ at step {i}: "
                    f"loss {x!r} of {first.name!r}, but {y!r} of {other.name!r}."
                )
