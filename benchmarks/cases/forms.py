"""The transformer's step with each form of update, against LoRA and against PEFT's."""

import functools as ft
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import quax
from jax import lax

import lora_quax

from .. import _work
from .._transformer import loss_fn, make, perturbed, Size, Transformer
from .._work import Absent, Case, Claim, External, Row
from .transformer import torch_row


# How each is asked for, at ranks that their papers use.
FORMS: dict[str, dict[str, Any]] = {
    "dropout": dict(rank=8, dropout=0.1),
    "DoRA": dict(rank=8, use_dora=True),
    "LoHa": dict(rank=4, update=lora_quax.LoHa),
    "LoKr": dict(rank=8, update=lora_quax.LoKr),
    "VeRA": dict(rank=256, update=lora_quax.VeRA),
    # Of the outputs PEFT scales the biases as well.
    "IA3": dict(rank=None, update=ft.partial(lora_quax.IA3.init, feedforward=True)),
}
LORA, PEFT = "LoRA", "PEFT's "


def case(name: str, size: Size, torch: str) -> Case:
    """`torch` is an interpreter that has PyTorch and PEFT."""
    claims = []
    for form in FORMS:
        theirs = PEFT + form
        claims += [
            Claim(f"{form} ÷ LoRA", _ratio(form, LORA)),
            Claim(f"{theirs} ÷ PEFT's LoRA", _ratio(theirs, PEFT + LORA)),
            Claim(f"{form} ÷ {theirs}", _ratio(form, theirs)),
        ]
    return Case(
        name,
        "A training step with other forms of update",
        {"step": lambda: rows(size, torch)},
        claims,
        rounds=7,
        rtol=1e-4,  # The factors of LoHa and LoKr are formed in other orders there.
    )


def _ratio(row: str, against: str) -> Callable:
    def value(points):
        (rows,) = points.values()
        if not {row, against} <= rows.keys():
            return None
        return rows[row].ratio(rows[against])

    return value


def rows(size: Size, torch: str) -> list[Row | External | Absent]:
    model, lora, data = make(size, jr.key(0))
    adapted = {LORA: lora}
    for form, asked in FORMS.items():
        fresh = lora_quax.loraify(model, key=jr.key(1), **asked)
        adapted[form] = perturbed(fresh, jr.key(2))
    out = []
    for form, x in adapted.items():
        dropped = form == "dropout"
        program = _work.program(
            lora_quax.partition(x), _dropped if dropped else quax.quaxify(loss_fn)
        )
        alike = False if dropped else form  # Their masks are others.
        out += [
            _work.training(form, program, data, adapted=alike),
            torch_row(PEFT + form, torch, size, model, x, data, alike=alike),
        ]
    return out


def _dropped(model: Transformer, x: jax.Array, y: jax.Array) -> jax.Array:
    """The loss with masks, which are drawn in each step: their key is of the data."""
    key = jr.key(lax.bitcast_convert_type(x[0, 0, 0], jnp.uint32))
    return quax.quaxify(loss_fn)(lora_quax.with_dropout_key(model, key), x, y)
