"""Whether to form the weight inside the step: `x (W + ab)` against `x W + (x a) b`.

Forming it takes fewer operations where tokens outnumber the width (RunLoRA, arXiv
2312.03415). Here both are written by hand in the same transformer, backward included,
so that nothing else differs; neither keeps anything of the size of a weight.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.random as jr
from jax import lax

from lora_quax._arrays.stored import stored
from lora_quax._arrays.thin_dot import contract

from .. import _work
from .._transformer import BASE, loss_fn, make, QUICK, Size
from .._work import at_most, Case, Row
from ..peers import plain


# x: (tokens, in), w: (in, out), a: (in, rank), b: (rank, out), g: (tokens, out)


def factored(x, w, a, b):
    z, _ = contract(x, "ti", a, "ir", keep="tr")
    delta, _ = contract(z, "tr", b, "ro", keep="to")
    return stored(x @ w + delta)


def _form(w, a, b):
    # A sum that went into the product as it is formed would be formed again.
    return lax.optimization_barrier(w + a @ b)


@jax.custom_vjp
def formed(x, w, a, b):
    return x @ _form(w, a, b)


def _forward(x, w, a, b):
    return formed(x, w, a, b), (x, w, a, b)


def _backward(residuals, g):
    x, w, a, b = residuals
    v, _ = contract(g, "to", b, "ro", keep="tr")
    z, _ = contract(x, "ti", a, "ir", keep="tr")
    grad_a, _ = contract(x, "ti", v, "tr", keep="ir")
    grad_b, _ = contract(z, "tr", g, "to", keep="ro")
    return g @ _form(w, a, b).T, None, grad_a, grad_b


formed.defvjp(_forward, _backward)


def case(quick: bool) -> Case:
    many = dataclasses.replace(BASE, layers=2, batch=32)
    sizes = {
        "512 tokens": BASE,
        "512 tokens, rank 256": dataclasses.replace(BASE, rank=256),
        "4096 tokens": many,
        "4096 tokens, rank 64": dataclasses.replace(many, rank=64),
    }
    if quick:
        sizes = {"quick": QUICK}
    return Case(
        "order",
        "A training step with the weight formed in it, or not",
        {name: lambda size=size: rows(size) for name, size in sizes.items()},
        [at_most("factored: ÷ formed, at worst", None, "factored", "formed")],
        rounds=3,
    )


def rows(size: Size) -> list[Row]:
    model, adapted, data = make(size, jr.key(0))

    def row(name: str, product: Callable):
        def linear(factors, frozen, x):
            rows = x.reshape(-1, x.shape[-1])
            y = product(rows, frozen.weight, *factors)
            return y.reshape(*x.shape[:-1], -1) + frozen.bias

        program = plain.program(model, adapted, linear)
        return _work.training(name, program, data, adapted=True)

    return [
        _work.frozen(model, loss_fn, data),
        row("formed", formed),
        row("factored", factored),
    ]
