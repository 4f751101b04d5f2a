"""The time to trace and lower a step of 24 layers, as at the start of a program."""

import dataclasses

import jax.random as jr
import quax

from .. import _work
from .._transformer import loss_fn, make, QUICK
from .._work import at_most, Case, FROZEN, INSIDE, OUTSIDE, Row
from ..peers import by_hand, quax_example


THROUGH_QUAX = "frozen model, through Quax"


def case(quick: bool) -> Case:
    layers = 1 if quick else 24
    hand = "by hand, Equinox"
    return Case(
        "tracing",
        f"Tracing and lowering a training step of {layers} layers",
        {"step": lambda: rows(layers)},
        [
            at_most("trace + lower: ÷ by hand, Equinox", 1.25, OUTSIDE, hand),
            at_most("the same, vmap(quaxify(f))", 1.25, INSIDE, hand),
            at_most("what Quax itself costs, ÷ frozen", None, THROUGH_QUAX, FROZEN),
        ],
        measure="trace",
        rounds=3,
    )


def rows(layers: int) -> list[Row]:
    # The shapes do not matter here.
    model, adapted, data = make(dataclasses.replace(QUICK, layers=layers), jr.key(0))
    hand = by_hand.program(model, adapted, loss_fn)
    example = quax_example.program(model, adapted, loss_fn)
    through_quax = _work.frozen(model, quax.quaxify(loss_fn), data)
    return [
        _work.frozen(model, loss_fn, data),
        dataclasses.replace(through_quax, name=THROUGH_QUAX),
        _work.training("by hand, Equinox", hand, data),
        _work.training("quax.examples.lora", example, data),
        _work.full(model, loss_fn, data),
        *_work.ours(adapted, loss_fn, data),
    ]
