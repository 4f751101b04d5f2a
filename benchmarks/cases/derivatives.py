"""Derivatives beside the gradient: forward mode, and forward over reverse."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import quax
from jaxtyping import PyTree

import lora_quax

from .._transformer import loss_fn, make, Size
from .._work import Case, Claim, FROZEN, INSIDE, inside, OUTSIDE, Program, program, Row
from ..peers import by_hand, plain, quax_example


BASE = Size(layers=2, width=256, batch=8)
QUICK = Size(layers=1, width=64, batch=2, tokens=16)


def programs(size: Size) -> tuple[Program, dict[str, Program], PyTree]:
    """The plain model, of which nothing trains; the adapted ones; and the data."""
    model, ours, data = make(size, jr.key(0))
    partitioned, outside = lora_quax.partition(ours), quax.quaxify(loss_fn)
    adapted = {
        "by hand, Equinox": by_hand.program(model, ours, loss_fn),
        "by hand, plain JAX": plain.program(model, ours),
        "quax.examples.lora": quax_example.program(model, ours, loss_fn),
        OUTSIDE: program(partitioned, outside),
        INSIDE: program(partitioned, inside(loss_fn)),
    }
    return program(eqx.partition(model, lambda _: False), loss_fn), adapted, data


# Directions are arrays that are there already: the factors themselves, for they are the
# same direction however a row lays them out, and for the input the target, towards
# which the loss falls. They are arguments: XLA is not to know that they are the same.


def jvp_rows(size: Size) -> list[Row]:
    """The derivative of the loss along a direction of the input and of the factors."""
    base, adapted, data = programs(size)

    def row(name, program, is_adapted):
        def step(state, fixed):
            params, frozen, (x, y), directions = fixed

            def loss(params, x):
                return program.loss(params, frozen, x, y)

            value, tangent = jax.jvp(loss, (params, x), directions)
            return state, tangent, value

        directions = program.params, data[1]
        fixed = program.params, program.frozen, data, directions
        return Row(name, step, (), fixed, is_adapted)

    rows = [row(name, program, True) for name, program in adapted.items()]
    return [row(FROZEN, base, False), *rows]


def hvp_rows(size: Size) -> list[Row]:
    """A product with the Hessian of the loss in the factors.

    The floor's is the Hessian in the input, which lies as deep.
    """
    base, adapted, (x, y) = programs(size)

    def row(name, loss, at, fixed, direction, is_adapted):
        def step(state, args):
            at, fixed, direction = args

            def grad(at):
                return jax.grad(loss)(at, *fixed)

            _, product = jax.jvp(grad, (at,), (direction,))
            squares = [jnp.sum(leaf**2) for leaf in jax.tree.leaves(product)]
            return state, jnp.sqrt(sum(squares)), product

        return Row(name, step, (), (at, fixed, direction), is_adapted)

    def of_input(x, frozen, y):
        return base.loss(base.params, frozen, x, y)

    return [
        row(FROZEN, of_input, x, (base.frozen, y), y, False),
        *(
            row(name, p.loss, p.params, (p.frozen, x, y), p.params, True)
            for name, p in adapted.items()
        ),
    ]


def case(quick: bool) -> Case:
    """Forward mode, and forward over reverse."""
    size = QUICK if quick else BASE

    def claim(point, row):
        return Claim(
            f"{point}, {row} ÷ frozen",
            lambda points: points[point][row].ratio(points[point][FROZEN]),
        )

    return Case(
        "derivatives",
        f"Other derivatives: {size.layers} layers, width {size.width}, "
        f"{size.batch} × {size.tokens} tokens, rank {size.rank}",
        {"jvp": lambda: jvp_rows(size), "hvp": lambda: hvp_rows(size)},
        [claim(point, row) for point in ("jvp", "hvp") for row in (OUTSIDE, INSIDE)],
    )
