"""A step of LoRA on a Llama, abstract: what it is called with, and what it computes."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import quax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from ..._model.loraify import loraify
from ..._model.quantise import quantise
from ..._model.shard import shard
from ..._model.training import partition
from .llama import abstract_llama, How, Llama, loss_fn
from .sizes import Sizes
from .split import batch_spec, gathered, rules, TILE


# What is quantised computes in bfloat16, and so does what is left of such a model.
QUANTISED = ("nf4", "int4", "int8")
BASES = ("float32", "bfloat16", *QUANTISED)
CHECKPOINTS = (
    "none",
    "nothing_saveable",
    "dots_saveable",
    "dots_with_no_batch_dims_saveable",
)


@dataclass(frozen=True)
class Job:
    """What is planned."""

    sizes: Sizes
    axes: dict[str, int]  # Of the mesh, and their sizes.
    base: str
    rank: int
    batch: int  # Rows of tokens, on all devices together.
    tokens: int  # In a row.
    checkpoint: str
    targets: tuple[str, ...]


class Step(NamedTuple):
    """A function of what trains, what does not, and a batch; and those, abstract.

    It returns the loss and the gradients.
    """

    run: Any
    params: PyTree
    frozen: PyTree
    batch: jax.ShapeDtypeStruct


def llama_of(job: Job, mesh: Any) -> Llama:
    """The model without an adapter, quantised if that is asked, and laid out.

    **Raises:** as `step_of`.
    """
    whole = {
        name: NamedSharding(mesh, spec) for name, spec in gathered(job.axes).items()
    }
    if job.checkpoint == "none":  # Or each layer's would be kept for the way back.
        whole = {}
    rows = NamedSharding(mesh, PartitionSpec(*batch_spec(job.axes), None))
    how = How(job.checkpoint, rows, (*whole.items(),))
    is_quantised = job.base in QUANTISED
    dtype = jnp.bfloat16 if is_quantised else jnp.dtype(job.base)
    model = abstract_llama(job.sizes, how, dtype)
    if is_quantised:
        kind: Any = job.base
        kept: Any = [eqx.nn.Linear, *_head(job)]
        model = quantise(model, kind, targets=kept, tile=TILE)
    return shard(model, mesh, rules(job.axes, job.sizes.tied))


def _head(job: Job) -> list[tuple[str, str]]:
    """Which is neither quantised nor, if nobody asks for it, adapted."""
    return [] if job.sizes.tied else [("lm_head", "freeze")]


def step_of(job: Job, mesh: Any) -> Step:
    """**Arguments:**

    - `mesh`: one of devices, or an abstract one.

    **Raises:** `ValueError` if an axis of the mesh does not divide what lies along it,
    or a target is not there; `ImportError` without qwix, for a quantised base.
    """
    named = any("lm_head" in target for target in job.targets)
    targets: Any = [*job.targets, *([] if named else _head(job))]
    model = loraify(llama_of(job, mesh), job.rank, jr.key(0), targets=targets)
    return step_between(*partition(model), job, mesh)


def step_between(params: PyTree, rest: PyTree, job: Job, mesh: Any) -> Step:
    """The step that trains one part of a model, and leaves the rest as it is."""
    frozen, static = eqx.partition(rest, lambda x: hasattr(x, "shape"))

    def loss(params, frozen, tokens):
        model = eqx.combine(params, frozen, static)
        return quax.quaxify(loss_fn)(model, tokens)

    rows = NamedSharding(mesh, batch_spec(job.axes))
    batch = jax.ShapeDtypeStruct((job.batch, job.tokens), jnp.int32, sharding=rows)
    return Step(jax.value_and_grad(loss), params, frozen, batch)
