"""Qwix: LoRA is given to a finished NNX model, whose products it intercepts."""

# It may not be installed.
# pyright: reportMissingImports=false

from typing import Any

import jax.numpy as jnp
import qwix
from flax import nnx
from jaxtyping import PyTree

from .._work import Program
from .nnx import LINEAR, split, Transformer, transformer


def program(model: PyTree, ours: PyTree, **quantised: Any) -> Program:
    """The Equinox `model` with the factors of `ours`, in parameters that Qwix adds.
    `quantised` says of what type its weights are kept."""
    rank = ours.blocks[0].q.weight.rank
    rule = qwix.LoraRule(
        module_path=rf"blocks/\d+/({'|'.join(LINEAR)})",
        rank=rank,
        alpha=rank,
        **quantised,
    )
    # Qwix finds the products by calling the model once; with what, does not matter.
    example = jnp.zeros((1, 1, model.norm.shape[0]))
    adapted = qwix.apply_lora_to_model(
        transformer(model, nnx.Linear),
        qwix.LoraProvider([rule]),
        example,
        rngs=nnx.Rngs(0),
    )
    assert isinstance(adapted, Transformer)  # A copy, of a subclass.
    for block, source in zip(adapted.blocks, ours.blocks):
        for name in LINEAR:
            weight = getattr(source, name).weight
            factors = {"kernel_lora_a": weight.a.T, "kernel_lora_b": weight.b.T}
            nnx.update(getattr(block, name), factors)
    return split(adapted)
