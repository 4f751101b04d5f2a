"""PEFT's files are read strictly: all that does not fit is named."""

import json
import math
import re

import equinox as eqx
import numpy as np
import pytest
import safetensors.numpy
from files import bits
from peft_models import (
    adapted,
    CONFIG,
    embedding,
    exported,
    linear,
    LORA_A,
    LORA_B,
    norm,
    PREFIX,
    WEIGHTS,
)

from lora_quax import Adapt, AdapterError, peft, unload


_TREE = {"a": [linear(), linear()], "e": embedding(), "head": linear(), "norm": norm()}


_TARGETS = {"a.0": True, "a.1": True, "e": 3, "head": "full"}


@pytest.fixture
def sound(tmp_path):
    """A model, and a way to load it from files that were changed."""
    model = adapted(_TREE, _TARGETS)
    base = unload(model)
    peft.save(tmp_path, model)

    def load(change=lambda tensors: None, **fields):
        path, config = tmp_path / WEIGHTS, tmp_path / CONFIG
        tensors = safetensors.numpy.load_file(path)
        change(tensors)
        safetensors.numpy.save_file(tensors, path)
        config.write_text(json.dumps(json.loads(config.read_text()) | fields))
        return peft.load(tmp_path, base)

    assert bits(load()) == bits(model)
    return base, load, tmp_path


def _spoil(tensors) -> None:
    del tensors[f"{PREFIX}a.0.{LORA_A}"], tensors[f"{PREFIX}a.0.{LORA_B}"]
    tensors[f"{PREFIX}a.9.{LORA_A}"] = np.zeros((2, 3), np.float32)
    tensors[f"{PREFIX}a.9.{LORA_B}"] = np.zeros((4, 2), np.float32)
    tensors[f"{PREFIX}a.1.{LORA_A}"] = np.zeros((2, 9), np.float32)
    tensors[f"{PREFIX}head.bias"] = np.zeros(5, np.float32)
    tensors[f"{PREFIX}norm.scale"] = np.zeros(4, np.float32)


def test_one_error_lists_all_that_does_not_fit_the_model(sound):
    base, load, folder = sound
    problems = [
        r"`a.0.weight` is targeted as `a.0.weight`, for which there are no tensors",
        r"the factors of `a.9` has no place in the model",
        r"`a.1.weight` .* \(2, 3\) and \(4, 2\); those of `a.1` have \(2, 9\)",
        r"`e.weight` .* rank 5 .* `e` have \(3, 5\) and \(4, 3\)",
        r"`head.bias` .*\(5,\).*\(4,\)",
        r"the value of `norm.scale` has no place in the model",
    ]
    load_spoilt = lambda: load(_spoil, rank_pattern={"^e": 5})
    with pytest.raises(AdapterError, match="of which nothing was changed") as caught:
        load_spoilt()
    found = str(caught.value).split("\n  - ")[1:]
    assert len(found) == len(problems), found
    for problem in problems:
        assert any(re.search(problem, line) for line in found), (problem, found)


def _break(tensors) -> None:
    del tensors[f"{PREFIX}a.0.{LORA_A}"], tensors[f"{PREFIX}a.1.{LORA_B}"]
    tensors[f"a.2.{LORA_A}"] = np.zeros(1, np.float32)
    tensors[f"{PREFIX}a.2.lora_magnitude_vector"] = np.zeros(4, np.int32)
    tensors[f"{PREFIX}head.lora_B.bias"] = np.zeros(4, np.float32)
    tensors[f"{PREFIX}norm.{LORA_A}"] = np.zeros((2, 4), np.int32)


def test_one_error_lists_all_that_is_wrong_in_the_file(sound):
    _, load, _ = sound
    with pytest.raises(AdapterError, match="is not sound") as caught:
        load(_break)
    found = str(caught.value).split("\n  - ")[1:]
    assert found == sorted(
        [
            "`a.0` has no A",
            "`a.1` has no B",
            f"`a.2.{LORA_A}` does not begin with `{PREFIX}`",
            f"`{PREFIX}a.2.lora_magnitude_vector` is of type int32, no floating point",
            "`a.2` has magnitudes alone",
            "`head` has a bias alone",
            f"`{PREFIX}norm.{LORA_A}` is of type int32, no floating point",
            "`norm` has no B",
        ]
    )


_M = "lora_magnitude_vector"


