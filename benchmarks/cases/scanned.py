"""Layers stacked in one array each and run by a scan, which compiles one of them."""

import dataclasses

import equinox as eqx
import jax
import jax.random as jr
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

import lora_quax

from .. import _work
from .._transformer import BASE, Block, loss_fn, QUICK, Size
from .._work import at_most, Case, FROZEN, OUTSIDE, Row
from ..peers import by_hand


class Stacked(eqx.Module):
    """A transformer whose blocks are one block, with a leading axis of layers."""

    blocks: Block

    def __init__(self, size: Size, key: PRNGKeyArray):
        keys = jr.split(key, size.layers)
        make = eqx.filter_vmap(lambda key: Block(size.width, size.heads, key))
        self.blocks = make(keys)

    def __call__(self, x: Float[Array, "tokens width"]):
        arrays, static = eqx.partition(self.blocks, eqx.is_array)

        def body(x, arrays):
            return eqx.combine(arrays, static)(x), None

        return lax.scan(body, x, arrays)[0]


def cases(quick: bool) -> list[Case]:
    size = QUICK if quick else BASE
    few, many = (
        dataclasses.replace(QUICK, layers=n) for n in ((2, 3) if quick else (4, 24))
    )
    names = [f"{OUTSIDE}, {depth.layers} layers" for depth in (few, many)]

    def depths():
        """A row for each depth, whose compilation is then interleaved."""
        for name, depth in zip(names, (few, many)):
            *_, outside, _ = rows(depth)
            yield dataclasses.replace(outside, name=name, adapted=False)

    return [
        Case(
            "scanned",
            f"A training step of {size.layers} layers, stacked and scanned",
            {"step": lambda: rows(size)},
            [at_most("scanned layers: ÷ frozen", None, OUTSIDE, FROZEN)],
        ),
        Case(
            "scanned-compile",
            "Compiling a training step of scanned layers, by their number",
            {"compile": lambda: list(depths())},
            [
                at_most(
                    f"compile time of {many.layers} scanned layers ÷ {few.layers}",
                    1.1,
                    *names[::-1],
                )
            ],
            measure="compile",
            rounds=11,
        ),
    ]


def rows(size: Size) -> list[Row]:
    model_key, lora_key, x_key, y_key = jr.split(jr.key(0), 4)
    shape = (size.batch, size.tokens, size.width)
    data = jr.normal(x_key, shape), jr.normal(y_key, shape)
    model = Stacked(size, model_key)
    init_b = jax.nn.initializers.normal(0.02)
    adapted = lora_quax.loraify(model, size.rank, lora_key, init_b=init_b)
    hand = by_hand.program(model, adapted, loss_fn)
    return [
        _work.frozen(model, loss_fn, data),
        _work.training("by hand, Equinox", hand, data, adapted=True),
        *_work.ours(adapted, loss_fn, data),
    ]
