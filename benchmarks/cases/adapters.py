"""Adapters on disk: saving and loading those of a large model."""

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path

import equinox as eqx
import jax
import jax.random as jr

import lora_quax

from .._transformer import BASE, QUICK, Size, Transformer
from .._work import Case, Claim, Row


def case(quick: bool) -> Case:
    size = QUICK if quick else dataclasses.replace(BASE, layers=24, width=1024)
    model = f"{size.layers} layers of width {size.width}"

    def seconds(row):
        return lambda points: points["large"][row].time

    return Case(
        "adapters",
        "Saving and loading an adapter, after the first",
        {"large": lambda: _rows(size)},
        [
            Claim(f"save_adapter, {model}: seconds", seconds("save"), 0.1),
            Claim(f"load_adapter, {model}: seconds", seconds("load"), 0.1),
            Claim(f"peft.save, {model}: seconds", seconds("save, PEFT")),
            Claim(f"peft.load, {model}: seconds", seconds("load, PEFT")),
        ],
        measure="call",
    )


def _rows(size: Size) -> list[Row]:
    base = Transformer(size, jr.key(0))
    model = lora_quax.loraify(base, size.rank, jr.key(1))
    # Lives as long as the rows do, which hold it.
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name)

    def row(name: str, call: Callable) -> Row:
        def step(state, fixed, folder=folder):
            del folder
            return state, 0.0, eqx.filter(call(), eqx.is_array)

        return Row(name, step, (), (), facts=dict(trainable=_parameters(model)))

    rows = [
        row("save", lambda: lora_quax.save_adapter(path / "adapter", model)),
        row("load", lambda: lora_quax.load_adapter(path / "adapter", base)),
        row("save, PEFT", lambda: lora_quax.peft.save(path, model)),
        row("load, PEFT", lambda: lora_quax.peft.load(path, base)),
    ]
    for saving in rows[::2]:  # Before anything is loaded, in whatever order.
        saving.step((), ())
    return rows


def _parameters(model) -> int:
    return sum(x.size for x in jax.tree.leaves(lora_quax.partition(model)[0]))
