"""A training step of a residual convolutional network."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float, PRNGKeyArray

import lora_quax

from .. import _work
from .._work import at_most, Case, FROZEN, INSIDE, OUTSIDE, Row
from ..peers import by_hand


@dataclass(frozen=True)
class Shape:
    """The network, and what it is given.

    There is a block for each of `widths`; where the width changes, the resolution is
    halved.
    """

    widths: tuple[int, ...]
    groups: int  # Of the normalisations.
    resolution: int
    rank: int
    channels: int = 3
    classes: int = 10
    batch: int = 8


FULL = Shape(
    widths=(64, 64, 128, 128, 256, 256, 512, 512),
    groups=8,
    resolution=32,
    rank=8,
)
QUICK = Shape(widths=(8,), groups=2, resolution=8, rank=2)


class Block(eqx.Module):
    """Two convolutions, each behind a normalisation, beside a shortcut."""

    norm1: eqx.nn.GroupNorm
    conv1: eqx.nn.Conv2d
    norm2: eqx.nn.GroupNorm
    conv2: eqx.nn.Conv2d
    shortcut: eqx.nn.Conv2d | eqx.nn.Identity

    def __init__(self, before: int, after: int, groups: int, key: PRNGKeyArray):
        keys = jr.split(key, 3)
        stride = 1 if before == after else 2
        self.norm1 = eqx.nn.GroupNorm(groups, before)
        self.conv1 = eqx.nn.Conv2d(before, after, 3, stride, padding=1, key=keys[0])
        self.norm2 = eqx.nn.GroupNorm(groups, after)
        self.conv2 = eqx.nn.Conv2d(after, after, 3, padding=1, key=keys[1])
        if before == after:
            self.shortcut = eqx.nn.Identity()
        else:
            self.shortcut = eqx.nn.Conv2d(before, after, 1, stride, key=keys[2])

    def __call__(self, x: Float[Array, "before height width"]):
        out = self.conv1(jax.nn.relu(self.norm1(x)))
        out = self.conv2(jax.nn.relu(self.norm2(out)))
        return self.shortcut(x) + out


class Network(eqx.Module):
    """Takes an image to the logits of its class."""

    stem: eqx.nn.Conv2d
    blocks: list[Block]
    norm: eqx.nn.GroupNorm
    head: eqx.nn.Linear

    def __init__(self, shape: Shape, key: PRNGKeyArray):
        stem_key, head_key, *keys = jr.split(key, 2 + len(shape.widths))
        first, last = shape.widths[0], shape.widths[-1]
        self.stem = eqx.nn.Conv2d(shape.channels, first, 3, padding=1, key=stem_key)
        befores = (first, *shape.widths)
        self.blocks = [
            Block(before, after, shape.groups, key)
            for before, after, key in zip(befores, shape.widths, keys)
        ]
        self.norm = eqx.nn.GroupNorm(shape.groups, last)
        self.head = eqx.nn.Linear(last, shape.classes, key=head_key)

    def __call__(self, x: Float[Array, "channels height width"]):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.mean(jax.nn.relu(self.norm(x)), axis=(1, 2)))


def loss_fn(model, images, labels):
    """Cross-entropy over a batch."""
    logits = jax.vmap(model)(images)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def rows(shape: Shape) -> Sequence[Row]:
    model_key, lora_key, x_key, y_key = jr.split(jr.key(0), 4)
    size = shape.batch, shape.channels, shape.resolution, shape.resolution
    data = jr.normal(x_key, size), jr.randint(y_key, (shape.batch,), 0, shape.classes)
    model = Network(shape, model_key)
    ours = lora_quax.loraify(
        model, shape.rank, lora_key, init_b=jax.nn.initializers.normal(0.02)
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
        name="convolution",
        title="A training step of a residual convolutional network",
        points={
            f"batch {n}": lambda n=n: rows(dataclasses.replace(shape, batch=n))
            for n in ((2,) if quick else (8,))
        },
        claims=[
            at_most("convolutional network: ÷ frozen", 1.06, OUTSIDE, FROZEN),
            at_most(
                "convolutional network, quaxify inside: ÷ frozen", 1.06, INSIDE, FROZEN
            ),
            at_most(
                "convolutional network: ÷ by hand", 1.00, OUTSIDE, "by hand, Equinox"
            ),
        ],
        rtol=1e-4,  # Three steps of Adam magnify what is rounded.
    )
