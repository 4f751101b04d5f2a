"""The transformer's step with DoRA, against LoRA on the same bases."""

import functools as ft

import jax
import jax.random as jr
import quax

import lora_quax
from lora_quax import DoRA, LoraArray

from .. import _work
from .._transformer import loss_fn, make, Size
from .._work import at_most, Case, Row


def case(name: str, size: Size) -> Case:
    return Case(
        name,
        "A training step with DoRA",
        {"step": lambda: rows(size)},
        [
            at_most("DoRA ÷ LoRA", 1.10, "DoRA", "LoRA"),
            at_most("DoRA ÷ LoRA, nf4", None, "DoRA, nf4", "LoRA, nf4"),
            at_most(
                "DoRA, norm not detached ÷ LoRA", None, "DoRA, not detached", "LoRA"
            ),
        ],
    )


def _with_magnitudes(model, **kwargs):
    is_lora = lambda x: isinstance(x, LoraArray)
    return jax.tree.map(
        lambda x: DoRA(x, **kwargs) if is_lora(x) else x, model, is_leaf=is_lora
    )


def rows(size: Size) -> list[Row]:
    model, lora, data = make(size, jr.key(0))
    on_nf4 = lora_quax.loraify(
        lora_quax.quantise(model, "nf4"),
        size.rank,
        jr.key(1),
        init_b=jax.nn.initializers.normal(0.02),
    )
    loss = quax.quaxify(loss_fn)
    models = {
        "LoRA": lora,
        "DoRA": _with_magnitudes(lora),
        "DoRA, not detached": _with_magnitudes(lora, detached=False),
        "LoRA, nf4": on_nf4,
        "DoRA, nf4": _with_magnitudes(on_nf4),
    }
    train = ft.partial(_work.training, data=data)
    return [
        train(name, _work.program(lora_quax.partition(adapted), loss))
        for name, adapted in models.items()
    ]
