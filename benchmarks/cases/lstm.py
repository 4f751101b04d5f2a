"""A training step of a recurrent network: a cell in a scan over time."""

from collections.abc import Sequence
from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

import lora_quax

from .. import _work
from .._work import at_most, Case, FROZEN, INSIDE, OUTSIDE, Row
from ..peers import by_hand


@dataclass(frozen=True)
class Shape:
    """The network, and what it is given. It takes inputs of its own width."""

    width: int
    batch: int
    steps: int
    rank: int


FULL = Shape(width=256, batch=32, steps=64, rank=8)
QUICK = Shape(width=16, batch=4, steps=8, rank=2)


class Network(eqx.Module):
    """Takes a series to a series of hidden states."""

    cell: eqx.nn.LSTMCell

    def __init__(self, shape: Shape, key: PRNGKeyArray):
        self.cell = eqx.nn.LSTMCell(shape.width, shape.width, key=key)

    def __call__(self, xs: Float[Array, "steps width"]):
        def step(state, x):
            h, c = self.cell(x, state)
            return (h, c), h

        zeros = jnp.zeros_like(xs[0])
        _, hs = lax.scan(step, (zeros, zeros), xs)
        return hs


def loss_fn(model, x, y):
    """Mean squared error over a batch."""
    return jnp.mean((jax.vmap(model)(x) - y) ** 2)


def rows(shape: Shape) -> Sequence[Row]:
    model_key, lora_key, x_key, y_key = jr.split(jr.key(0), 4)
    size = shape.batch, shape.steps, shape.width
    data = jr.normal(x_key, size), jr.normal(y_key, size)
    model = Network(shape, model_key)
    ours = lora_quax.loraify(
        model,
        shape.rank,
        lora_key,
        targets=["weight_ih", "weight_hh"],
        init_b=jax.nn.initializers.normal(0.02),
    )
    program = by_hand.program(model, ours, loss_fn)
    return [
        _work.frozen(model, loss_fn, data),
        _work.training("by hand, Equinox", program, data, adapted=True),
        _work.full(model, loss_fn, data),
        *_work.ours(ours, loss_fn, data),
    ]


def case(quick: bool) -> Case:
    shape = QUICK if quick else FULL
    return Case(
        name="lstm",
        title="A training step of an LSTM, scanned over time",
        points={"step": lambda: rows(shape)},
        claims=[
            at_most("LSTM: ÷ frozen", 1.12, OUTSIDE, FROZEN),
            at_most("LSTM, quaxify inside: ÷ frozen", 1.12, INSIDE, FROZEN),
            at_most("LSTM: ÷ by hand", 1.00, OUTSIDE, "by hand, Equinox"),
        ],
    )
