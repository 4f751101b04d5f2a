"""A whole Llama and a whole GPT-2 in Equinox, of the layers of a twin."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp


class Causal(eqx.Module):
    """A model whose embedding is its head, as `equinox.nn.Shared` has it."""

    ends: eqx.nn.Shared
    body: dict

    def __init__(self, embedding, head, body):
        where = lambda ends: ends["head"].weight
        get = lambda ends: ends["embedding"].weight
        self.ends = eqx.nn.Shared({"embedding": embedding, "head": head}, where, get)
        self.body = body

    def __call__(self, tokens):
        ends = self.ends()
        x = jax.vmap(ends["embedding"])(tokens)
        return jax.vmap(ends["head"])(run(self.body, x))


class Apart(eqx.Module):
    """The same with an array for each."""

    embedding: eqx.nn.Embedding
    head: eqx.nn.Linear
    body: dict

    def __call__(self, tokens):
        x = jax.vmap(self.embedding)(tokens)
        return jax.vmap(self.head)(run(self.body, x))


class Twice(eqx.Module):
    """The same with a program that uses the embedding as its head."""

    embedding: eqx.nn.Embedding
    body: dict

    def __call__(self, tokens):
        x = run(self.body, jax.vmap(self.embedding)(tokens))
        return x @ self.embedding.weight.T


NAMES = {
    "llama": {
        "ends.pytree.embedding": "model.embed_tokens",
        "ends.pytree.head": "lm_head",
        "embedding": "model.embed_tokens",
        "head": "lm_head",
        "body": "model",
    },
    "gpt2": {
        "ends.pytree.embedding": "transformer.wte",
        "ends.pytree.head": "lm_head",
        "embedding": "transformer.wte",
        "head": "lm_head",
        "body": "transformer",
    },
}
EMBEDDINGS = {"llama": "embed_tokens", "gpt2": "wte"}


def names_for(kind: str, model) -> dict[str, str]:
    starts = "ends" if isinstance(model, Causal) else ("embedding", "head")
    if isinstance(model, Twice):
        starts = "embedding"
    starts = (*([starts] if isinstance(starts, str) else starts), "body")
    return {key: x for key, x in NAMES[kind].items() if key.startswith(starts)}


def model_of(kind: str, twin: dict, make):
    body = dict(twin["model"] if kind == "llama" else twin["transformer"])
    embedding = body.pop(EMBEDDINGS[kind])
    if make is Twice:
        return Twice(embedding, body)
    head = eqx.tree_at(lambda l: l.weight, twin["lm_head"], embedding.weight)
    return make(embedding, head, body)


def run(body: dict, x):
    return _llama(body, x) if "layers" in body else _gpt2(body, x)


def _attention(q, k, v):
    """Of shapes (tokens, heads, size), each seeing what comes before it."""
    k, v = (jnp.repeat(y, q.shape[1] // y.shape[1], axis=1) for y in (k, v))
    scores = jnp.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    scores = jnp.where(jnp.tri(len(q), dtype=bool), scores, -jnp.inf)
    out = jnp.einsum("hqk,khd->qhd", jax.nn.softmax(scores), v)
    return out.reshape(len(q), -1)


# Of 4 heads of queries and 2 of keys, as `interop_twins.llama` has them.


def _llama(body: dict, x):
    for i in range(len(body["layers"])):
        layer = body["layers"][str(i)]
        x = x + _llama_attention(layer["self_attn"], _rms(layer["input_layernorm"], x))
        mlp, y = layer["mlp"], _rms(layer["post_attention_layernorm"], x)
        gate, up = jax.vmap(mlp["gate_proj"])(y), jax.vmap(mlp["up_proj"])(y)
        x = x + jax.vmap(mlp["down_proj"])(jax.nn.silu(gate) * up)
    return _rms(body["norm"], x)


def _rms(norm: dict, x):
    return norm["weight"] * x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def _llama_attention(layer: dict, x):
    q, k, v = (jax.vmap(layer[f"{name}_proj"])(x) for name in "qkv")
    q, k, v = (y.reshape(len(x), n, -1) for y, n in ((q, 4), (k, 2), (v, 2)))
    return jax.vmap(layer["o_proj"])(_attention(_turned(q), _turned(k), v))


def _turned(x):
    """By the position: rotary embeddings."""
    tokens, _, size = x.shape
    rates = 10000.0 ** -(jnp.arange(0, size, 2) / size)
    angles = jnp.outer(jnp.arange(tokens), rates)[:, None]
    cos, sin = (jnp.tile(f(angles), 2) for f in (jnp.cos, jnp.sin))
    one, other = jnp.split(x, 2, axis=-1)
    return x * cos + jnp.concatenate([-other, one], axis=-1) * sin


def _gpt2(body: dict, x):
    x = x + jax.vmap(body["wpe"])(jnp.arange(len(x)))
    for i in range(len(body["h"])):
        layer = body["h"][str(i)]
        y = jax.vmap(layer["ln_1"])(x)
        q, k, v = jnp.split(jax.vmap(layer["attn"]["c_attn"])(y), 3, axis=-1)
        q, k, v = (y.reshape(len(x), 2, -1) for y in (q, k, v))
        x = x + jax.vmap(layer["attn"]["c_proj"])(_attention(q, k, v))
        y = jax.vmap(layer["mlp"]["c_fc"])(jax.vmap(layer["ln_2"])(x))
        x = x + jax.vmap(layer["mlp"]["c_proj"])(jax.nn.gelu(y, approximate=True))
    return jax.vmap(body["ln_f"])(x)
