"""Inference on a long prompt: forward alone, adapted and merged."""

import zlib
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import quax
from jaxtyping import PyTree

import lora_quax

from .._transformer import make, Size, Transformer
from .._work import at_most, Case, Claim, FROZEN, INSIDE, inside, OUTSIDE, Row
from ..peers import plain
from ..peers.by_hand import by_hand
from ..peers.quax_example import quax_example


BASE = Size(layers=4, batch=1, tokens=2048)
QUICK = Size(layers=1, width=64, batch=1, tokens=32)


def forward(model: Transformer, x):
    """Of a batch of prompts."""
    return jax.vmap(model)(x)


def rows(size: Size) -> list[Row]:
    """All on the same weights, factors and prompt."""
    model, ours, (x, _) = make(size, jr.key(0))

    def plain_forward(trees, x):
        factors, weights = trees
        return plain.forward(factors, weights, x, size.heads, model.norm.eps)

    trees = plain.factors(ours), plain.weights(model)
    outside = quax.quaxify(forward)
    return [
        _row(FROZEN, model, forward, x, adapted=False),
        _row("by hand, Equinox", by_hand(model, ours), forward, x),
        _row("by hand, plain JAX", trees, plain_forward, x),
        _row("quax.examples.lora", quax_example(model, ours), outside, x),
        _row(OUTSIDE, ours, outside, x),
        _row(INSIDE, ours, inside(forward), x),
        _row("merged", lora_quax.merge(ours), forward, x),
    ]


def _row(name: str, model: PyTree, forward: Callable, x, adapted: bool = True) -> Row:
    arrays, static = eqx.partition(model, eqx.is_array)

    def step(state, fixed):
        arrays, x = fixed
        y = forward(eqx.combine(arrays, static), x)
        return state, jnp.mean(jnp.abs(y[:, -1])), y

    # What is handed to the compiler, without the places in the source; a program that
    # is given the same text is the same program.
    text = jax.jit(step).lower((), (arrays, x)).as_text()
    facts = dict(program=float(zlib.crc32(text.encode())))
    return Row(name, step, (), (arrays, x), adapted, facts)


def _differ(points) -> float:
    (rows,) = points.values()
    merged, floor = (rows[name].facts["program"] for name in ("merged", FROZEN))
    return float(merged != floor)


def case(quick: bool) -> Case:
    """Prefill."""
    size = QUICK if quick else BASE
    peer = "by hand, plain JAX"
    return Case(
        "prefill",
        f"Prefill: {size.layers} layers, width {size.width}, "
        f"{size.batch} × {size.tokens} tokens, rank {size.rank}",
        {"forward": lambda: rows(size)},
        [
            Claim("merged: programs other than the plain one", _differ, 0),
            at_most("merged: ÷ the plain model", None, "merged", FROZEN),
            *(at_most(f"{row} ÷ {peer}", None, row, peer) for row in (OUTSIDE, INSIDE)),
        ],
        rounds=7,
    )
