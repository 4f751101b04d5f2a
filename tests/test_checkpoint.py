"""Checkpoints by other means: training goes on from them as if it had not stopped."""

import functools as ft
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import pytest
import quax
from files import bits
from jax import lax

from lora_quax import (
    filter_value_and_grad,
    labels,
    load_adapter,
    loraify,
    partition,
    save_adapter,
)


class _Scanned(eqx.Module):
    """Layers stacked along a leading axis, and a head."""

    layers: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, key):
        make = lambda key: eqx.nn.Linear(4, 4, key=key)
        self.layers = eqx.filter_vmap(make)(jr.split(key, 3))
        self.head = eqx.nn.Linear(4, 2, key=key)

    def __call__(self, x):
        dynamic, static = eqx.partition(self.layers, eqx.is_array)
        step = lambda x, layer: (jnp.tanh(eqx.combine(layer, static)(x)), None)
        return self.head(lax.scan(step, x, dynamic)[0])


def _mlp(key):
    return eqx.nn.MLP(4, 2, 4, 1, key=key)


MODELS: dict[str, tuple[Callable, dict[str, Any]]] = {
    "mlp": (_mlp, dict(targets={eqx.nn.Linear: True, "bias": "full"})),
    "scanned": (_Scanned, dict(targets={"layers": 3, "head": "full"})),
    "a base that trains": (_mlp, dict(stop_gradient=False)),
}
_factors: dict[Hashable, optax.GradientTransformation] = {
    "a": optax.adam(1e-2),
    "b": optax.adam(1e-1),
    "full": optax.sgd(1e-2),
}
OPTIMISERS = {
    "adamw": optax.adamw(1e-2),
    "LoRA+": optax.multi_transform(_factors, labels),
}


class State(NamedTuple):
    """A training run, in the middle."""

    model: Any
    opt_state: Any


@ft.cache
def start(model: str, optimiser: str, seed: int = 0) -> State:
    make, options = MODELS[model]
    base, key = make(jr.key(seed)), jr.key(seed + 1)
    adapted = loraify(base, 2, key, **options)
    return State(adapted, OPTIMISERS[optimiser].init(partition(adapted)[0]))


@ft.cache
def stepper(optimiser: str):
    @eqx.filter_jit
    def step(state: State, x) -> State:
        loss = lambda model, x: jnp.sum((jax.vmap(model)(x) - jnp.sin(x[:, :2])) ** 2)
        _, grads = filter_value_and_grad(quax.quaxify(loss))(state.model, x)
        params, _ = partition(state.model)
        updates, opt_state = OPTIMISERS[optimiser].update(
            grads, state.opt_state, params
        )
        return State(eqx.apply_updates(state.model, updates), opt_state)

    return step


def train(optimiser: str, state: State, steps: range) -> State:
    for i in steps:
        state = stepper(optimiser)(state, jr.normal(jr.key(i), (5, 4)))
    return state


@ft.cache
def run(model: str, optimiser: str) -> tuple[State, State, State]:
    """A run at its start, in the middle and at its end, never stopped."""
    first = start(model, optimiser)
    middle = train(optimiser, first, range(3))
    return first, middle, train(optimiser, middle, range(3, 6))


# Ways to keep a tree. Each restores into another of the same structure.


def _save_equinox(path: Path, tree) -> None:
    eqx.tree_serialise_leaves(path, tree)


def _load_equinox(path: Path, like):
    return eqx.tree_deserialise_leaves(path, like)


def _save_orbax(path: Path, tree) -> None:
    with pytest.importorskip("orbax.checkpoint").StandardCheckpointer() as checkpointer:
        checkpointer.save(path, eqx.filter(tree, eqx.is_array))


def _load_orbax(path: Path, like):
    arrays, static = eqx.partition(like, eqx.is_array)
    with pytest.importorskip("orbax.checkpoint").StandardCheckpointer() as checkpointer:
        return eqx.combine(checkpointer.restore(path, arrays), static)


WAYS = {"equinox": (_save_equinox, _load_equinox), "orbax": (_save_orbax, _load_orbax)}


# What of a run is kept. Each is put into a fresh run on the same base.


def _keep_all(way, folder, state):
    save, _ = WAYS[way]
    save(folder / "state", state)


def _resume_all(way, folder, fresh, _):
    _, load = WAYS[way]
    return load(folder / "state", fresh)


def _keep_what_trains(way, folder, state):
    save, _ = WAYS[way]
    save(folder / "state", (partition(state.model)[0], state.opt_state))


def _resume_what_trains(way, folder, fresh, base):
    _, load = WAYS[way]
    like = partition(fresh.model)[0], fresh.opt_state
    params, opt_state = load(folder / "state", like)
    return State(eqx.combine(params, partition(base.model)[1]), opt_state)


def _keep_adapter(way, folder, state):
    save, _ = WAYS[way]
    save_adapter(folder / "adapter", state.model)
    save(folder / "opt_state", state.opt_state)


def _resume_adapter(way, folder, fresh, base):
    _, load = WAYS[way]
    model = load_adapter(folder / "adapter", base.model)
    return State(model, load(folder / "opt_state", fresh.opt_state))


PARTS = {
    "all of it": (_keep_all, _resume_all),
    "what trains": (_keep_what_trains, _resume_what_trains),
    "an adapter": (_keep_adapter, _resume_adapter),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("model", MODELS)
def test_training_goes_on(model, optimiser, part, way, tmp_path):
    keep, resume = PARTS[part]
    first, middle, end = run(model, optimiser)
    assert bits(end.model) != bits(middle.model) != bits(first.model)
    keep(way, tmp_path, middle)
    fresh = start(model, optimiser, seed=10)
    got = resume(way, tmp_path, fresh, first)
    assert jax.tree.structure(got) == jax.tree.structure(middle)
    assert bits(got) == bits(middle)
    assert bits(train(optimiser, got, range(3, 6))) == bits(end)
