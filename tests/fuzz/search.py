"""Goes through many programs, and shrinks those that fail."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import hypothesis
import jax

from .oracle import NotAProgram
from .programs import Program, programs


# Of one failure, how many smaller programs are tried.
_ATTEMPTS = 80


@dataclass
class Failure:
    program: str
    error: str
    kind: str

    def contains(self, other: "Failure") -> bool:
        """Whether this may be the other failure, in a larger program."""
        return self.kind == other.kind and _words(other.program) <= _words(self.program)


@dataclass
class Report:
    outcomes: Counter = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)

    def add(self, other: "Report"):
        self.outcomes += other.outcomes
        self.failures += [f for f in other.failures if not self.knows(f)]

    def knows(self, failure: Failure) -> bool:
        return any(failure.contains(known) for known in self.failures)


def _words(text: str) -> set[str]:
    return set(re.findall(r"[A-Za-z_]\w*", text))


def _failure(program: Program, error: Exception) -> Failure:
    message = f"{type(error).__name__}: {error}"
    kind = re.sub(r"[-+]?(\d[\d.]*(e[-+]?\d+)?|nan|inf)", "#", message.split("\n")[0])
    return Failure(str(program), message, kind)


def use_double_precision() -> None:
    jax.config.update("jax_enable_x64", True)


def search(
    n: int, seed: int, kind: str | None = None, known: Sequence[Failure] = ()
) -> Report:
    """Runs `n` programs drawn from a seed, in this process, of which JAX has to have
    double precision.

    A program that fails as one that is `known` does, and contains it, is counted and
    not shrunk.
    """
    report = Report(failures=list(known))
    attempt = 0
    while (left := n - report.outcomes.total()) > 0:
        failure = _until_one_fails(left, (seed, attempt), kind, report)
        if failure is None:
            break
        report.failures.append(failure)
        attempt += 1
    jax.clear_caches()
    return report


class _Enough(BaseException):
    """Ends the shrinking of a program. (Of an `Exception`, hypothesis would make one
    more failure.)"""


def _until_one_fails(
    n: int, seed: Sequence[int], kind: str | None, report: Report
) -> Failure | None:
    """Draws programs until one fails in a way that is not known; that one, shrunk."""
    results: dict[str, Failure | None] = {}
    failed: list[Failure] = []
    attempts = 0

    @hypothesis.seed(hash(tuple(seed)))
    @hypothesis.settings(
        max_examples=n,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        suppress_health_check=[*hypothesis.HealthCheck],  # pyright: ignore
        report_multiple_bugs=False,
        print_blob=False,
    )
    @hypothesis.given(programs(kind))
    def run(program):
        nonlocal attempts
        text = str(program)
        if text not in results:
            attempts += bool(failed)
            if attempts > _ATTEMPTS:
                raise _Enough
            results[text] = _outcome(program, report, shrinking=bool(failed))
        failure = results[text]
        if failure is not None:
            failed.append(failure)
            raise AssertionError(failure.kind)

    try:
        run()
    except (AssertionError, _Enough):
        # The smallest, which is not always the last.
        return min(failed, key=lambda failure: len(failure.program))
    return None


def _outcome(program: Program, report: Report, *, shrinking: bool) -> Failure | None:
    failure = None
    try:
        reason = program.run()
        outcome = (
            "right" if reason is None else f"refused, then right: {_class(reason)}"
        )
    except NotAProgram:
        outcome = "not possible in JAX either"
    except Exception as error:
        failure = _failure(program, error)
        known = report.knows(failure)
        outcome = f"{'known' if known else 'failed'}: {failure.kind}"
        failure = None if known else failure
    if not shrinking:
        report.outcomes[outcome] += 1
    return failure


def _class(reason: str) -> str:
    """A reason without what is particular to one program."""
    return re.sub(r"\(.*?\)|\[.*?\]|\d+", "#", reason)
