"""LoRA by hand in plain JAX: functions of arrays, activations first, and no library.

Activations are `(*leading, width)` and weights `(in, out)`, so that an adapted layer is
`x @ weight + x @ a @ b + bias` and nothing is ever transposed.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from .._work import Program


LINEAR = ("q", "k", "v", "o", "up", "down")
NORMS = ("norm1", "norm2")


class Affine(NamedTuple):
    """What a linear layer and a normalisation are made of; neither trains."""

    weight: Float[Array, "*in out"]
    bias: Float[Array, " out"]


class Factors(NamedTuple):
    """The update of a linear layer, `a @ b`; a scaling of 1."""

    a: Float[Array, "in rank"]
    b: Float[Array, "rank out"]


def linear(factors: Factors, frozen: Affine, x: Float[Array, "*leading in"]):
    # Factors may be wider than the model. The products then have the model's dtype,
    # as under the autocast of other libraries, and the gradients that of the factors.
    a, b = (factor.astype(x.dtype) for factor in factors)
    return x @ frozen.weight + (x @ a) @ b + frozen.bias


def layer_norm(frozen: Affine, x: Float[Array, "*leading width"], epsilon: float):
    # In float32 at least, as in Equinox.
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.var(wide, axis=-1, keepdims=True)
    out = (wide - mean) * lax.rsqrt(variance + epsilon)
    return (out * frozen.weight + frozen.bias).astype(x.dtype)


def perceptron(
    factors: PyTree,
    frozen: PyTree,
    x: Float[Array, "*leading width"],
    linear: Callable = linear,
):
    hidden = jax.nn.gelu(linear(factors["up"], frozen["up"], x))
    return linear(factors["down"], frozen["down"], hidden)


def attention(
    factors: PyTree,
    frozen: PyTree,
    x: Float[Array, "batch tokens width"],
    heads: int,
    linear: Callable = linear,
):
    batch, tokens, width = x.shape
    # q, k, v: (batch, tokens, heads, width / heads)
    q, k, v = (
        linear(factors[name], frozen[name], x).reshape(batch, tokens, heads, -1)
        for name in "qkv"
    )
    logits = jnp.einsum("bshd,bthd->bhst", q, k) / jnp.sqrt(width / heads)
    weights = jax.nn.softmax(logits)  # (batch, heads, tokens, tokens)
    out = jnp.einsum("bhst,bthd->bshd", weights, v)
    return linear(factors["o"], frozen["o"], out.reshape(batch, tokens, width))


def forward(
    factors: PyTree,
    frozen: PyTree,
    x: Float[Array, "batch tokens width"],
    heads: int,
    epsilon: float,
    linear: Callable = linear,
):
    """The transformer, from embeddings to predictions of the same shape."""
    for trained, block in zip(factors, frozen["blocks"]):
        normed = layer_norm(block["norm1"], x, epsilon)
        x = x + attention(trained, block, normed, heads, linear)
        normed = layer_norm(block["norm2"], x, epsilon)
        x = x + perceptron(trained, block, normed, linear)
    return layer_norm(frozen["norm"], x, epsilon)


def decode(
    factors: PyTree,
    frozen: PyTree,
    x: Float[Array, "1 width"],
    cache: PyTree,
    epsilon: float,
):
    """One token through the transformer, and the cache with its keys and values.

    `cache` is as in `benchmarks/cases/decode.py`.
    """
    slot, entries = cache
    width, positions, new = x.shape[-1], entries[0][0].shape[0], []
    for trained, block, (keys, values) in zip(factors, frozen["blocks"], entries):
        heads = keys.shape[1]
        normed = layer_norm(block["norm1"], x, epsilon)
        # q, k, v: (1, heads, width / heads)
        q, k, v = (
            linear(trained[name], block[name], normed).reshape(1, heads, -1)
            for name in "qkv"
        )
        # keys, values: (positions, heads, width / heads)
        keys = lax.dynamic_update_slice_in_dim(keys, k, slot, axis=0)
        values = lax.dynamic_update_slice_in_dim(values, v, slot, axis=0)
        new.append((keys, values))
        logits = jnp.einsum("shd,thd->hst", q, keys) / jnp.sqrt(width / heads)
        weights = jax.nn.softmax(logits)  # (heads, 1, positions)
        out = jnp.einsum("hst,thd->shd", weights, values).reshape(1, width)
        x = x + linear(trained["o"], block["o"], out)
        normed = layer_norm(block["norm2"], x, epsilon)
        x = x + perceptron(trained, block, normed)
    return layer_norm(frozen["norm"], x, epsilon), ((slot + 1) % positions, new)


def weights(model: PyTree) -> PyTree:
    """The arrays of the Equinox model, none of which trains."""

    def affine(layer):
        # A weight in Equinox is (out, in); that of a normalisation has one axis.
        return Affine(layer.weight.T, layer.bias)

    return dict(
        blocks=[
            {name: affine(getattr(block, name)) for name in LINEAR + NORMS}
            for block in model.blocks
        ],
        norm=affine(model.norm),
    )


def factors(ours: PyTree) -> PyTree:
    """The factors of the adapted Equinox model: what trains."""

    def transposed(weight):
        return Factors(weight.a.T, weight.b.T)

    return [
        {name: transposed(getattr(block, name).weight) for name in LINEAR}
        for block in ours.blocks
    ]


def program(model: PyTree, ours: PyTree, linear: Callable = linear) -> Program:
    """The Equinox `model` with the factors of `ours`.

    `linear(factors, frozen, x)` is what an adapted layer computes.
    """
    heads, epsilon = model.blocks[0].heads, model.norm.eps

    def loss(params, frozen, x, y):
        return jnp.mean((forward(params, frozen, x, heads, epsilon, linear) - y) ** 2)

    return Program(factors(ours), weights(model), loss)
