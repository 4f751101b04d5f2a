"""What PEFT is to call the layers of a model, and its adapters."""

from typing import Any, NamedTuple

import numpy as np
import pytest
from files import bits, listing
from peft_models import adapted, CONFIG, exported, linear, LORA_A, stacked, WEIGHTS

from lora_quax import peft, unload


class Naming(NamedTuple):
    names: Any
    modules: list[str]  # What the layers of `_BLOCKS` are called.


_BLOCKS = {"blocks": [{"q": linear()}, {"q": linear()}], "head": linear()}


NAMINGS = {
    "none": Naming(None, ["blocks.0.q", "blocks.1.q", "head"]),
    "a beginning": Naming(
        {"blocks": "model.layers"}, ["model.layers.0.q", "model.layers.1.q", "head"]
    ),
    "any segment": Naming(
        {"blocks.{}.q": "h.{}.attn.q_proj"},
        ["h.0.attn.q_proj", "h.1.attn.q_proj", "head"],
    ),
    "the longest": Naming({"blocks": "x", "blocks.1": "y"}, ["x.0.q", "y.q", "head"]),
    "the most exact": Naming(
        {"blocks.{}": "x.{}", "blocks.0": "first"}, ["first.q", "x.1.q", "head"]
    ),
    "the whole model": Naming({"": "m"}, ["m.blocks.0.q", "m.blocks.1.q", "m.head"]),
    "all but a part": Naming(
        {"": "m", "head": "head"}, ["m.blocks.0.q", "m.blocks.1.q", "head"]
    ),
    "without a beginning": Naming({"blocks": ""}, ["0.q", "1.q", "head"]),
    "a function": Naming(
        lambda path: path.replace("blocks.", "b"), ["b0.q", "b1.q", "head"]
    ),
}


@pytest.mark.parametrize("name", NAMINGS)
def test_names(name, tmp_path):
    names, modules = NAMINGS[name]
    model = adapted(_BLOCKS)
    _, tensors = exported(tmp_path, model, names=names)
    assert {key.removesuffix(f".{LORA_A}") for key in tensors if LORA_A in key} == set(
        modules
    )
    for layer, module in zip([*model["blocks"], {"q": model["head"]}], modules):
        assert bits(tensors[f"{module}.{LORA_A}"]) == bits(layer["q"].weight.a)
    assert bits(peft.load(tmp_path, unload(model), names=names)) == bits(model)


def test_two_axes_of_layers(tmp_path):
    model = adapted({"h": stacked(stacked(linear(), 2), 3)})
    names = {"h": "g.{}.h.{}"}
    _, tensors = exported(tmp_path, model, names=names)
    a = np.asarray(model["h"].weight.a)
    for i, j in np.ndindex(3, 2):
        assert bits(tensors[f"g.{i}.h.{j}.{LORA_A}"]) == bits(a[i, j])
    assert bits(peft.load(tmp_path, unload(model), names=names)) == bits(model)


@pytest.mark.parametrize(
    "names,error,match",
    [
        ({"block": "x"}, ValueError, "'block' of `names` matched no array"),
        ({"blocks.{}.q.{}.x": "x"}, ValueError, "matched no array of the model"),
        ({"blocks.{}": "x"}, ValueError, "the path `x.q.weight`, `x.q.bias`"),
        (lambda path: "x.weight", ValueError, "Several arrays .*`x.weight`"),
        ({"head": "{}.{}.{}"}, ValueError, "`head.weight` .* more stacked axes"),
        (lambda path: None, TypeError, "`names` gives None for"),
        (lambda path: "", TypeError, "`names` gives '' for"),
    ],
)
def test_names_that_are_refused(names, error, match, tmp_path):
    model = adapted(_BLOCKS)
    peft.save(tmp_path / "sound", model)
    before = listing(tmp_path)
    for run in (
        lambda: peft.save(tmp_path / "x", model, names=names),
        lambda: peft.load(tmp_path / "sound", model, names=names),
    ):
        with pytest.raises(error, match=match):
            run()
    assert listing(tmp_path) == before


def test_names_of_adapters(tmp_path):
    first, second = adapted({"q": linear()}), adapted({"q": linear()}, rank=3)
    (tmp_path / "README.md").write_text("text")
    peft.save(tmp_path, first)
    peft.save(tmp_path, second, adapter_name="second-1")
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert files == {
        "README.md",
        WEIGHTS,
        CONFIG,
        "second-1",
        f"second-1/{WEIGHTS}",
        f"second-1/{CONFIG}",
    }
    base = unload(first)
    assert bits(peft.load(tmp_path, base)) == bits(first)
    got = peft.load(tmp_path, base, adapter_name="second-1")
    assert bits(got["q"].weight.delta) == bits(second["q"].weight.delta)
    with pytest.raises(FileNotFoundError, match="adapters of the names 'second-1'"):
        peft.load(tmp_path, base, adapter_name="third")
    (tmp_path / CONFIG).unlink()
    with pytest.raises(FileNotFoundError, match="adapters of the names 'second-1'"):
        peft.load(tmp_path, base)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "/x", "a/b", "a\0", "a\nb", "x\n"]
)
def test_names_of_adapters_that_are_refused(name, tmp_path):
    model = adapted({"q": linear()})
    for run in (peft.save, peft.load):
        with pytest.raises(ValueError, match="`adapter_name` must be"):
            run(tmp_path / "x", model, adapter_name=name)
    assert not listing(tmp_path)
