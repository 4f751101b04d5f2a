"""Models that tests of adapters on disk save, and files that they change."""

import contextlib
import functools as ft
import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import pytest
import quax
import safetensors.numpy
from files import bits, Int8, listing, numbers
from helpers import normal
from jax import lax
from jaxtyping import Array

from lora_quax import AdapterError, FullArray, LoraArray, loraify, LowRankArray, unload
from lora_quax._model.paths import dotted


class _Experts(eqx.Module):
    """Raw arrays, in no layer that is known."""

    router: Array
    experts: Array
    name: str = "experts"

    def __init__(self, key):
        self.router = jr.normal(key, (3, 4))
        self.experts = jr.normal(key, (3, 4, 5))

    def __call__(self, x):
        gate = jax.nn.softmax(self.router @ x)
        return jnp.einsum("e,i,eio->o", gate, x, self.experts)


class _Tied(eqx.Module):
    """An embedding and an output head that share one matrix."""

    shared: eqx.nn.Shared

    def __init__(self, key):
        embedding = eqx.nn.Embedding(7, 4, key=key)
        head = eqx.nn.Linear(4, 7, use_bias=False, key=key)
        self.shared = eqx.nn.Shared(
            (embedding, head), lambda t: t[1].weight, lambda t: t[0].weight
        )

    def __call__(self, x):
        embedding, head = self.shared()
        return head(embedding(2) * x)


class _Scanned(eqx.Module):
    """Layers stacked along a leading axis and run by `lax.scan`."""

    layers: eqx.nn.Linear

    def __init__(self, key):
        make = lambda key: eqx.nn.Linear(4, 4, key=key)
        self.layers = eqx.filter_vmap(make)(jr.split(key, 3))

    def __call__(self, x):
        dynamic, static = eqx.partition(self.layers, eqx.is_array)
        step = lambda x, layer: (jnp.tanh(eqx.combine(layer, static)(x)), None)
        return lax.scan(step, x, dynamic)[0]


def a_linear(key):
    return eqx.nn.Linear(4, 4, key=key)


def an_mlp(key):
    return eqx.nn.MLP(4, 5, 8, 2, key=key)


def _nested(key):
    one, two, three = map(a_linear, jr.split(key, 3))
    return {"a": [one, (two,)], "b": {"0": {"c.d": three}}, "n": [None, 3, "text"]}


def _run_nested(model, x):
    (one, (two,)), three = model["a"], model["b"]["0"]["c.d"]
    return three(two(one(x)))


def _weight(key):
    return {"w": jr.normal(key, (5, 4))}


def _product(model, x):
    return model["w"] @ x


def _on_weight(adapt):
    """An adaptation of `_weight` by hand, with something that `loraify` does not do."""
    return lambda model, key: {"w": adapt(model["w"], key)}


lora = ft.partial(LoraArray, rank=2, alpha=3.0, init_b=normal)


def _twice(weight, key, **outer):
    return lora(lora(weight, key=key), key=key, **outer)


def _on_full(weight, key):
    return lora(FullArray(weight), key=key)


class Case(NamedTuple):
    make: Callable
    run: Callable = lambda model, x: model(x)
    adapt: Callable | None = None  # By default `loraify`, with these options.
    options: dict[str, Any] = {}
    x: tuple[int, ...] = (4,)
    unload: Callable = unload
    more: frozenset[str] = frozenset()  # What is saved beside what trains.


def linears_and(*names: str) -> dict[Any, Any]:
    """Targets: every linear layer, and these in full."""
    return {eqx.nn.Linear: True} | dict.fromkeys(names, "full")


