"""A pre-norm transformer, written as an Equinox user writes it.

It has never heard of LoRA. Beside it, what a step of it costs on paper.
"""

from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

import lora_quax


@dataclass(frozen=True)
class Size:
    """How large a model, and on how much data."""

    layers: int = 6
    width: int = 512
    heads: int = 4
    batch: int = 4
    tokens: int = 128
    rank: int = 8


BASE = Size()
MANY = Size(batch=8, tokens=512)
SIZES = {
    "small": Size(layers=2, width=256),
    "base": BASE,
    "large": Size(layers=12, width=1024, heads=16),
}
QUICK = Size(layers=1, width=64, tokens=16)


class Block(eqx.Module):
    """Attention and a perceptron, each behind a normalisation and beside a residual."""

    norm1: eqx.nn.LayerNorm
    q: eqx.nn.Linear
    k: eqx.nn.Linear
    v: eqx.nn.Linear
    o: eqx.nn.Linear
    norm2: eqx.nn.LayerNorm
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    heads: int = eqx.field(static=True)

    def __init__(self, width: int, heads: int, key: PRNGKeyArray):
        keys = jr.split(key, 6)
        self.norm1 = eqx.nn.LayerNorm(width)
        self.q = eqx.nn.Linear(width, width, key=keys[0])
        self.k = eqx.nn.Linear(width, width, key=keys[1])
        self.v = eqx.nn.Linear(width, width, key=keys[2])
        self.o = eqx.nn.Linear(width, width, key=keys[3])
        self.norm2 = eqx.nn.LayerNorm(width)
        self.up = eqx.nn.Linear(width, 4 * width, key=keys[4])
        self.down = eqx.nn.Linear(4 * width, width, key=keys[5])
        self.heads = heads

    def attention(self, x: Float[Array, "tokens width"]):
        tokens, width = x.shape
        # q, k, v: (tokens, heads, width / heads)
        q, k, v = (
            jax.vmap(linear)(x).reshape(tokens, self.heads, -1)
            for linear in (self.q, self.k, self.v)
        )
        logits = jnp.einsum("shd,thd->hst", q, k) / jnp.sqrt(width / self.heads)
        weights = jax.nn.softmax(logits)  # (heads, tokens, tokens)
        out = jnp.einsum("hst,thd->shd", weights, v)
        return jax.vmap(self.o)(out.reshape(tokens, width))

    def __call__(self, x: Float[Array, "tokens width"]):
        x = x + self.attention(jax.vmap(self.norm1)(x))
        hidden = jax.nn.gelu(jax.vmap(self.up)(jax.vmap(self.norm2)(x)))
        return x + jax.vmap(self.down)(hidden)


class Transformer(eqx.Module):
    """Takes embeddings to predictions of the same shape."""

    blocks: list[Block]
    norm: eqx.nn.LayerNorm

    def __init__(self, size: Size, key: PRNGKeyArray):
        keys = jr.split(key, size.layers)
        self.blocks = [Block(size.width, size.heads, key) for key in keys]
        self.norm = eqx.nn.LayerNorm(size.width)

    def __call__(self, x: Float[Array, "tokens width"]):
        for block in self.blocks:
            x = block(x)
        return jax.vmap(self.norm)(x)


def loss_fn(model, x, y):
    """Mean squared error over a batch."""
    return jnp.mean((jax.vmap(model)(x) - y) ** 2)


def make(size: Size, key: PRNGKeyArray, dtype=jnp.float32):
    """A model, the same with a `LoraArray` in each linear layer, and a batch.

    The factors are in float32 at least, both nonzero, and the scaling is 1.
    """
    model_key, lora_key, x_key, y_key = jr.split(key, 4)
    shape = (size.batch, size.tokens, size.width)
    # The loss, to compare, is in float32 whatever the model is in.
    data = jr.normal(x_key, shape, dtype), jr.normal(y_key, shape)
    model = Transformer(size, model_key)
    model = jax.tree.map(
        lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x, model
    )
    init_b = jax.nn.initializers.normal(0.02)
    return model, lora_quax.loraify(model, size.rank, lora_key, init_b=init_b), data


def perturbed(model: Transformer, key: PRNGKeyArray) -> Transformer:
    """An adapted model of which all that trains has moved a little, and is not zero."""
    params, rest = lora_quax.partition(model)
    leaves, treedef = jax.tree.flatten(params)
    keys = jr.split(key, len(leaves))
    moved = [x + 0.02 * jr.normal(k, x.shape, x.dtype) for x, k in zip(leaves, keys)]
    return eqx.combine(jax.tree.unflatten(treedef, moved), rest)


def factors(size: Size) -> int:
    """How many numbers the factors hold."""
    return size.layers * size.rank * sum(m + n for m, n in _linears(size))


def floor_products(size: Size) -> float:
    """The operations of the products of the frozen model, forward and backward."""
    tokens = size.batch * size.tokens
    weights = size.layers * sum(fan_in * fan_out for fan_in, fan_out in _linears(size))
    # Logits and averages; each takes part in two products of the backward pass.
    attention = size.layers * 2 * tokens * size.tokens * size.width
    return 2 * (2 * tokens * weights + 3 * attention)


def lora_products(size: Size) -> float:
    """The same for a step of LoRA on every linear layer.

    Three thin products read the input or make its cotangent, and three read or make
    those of the output. Nothing that is before the first q, k and v trains, so the
    cotangents of their inputs, which the floor computes, are not needed.
    """
    tokens = size.batch * size.tokens
    unneeded = 3 * (size.width**2 + size.width * size.rank)
    return floor_products(size) + 2 * tokens * (3 * factors(size) - unneeded)


def best_products(size: Size) -> float:
    """The same, each product in the order that takes the fewest operations.

    Where tokens outnumber the inputs, forming `W + b·a` takes fewer than the product
    of `x·aᵀ` with `bᵀ`; where they outnumber the outputs, so it does for the input's
    cotangent (RunLoRA, arXiv 2312.03415). All else the gradients of the factors need.
    """
    tokens = size.batch * size.tokens

    def saved(tokens: int, read: int, made: int) -> int:
        return size.rank * made * max(0, tokens - read)

    forward = sum(saved(tokens, m, n) for m, n in _linears(size))
    backward = sum(saved(tokens, n, m) for m, n in _linears(size))
    unneeded = 3 * saved(tokens, size.width, size.width)
    return lora_products(size) - 2 * (size.layers * (forward + backward) - unneeded)


def _linears(size: Size) -> list[tuple[int, int]]:
    """(in, out) of q, k, v, o, up and down."""
    w = size.width
    return [(w, w)] * 4 + [(w, 4 * w), (4 * w, w)]
