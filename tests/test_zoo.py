"""Models that others wrote, through all that is done with an adapter, against the same
models with dense weights. `zoo` has their table."""

from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
import quax
from files import bits
from helpers import densify, normal
from jax.flatten_util import ravel_pytree
from zoo import Made, Model, rows, ZOO

import lora_quax


RANK = 2


MODELS = [
    pytest.param(name, marks=[pytest.mark.slow] if entry.slow else [])
    for name, entry in ZOO.items()
]


def adapted(entry: Model, made: Made, **kwargs):
    """Nonzero factors, and a scaling other than 1; small, as those of a fine-tuning."""
    scaled = lambda *args: 0.2 * normal(*args)
    given = dict(
        targets=entry.targets,
        alpha=3.0,
        init_b=scaled,
        allow_materialise=entry.allow_materialise,
    )
    return lora_quax.loraify(made.model, RANK, jr.key(5), **(given | kwargs))


def assert_near(ours, dense, tolerance):
    """Relative to the largest element of each array, or of the arrays around it."""
    floats = lambda tree: jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))
    ours, dense = (
        [np.asarray(x, np.float64) for x in floats(tree)] for tree in (ours, dense)
    )
    assert len(ours) == len(dense) > 0
    largest = max(np.abs(y).max() for y in dense)
    assert largest > 0
    for x, y in zip(ours, dense):
        assert x.shape == y.shape
        error = np.abs(x - y).max() / max(np.abs(y).max(), 1e-3 * largest)
        assert error <= tolerance, error


def loss_of(made: Made, program):
    def loss(model):
        out = eqx.filter(program(model, *made.inputs), eqx.is_inexact_array)
        flat, _ = ravel_pytree(out)
        return jnp.mean((flat - jnp.sin(jnp.arange(flat.size))) ** 2)

    return loss


def three_steps(model, loss):
    """The losses on the way, and the first gradient."""
    optim = optax.adam(1e-3)
    params, frozen = lora_quax.partition(model)
    state = optim.init(params)

    @eqx.filter_jit
    def step(params, frozen, state):
        of = lambda params: loss(eqx.combine(params, frozen))
        value, grads = eqx.filter_value_and_grad(of)(params)
        updates, state = optim.update(grads, state)
        return eqx.apply_updates(params, updates), state, value, grads

    losses, first = [], None
    for _ in range(4):
        params, state, value, grads = step(params, frozen, state)
        losses.append(value)
        first = grads if first is None else first
    return eqx.combine(params, frozen), jnp.stack(losses), first


@pytest.mark.parametrize("name", MODELS)
def test_computes_and_trains(name):
    entry = ZOO[name]
    made = entry.make()
    model = adapted(entry, made)
    before = bits(made.model)
    dense = lambda model, *inputs: made.program(densify(model), *inputs)
    ours = quax.quaxify(made.program)

    # Forward, and merged.
    out = eqx.filter_jit(ours)(model, *made.inputs)
    assert_near(out, eqx.filter_jit(dense)(model, *made.inputs), entry.tolerance)
    merged = lora_quax.merge(model)
    assert jax.tree.structure(merged) == jax.tree.structure(made.model)
    again = eqx.filter_jit(made.program)(merged, *made.inputs)
    assert_near(out, again, entry.tolerance)

    # The gradient, and steps of Adam.
    trained, losses, grads = three_steps(model, loss_of(made, ours))
    _, expected, dense_grads = three_steps(model, loss_of(made, dense))
    assert_near(grads, dense_grads, 10 * entry.tolerance)
    assert_near(losses, expected, 10 * entry.tolerance)
    assert losses[-1] < losses[0]

    # What was frozen has not moved.
    assert bits(lora_quax.unload(trained)) == before
    assert bits(made.model) == before


@pytest.mark.parametrize("name", MODELS)
def test_files(name, tmp_path):
    entry = ZOO[name]
    made = entry.make()
    model = adapted(entry, made)
    lora_quax.save_adapter(tmp_path / "adapter.safetensors", model)
    again = lora_quax.load_adapter(tmp_path / "adapter.safetensors", made.model)
    assert eqx.tree_equal(again, model)
    if entry.names is not False:
        names = entry.names
        lora_quax.peft.save(tmp_path / "peft", model, names=names)
        again = lora_quax.peft.load(tmp_path / "peft", made.model, names=names)
        trains = lambda model: lora_quax.partition(model)[0]
        assert eqx.tree_equal(trains(again), trains(model))


def size(tree) -> int:
    leaves = jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))
    return sum(x.size for x in leaves)


@pytest.mark.parametrize("name", MODELS)
def test_what_trains(name):
    entry = ZOO[name]
    made = entry.make()
    params = lora_quax.partition(adapted(entry, made))[0]
    assert (size(params), size(made.model)) == entry.trains


REFUSED = [
    pytest.param(name, i, marks=[pytest.mark.slow] if entry.slow else [])
    for name, entry in ZOO.items()
    for i in range(len(entry.refused))
]


@pytest.mark.parametrize(("name", "i"), REFUSED)
def test_what_is_refused(name, i, tmp_path):
    entry = ZOO[name]
    refused, made = entry.refused[i], entry.make()
    targets = entry.targets if refused.targets is None else refused.targets
    with pytest.raises((ValueError, lora_quax.MaterialiseError), match=refused.match):
        model = adapted(entry, made, targets=targets, allow_materialise=False)
        if refused.by == "peft":
            lora_quax.peft.save(tmp_path, model)
        eqx.filter_eval_shape(quax.quaxify(made.program), model, *made.inputs)


def test_the_page_has_the_table():
    page = Path(__file__).parents[1] / "docs" / "models.md"
    lines = page.read_text().splitlines()
    for row in rows():
        line = f"| {' | '.join(row)} |"
        assert line in lines, line
    assert sum(line.startswith("| ") for line in lines) == len(ZOO) + 1