CASES = {
    "mlp": Case(an_mlp),
    "biases": Case(an_mlp, options=dict(targets=linears_and("bias"))),
    "a layer in full": Case(an_mlp, options=dict(targets=linears_and("layers.2"))),
    "full alone": Case(an_mlp, options=dict(targets={"layers.2": "full"})),
    "some layers": Case(an_mlp, options=dict(targets=["layers.1"])),
    "ranks of their own": Case(
        an_mlp, options=dict(targets={eqx.nn.Linear: 3, "layers.1": 1})
    ),
    "containers": Case(_nested, _run_nested),
    "a list": Case(lambda key: [a_linear(key)], lambda model, x: model[0](x)),
    "a tuple": Case(lambda key: (a_linear(key),), lambda model, x: model[0](x)),
    "a layer alone": Case(a_linear),
    "raw arrays": Case(_Experts, options=dict(targets=["router", "experts"])),
    "tied": Case(_Tied, options=dict(targets=eqx.nn.Embedding)),
    "scanned": Case(_Scanned),
    "conv": Case(lambda key: eqx.nn.Conv2d(4, 6, 3, groups=2, key=key), x=(4, 5, 5)),
    "upconv": Case(lambda key: eqx.nn.ConvTranspose1d(4, 6, 3, key=key), x=(4, 5)),
    "embedding": Case(
        lambda key: eqx.nn.Embedding(7, 4, key=key),
        lambda model, x: model(3) * x,
        options=dict(targets=eqx.nn.Embedding),
    ),
    "lstm": Case(
        lambda key: eqx.nn.LSTMCell(4, 3, key=key),
        lambda cell, x: cell(x, (jnp.ones(3), jnp.ones(3))),
        options=dict(targets=["weight_ih", "weight_hh"]),
    ),
    "a base that trains": Case(an_mlp, options=dict(stop_gradient=False)),
    "dense weights allowed": Case(an_mlp, options=dict(allow_materialise=True)),
    "an adapter on an adapter": Case(
        _weight,
        _product,
        _on_weight(_twice),
        more=frozenset(["w.base.delta.a", "w.base.delta.b"]),
    ),
    "an adapter on an adapter that trains": Case(
        _weight, _product, _on_weight(ft.partial(_twice, stop_gradient=False))
    ),
    "an adapter on an array in full": Case(
        _weight, _product, _on_weight(_on_full), more=frozenset(["w.base.value"])
    ),
    "rows and columns": Case(
        lambda key: {"w": jr.normal(key, (2, 3, 4, 5))},
        lambda model, x: jnp.einsum("bhoi,i->bho", model["w"], x[0, :5]),
        _on_weight(lambda w, key: lora(w, key=key, rows=2)),
        x=(4, 5),
    ),
    "a low-rank array": Case(
        lambda key: {"w": LowRankArray.init((5, 4), rank=2, key=key, init_b=normal)},
        _product,
        lambda model, key: model,
        unload=lambda model: model,
    ),
    "a quantised base": Case(
        lambda key: {"w": Int8(jr.randint(key, (5, 4), -100, 100, jnp.int8))},
        _product,
        _on_weight(lambda w, key: lora(w, key=key)),
    ),
    "an adapter on the model itself": Case(
        lambda key: jr.normal(key, (5, 4)),
        lambda model, x: model @ x,
        lambda model, key: lora(model, key=key),
    ),
}


@ft.cache
def runner(name: str):
    """A case's program, compiled once for all models of one structure."""
    return eqx.filter_jit(quax.quaxify(CASES[name].run))


def plan(case: Case, base):
    """An abstract model, adapted."""
    options = {"alpha": 3.0, **case.options}
    adapt = case.adapt or (lambda model, key: loraify(model, 2, key, **options))
    return eqx.filter_eval_shape(adapt, base, jr.key(0))


def models(case: Case):
    """A base, its adapted model with nothing as it starts, and another draw of it."""
    base = eqx.filter_eval_shape(case.make, jr.key(0))
    model, other = numbers(plan(case, base))
    return case.unload(other), model, other


@ft.cache
def models_of(name: str):
    return models(CASES[name])


def abstract(model):
    return eqx.filter_eval_shape(lambda: model)


def named_leaves(tree) -> dict[str, Any]:
    return {dotted(keys): x for keys, x in jtu.tree_flatten_with_path(tree)[0]}


def lora_mlp():
    return models_of("mlp")[1]


def lora_weight():
    return lora(jnp.ones((3, 4)), key=jr.key(0))


def rewritten(path, change: Callable[[dict, dict], Any]) -> None:
    """A file with its tensors, or its description, changed in place."""
    with safetensors.safe_open(path, framework="numpy") as file:
        about = json.loads(file.metadata()["lora_quax"])
    tensors = safetensors.numpy.load_file(path)
    change(tensors, about)
    metadata = {"lora_quax": json.dumps(about)}
    safetensors.numpy.save_file(tensors, path, metadata=metadata)


@contextlib.contextmanager
def refused(*lines: str, folder, model):
    """An `AdapterError` with these lines and no more; nothing is changed."""
    before = listing(folder), bits(model)
    with pytest.raises(AdapterError, match="of which nothing was changed") as caught:
        yield
    problems = str(caught.value).split("\n  - ")[1:]
    assert len(problems) == len(lines), problems
    for line in lines:
        assert any(re.search(line, problem) for problem in problems), problems
    assert (listing(folder), bits(model)) == before
