"""The case: a training step of a pre-norm transformer.

The model is written as an Equinox user writes it, and has never heard of LoRA.
"""

from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import quax
from jaxtyping import Array, Float, PRNGKeyArray
from quax.examples import lora as quax_lora

import lora_quax

from ._harness import Row


LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Size:
    """How large a model, and on how much data.

    `bounds` are what the ratios to the floor of our two rows, `quaxify(vmap(f))` and
    `vmap(quaxify(f))`, are to stay within. Small models are all overhead: no bounds.
    """

    layers: int
    width: int
    heads: int
    batch: int
    tokens: int
    rank: int
    bounds: tuple[float | None, float | None] = (None, None)


SIZES = {
    "small": Size(layers=2, width=128, heads=4, batch=4, tokens=32, rank=8),
    "base": Size(
        layers=6,
        width=512,
        heads=4,
        batch=4,
        tokens=128,
        rank=8,
        bounds=(1.20, 1.25),
    ),
}


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


class LoraLinear(eqx.Module):
    """LoRA as it is written by hand in Equinox: a wrapper round the layer."""

    linear: eqx.nn.Linear
    a: Float[Array, "rank in"]
    b: Float[Array, "out rank"]

    def __call__(self, x: Float[Array, "in"]):
        return self.linear(x) + self.b @ (self.a @ x)


def rows(size: Size) -> list[Row]:
    """Every way of taking the step, on the same weights, factors and data.

    All train by Adam; the LoRA rows hand only their factors to it, whichever library
    they come from, and each has the same nonzero factors with a scaling of 1.
    """
    model_key, lora_key, x_key, y_key = jr.split(jr.key(0), 4)
    shape = (size.batch, size.tokens, size.width)
    data = jr.normal(x_key, shape), jr.normal(y_key, shape)
    model = Transformer(size, model_key)
    ours = lora_quax.loraify(
        model, size.rank, lora_key, init_b=jax.nn.initializers.normal(0.02)
    )
    by_hand, example = _by_hand(model, ours), _quax_example(model, ours, size.rank)
    outside = quax.quaxify(loss_fn)

    def inside(model, x, y):
        return loss_fn(quax.quaxify(model), x, y)

    return [
        _floor("floor (frozen)", model, data),
        _training(
            "hand-written LoRA",
            eqx.partition(by_hand, _factors(by_hand, LoraLinear)),
            loss_fn,
            data,
            adapted=True,
        ),
        _training(
            "quax.examples.lora",
            eqx.partition(example, _factors(example, quax_lora.LoraArray)),
            outside,
            data,
            adapted=True,
        ),
        _training(
            "full fine-tuning",
            eqx.partition(model, eqx.is_inexact_array),
            loss_fn,
            data,
        ),
        _training(
            "ours, quaxify(vmap(f))",
            lora_quax.partition(ours),
            outside,
            data,
            bound=size.bounds[0],
            adapted=True,
        ),
        _training(
            "ours, vmap(quaxify(f))",
            lora_quax.partition(ours),
            inside,
            data,
            bound=size.bounds[1],
            adapted=True,
        ),
    ]


def _floor(name, model, data) -> Row:
    """What no fine-tuning that reaches the first layer can avoid computing."""
    arrays, static = eqx.partition(model, eqx.is_array)

    def step(state, fixed):
        arrays, (x, y) = fixed
        model = eqx.combine(arrays, static)
        loss, grad = jax.value_and_grad(loss_fn, argnums=1)(model, x, y)
        return state, loss, grad

    return Row(name, step, (), (arrays, data))


def _training(name, partitioned, loss_fn, data, **kwargs) -> Row:
    """A step of Adam on the first part of a partitioned model."""
    params, rest = partitioned
    frozen, static = eqx.partition(rest, eqx.is_array)
    optim = optax.adam(LEARNING_RATE)

    def step(state, fixed):
        params, opt_state = state
        frozen, (x, y) = fixed

        def objective(params):
            return loss_fn(eqx.combine(params, frozen, static), x, y)

        loss, grads = jax.value_and_grad(objective)(params)
        updates, opt_state = optim.update(grads, opt_state)
        return (optax.apply_updates(params, updates), opt_state), loss

    return Row(name, step, (params, optim.init(params)), (frozen, data), **kwargs)


def _is_linear(x) -> bool:
    return isinstance(x, eqx.nn.Linear)


def _by_hand(model, ours):
    """`model` with the factors of `ours`, in the wrapper."""

    def wrap(x, y):
        return LoraLinear(x, y.weight.a, y.weight.b) if _is_linear(x) else x

    return jax.tree.map(wrap, model, ours, is_leaf=_is_linear)


def _quax_example(model, ours, rank):
    """`model` with the factors of `ours`, in Quax's example, which swaps the names."""

    def refill(x, y):
        if not _is_linear(x):
            return x
        factors = y.weight.b, y.weight.a
        return eqx.tree_at(lambda x: (x.weight.a, x.weight.b), x, factors)

    example = quax_lora.loraify(model, rank=rank, key=jr.key(0))
    return jax.tree.map(refill, example, ours, is_leaf=_is_linear)


def _factors(model, cls):
    """A filter spec, true at the fields `a` and `b` of each instance of `cls`."""

    def is_adapter(x):
        return isinstance(x, cls)

    def spec(x):
        spec = jax.tree.map(lambda _: False, x)
        if is_adapter(x):
            spec = eqx.tree_at(lambda s: (s.a, s.b), spec, (True, True))
        return spec

    return jax.tree.map(spec, model, is_leaf=is_adapter)
