"""A language model split over eight devices in every way: the same losses and
gradients as on one, and no more traffic than the dense model has."""

import functools as ft
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from jax.sharding import PartitionSpec as P
from splits import adapted, bytes_of, laid_out, loss_of, RANK, step_of, traffic

import lora_quax


pytestmark = pytest.mark.slow
LAYERS, WIDTH, HEADS, HIDDEN, WORDS = 2, 32, 4, 64, 48
BATCH, TOKENS = 8, 16


class Block(eqx.Module):
    q: eqx.nn.Linear
    k: eqx.nn.Linear
    v: eqx.nn.Linear
    o: eqx.nn.Linear
    gate: eqx.nn.Linear
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    norms: list[eqx.nn.RMSNorm]

    def __init__(self, key):
        linear = ft.partial(eqx.nn.Linear, use_bias=False)
        keys = jr.split(key, 7)
        self.q, self.k, self.v, self.o = (
            linear(WIDTH, WIDTH, key=key) for key in keys[:4]
        )
        self.gate, self.up = (linear(WIDTH, HIDDEN, key=key) for key in keys[4:6])
        self.down = linear(HIDDEN, WIDTH, key=keys[6])
        self.norms = [eqx.nn.RMSNorm(WIDTH), eqx.nn.RMSNorm(WIDTH)]

    def __call__(self, x):
        def heads(linear, x):
            return jax.vmap(linear)(x).reshape(len(x), HEADS, -1)

        h = jax.vmap(self.norms[0])(x)
        q, k, v = (heads(linear, h) for linear in (self.q, self.k, self.v))
        logits = jnp.einsum("shd,thd->hst", q, k) / math.sqrt(WIDTH / HEADS)
        mask = jnp.tril(jnp.ones((len(x), len(x)), bool))
        weights = jax.nn.softmax(jnp.where(mask, logits, -1e9))
        out = jnp.einsum("hst,thd->shd", weights, v)
        x = x + jax.vmap(self.o)(out.reshape(x.shape))
        h = jax.vmap(self.norms[1])(x)
        h = jax.nn.silu(jax.vmap(self.gate)(h)) * jax.vmap(self.up)(h)
        return x + jax.vmap(self.down)(h)


class Llama(eqx.Module):
    embed: eqx.nn.Embedding
    blocks: Any  # A list, or one block with an axis of layers.
    head: eqx.nn.Linear
    policy: str | None = eqx.field(static=True)

    def __init__(self, scanned: bool, policy: str | None, key):
        keys = jr.split(key, 3)
        self.embed = eqx.nn.Embedding(WORDS, WIDTH, key=keys[0])
        self.head = eqx.nn.Linear(WIDTH, WORDS, use_bias=False, key=keys[1])
        layers = jr.split(keys[2], LAYERS)
        self.blocks = (
            eqx.filter_vmap(Block)(layers) if scanned else [*map(Block, layers)]
        )
        self.policy = policy

    def __call__(self, tokens):
        run = lambda block, x: block(x)
        if self.policy is not None:
            policy = getattr(jax.checkpoint_policies, self.policy)
            run = eqx.filter_checkpoint(run, policy=policy)
        x = jax.vmap(self.embed)(tokens)
        if isinstance(self.blocks, list):
            for block in self.blocks:
                x = run(block, x)
        else:
            arrays, static = eqx.partition(self.blocks, eqx.is_array)
            step = lambda x, layer: (run(eqx.combine(layer, static), x), None)
            x, _ = jax.lax.scan(step, x, arrays)
        return jax.vmap(self.head)(x)


def loss_fn(model, tokens):
    return loss_of(jax.vmap(model)(tokens), tokens)


