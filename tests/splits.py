"""A step of a language model on a mesh, and what its devices send each other."""

import math
from collections.abc import Callable, Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import quax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import lora_quax
from lora_quax._cli.plan.compiled import Program


RANK = 4


def loss_of(logits, tokens):
    """Minus the mean logarithm of the likelihood of each token, given those before."""
    picked = jnp.take_along_axis(
        jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32)),
        tokens[:, 1:, None],
        axis=-1,
    )
    return -picked.mean()


def adapted(plain, *targets):
    init_b = jax.nn.initializers.normal(0.1)
    targets = list(targets or (eqx.nn.Linear, eqx.nn.Embedding))
    return lora_quax.loraify(plain, RANK, jr.key(2), targets=targets, init_b=init_b)


def laid_out(plain, tokens, axes: Mapping[str, int], rules):
    """A model and its tokens on a mesh of such axes: rows along `dp` and `fsdp`, their
    tokens along `sp`."""
    devices = jax.devices()[: math.prod(axes.values())]
    types = (AxisType.Auto,) * len(axes)
    mesh = jax.make_mesh((*axes.values(),), (*axes,), types, devices=devices)
    rows = tuple(name for name in ("dp", "fsdp") if name in axes)
    spec = P(rows or None, "sp" if "sp" in axes else None)
    tokens = jax.device_put(tokens, NamedSharding(mesh, spec))
    return lora_quax.shard(plain, mesh, rules), tokens


def step_of(loss_fn: Callable, model, tokens, is_lora: bool = True):
    """A compiled step, and what it is called with."""
    partition = (
        lora_quax.partition if is_lora else lambda m: eqx.partition(m, eqx.is_array)
    )
    params, rest = partition(model)
    arrays, static = eqx.partition(rest, eqx.is_array)

    def loss(params, arrays, tokens):
        return quax.quaxify(loss_fn)(eqx.combine(params, arrays, static), tokens)

    run = jax.jit(jax.value_and_grad(loss))
    return run.lower(params, arrays, tokens).compile(), (params, arrays, tokens)


def traffic(compiled) -> dict[str, int]:
    """The bytes that collectives of each kind give to a device."""
    return Program(compiled.as_text()).traffic()


def bytes_of(tree, sharded: bool = False) -> int:
    """Of all its arrays, or of what one device has of them."""
    shape = lambda x: x.sharding.shard_shape(x.shape) if sharded else x.shape
    return sum(math.prod(shape(x)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
