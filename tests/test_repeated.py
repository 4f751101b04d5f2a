"""What several weights of an adapter share is in its file once, and one array again."""

import json
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import lora_quax
from lora_quax._disk.repeated import with_repeats, without_repeats


LAYERS, SIZE, RANK = 20, 16, 64
PATH = "layers.{}.weight.delta.shared.{}"


@pytest.fixture
def adapter(tmp_path):
    """A plain model, one adapted with VeRA, and its file."""
    plain = eqx.nn.MLP(SIZE, SIZE, SIZE, LAYERS - 1, key=jr.key(0))
    model = lora_quax.loraify(plain, RANK, jr.key(1), update=lora_quax.VeRA)
    model = jax.tree.map(
        lambda x, t: x + 0.1 * jnp.cos(x) if t else x,
        model,
        lora_quax.trainable(model),
    )
    path = tmp_path / "adapter.safetensors"
    lora_quax.save_adapter(path, model)
    return plain, model, path


def _shared(model) -> list:
    return [layer.weight.delta.shared for layer in model.layers]


def test_shared_factors_are_there_once(adapter):
    plain, model, path = adapter
    vectors, factors = LAYERS * (RANK + SIZE), 2 * RANK * SIZE
    tensors = load_file(path)
    assert sum(x.size for x in tensors.values()) == vectors + factors
    again = lora_quax.load_adapter(path, plain)
    assert eqx.tree_equal(again, model)
    first, *rest = _shared(again)
    assert all(x.a is first.a and x.b is first.b for x in rest)


def test_what_came_apart_is_written_apart(adapter):
    plain, model, path = adapter
    other = eqx.tree_at(lambda x: _shared(x)[3].a, model, replace_fn=lambda x: 2 * x)
    # An equal array is as good as the same one.
    other = eqx.tree_at(lambda x: _shared(x)[5].a, other, replace_fn=jnp.copy)
    lora_quax.save_adapter(path, other)
    names = {name for name in load_file(path) if name.endswith("shared.a")}
    assert names == {PATH.format(i, "a") for i in (0, 3)}
    assert eqx.tree_equal(lora_quax.load_adapter(path, plain), other)


def test_a_file_that_repeats_nothing(adapter):
    """As files were before."""
    plain, model, path = adapter
    about = _about(path)
    tensors = load_file(path)
    for name, of in about.pop("repeats").items():
        tensors[name] = tensors[of]
    _write(path, tensors, about)
    assert eqx.tree_equal(lora_quax.load_adapter(path, plain), model)


def test_like_bytes_of_another_shape_or_type_are_no_repeat():
    names = {"a": (2, 3), "b": (3, 2), "c": (2, 3)}
    tensors: dict[str, Any] = {x: np.zeros(y, np.float32) for x, y in names.items()}
    tensors["d"] = np.zeros((2, 3), np.int32)
    kept, repeats = without_repeats(tensors, sorted(tensors))
    assert [*kept] == ["a", "b", "d"] and repeats == {"c": "a"}
    again = with_repeats(kept, repeats)
    assert again.keys() == tensors.keys() and again["c"] is again["a"]


WRONG: dict[str, tuple[Any, str]] = {
    "a list": ([PATH.format(1, "a")], r"what repeats is \['layers\.1"),
    "no such tensor": ({PATH.format(1, "a"): "x"}, "it has no 'x'"),
    "no name": ({PATH.format(1, "a"): ["x"]}, "description cannot be read"),
    "there already": (
        {PATH.format(0, "a"): PATH.format(0, "b")},
        r"`layers\.0\.weight\.delta\.shared\.a` is there, and repeats another",
    ),
    "itself": ({PATH.format(1, "a"): PATH.format(1, "a")}, "it has no 'layers"),
    "too few": ({}, r"`layers\.1\.weight\.delta\.shared\.a` is missing"),
    "of another shape": (
        {PATH.format(i, j): PATH.format(0, "b") for i in range(1, 20) for j in "ab"},
        r"has shape \(16, 64\)",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_repeats_that_make_no_sense(name, adapter):
    plain, _, path = adapter
    repeats, match = WRONG[name]
    _write(path, load_file(path), _about(path) | {"repeats": repeats})
    with pytest.raises(lora_quax.AdapterError, match=match):
        lora_quax.load_adapter(path, plain)


def _about(path) -> dict[str, Any]:
    with safe_open(path, "numpy") as file:
        return json.loads(file.metadata()["lora_quax"])


def _write(path, tensors: dict[str, np.ndarray], about) -> None:
    save_file(tensors, path, {"lora_quax": json.dumps(about)})