TENSOR = {r".*\.(q|k|v|gate|up)": ("tp", "fsdp"), r".*\.(o|down)": ("fsdp", "tp")}
SPLITS = {  # The sizes of the axes of the mesh.
    "dp": dict(dp=8),
    "fsdp": dict(fsdp=8),
    "tp": dict(tp=4),
    "sp": dict(sp=8),
    "dp, fsdp": dict(dp=2, fsdp=4),
    "dp, tp": dict(dp=4, tp=2),
    "fsdp, tp": dict(fsdp=4, tp=2),
    "tp, sp": dict(tp=2, sp=4),
    "dp, fsdp, tp": dict(dp=2, fsdp=2, tp=2),
    "fsdp, tp, sp": dict(fsdp=2, tp=2, sp=2),
}
MODELS = {  # Whether its layers are scanned over, and what is kept for the way back.
    "list": (False, None),
    "scanned": (True, None),
    "list, checkpointed": (False, "nothing_saveable"),
    "scanned, checkpointed": (True, "dots_with_no_batch_dims_saveable"),
}
BASES = {  # How the base is made of that in float32, and how near its losses are.
    "float32": (lambda model: model, 1e-5),
    "bfloat16": (
        lambda model: jax.tree.map(
            lambda x: x.astype(jnp.bfloat16) if eqx.is_inexact_array(x) else x, model
        ),
        1e-2,
    ),
    "int8": (lambda model: lora_quax.quantise(model, "int8", tile=4), 1e-5),
    "nf4": (lambda model: lora_quax.quantise(model, "nf4", tile=4), 1e-5),
}


def rules(axes: dict[str, int], scanned: bool) -> dict[str, P]:
    def spec(*names):
        of_mesh = [name if name in axes else None for name in names]
        return P(None, *of_mesh) if scanned else P(*of_mesh)

    out = {path: spec(*names) for path, names in TENSOR.items()}
    fsdp = "fsdp" if "fsdp" in axes else None
    return {**out, "embed": P(None, fsdp), "head": P(None, fsdp)}


def data():
    return jr.randint(jr.key(1), (BATCH, TOKENS), 0, WORDS)


@ft.cache
def alone(model: str, base: str):
    """The loss and the gradients on one device."""
    plain = BASES[base][0](Llama(*MODELS[model], key=jr.key(0)))
    run, args = step_of(loss_fn, adapted(plain), data())
    return jax.device_get(run(*args))


def split(plain, name: str, model: str):
    axes = SPLITS[name]
    return laid_out(plain, data(), axes, rules(axes, MODELS[model][0]))


CELLS = [
    *((name, "list", "float32") for name in SPLITS),
    *(("fsdp, tp", model, "float32") for model in MODELS if model != "list"),
    *(("dp, fsdp, tp", "scanned", base) for base in BASES if base != "float32"),
    *(("fsdp", "scanned, checkpointed", base) for base in ("bfloat16", "nf4")),
]


@pytest.mark.parametrize("name, model, base", CELLS)
def test_a_split_model_is_the_same(name, model, base):
    if base in ("int8", "nf4"):
        pytest.importorskip("qwix")
    make_base, tolerance = BASES[base]
    plain = make_base(Llama(*MODELS[model], key=jr.key(0)))
    on_mesh, tokens = split(plain, name, model)
    run, args = step_of(loss_fn, adapted(on_mesh), tokens)
    got, wanted = jax.device_get(run(*args)), alone(model, base)
    for x, y in zip(*map(jax.tree.leaves, (got, wanted)), strict=True):
        assert abs(x - y).max() <= tolerance * max(1.0, abs(y).max())


@pytest.mark.parametrize("name", SPLITS)
def test_traffic_and_memory(name):
    plain = Llama(*MODELS["list"], key=jr.key(0))
    on_mesh, tokens = split(plain, name, "list")
    model = adapted(on_mesh)
    run, args = step_of(loss_fn, model, tokens)
    dense, _ = step_of(loss_fn, on_mesh, tokens, is_lora=False)
    ours, theirs = traffic(run), traffic(dense)
    # No more is gathered than a step of the dense model gathers, nor more sent in all,
    # but for activations of the rank: of each weight one forward and one backward.
    assert ours.get("all-gather", 0) <= theirs.get("all-gather", 0)
    thin = 2 * (7 * LAYERS + 2) * BATCH * TOKENS * RANK * 4
    assert sum(ours.values()) <= sum(theirs.values()) + thin
    factors = bytes_of(lora_quax.partition(model)[0])
    if name == "dp":  # The gradients, and the loss.
        assert ours == {"all-reduce": factors + 4}
    memory: Any = run.memory_analysis()
    assert memory.argument_size_in_bytes == bytes_of(args, sharded=True)
