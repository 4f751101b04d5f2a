"""What is measured: rows that do the same work, the cases they make, and the claims."""

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import equinox as eqx
import jax
import optax
import quax
from jaxtyping import PyTree

import lora_quax
from lora_quax._arrays.stored import stored

from ._process import Process


# Large enough for the losses to part within three steps if the gradients do.
LEARNING_RATE = 1e-3
FROZEN = "frozen model"
STRICT = "strict floor"
OUTSIDE = "ours, quaxify(vmap(f))"
INSIDE = "ours, vmap(quaxify(f))"


@dataclass(frozen=True)
class Row:
    """One way of doing the work: `step(state, fixed) -> (state, check, *rest)`.

    Every array is an argument, for XLA would fold constants. `state` is donated and fed
    back, as in a training loop; `fixed` (frozen weights and data) is lent every time.
    `check` is a number, a loss for instance, in which rows that are `adapted` alike
    have to agree.
    """

    name: str
    step: Callable
    state: Any
    fixed: Any
    # Rows of one value compute the same adapted model, True being one; False is none.
    adapted: bool | str = False
    facts: Mapping[str, float] = field(
        default_factory=dict
    )  # What is known beforehand.


@dataclass(frozen=True)
class External:
    """A way of doing the work in another process, which `start` starts."""

    name: str
    start: Callable[[], Process]
    adapted: bool | str = False


@dataclass(frozen=True)
class Absent:
    """A row that cannot be measured here, and why."""

    name: str
    why: str


@dataclass
class Measurement:
    """What was found about a row. Times in seconds, sizes in bytes."""

    name: str
    facts: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)  # Of another process.
    # None where only the time is known, as of another process.
    trace_time: float | None = None
    lower_time: float | None = None
    compile_time: float | None = None
    flops: float | None = None  # As XLA counts them, everything included.
    product_flops: float | None = None  # Of matrix products alone.
    bytes_accessed: float | None = None
    temporary_memory: int | None = None
    argument_memory: int | None = None
    checks: list[float] = field(default_factory=list)  # Of the warm-up steps.
    times: list[float] = field(default_factory=list)  # One a round.

    @property
    def time(self) -> float:
        """The median time."""
        return statistics.median(self.times)

    def ratios(self, other: "Measurement") -> list[float]:
        """This row's time over another's, round by round."""
        return [mine / theirs for mine, theirs in zip(self.times, other.times)]

    def ratio(self, other: "Measurement") -> float:
        """The median of the ratios."""
        return statistics.median(self.ratios(other))


Point: TypeAlias = Mapping[str, Measurement]
"""The rows of one point of a case, by name."""


@dataclass(frozen=True)
class Claim:
    """Something that is said of the library, and what of it was measured.

    `value` takes the points of a case, by name, to the figure, which is to be at most
    `bound`; or to `None` if what it takes was not measured. Without a bound the figure
    is only reported.
    """

    text: str
    value: Callable[[Mapping[str, Point]], float | None]
    bound: float | None = None


@dataclass(frozen=True)
class Case:
    """A kind of work, at one point or at several.

    `points` are made one at a time, when their turn has come: some fill the memory.
    """

    name: str
    title: str
    points: Mapping[str, Callable[[], Sequence[Row | External | Absent]]]
    claims: Sequence[Claim] = ()
    measure: str = "run"  # What a round times; see `_harness.RUNNERS`.
    rounds: int = 11  # If nothing else is asked for.
    rtol: float = 1e-5  # Within which the checks of adapted rows agree.


def at_most(text: str, bound: float | None, row: str, against: str) -> Claim:
    """That a row takes at most `bound` times as long as another, at every point."""

    def value(points):
        return max(rows[row].ratio(rows[against]) for rows in points.values())

    return Claim(text, value, bound)


@dataclass(frozen=True)
class Program:
    """A loss of what trains and what does not: `loss(params, frozen, *data)`."""

    params: PyTree
    frozen: PyTree
    loss: Callable


def program(partitioned, loss_fn: Callable) -> Program:
    """A program from a partitioned Equinox model and `loss_fn(model, *data)`."""
    params, rest = partitioned
    frozen, static = eqx.partition(rest, eqx.is_array)

    def loss(params, frozen, *data):
        return loss_fn(eqx.combine(params, frozen, static), *data)

    return Program(params, frozen, loss)


def inside(loss_fn: Callable) -> Callable:
    """`loss_fn(model, *data)`, which vmaps its model, with `quaxify` inside `vmap`."""
    return lambda model, *data: loss_fn(quax.quaxify(model), *data)


def ours(adapted: PyTree, loss_fn: Callable, data) -> list[Row]:
    """Training steps of a model that `lora_quax.loraify` made, nested either way."""
    partitioned = lora_quax.partition(adapted)
    outside = program(partitioned, quax.quaxify(loss_fn))
    within = program(partitioned, inside(loss_fn))
    return [
        training(OUTSIDE, outside, data, adapted=True),
        training(INSIDE, within, data, adapted=True),
    ]


def full(model: PyTree, loss_fn: Callable, data) -> Row:
    """A step that trains every weight of a plain model."""
    partitioned = eqx.partition(model, eqx.is_inexact_array)
    return training("full fine-tuning", program(partitioned, loss_fn), data)


def training(name: str, program: Program, data, adapted: bool | str = False) -> Row:
    """A step of Adam on the parameters of a program."""
    optim = optax.adam(LEARNING_RATE)
    opt_state = optim.init(program.params)

    def step(state, fixed):
        params, opt_state = state
        frozen, data = fixed
        loss, grads = jax.value_and_grad(program.loss)(params, frozen, *data)
        updates, opt_state = optim.update(grads, opt_state)
        return (optax.apply_updates(params, updates), opt_state), loss

    grads = jax.eval_shape(
        lambda *args: jax.grad(program.loss)(*args),
        program.params,
        program.frozen,
        *data,
    )
    facts = dict(
        trainable=size(program.params), gradient=size(grads), optimiser=size(opt_state)
    )
    state = program.params, opt_state
    return Row(name, step, state, (program.frozen, data), adapted, facts)


def frozen(model: PyTree, loss_fn: Callable, data, name: str = FROZEN) -> Row:
    """The plain model, frozen: its loss, and the gradient of its first input.

    No fine-tuning that reaches the first layer can do without this work. But it is done
    as an Equinox user writes it, features first and sums formed anew, and so a step
    that has more to do may take less time. What it cannot go below is `strict_floor`.
    """
    arrays, static = eqx.partition(model, eqx.is_array)

    def step(state, fixed):
        arrays, data = fixed
        model = eqx.combine(arrays, static)
        loss, grad = jax.value_and_grad(loss_fn, argnums=1)(model, *data)
        return state, loss, grad

    return Row(name, step, (), (arrays, data))


class _Stored(eqx.Module):
    """A linear layer, its product and the cotangent of its input stored once."""

    linear: eqx.nn.Linear

    def __call__(self, x):
        y = stored(stored(x) @ self.linear.weight.T)
        return y if self.linear.bias is None else y + self.linear.bias


def strict_floor(model: PyTree, loss_fn: Callable, data) -> Row:
    """The frozen model with all that is done for ours: ours without its factors."""

    def is_linear(x):
        return isinstance(x, eqx.nn.Linear)

    model = jax.tree.map(
        lambda x: _Stored(x) if is_linear(x) else x, model, is_leaf=is_linear
    )
    return frozen(model, loss_fn, data, STRICT)


def size(tree: PyTree) -> int:
    """The bytes that the arrays of a tree take."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def cores() -> int:
    """How many this process may use."""
    # Not every system can tell.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
