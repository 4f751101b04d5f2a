"""The transformer's step on bases of a few bits a number."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import quax

import lora_quax
from lora_quax import LoraArray, QuantisedArray

from .. import _work
from .._transformer import loss_fn, make, Size, Transformer
from .._work import Absent, at_most, Case, Claim, Row


TILE = 64
QWIX = "qwix, nf4"


def case(name: str, size: Size) -> Case:
    def bytes_a_number(points):
        (rows,) = points.values()
        return rows["nf4"].facts["bytes a number"]

    def against_qwix(points):
        (rows,) = points.values()
        return rows["nf4"].ratio(rows[QWIX]) if QWIX in rows else None

    return Case(
        name,
        "A training step on quantised bases, in tiles of 64 (Q4_1 of 32)",
        {"step": lambda: rows(size)},
        [
            at_most("nf4 ÷ bfloat16 base", 1.3, "nf4", "bfloat16"),
            Claim("nf4 ÷ qwix's nf4", against_qwix, 1.0),
            Claim("nf4: bytes a number of a weight", bytes_a_number, 0.57),
            *(
                at_most(f"{kind} ÷ float32 base", None, kind, "float32")
                for kind in BASES
                if kind != "float32"
            ),
        ],
        # Of the same numbers, but for the order of sums.
        rtol=1e-4,
    )


def _of_weights(change: Callable) -> Callable[[Transformer], Transformer]:
    """A model with `change` of the weight of each linear layer."""
    is_linear = lambda x: isinstance(x, eqx.nn.Linear)

    def changed(x):
        if not is_linear(x):
            return x
        return eqx.tree_at(lambda l: l.weight, x, change(x.weight))

    return lambda model: jax.tree.map(changed, model, is_leaf=is_linear)


def _q4_1(weight) -> QuantisedArray:
    """As llama.cpp does: the least and the greatest of each 32 are codes."""
    tiles = weight.reshape(len(weight), -1, 32)
    low, high = tiles.min(-1, keepdims=True), tiles.max(-1, keepdims=True)
    codes = jnp.round((tiles - low) / (high - low) * 15).astype(jnp.int8)
    scale, offset = (x[..., 0].astype(jnp.float16) for x in ((high - low) / 15, low))
    return QuantisedArray(codes.reshape(weight.shape), scale, offset, kind="q4_1")


BASES: dict[str, Callable[[Transformer], Transformer]] = {
    "float32": lambda model: model,
    "bfloat16": _of_weights(lambda weight: weight.astype(jnp.bfloat16)),
    "int8": lambda model: lora_quax.quantise(model, "int8", tile=TILE),
    "q4_1": _of_weights(_q4_1),
    "int4": lambda model: lora_quax.quantise(model, "int4", tile=TILE),
    "nf4": lambda model: lora_quax.quantise(model, "nf4", tile=TILE),
}


def rows(size: Size) -> list[Row | Absent]:
    model, adapted, data = make(size, jr.key(0))
    loss = quax.quaxify(loss_fn)
    out: list[Row | Absent] = []
    for kind, base_of in BASES.items():
        on_base = _around(base_of(model), adapted)
        program = _work.program(lora_quax.partition(on_base), loss)
        row = _work.training(kind, program, data, adapted=kind == "nf4")
        first: Any = on_base.blocks[0].q.weight
        first = first.base
        facts = {**row.facts, "bytes a number": _held(first) / first.size}
        out.append(dataclasses.replace(row, facts=facts))
    return [*out, _qwix(model, adapted, data)]


def _around(base: Transformer, adapted: Transformer) -> Transformer:
    """The updates of `adapted` around other weights."""
    is_leaf = lambda x: isinstance(x, LoraArray | QuantisedArray)
    leaves, treedef = jax.tree.flatten(adapted, is_leaf=is_leaf)
    bases = jax.tree.leaves(base, is_leaf=is_leaf)
    return jax.tree.unflatten(
        treedef,
        [
            LoraArray.from_parts(y, x.delta) if isinstance(x, LoraArray) else y
            for x, y in zip(leaves, bases, strict=True)
        ],
    )


def _held(tree) -> int:
    return sum(x.on_device_size_in_bytes() for x in jax.tree.leaves(tree))


def _qwix(model: Transformer, adapted: Transformer, data) -> Row | Absent:
    try:
        from ..peers import nnx_qwix
    except ImportError as e:
        return Absent(QWIX, str(e))
    program = nnx_qwix.program(model, adapted, weight_qtype="nf4", tile_size=TILE)
    return _work.training(QWIX, program, data, adapted=True)
