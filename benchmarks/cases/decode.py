"""Decoding one token at batch 1, with a cache of keys and values.

Every weight is read once for a single vector, so the step is as fast as memory is, and
products with the factors, however small, are all overhead.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import quax
from jax import lax
from jaxtyping import Array, Float, PyTree

from .._transformer import make, Size, Transformer
from .._work import at_most, Case, FROZEN, Row
from ..peers import plain
from ..peers.by_hand import by_hand
from ..peers.quax_example import quax_example


BASE = Size(batch=1, tokens=1)
QUICK = Size(layers=1, width=64, batch=1, tokens=1)
POSITIONS = 256


def decode(model: Transformer, x: Float[Array, " width"], cache: PyTree):
    """One token through the model, and the cache with its keys and values.

    The cache is full: `(slot, [(keys, values), ...])`, a window of which the new token
    takes the oldest `slot`. Without encodings of position their order does not matter.
    """
    slot, entries = cache
    positions, new = entries[0][0].shape[0], []
    for block, (keys, values) in zip(model.blocks, entries):
        normed = block.norm1(x)
        # q, k, v: (heads, width / heads)
        q, k, v = (
            linear(normed).reshape(block.heads, -1)
            for linear in (block.q, block.k, block.v)
        )
        # keys, values: (positions, heads, width / heads)
        keys = lax.dynamic_update_index_in_dim(keys, k, slot, axis=0)
        values = lax.dynamic_update_index_in_dim(values, v, slot, axis=0)
        new.append((keys, values))
        logits = jnp.einsum("hd,thd->ht", q, keys) / jnp.sqrt(q.shape[-1])
        weights = jax.nn.softmax(logits)  # (heads, positions)
        x = x + block.o(jnp.einsum("ht,thd->hd", weights, values).reshape(-1))
        x = x + block.down(jax.nn.gelu(block.up(block.norm2(x))))
    return model.norm(x), ((slot + 1) % positions, new)


def rows(size: Size) -> list[Row]:
    """All decode with the same weights, factors and cache."""
    make_key, cache_key = jr.split(jr.key(0))
    model, ours, (x, _) = make(size, make_key)
    head = size.width // size.heads
    cache = jr.normal(cache_key, (2 * size.layers, POSITIONS, size.heads, head))
    state = x[0, 0], (jnp.array(0), list(zip(cache[::2], cache[1::2])))

    def plain_decode(trees, x, cache):
        factors, weights = trees
        y, cache = plain.decode(factors, weights, x[None], cache, model.norm.eps)
        return y[0], cache

    trees = plain.factors(ours), plain.weights(model)
    example, outside = quax_example(model, ours), quax.quaxify(decode)
    return [
        _row(FROZEN, model, decode, state, adapted=False),
        _row("by hand, Equinox", by_hand(model, ours), decode, state),
        _row("by hand, plain JAX", trees, plain_decode, state),
        _row("quax.examples.lora", example, outside, state),
        _row("ours, quaxify(f)", ours, outside, state),
    ]


def _row(name: str, model: PyTree, decode, state, adapted: bool = True) -> Row:
    arrays, static = eqx.partition(model, eqx.is_array)

    def step(state, arrays):
        x, cache = state
        y, cache = decode(eqx.combine(arrays, static), x, cache)
        # What comes out is the next token to go in, as normalised as the first.
        return (y, cache), jnp.mean(jnp.abs(y))

    return Row(name, step, state, arrays, adapted)


def case(quick: bool) -> Case:
    """Batch-1 decoding."""
    size = QUICK if quick else BASE
    row, plainly, hand = "ours, quaxify(f)", "by hand, plain JAX", "by hand, Equinox"
    return Case(
        "decode",
        f"Decoding a token: {size.layers} layers, width {size.width}, "
        f"{POSITIONS} positions in the cache, rank {size.rank}",
        {"step": lambda: rows(size)},
        [
            at_most("batch-1 decoding: ÷ by hand, plain JAX", 1.03, row, plainly),
            at_most("batch-1 decoding: ÷ by hand, Equinox", None, row, hand),
            at_most("batch-1 decoding: ÷ frozen", None, row, FROZEN),
        ],
        rounds=401,  # Of a few milliseconds each.
    )
