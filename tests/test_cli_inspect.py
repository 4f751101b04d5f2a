"""`inspect` and `diff`: what is in adapters, and in what they differ."""

import re

import equinox as eqx
import jax.random as jr
import numpy as np
import pytest
from cli import base_of, expected, model, run, tensors_of, trained
from helpers import adapted
from peft_files import draw, pair, Q, write_peft
from rich.console import Console

import lora_quax
from lora_quax import peft


@pytest.mark.parametrize("form", ["ours", "PEFT"])
def test_inspect(form, net, tmp_path, capsys):
    first = trained(model(net, "everything"))
    save = lora_quax.save_adapter if form == "ours" else peft.save
    save(tmp_path / "a", first)
    assert run("inspect", tmp_path / "a") == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line for line in lines}
    deltas = {
        name: expected(first)[name] - base_of(first)[name].astype(float)
        for name in ("layers.1.weight", "embed.weight", "conv.weight", "experts.up")
    }
    for name, delta in deltas.items():
        assert rows[name].split()[-1] == f"{np.linalg.norm(delta):.4g}"
    assert "(5, 4, 3, 3)" in rows["conv.weight"] and "whole" in rows["head.weight"]
    file = tmp_path / "a" / ("adapter_model.safetensors" if form == "PEFT" else "")
    count = sum(x.size for x in tensors_of(file).values())
    assert f"{count} parameters, {4 * count:,} bytes" in lines[-1]


def test_a_path_is_whole_in_80_columns(tmp_path, capsys, monkeypatch):
    path = "decoder.layers.0.attention.query"
    base = {path: eqx.nn.Linear(3, 2, key=jr.key(0))}
    lora_quax.save_adapter(tmp_path / "a", adapted(base))
    narrow = lambda stderr=False: Console(width=80, force_terminal=True)
    monkeypatch.setattr("lora_quax._cli.console.console", narrow)
    monkeypatch.setattr("lora_quax._cli.inspect.console", narrow)
    assert run("inspect", tmp_path / "a") == 0
    lines = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    assert max(map(len, lines)) <= 80
    assert any(f"{path}.weight" in line for line in lines)
    assert any("linear" in line and "float" in line for line in lines)


def test_inspect_marks_what_is_not_finite(tmp_path, capsys):
    tensors = pair("layer" * 50, 5, 4) | {"n.weight": np.asarray([np.inf])}
    tensors[f"{'layer' * 50}.lora_B.weight"][0, 0] = np.nan
    config = {"target_modules": ["layer" * 50], "modules_to_save": ["n"]}
    assert run("inspect", write_peft(tmp_path / "p", tensors, **config)) == 1
    out = capsys.readouterr().out
    assert f"{'layer' * 50}.weight " in out and "not finite: b" in out
    assert out.rstrip().endswith("not finite: 2")


def changed(tensors: dict, config: dict, **more):
    return {"tensors": tensors, "config": config | more}


ROTATED = {
    "q.lora_A.weight": 2 * Q["q.lora_A.weight"],
    "q.lora_B.weight": Q["q.lora_B.weight"] / 2,
}


DIFFERENT = {
    "nothing": (Q, {}, None),
    "other factors of the same update": (
        ROTATED,
        {},
        "q.weight: relative difference ",
    ),
    "alpha": (Q, {"lora_alpha": 6}, "q.weight: alpha 3.0 and 6.0, relative difference"),
    "only in one": (
        Q | pair("r", 5, 4),
        {"target_modules": ["q", "r"]},
        "r.weight: only in",
    ),
    "rank": (
        pair("q", 5, 4, rank=3),
        {"r": 3},
        "q.weight: rank 2 and 3, relative difference",
    ),
    "shape": (pair("q", 5, 6), {}, "q.weight: shape (5, 4) and (5, 6)"),
    "type": (
        {name: x.astype(np.float16) for name, x in Q.items()},
        {},
        "q.weight: dtype float32 and float16, relative difference",
    ),
    "half": (
        Q | {"q.lora_B.weight": Q["q.lora_B.weight"] / 2},
        {},
        "q.weight: relative difference 0.5",
    ),
    "opposite": (
        Q | {"q.lora_B.weight": -Q["q.lora_B.weight"]},
        {},
        "q.weight: relative difference 2",
    ),
    "saved": (
        Q | {"n.weight": draw(4)},
        {"modules_to_save": ["n"]},
        "n.weight: only in",
    ),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_diff(case, tmp_path, capsys):
    tensors, config, line = DIFFERENT[case]
    one = write_peft(tmp_path / "one", Q, target_modules=["q"])
    config = {"target_modules": ["q"], "lora_alpha": 3, **config}
    other = write_peft(tmp_path / "other", tensors, **config)
    assert run("diff", one, other) == (line is not None)
    out = capsys.readouterr().out
    assert out.startswith(line) and out.count("\n") == 1 if line else out == ""


def test_a_small_difference_keeps_its_digits(tmp_path, capsys):
    """Where updates nearly cancel, squares would lose the difference."""
    near = Q | {
        "q.lora_B.weight": Q["q.lora_B.weight"].astype(np.float64) * (1 + 1e-12)
    }
    wide = {name: x.astype(np.float64) for name, x in Q.items()}
    near["q.lora_A.weight"] = wide["q.lora_A.weight"]
    one = write_peft(tmp_path / "one", wide, target_modules=["q"])
    other = write_peft(tmp_path / "other", near, target_modules=["q"])
    assert run("diff", one, other) == 1
    assert "relative difference 1e-12" in capsys.readouterr().out
