"""What a run says while it runs, on stderr: a bar on a terminal, and lines in a log."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from ..console import console


_LINES = 20  # Of a whole run, where there is no bar.


class Report:
    def __init__(self, bar: Progress, steps: int):
        """**Arguments:**

        - `bar`: is disabled where it would fill a log with its frames.
        """
        self._bar, self._steps = bar, steps
        self._task = bar.add_task("", total=steps, said="")
        self._every = max(1, steps // _LINES)
        self._begin(0)

    def _begin(self, step: int) -> None:
        self._since, self._tokens, self._losses = time.perf_counter(), 0, []
        self._bar.update(self._task, completed=step)

    def resumed(self, step: int) -> None:
        self.say(f"goes on after step {step}")
        self._begin(step)

    def say(self, text: str) -> None:
        self._bar.console.print(text, markup=False, soft_wrap=True)

    def step(self, step: int, loss: float, tokens: int) -> None:
        """A step is done, of so many tokens."""
        self._tokens += tokens
        self._losses.append(loss)
        seconds = time.perf_counter() - self._since
        mean = sum(self._losses) / len(self._losses)
        said = f"loss {mean:.4f}  {self._tokens / seconds:,.0f} tokens/s"
        self._bar.update(self._task, completed=step, said=said)
        if step % self._every == 0 or step == self._steps:
            if self._bar.disable:
                self.say(f"step {step}/{self._steps}  {said}")
            self._begin(step)

    def valid(self, step: int, loss: float) -> None:
        self.say(f"step {step}/{self._steps}  valid loss {loss:.4f}")
        # An evaluation is no part of a step, nor is what is written.
        self.went_on()

    def went_on(self) -> None:
        """The time that was spent is not that of a step."""
        self._since, self._tokens, self._losses = time.perf_counter(), 0, []


@contextmanager
def report(steps: int) -> Iterator[Report]:
    out = console(stderr=True)
    # Colours may be asked for in a log, and some terminals know no lines but the last.
    is_seen = out.is_interactive and out.file.isatty()
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[said]}", markup=False),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=out, disable=not is_seen) as bar:
        yield Report(bar, steps)
