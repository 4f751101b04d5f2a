"""A training step of a language model whose head is tied to its embedding."""

from collections.abc import Sequence
from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

import lora_quax

from .. import _work
from .._work import at_most, Case, FROZEN, INSIDE, OUTSIDE, Row
from ..peers.by_hand import by_hand, factors, LoraEmbedding


@dataclass(frozen=True)
class Shape:
    """The model, and what it is given."""

    vocabulary: int
    width: int
    layers: int
    batch: int
    tokens: int
    rank: int


FULL = Shape(vocabulary=8192, width=256, layers=2, batch=4, tokens=128, rank=8)
QUICK = Shape(vocabulary=32, width=16, layers=1, batch=2, tokens=8, rank=2)


class Block(eqx.Module):
    """A perceptron, behind a normalisation and beside a residual."""

    norm: eqx.nn.LayerNorm
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, width: int, key: PRNGKeyArray):
        up_key, down_key = jr.split(key)
        self.norm = eqx.nn.LayerNorm(width)
        self.up = eqx.nn.Linear(width, 4 * width, key=up_key)
        self.down = eqx.nn.Linear(4 * width, width, key=down_key)

    def __call__(self, x: Float[Array, " width"]):
        return x + self.down(jax.nn.gelu(self.up(self.norm(x))))


class LanguageModel(eqx.Module):
    """Takes tokens to the logits of those that follow, each from itself alone."""

    embedding: eqx.nn.Embedding
    blocks: list[Block]
    norm: eqx.nn.LayerNorm

    def __init__(self, shape: Shape, key: PRNGKeyArray):
        embedding_key, *keys = jr.split(key, 1 + shape.layers)
        # Small, for the head: it has the same weight.
        weight = 0.02 * jr.normal(embedding_key, (shape.vocabulary, shape.width))
        self.embedding = eqx.nn.Embedding(weight=weight)
        self.blocks = [Block(shape.width, key) for key in keys]
        self.norm = eqx.nn.LayerNorm(shape.width)

    def embed(self, tokens: Int[Array, " tokens"]) -> Float[Array, "tokens width"]:
        return jax.vmap(self.embedding)(tokens)

    def hidden(self, x: Float[Array, "tokens width"]) -> Float[Array, "tokens width"]:
        for block in self.blocks:
            x = jax.vmap(block)(x)
        return jax.vmap(self.norm)(x)

    def head(self, x: Float[Array, "tokens width"]) -> Float[Array, "tokens words"]:
        return x @ self.embedding.weight.T

    def __call__(self, tokens: Int[Array, " tokens"]):
        return self.head(self.hidden(self.embed(tokens)))


class ByHand(LanguageModel):
    """The model with wrapped layers, which have no weight to tie a head to."""

    def __init__(self, model: LanguageModel, ours: LanguageModel):
        wrapped = by_hand(model, ours)
        self.embedding = wrapped.embedding
        self.blocks = wrapped.blocks
        self.norm = wrapped.norm

    def head(self, x):
        assert isinstance(self.embedding, LoraEmbedding)
        return self.embedding.attend(x)


def cross_entropy(logits, targets):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets))


def loss_fn(model, tokens, targets):
    """Cross-entropy over a batch."""
    return cross_entropy(jax.vmap(model)(tokens), targets)


def loss_of_offset(model, offset, tokens, targets):
    """The same, of something added to the embedded tokens.

    Its gradient is the floor's: there is none of integers, and training the embedding,
    which is the first layer, takes the gradient of what comes out of it.
    """

    def logits(offset, tokens):
        return model.head(model.hidden(model.embed(tokens) + offset))

    return cross_entropy(jax.vmap(logits)(offset, tokens), targets)


def rows(shape: Shape) -> Sequence[Row]:
    model_key, lora_key, x_key, y_key = jr.split(jr.key(0), 4)
    size = shape.batch, shape.tokens
    data = (
        jr.randint(x_key, size, 0, shape.vocabulary),
        jr.randint(y_key, size, 0, shape.vocabulary),
    )
    model = LanguageModel(shape, model_key)
    ours = lora_quax.loraify(
        model,
        shape.rank,
        lora_key,
        targets=[eqx.nn.Embedding, eqx.nn.Linear],
        init_b=jax.nn.initializers.normal(0.02),
    )
    hand = ByHand(model, ours)
    program = _work.program(eqx.partition(hand, factors(hand)), loss_fn)
    offset = jnp.zeros((*size, shape.width))
    return [
        _work.frozen(model, loss_of_offset, (offset, *data)),
        _work.training("by hand, Equinox", program, data, adapted=True),
        _work.full(model, loss_fn, data),
        *_work.ours(ours, loss_fn, data),
    ]


def case(quick: bool) -> Case:
    shape = QUICK if quick else FULL
    return Case(
        name="embedding",
        title="A training step of a language model with a tied embedding",
        points={"step": lambda: rows(shape)},
        claims=[
            at_most("tied embedding: ÷ frozen", 1.12, OUTSIDE, FROZEN),
            at_most("tied embedding, quaxify inside: ÷ frozen", 1.12, INSIDE, FROZEN),
            at_most("tied embedding: ÷ by hand", 1.00, OUTSIDE, "by hand, Equinox"),
        ],
    )
