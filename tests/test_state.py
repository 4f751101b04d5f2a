"""What a model learns beside its weights, in an `eqx.nn.State`, is not lost."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import quax
import safetensors.numpy
from files import bits
from helpers import adapted

from lora_quax import AdapterError, load_adapter, save_adapter
from lora_quax.__main__ import main


class Norms(eqx.Module):
    first: eqx.nn.Linear
    norms: list[eqx.nn.BatchNorm]
    spectral: eqx.nn.SpectralNorm
    seen: eqx.nn.StateIndex

    def __init__(self, mode: Any = "batch", *, key=jr.key(0)):
        self.first = eqx.nn.Linear(3, 4, key=key)
        self.norms = [eqx.nn.BatchNorm(4, "batch", mode=mode) for _ in range(2)]
        last = eqx.nn.Linear(4, 2, key=key)
        self.spectral = eqx.nn.SpectralNorm(last, "weight", key=key)
        self.seen = eqx.nn.StateIndex({"steps": jnp.array(0)})

    def __call__(self, x, state):
        x = self.first(x)
        for norm in self.norms:
            x, state = norm(x, state)
        x, state = self.spectral(x, state)
        seen = state.get(self.seen)
        return x, state.set(self.seen, {"steps": seen["steps"] + 1})


@eqx.filter_jit
def run(model, x, state):
    each, both = quax.quaxify(model), (0, None)
    return jax.vmap(each, both, both, axis_name="batch")(x, state)


def trained(mode="batch"):
    """A base with its state, and an adapted model with the state of later."""
    base, state = eqx.nn.make_with_state(Norms)(mode)
    model, later = adapted(base, targets="first"), _clone(state)
    for i in range(3):
        _, later = run(model, 3 + jr.normal(jr.key(i), (8, 3)), later)
    return base, state, model, later


def _clone(state):
    leaves, treedef = jax.tree.flatten(state)
    return jax.tree.unflatten(treedef, leaves)


@pytest.mark.parametrize("mode", ["batch", "ema"])
def test_it_is_saved_and_loaded(tmp_path, mode):
    base, state, model, later = trained(mode)
    assert bits(state) != bits(later)
    save_adapter(tmp_path / "x", model, state=later)
    again, loaded = load_adapter(tmp_path / "x", base, state=state)
    # Equinox's "ema" leaves a flag of Python's in it.
    want = jax.tree.map(jnp.asarray, later)
    assert bits(again) == bits(model) and bits(loaded) == bits(want)
    _, twice = load_adapter(tmp_path / "x", base, state=later)
    assert bits(twice) == bits(want)
    # Neither was used up.
    assert bits(_clone(state)) != bits(_clone(want))
    test = eqx.nn.inference_mode((model, again))
    x = jr.normal(jr.key(9), (8, 3))
    (want, _), (got, _) = run(test[0], x, later), run(test[1], x, loaded)
    assert bits(got) == bits(want)


def test_it_is_not_forgotten(tmp_path):
    base, _, model, later = trained()
    with pytest.raises(ValueError, match=r"has a state, at .*state=state") as info:
        save_adapter(tmp_path / "x", model)
    assert "`norms.0." in str(info.value) and not list(tmp_path.iterdir())
    save_adapter(tmp_path / "x", model, state=later)
    with pytest.raises(AdapterError, match="model, state = load_adapter.*state=state"):
        load_adapter(tmp_path / "x", base)


def test_abstract_models(tmp_path):
    base, state, model, later = trained()
    save_adapter(tmp_path / "x", model, state=later)
    shapes = eqx.filter_eval_shape(lambda: (base, state))
    _, loaded = load_adapter(tmp_path / "x", shapes[0], state=shapes[1])
    assert bits(loaded) == bits(later)


def test_the_state_of_another_model(tmp_path):
    base, state, model, later = trained()
    other, other_state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, "b", mode="batch")
    with pytest.raises(ValueError, match="nothing for `norms.0.*of another model"):
        save_adapter(tmp_path / "x", model, state=other_state)
    _, large = eqx.nn.make_with_state(lambda: {"a": Norms(), "b": Norms()})()
    plain = {"a": adapted(eqx.nn.Linear(2, 2, key=jr.key(0)))}
    with pytest.raises(ValueError, match="more than this model: it is that of another"):
        save_adapter(tmp_path / "x", plain, state=large)
    old = _clone(later)
    old.set(base.seen, {"steps": jnp.array(1)})
    with pytest.raises(ValueError, match="old state"):
        save_adapter(tmp_path / "x", model, state=old)

    save_adapter(tmp_path / "x", model, state=later)
    other, ema = eqx.nn.make_with_state(Norms)("ema")
    match = r"(?s)`norms\.0\.batch_counter` is unexpected.*`norms\.0\.ema\S+ is missing"
    with pytest.raises(AdapterError, match=match):
        load_adapter(tmp_path / "x", other, state=ema)


def test_a_file_without_state(tmp_path):
    linear = eqx.nn.Linear(3, 3, key=jr.key(0))
    save_adapter(tmp_path / "x", {"first": adapted(linear)})
    state = eqx.nn.State({"first": linear})
    assert load_adapter(tmp_path / "x", {"first": linear}, state=state)[1] is not None
    with pytest.raises(ValueError, match="of another"):
        load_adapter(tmp_path / "x", {"first": linear}, state=trained()[-1])


def test_it_is_not_lost_on_the_command_line(tmp_path, capsys):
    _, _, model, later = trained()
    save_adapter(tmp_path / "x", model, state=later)
    safetensors.numpy.save_file({"first.weight": np.ones((4, 3))}, tmp_path / "base")
    assert main(["inspect", str(tmp_path / "x")]) == 0
    assert "norms" not in capsys.readouterr().out
    for command in ("convert x new", "merge base x new"):
        name, *paths = command.split()
        assert main([name, *(str(tmp_path / path) for path in paths)]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert "has the state of a model as well, with `norms.0." in said
    assert not (tmp_path / "new").exists()