MAGNITUDES = {
    "one is missing": (
        lambda tensors: tensors.pop(f"{PREFIX}e.{_M}"),
        {},
        f"`e` has no `{_M}`, with `use_dora`",
    ),
    "no DoRA": (
        lambda tensors: None,
        dict(use_dora=False),
        f"`e` has a `{_M}`, without `use_dora`",
    ),
    "another shape": (
        lambda tensors: tensors.update({f"{PREFIX}e.{_M}": np.ones(5, np.float32)}),
        {},
        r"`e.weight` .* must have the shape \(4,\); those of `e.weight` have \(5,\)",
    ),
}


@pytest.mark.parametrize("name", MAGNITUDES)
def test_magnitudes_that_do_not_fit(name, tmp_path):
    change, fields, match = MAGNITUDES[name]
    tree = {"q": linear(), "e": embedding()}
    model = adapted(tree, {"q": Adapt(use_dora=True), "e": Adapt(use_dora=True)})
    peft.save(tmp_path, model)
    path, config = tmp_path / WEIGHTS, tmp_path / CONFIG
    assert json.loads(config.read_text())["use_dora"] is True
    assert bits(peft.load(tmp_path, unload(model))) == bits(model)
    # All that is asked of the base is its shape.
    abstract = eqx.filter_eval_shape(lambda: unload(model))
    assert bits(peft.load(tmp_path, abstract)["q"].weight.magnitude) == bits(
        model["q"].weight.magnitude
    )
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path)
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    with pytest.raises(AdapterError, match=match):
        peft.load(tmp_path, unload(model))


# Fields that are refused, or have to be, and why.
FIELDS = {
    "another kind": (dict(peft_type="BOFT"), "`peft_type` must be 'LORA', got 'BOFT'"),
    "DoRA of text": (dict(use_dora="yes"), "`use_dora` must be true or false"),
    "a field of the future": (dict(use_x=3), "`use_x` is 3.* not known here"),
    "a rank of text": (dict(r="2"), "`r` must be an integer, got '2'"),
    "no rank": (dict(r=None), "`r` is missing"),
    "no alpha": (dict(lora_alpha=None), "`lora_alpha` is missing"),
    "a rank of zero": (dict(r=0), "a rank is not positive"),
    "a list of patterns": (dict(rank_pattern=[1]), "`rank_pattern` must be a mapping"),
    "an alpha that is not finite": (
        dict(lora_alpha=math.nan),
        "an alpha is not finite",
    ),
    "no regular expression": (
        dict(target_modules="("),
        r"'\(' cannot be matched: it is not a regular",
    ),
    "another initialisation": (dict(init_lora_weights="loftq"), "is 'loftq', by which"),
    "another mode of biases": (dict(bias="some"), "`bias` is 'some'"),
}


@pytest.mark.parametrize("name", FIELDS)
def test_configurations_that_are_refused(name, sound):
    _, load, folder = sound
    fields, match = FIELDS[name]
    with pytest.raises(AdapterError, match=match) as caught:
        load(**fields)
    assert str(folder / CONFIG) in str(caught.value)


# Fields that say less or more than they did, and change nothing.
HARMLESS = {
    "no targets": dict(target_modules=None, rank_pattern={"e": 3}),
    "targets by a regular expression": dict(target_modules=r"(a\.\d|e)"),
    "more patterns": dict(alpha_pattern={"x": 7, "e": 3}),
    "empty fields": dict(use_x=None, use_y={}, use_z=[], use_dora=False),
    "a dropout": dict(lora_dropout=0.5, inference_mode=False),
}


def test_factors_of_what_the_configuration_does_not_target(sound):
    """PEFT would leave them out, and compute something else."""
    _, load, _ = sound
    with pytest.raises(AdapterError, match="there are factors of `a.1.weight`, which"):
        load(target_modules=["a.0", "e"])


@pytest.mark.parametrize("name", HARMLESS)
def test_fields_that_change_nothing(name, sound):
    _, load, _ = sound
    assert bits(load(**HARMLESS[name])) == bits(load())


def test_a_module_called_as_what_peft_puts_around_one(tmp_path):
    model = {"q": {"base_layer": linear(), "q": linear()}}
    model = adapted(model, {"base_layer.weight": True, "base_layer.bias": "full"})
    exported(tmp_path, model)
    assert bits(peft.load(tmp_path, unload(model))) == bits(model)
