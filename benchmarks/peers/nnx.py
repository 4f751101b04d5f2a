"""Flax NNX: LoRA is a layer, `nnx.LoRALinear`, that the model is written with."""

# It may not be installed.
# pyright: reportMissingImports=false

import functools as ft
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PyTree

from .._work import Program


LINEAR = ("q", "k", "v", "o", "up", "down")


class Block(nnx.Module):
    """The Equinox model's block, for batches: NNX's layers take leading axes."""

    def __init__(
        self, width: int, heads: int, epsilon: float, linear: Callable, rngs: nnx.Rngs
    ):
        self.norm1 = nnx.LayerNorm(width, epsilon=epsilon, rngs=rngs)
        self.q = linear(width, width, rngs=rngs)
        self.k = linear(width, width, rngs=rngs)
        self.v = linear(width, width, rngs=rngs)
        self.o = linear(width, width, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, epsilon=epsilon, rngs=rngs)
        self.up = linear(width, 4 * width, rngs=rngs)
        self.down = linear(4 * width, width, rngs=rngs)
        self.heads = heads

    def attention(self, x: Float[Array, "batch tokens width"]):
        batch, tokens, width = x.shape
        # q, k, v: (batch, tokens, heads, width / heads)
        q, k, v = (
            linear(x).reshape(batch, tokens, self.heads, -1)
            for linear in (self.q, self.k, self.v)
        )
        logits = jnp.einsum("bshd,bthd->bhst", q, k) / jnp.sqrt(width / self.heads)
        weights = jax.nn.softmax(logits)  # (batch, heads, tokens, tokens)
        out = jnp.einsum("bhst,bthd->bshd", weights, v)
        return self.o(out.reshape(batch, tokens, width))

    def __call__(self, x: Float[Array, "batch tokens width"]):
        x = x + self.attention(self.norm1(x))
        return x + self.down(jax.nn.gelu(self.up(self.norm2(x))))


class Transformer(nnx.Module):
    """The Equinox model, for batches."""

    def __init__(
        self,
        layers: int,
        width: int,
        heads: int,
        epsilon: float,
        linear: Callable,
        rngs: nnx.Rngs,
    ):
        self.blocks = nnx.List(
            [Block(width, heads, epsilon, linear, rngs) for _ in range(layers)]
        )
        self.norm = nnx.LayerNorm(width, epsilon=epsilon, rngs=rngs)

    def __call__(self, x: Float[Array, "batch tokens width"]):
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def program(model: PyTree, ours: PyTree) -> Program:
    """The Equinox `model` with the factors of `ours`, in the layer Flax provides.

    The layer has no `alpha`: its update is `x @ lora_a @ lora_b`, a scaling of 1.
    """
    rank = ours.blocks[0].q.weight.rank
    adapted = transformer(model, ft.partial(nnx.LoRALinear, lora_rank=rank))
    for block, source in zip(adapted.blocks, ours.blocks):
        for name in LINEAR:
            weight = getattr(source, name).weight
            factors = {"lora_a": weight.a.T, "lora_b": weight.b.T}
            nnx.update(getattr(block, name).lora, factors)
    return split(adapted)


def transformer(model: PyTree, linear: Callable) -> Transformer:
    """The Equinox `model` in NNX, with linear layers that `linear` makes."""
    out = Transformer(
        layers=len(model.blocks),
        width=model.norm.shape[0],
        heads=model.blocks[0].heads,
        epsilon=model.norm.eps,  # The two libraries have different defaults.
        linear=linear,
        rngs=nnx.Rngs(0),
    )
    norms = [(out.norm, model.norm)]
    for block, source in zip(out.blocks, model.blocks):
        norms += [(block.norm1, source.norm1), (block.norm2, source.norm2)]
        for name in LINEAR:
            theirs = getattr(source, name)
            # A kernel is (in, out), a weight in Equinox (out, in).
            weights = {"kernel": theirs.weight.T, "bias": theirs.bias}
            nnx.update(getattr(block, name), weights)
    for norm, theirs in norms:
        nnx.update(norm, {"scale": theirs.weight, "bias": theirs.bias})
    return out


def split(adapted: Transformer) -> Program:
    """What trains is every `nnx.LoRAParam`, and nothing else."""
    graphdef, params, frozen = nnx.split(adapted, nnx.LoRAParam, ...)

    def loss(params, frozen, x, y):
        return jnp.mean((nnx.merge(graphdef, params, frozen)(x) - y) ** 2)

    return Program(params, frozen, loss)
