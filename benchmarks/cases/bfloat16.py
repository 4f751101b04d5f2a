"""The transformer's step with a bfloat16 model and float32 factors."""

import jax.numpy as jnp
import jax.random as jr

from .. import _work
from .._transformer import loss_fn, make, Size
from .._work import at_most, Case, FROZEN, INSIDE, OUTSIDE, Row
from ..peers import by_hand, plain


def case(name: str, size: Size) -> Case:
    return Case(
        name,
        "A training step of a bfloat16 model with float32 factors",
        {"step": lambda: rows(size)},
        [
            at_most("bfloat16: ÷ by hand, Equinox", 1.0, OUTSIDE, "by hand, Equinox"),
            at_most("bfloat16: ÷ by hand, plain", 1.0, OUTSIDE, "by hand, plain JAX"),
            at_most("bfloat16: ÷ frozen", None, OUTSIDE, FROZEN),
            at_most("bfloat16, vmap(quaxify(f)): ÷ frozen", None, INSIDE, FROZEN),
        ],
        rtol=1e-3,
    )


def rows(size: Size) -> list[Row]:
    model, adapted, data = make(size, jr.key(0), jnp.bfloat16)
    hand = by_hand.program(model, adapted, loss_fn)
    return [
        _work.frozen(model, loss_fn, data),
        _work.strict_floor(model, loss_fn, data),
        _work.training("by hand, Equinox", hand, data, adapted=True),
        _work.training(
            "by hand, plain JAX", plain.program(model, adapted), data, adapted=True
        ),
        _work.full(model, loss_fn, data),
        *_work.ours(adapted, loss_fn, data),
    ]
