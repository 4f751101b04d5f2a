"""`docs/mistakes.md` says what happens: its programs run, and its errors are raised."""

import re
from collections.abc import Callable
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
import quax

import lora_quax


PAGE = (Path(__file__).parents[1] / "docs/mistakes.md").read_text()
BASE = eqx.nn.MLP(3, 2, 4, 1, key=jr.key(0))
MODEL = lora_quax.loraify(BASE, 2, jr.key(1))
X, Y = jnp.ones((8, 3)), jnp.zeros((8, 2))


def loss(model, x, y):
    return jnp.mean((jax.vmap(quax.quaxify(model))(x) - y) ** 2)


def test_programs_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
    exec(compile("\n".join(blocks), "mistakes.md", "exec"), {})


ours = lora_quax.filter_value_and_grad(loss)
theirs = eqx.filter_value_and_grad(loss)
ALL = eqx.filter(MODEL, eqx.is_inexact_array)
PARAMS, FROZEN = lora_quax.partition(MODEL)


def step(grad, init, optim=optax.adam(1e-3), params=None):
    state = optim.init(init)
    updates, _ = optim.update(grad(MODEL, X, Y)[1], state, params)
    return eqx.apply_updates(MODEL, updates)


HALVES: dict[str, Callable] = {
    "unsupported operand type(s) for *: 'float' and 'NoneType'": lambda: step(
        theirs, PARAMS
    ),
    "pytree structure error: different types at key path": lambda: step(ours, ALL),
    "requires the current value of parameters": lambda: step(
        ours, PARAMS, optax.adamw(1e-3)
    ),
    "zeros_like requires ndarray or scalar arguments": lambda: step(ours, MODEL),
    "is not a valid JAX type": lambda: jax.grad(loss)(MODEL, X, Y),
    "An adapted weight has None for one of its parts": lambda: ours(PARAMS, X, Y),
    "Nothing in the model trains": lambda: ours(BASE, X, Y),
}


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_all_errors_of_loops_are_tried():
    rows = re.findall(r"^\| `(.*?)`", section("Half-changed training loops"), re.M)
    assert rows == [*HALVES]


@pytest.mark.parametrize("error", HALVES)
def test_errors_of_loops(error):
    with pytest.raises((TypeError, ValueError), match=re.escape(error)):
        HALVES[error]()


def test_whole_loops():
    step(ours, PARAMS)
    step(theirs, ALL)
    step(ours, PARAMS, optax.adamw(1e-3), PARAMS)


MOVE = {
    "adamw": optax.adamw(1e-3),
    "lion": optax.lion(1e-3),
    "lamb": optax.lamb(1e-3, weight_decay=1e-2),
    "noisy_sgd": optax.noisy_sgd(1e-3, key=0),
    "fromage": optax.fromage(1e-3),
    "yogi": optax.yogi(1e-3),
}


def bits(model):
    return [np.asarray(layer.weight).tobytes() for layer in model.layers]


@pytest.mark.parametrize("name", MOVE)
def test_optimisers_that_move_frozen_weights(name, tmp_path):
    optim = MOVE[name]
    assert f"`{name}`" in section("Optimisers that move frozen weights")
    moved = step(theirs, ALL, optim, ALL)
    assert bits(lora_quax.unload(moved)) != bits(BASE)
    match = r"`layers\.0\.weight`.*would not be written, and are not what they are"
    with pytest.raises(ValueError, match=match):
        lora_quax.save_adapter(tmp_path / "x", moved, base=BASE)
    held = step(ours, PARAMS, optim, PARAMS)
    assert bits(lora_quax.unload(held)) == bits(BASE)
    lora_quax.save_adapter(tmp_path / "x", held, base=BASE)


def test_what_is_said():
    """The beginnings of messages that the page quotes."""
    with pytest.raises(RuntimeError) as info:
        abs(MODEL.layers[0].weight)
    begin = "met a LoraArray outside of `quax.quaxify`. It stands for a weight"
    assert begin in str(info.value) and begin in PAGE
    rows = quax.quaxify(jax.vmap(lambda row: row @ X[0]))(MODEL.layers[0].weight)
    assert jnp.allclose(rows, BASE.layers[0].weight @ X[0], atol=1e-6)
