"""A Llama of which there are shapes alone, in plain Equinox, and its loss.

Its layers are scanned over, so that a program of it is as long for 126 of them as for
one.
"""

import functools as ft
import math
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int, Shaped

from .sizes import Sizes


@dataclass(frozen=True)
class How:
    """How a model is run: static, as a program is."""

    checkpoint: str  # A policy of `jax.checkpoint_policies`, or "none".
    rows: NamedSharding  # Of activations: (batch, tokens, width).
    # Of the weights of one layer, by their names, while it runs.
    gathered: tuple[tuple[str, NamedSharding], ...]

    def gather(self, layer: "Block") -> "Block":
        """A layer whose weights lie whole along `fsdp`. Of a quantised one it is the
        codes that are sent, and not the numbers that they stand for."""
        for name, sharding in self.gathered:
            where = lambda layer, name=name: getattr(layer, name).weight
            whole = jax.lax.with_sharding_constraint(where(layer), sharding)
            layer = eqx.tree_at(where, layer, whole)
        return layer


class Block(eqx.Module):
    input_norm: eqx.nn.RMSNorm
    q_proj: eqx.nn.Linear
    k_proj: eqx.nn.Linear
    v_proj: eqx.nn.Linear
    o_proj: eqx.nn.Linear
    post_norm: eqx.nn.RMSNorm
    gate_proj: eqx.nn.Linear
    up_proj: eqx.nn.Linear
    down_proj: eqx.nn.Linear
    sizes: Sizes = eqx.field(static=True)

    def __init__(self, sizes: Sizes, dtype: Any, key):
        linear = ft.partial(eqx.nn.Linear, use_bias=False, dtype=dtype, key=key)
        norm = ft.partial(eqx.nn.RMSNorm, sizes.width, use_bias=False, dtype=dtype)
        queries, keys = sizes.heads * sizes.head, sizes.kv_heads * sizes.head
        self.input_norm, self.post_norm = norm(), norm()
        self.q_proj = linear(sizes.width, queries)
        self.k_proj, self.v_proj = linear(sizes.width, keys), linear(sizes.width, keys)
        self.o_proj = linear(queries, sizes.width)
        self.gate_proj = linear(sizes.width, sizes.hidden)
        self.up_proj = linear(sizes.width, sizes.hidden)
        self.down_proj = linear(sizes.hidden, sizes.width)
        self.sizes = sizes

    def __call__(self, x: Float[Array, "batch tokens width"]):
        x = x + self.attention(each(self.input_norm, x))
        h = each(self.post_norm, x)
        h = jax.nn.silu(each(self.gate_proj, h)) * each(self.up_proj, h)
        return x + each(self.down_proj, h)

    def attention(self, x: Float[Array, "batch tokens width"]):
        batch, tokens, _ = x.shape
        n = self.sizes.kv_heads
        # q: (batch, tokens, n, heads of each, head); k, v: (batch, tokens, n, head)
        q = each(self.q_proj, x).reshape(batch, tokens, n, -1, self.sizes.head)
        k = each(self.k_proj, x).reshape(batch, tokens, n, self.sizes.head)
        v = each(self.v_proj, x).reshape(batch, tokens, n, self.sizes.head)
        q, k = rotated(q), rotated(k)
        scores = jnp.einsum("bsngh,btnh->bngst", q, k) / math.sqrt(self.sizes.head)
        causal = jnp.tril(jnp.ones((tokens, tokens), bool))
        scores = jnp.where(causal, scores.astype(jnp.float32), -1e9)
        weights = jax.nn.softmax(scores).astype(v.dtype)
        out = jnp.einsum("bngst,btnh->bsngh", weights, v)
        return each(self.o_proj, out.reshape(batch, tokens, -1))


def each(layer, x: Shaped[Array, "batch tokens ..."]):
    return jax.vmap(jax.vmap(layer))(x)


def rotated(x: Float[Array, "batch tokens ..."]):
    """By position, as RoPE has it; its base does not matter here."""
    half = x.shape[-1] // 2
    rates = 10_000.0 ** (-jnp.arange(half) / half)
    angles = jnp.arange(x.shape[1])[:, None] * rates  # (tokens, half)
    angles = angles.reshape(len(angles), *(1,) * (x.ndim - 3), half)
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    one, two = x[..., :half], x[..., half:]
    return jnp.concatenate([one * cos - two * sin, two * cos + one * sin], -1)


class Llama(eqx.Module):
    embed_tokens: eqx.nn.Embedding
    layers: Block  # Each array of it with an axis of layers.
    norm: eqx.nn.RMSNorm
    lm_head: eqx.nn.Linear | None  # Or the embedding is the head.
    how: How = eqx.field(static=True)

    def __init__(self, sizes: Sizes, how: How, dtype: Any, key):
        self.embed_tokens = eqx.nn.Embedding(
            sizes.words, sizes.width, dtype=dtype, key=key
        )
        make = lambda key: Block(sizes, dtype, key)
        self.layers = eqx.filter_vmap(make)(jr.split(key, sizes.layers))
        self.norm = eqx.nn.RMSNorm(sizes.width, use_bias=False, dtype=dtype)
        self.lm_head = (
            None
            if sizes.tied
            else eqx.nn.Linear(
                sizes.width, sizes.words, use_bias=False, dtype=dtype, key=key
            )
        )
        self.how = how

    def __call__(self, tokens: Int[Array, "batch tokens"]):
        placed = lambda x: jax.lax.with_sharding_constraint(x, self.how.rows)
        x = placed(each(self.embed_tokens, tokens))
        arrays, static = eqx.partition(self.layers, eqx.is_array)

        def step(x, layer):
            layer = self.how.gather(eqx.combine(layer, static))
            return placed(layer(x)), None

        if self.how.checkpoint != "none":
            policy = getattr(jax.checkpoint_policies, self.how.checkpoint)
            step = jax.checkpoint(step, policy=policy, prevent_cse=False)
        x, _ = jax.lax.scan(step, x, arrays)
        x = each(self.norm, x)
        if self.lm_head is not None:
            return each(self.lm_head, x)
        return jnp.einsum("btw,vw->btv", x, self.embed_tokens.weight)


def abstract_llama(sizes: Sizes, how: How, dtype: Any) -> Llama:
    return eqx.filter_eval_shape(Llama, sizes, how, dtype, jr.key(0))


def loss_fn(model: Llama, tokens: Int[Array, "batch tokens"]) -> Float[Array, ""]:
    """Minus the mean logarithm of the likelihood of each token, given those before."""
    # Of the last there is no next; it is scored as any, so that tokens divide.
    scores = model(tokens).astype(jnp.float32)
    right = jnp.roll(tokens, -1, axis=1)[..., None]
    found = jnp.take_along_axis(scores, right, axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(scores, axis=-1) - found)
