"""Adapters on disk in our own format: what is saved is what is loaded, to the bit."""

import collections
import contextlib
import errno
import functools as ft
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
import quax
import safetensors.numpy
from files import bits, Int8, listing, numbers
from helpers import normal
from jax import lax
from jaxtyping import Array

from lora_quax import (
    AbstractDelta,
    AdaptedArray,
    AdapterError,
    FullArray,
    load_adapter,
    LoraArray,
    loraify,
    LowRankArray,
    partition,
    peft,
    role,
    save_adapter,
    ScaledArray,
    unload,
)
from lora_quax.__main__ import main
from lora_quax._arrays.base import replace
from lora_quax._model.paths import dotted


# Models.


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


def _linear(key):
    return eqx.nn.Linear(4, 4, key=key)


def _mlp(key):
    return eqx.nn.MLP(4, 5, 8, 2, key=key)


def _nested(key):
    one, two, three = map(_linear, jr.split(key, 3))
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


_lora = ft.partial(LoraArray, rank=2, alpha=3.0, init_b=normal)


def _twice(weight, key, **outer):
    return _lora(_lora(weight, key=key), key=key, **outer)


def _on_full(weight, key):
    return _lora(FullArray(weight), key=key)


class Case(NamedTuple):
    make: Callable
    run: Callable = lambda model, x: model(x)
    adapt: Callable | None = None  # By default `loraify`, with these options.
    options: dict[str, Any] = {}
    x: tuple[int, ...] = (4,)
    unload: Callable = unload
    more: frozenset[str] = frozenset()  # What is saved beside what trains.


def _linears_and(*names: str) -> dict[Any, Any]:
    """Targets: every linear layer, and these in full."""
    return {eqx.nn.Linear: True} | dict.fromkeys(names, "full")


CASES = {
    "mlp": Case(_mlp),
    "biases": Case(_mlp, options=dict(targets=_linears_and("bias"))),
    "a layer in full": Case(_mlp, options=dict(targets=_linears_and("layers.2"))),
    "full alone": Case(_mlp, options=dict(targets={"layers.2": "full"})),
    "some layers": Case(_mlp, options=dict(targets=["layers.1"])),
    "ranks of their own": Case(
        _mlp, options=dict(targets={eqx.nn.Linear: 3, "layers.1": 1})
    ),
    "containers": Case(_nested, _run_nested),
    "a list": Case(lambda key: [_linear(key)], lambda model, x: model[0](x)),
    "a tuple": Case(lambda key: (_linear(key),), lambda model, x: model[0](x)),
    "a layer alone": Case(_linear),
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
    "a base that trains": Case(_mlp, options=dict(stop_gradient=False)),
    "dense weights allowed": Case(_mlp, options=dict(allow_materialise=True)),
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
        _on_weight(lambda w, key: _lora(w, key=key, rows=2)),
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
        _on_weight(lambda w, key: _lora(w, key=key)),
    ),
    "an adapter on the model itself": Case(
        lambda key: jr.normal(key, (5, 4)),
        lambda model, x: model @ x,
        lambda model, key: _lora(model, key=key),
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


def _lora_mlp():
    return models_of("mlp")[1]


def _lora_weight():
    return _lora(jnp.ones((3, 4)), key=jr.key(0))


# Round trips.


@pytest.fixture(params=CASES)
def saved(request, tmp_path):
    """A case's name, `models` of it, and the file with the adapter."""
    base, model, other = models_of(request.param)
    save_adapter(tmp_path / "adapter", model)
    return request.param, base, model, other, tmp_path / "adapter"


def test_round_trips(saved):
    name, *onto, path = saved
    _, model, _ = onto
    run, x = runner(name), np.cos(np.arange(20.0, dtype=np.float32))
    x = jnp.asarray(np.resize(x, CASES[name].x))
    want = bits(run(model, x))
    for where, other in zip(("the base", "the model", "another draw"), onto):
        before = bits(other)
        got = load_adapter(path, other)
        assert jax.tree.structure(got) == jax.tree.structure(model), where
        assert bits(got) == bits(model), where
        assert bits(run(got, x)) == want, where
        assert bits(other) == before, where


def test_loading_onto_an_abstract_model(saved):
    _, base, model, _, path = saved
    in_file = safetensors.numpy.load_file(path)
    # What is not in the file is as abstract as it came.
    want = {
        name: x if name in in_file else abstract(x)
        for name, x in named_leaves(model).items()
    }
    for onto in base, model:
        got = load_adapter(path, abstract(onto))
        assert jax.tree.structure(got) == jax.tree.structure(model)
        assert eqx.tree_equal(named_leaves(got), want)


def test_the_file_holds_what_is_not_the_bases(saved):
    name, _, model, _, path = saved
    tensors = safetensors.numpy.load_file(path)
    assert set(tensors) == named_leaves(partition(model)[0]).keys() | CASES[name].more
    for name, x in named_leaves(model).items():
        assert name not in tensors or bits(tensors[name]) == bits(x)


def test_saving_is_deterministic(saved, tmp_path):
    _, base, _, _, path = saved
    save_adapter(tmp_path / "again", load_adapter(path, base))
    assert (tmp_path / "again").read_bytes() == path.read_bytes()
    assert set(tmp_path.iterdir()) == {path, tmp_path / "again"}


def test_the_file_is_small(tmp_path):
    size = 512
    layer = Case(lambda key: eqx.nn.Linear(size, size, key=key))
    save_adapter(tmp_path / "x", models(layer)[1])
    factors = 2 * 2 * size * 4
    assert factors < (tmp_path / "x").stat().st_size < factors + 1024


def test_saving_replaces_a_file(tmp_path):
    path = tmp_path / "x"
    for name in "biases", "mlp":
        base, model, _ = models_of(name)
        save_adapter(str(path), model)
        assert bits(load_adapter(str(path), base)) == bits(model)
        assert list(tmp_path.iterdir()) == [path]


# base, factors
DTYPES = [
    ("float32", "float32"),
    ("bfloat16", "float32"),
    ("bfloat16", "bfloat16"),
    ("float16", "float16"),
    ("float64", "float64"),
    ("float64", "float32"),
]


@pytest.mark.filterwarnings("ignore:The factors of:UserWarning")
@pytest.mark.parametrize("base_dtype,dtype", DTYPES)
def test_dtypes(base_dtype, dtype, tmp_path, x64):
    def make(key):
        cast = lambda x: x.astype(base_dtype) if eqx.is_array(x) else x
        return jax.tree.map(cast, _mlp(key))

    case = Case(make, options=dict(dtype=dtype, targets=_linears_and("bias")))
    base, model, other = models(case)
    weight, bias = model.layers[0].weight, model.layers[0].bias
    assert (weight.base.dtype, weight.a.dtype) == (base_dtype, dtype)
    assert bias.value.dtype == base_dtype
    save_adapter(tmp_path / "x", model)
    for onto in base, other:
        assert bits(load_adapter(tmp_path / "x", onto)) == bits(model)
    got = load_adapter(tmp_path / "x", abstract(base))
    assert bits(partition(got)[0]) == bits(partition(model)[0])


def test_numbers_that_are_not_finite_are_kept(tmp_path):
    odd = [np.nan, -np.nan, np.inf, -np.inf, -0.0, 1e-45, 3e38, 1.0]
    base, model, _ = models_of("mlp")
    b = jnp.asarray(np.array([odd, odd], np.float32).T)
    model = eqx.tree_at(lambda m: m.layers[0].weight.delta.b, model, b)
    match = r"`layers\.0\.weight\.delta\.b` have infinities or NaNs.*check_finite=False"
    with pytest.raises(ValueError, match=match):
        save_adapter(tmp_path / "x", model)
    assert not list(tmp_path.iterdir())
    save_adapter(tmp_path / "x", model, check_finite=False)
    assert bits(load_adapter(tmp_path / "x", base)) == bits(model)


# What does not fit.


def rewritten(path, change: Callable[[dict, dict], Any]) -> None:
    """A file with its tensors, or its description, changed in place."""
    with safetensors.safe_open(path, framework="numpy") as file:
        about = json.loads(file.metadata()["lora_quax"])
    tensors = safetensors.numpy.load_file(path)
    change(tensors, about)
    metadata = {"lora_quax": json.dumps(about)}
    safetensors.numpy.save_file(tensors, path, metadata=metadata)


@pytest.fixture
def mlp(tmp_path):
    """A model and its adapter's file."""
    _, model, _ = models_of("mlp")
    path = tmp_path / "adapter"
    save_adapter(path, model)
    return model, path


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


def test_one_error_lists_all_that_is_wrong_with_the_tensors(mlp, tmp_path):
    model, path = mlp

    def spoil(tensors, about):
        del tensors["layers.0.weight.delta.a"]
        tensors["layers.9.weight.delta.a"] = np.zeros(3, np.float32)
        tensors["layers.1.weight.delta.a"] = np.zeros((2, 9), np.float32)
        tensors["layers.2.weight.delta.b"] = np.zeros((5, 2), np.float16)

    rewritten(path, spoil)
    for onto in model, abstract(model):
        with refused(
            r"`layers.0.weight.delta.a` is missing",
            r"`layers.9.weight.delta.a` is unexpected",
            r"`layers.1.weight.delta.a` has shape \(2, 9\) .* \(2, 8\)",
            r"`layers.2.weight.delta.b` has .* type float16; .* float32",
            folder=tmp_path,
            model=onto,
        ):
            load_adapter(path, onto)


def _described(change):
    """What `change` does to the description of the first layer's weight."""
    return lambda tensors, about: change(about["weights"]["layers.0.weight"])


def _updated(part=None, **fields):
    return _described(lambda w: (w if part is None else w[part]).update(fields))


def _of_factor(factor: str, **fields):
    return _described(lambda w: w["delta"][factor].update(fields))


def _of_rank(rank: int):
    """A description that agrees with itself, of factors of another rank."""

    def change(about):
        delta = about["delta"]
        delta["rank"] = delta["a"]["shape"][0] = delta["b"]["shape"][1] = rank

    return _described(change)


def _dropped(part, field):
    return _described(lambda w: (w if part is None else w[part]).pop(field))


# What is done to the description, and how it is refused.
DESCRIPTIONS = {
    "another path": (
        lambda _, about: about["weights"].update(x=about["weights"]["layers.0.weight"]),
        ["the model has no `x`"],
    ),
    "one less": (
        lambda _, about: about["weights"].pop("layers.0.weight"),
        ["layers.0.weight.delta.a` is unexpected", "weight.delta.b` is unexpected"],
    ),
    "a weight that is no object": (
        lambda _, about: about["weights"].update({"layers.0.weight": [1]}),
        ["`layers.0.weight`"],
    ),
    "an unknown form": (_updated(form="loxo"), ["form 'loxo' is not known"]),
    "a form that is no text": (_updated(form=[1]), [r"form \[1\] is not known"]),
    "the form of an array": (_updated(form="array"), ["form 'array' is not known"]),
    "an unknown field": (_updated("delta", x=1), ["'low_rank' has no field 'x'"]),
    "an update that is a weight": (
        _described(lambda w: w.update(delta={**w, "stop_gradient": True})),
        ["must be an `AbstractDelta`"],
    ),
    "an update that is an array": (
        _described(lambda w: w.update(delta=w["base"])),
        ["update of a `LoraArray` must be an `AbstractDelta`"],
    ),
    "no form": (_dropped(None, "form"), ["`layers.0.weight`: .*form"]),
    "no rank": (_dropped("delta", "rank"), ["`layers.0.weight`: .*rank"]),
    "no base": (_dropped(None, "base"), ["`layers.0.weight`: .*base"]),
    "another shape": (
        _updated("base", shape=[4, 9]),
        [r"has shape \(8, 4\); the adapter is for \[4, 9\]"],
    ),
    "a shape that is a number": (_updated("base", shape=3), ["`layers.0.weight`"]),
    "another rank": (
        _of_rank(7),
        [r"delta.a` has shape \(2, 4\)", r"delta.b` has shape \(8, 2\)"],
    ),
    "a rank that its factors have not": (
        _updated("delta", rank=7),
        [r"got a of shape \(2, 4\) and b of shape \(8, 2\)"],
    ),
    "an update of another shape": (
        _of_factor("a", shape=[2, 5]),
        [r"update of shape \(8, 5\) does not fit a weight of shape \(8, 4\)"],
    ),
    "a type that is none": (
        _of_factor("a", dtype="float33"),
        ["`layers.0.weight`: .*float33"],
    ),
    "a factor of integers": (_of_factor("a", dtype="int8"), ["its type is 'int8'"]),
    "too many axes of rows": (_updated("delta", rows=2), ["2 axes of rows and 1 of"]),
    **{
        f"a factor of shape {shape!r}": (_of_factor("a", shape=shape), ["is no shape"])
        for shape in ("24", 24, None, [2, -4], [2, 4.0], [True, 4], {"2": 4})
    },
    **{
        f"rank {rank!r}": (_updated("delta", rank=rank), ["`layers.0.weight`: .*rank"])
        for rank in (0, -1, 2.0, True, "2", None, [2])
    },
    **{
        f"alpha {alpha!r}": (_updated("delta", alpha=alpha), ["`alpha` must be"])
        for alpha in (float("nan"), float("inf"), True, "2", [2])
    },
    **{
        f"stop_gradient {flag!r}": (_updated(stop_gradient=flag), ["true or false"])
        for flag in (0, 1.0, "true", None)
    },
    "two weights": (
        lambda _, about: [
            about["weights"][f"layers.{i}.weight"].pop("delta") for i in range(2)
        ],
        [
            "`layers.0.weight`: it has no 'delta'",
            "`layers.1.weight`: it has no 'delta'",
        ],
    ),
}


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_descriptions_that_make_no_sense(name, mlp, tmp_path):
    change, lines = DESCRIPTIONS[name]
    model, path = mlp
    rewritten(path, change)
    plain = unload(model)
    with refused(*lines, folder=tmp_path, model=plain):
        load_adapter(path, plain)


# A model that is not the one that was adapted, and how it is refused.
OTHERS = {
    "wider": (
        lambda key: eqx.nn.MLP(4, 5, 9, 2, key=key),
        [
            r"layers.0.weight`: it has shape \(9, 4\)",
            "layers.1.weight",
            "layers.2.weight",
        ],
    ),
    "shallower": (
        lambda key: eqx.nn.MLP(4, 5, 8, 1, key=key),
        ["the model has no `layers.2.weight`", "`layers.1.weight`: it has shape"],
    ),
    "of another kind": (
        lambda key: [_mlp(key)],
        [f"the model has no `layers.{i}.weight`" for i in range(3)],
    ),
    "nothing": (
        lambda key: None,
        [f"the model has no `layers.{i}.weight`" for i in range(3)],
    ),
    "of another rank": (
        lambda key: loraify(_mlp(key), 3, key),
        [rf"layers.{i}.weight.delta.{x}` has" for i in range(3) for x in "ab"],
    ),
    "with more that is adapted": (
        lambda key: loraify(_mlp(key), 2, key, targets=_linears_and("layers.0.bias")),
        ["`layers.0.bias.value` is missing"],
    ),
    "without numbers": (
        lambda key: eqx.tree_at(
            lambda m: m.layers[0].weight, _mlp(key), replace_fn=lambda _: "a text"
        ),
        ["`layers.0.weight`"],
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_models_that_do_not_fit(name, mlp, tmp_path, getkey):
    make, lines = OTHERS[name]
    model = make(getkey())
    with refused(*lines, folder=tmp_path, model=model):
        load_adapter(mlp[1], model)


# What is saved of an array, and an array that it cannot be put around.
UNLIKE = {
    "a low-rank array alone, of another shape": (
        lambda: LowRankArray.init((3, 4), rank=2, key=jr.key(0)),
        lambda: jnp.ones((3, 5)),
        r"`w`.*\(3, 5\)",
    ),
    "a weight that is of integers": (
        _lora_weight,
        lambda: jnp.ones((3, 4), jnp.int32),
        "`w[.`].*int32",
    ),
    "an array in full that is of integers": (
        lambda: FullArray(jnp.ones((3, 4))),
        lambda: jnp.ones((3, 4), jnp.int32),
        "`w[.`].*int32",
    ),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_weights_that_do_not_fit(name, tmp_path):
    make, other, problem = UNLIKE[name]
    save_adapter(tmp_path / "x", {"w": make()})
    model = {"w": other()}
    with refused(problem, folder=tmp_path, model=model):
        load_adapter(tmp_path / "x", model)


# Files that are no adapter.


def _newer(path):
    rewritten(path, lambda _, about: about.update(version=3))


def _foreign(path):
    safetensors.numpy.save_file({"x": np.zeros(3)}, path)


def _folder(path):
    path.unlink()
    path.mkdir()


def _peft_folder(path):
    path.unlink()
    model = loraify([_linear(jr.key(0))], 2, jr.key(1))
    peft.save(path, model)


def _zip(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("data.pkl", pickle.dumps({"x": 1}))


FILES = {
    "missing": (os.unlink, FileNotFoundError, "There is no file"),
    "newer": (_newer, AdapterError, "by a newer lora_quax, in version 3 .* up to 2"),
    "foreign": (_foreign, AdapterError, "no adapter of lora_quax.*lora_quax.peft.load"),
    "folder": (_folder, AdapterError, "is a folder"),
    "PEFT's": (_peft_folder, AdapterError, "is a folder.*`lora_quax.peft.load`"),
    "pickle": (
        lambda path: path.write_bytes(pickle.dumps({"x": b"y" * 100}, protocol=4)),
        AdapterError,
        "a pickle, or an archive of one, which can run any code",
    ),
    "PyTorch's": (_zip, AdapterError, "a pickle, or an archive of one"),
    "empty": (lambda path: path.write_bytes(b""), AdapterError, "truncated.* 0 bytes"),
    "text": (
        lambda path: path.write_text("lora_quax, but not really"),
        AdapterError,
        "is no safetensors file",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_adapter(name, mlp, tmp_path):
    spoil, error, match = FILES[name]
    model, path = mlp
    spoil(path)
    before = listing(tmp_path), bits(model)
    with pytest.raises(error, match=match) as caught:
        load_adapter(path, model)
    assert str(path) in str(caught.value)
    assert (listing(tmp_path), bits(model)) == before


def test_a_file_of_peft_alone(mlp, tmp_path):
    model, _ = mlp
    peft.save(tmp_path / "peft", model)
    with pytest.raises(AdapterError, match="`lora_quax.peft.load`, together with"):
        load_adapter(tmp_path / "peft" / "adapter_model.safetensors", model)


# Models that cannot be saved, or not be told apart.


# Two arrays, one path.
AMBIGUOUS = {
    "a dot in a key": lambda x: {"a.b": x, "a": {"b": x}},
    "a number and its text": lambda x: {
        "a": collections.OrderedDict([("b", x), (1, x), ("1", x)])
    },
}
UNSAVED = {
    "plain": (lambda: _mlp(jr.key(0)), ValueError, "Nothing in the model trains"),
    "abstract": (
        lambda: abstract(_lora_mlp()),
        TypeError,
        "`layers.0.weight.delta.a` is abstract.* Save a concrete model",
    ),
    "what trains": (
        lambda: partition(_lora_mlp())[0],
        ValueError,
        "`layers.0.weight` has None for its `base`",
    ),
    "what is frozen": (
        lambda: partition(_lora_mlp())[1],
        ValueError,
        "`layers.0.weight` has None for its `delta.a`",
    ),
    **{
        name: (
            lambda make=make: make(_lora_weight()),
            ValueError,
            "Several arrays of the model have the path `a.[b1].delta.a`",
        )
        for name, make in AMBIGUOUS.items()
    },
}


@pytest.mark.parametrize("name", UNSAVED)
def test_models_that_cannot_be_saved(name, tmp_path):
    make, error, match = UNSAVED[name]
    with pytest.raises(error, match=match):
        save_adapter(tmp_path / "x", make())
    assert not listing(tmp_path)


def test_a_traced_model_cannot_be_saved(tmp_path):
    model = _lora_mlp()
    with pytest.raises(TypeError, match="is traced.*outside of `jax.jit`"):
        eqx.filter_jit(lambda model: save_adapter(tmp_path / "x", model))(model)
    assert not listing(tmp_path)


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_loading_onto_an_ambiguous_model(name, tmp_path):
    x = _lora_weight()
    save_adapter(tmp_path / "x", {"a": {"b": x, "1": x}})
    with pytest.raises(ValueError, match="Several arrays of the model have the path"):
        load_adapter(tmp_path / "x", AMBIGUOUS[name](jnp.ones((3, 4))))


def test_float64_needs_x64(tmp_path):
    with jax.enable_x64(True):
        base = {"w": jnp.ones((3, 4), jnp.float64)}
        save_adapter(tmp_path / "x", {"w": _lora(base["w"], key=jr.key(0))})
    problem = "`w.delta.[ab]` is of type float64, which JAX has with `jax_enable_x64`"
    base = {"w": jnp.ones((3, 4))}
    with refused(problem, problem, folder=tmp_path, model=base):
        load_adapter(tmp_path / "x", base)


# Writes that break off.


def _save_peft(path, model, **kwargs):
    peft.save(path.parent, model, **kwargs)


def _full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _half(tensors, path, metadata):
    del tensors, metadata
    path.write_bytes(bytes(100))
    _full_disk()


def _second(function):
    """A function of which the second call fails."""
    calls = []

    def run(*args, **kwargs):
        calls.append(args)
        return _full_disk() if len(calls) == 2 else function(*args, **kwargs)

    return run


# What fails, where it is, and what makes its stand-in.
FAILURES = {
    "writing": (safetensors.numpy, "save_file", lambda: _full_disk),
    "writing halfway": (safetensors.numpy, "save_file", lambda: _half),
    "writing text": (Path, "write_text", lambda: _full_disk),
    "flushing": (os, "fsync", lambda: _full_disk),
    "flushing the second": (os, "fsync", lambda: _second(os.fsync)),
    "moving": (os, "replace", lambda: _full_disk),
    "moving the second": (os, "replace", lambda: _second(os.replace)),
}
WRITERS = {
    "ours": (save_adapter, ["writing", "writing halfway", "flushing", "moving"]),
    "PEFT's": (_save_peft, list(FAILURES)),
}


@pytest.mark.parametrize("is_there", [False, True], ids=["new", "old"])
@pytest.mark.parametrize(
    "writer,failure", [(w, f) for w, (_, failures) in WRITERS.items() for f in failures]
)
def test_a_write_that_fails_changes_nothing(
    writer, failure, is_there, tmp_path, monkeypatch
):
    save, _ = WRITERS[writer]
    path = tmp_path / "folder" / "adapter"
    path.parent.mkdir()
    _, model, other = models_of("mlp")
    if is_there:
        save(path, model)
    before = listing(tmp_path)
    with monkeypatch.context() as patch:
        *where, stand_in = FAILURES[failure]
        patch.setattr(*where, stand_in())
        with pytest.raises(OSError, match="No space left"):
            save(path, other)
    assert listing(tmp_path) == before
    save(path, model)  # And the next one goes through.


@pytest.mark.parametrize(
    "path,error,match",
    [
        ("missing/x", FileNotFoundError, "There is no folder .*missing"),
        ("folder", IsADirectoryError, "folder is a folder; a file is to be written"),
        ("file/x", FileNotFoundError, "There is no folder .*file"),
    ],
)
def test_paths_that_cannot_be_written(path, error, match, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("text")
    before = listing(tmp_path)
    with pytest.raises(error, match=match):
        save_adapter(tmp_path / path, _lora_mlp())
    assert listing(tmp_path) == before


# What is held to be as in the base: `test_peft.py` has it for both formats.


def test_what_is_written_may_change(tmp_path):
    base = {"w": jnp.ones((3, 4)), "x": jnp.ones(4)}
    model = loraify(base, 1, jr.key(0), targets={"w": True, "x": "full"})
    model = {**model, "w": replace(model["w"], stop_gradient=False)}
    where = lambda m: (m["w"].base, m["w"].delta.b, m["x"].value)
    model = eqx.tree_at(where, model, replace_fn=lambda x: x + 1)
    save_adapter(tmp_path / "x", model, base=base)
    assert bits(load_adapter(tmp_path / "x", base)) == bits(model)


def test_a_low_rank_array_alone_may_change(tmp_path):
    base, model, _ = models_of("a low-rank array")
    assert bits(base) != bits(model)
    save_adapter(tmp_path / "x", model, base=base)


def test_complex_arrays_may_not_change(tmp_path):
    base = {"w": jnp.ones((3, 4)), "z": jnp.ones(4, jnp.complex64), "n": jnp.arange(3)}
    model = loraify(base, 1, jr.key(0), targets="w")
    save_adapter(tmp_path / "x", model, base=base)
    model = {**model, "z": model["z"] * 2, "n": model["n"] + 1}
    with pytest.raises(ValueError, match="^`n`, `z` would not be written"):
        save_adapter(tmp_path / "x", model, base=base)


# Files of version 0.1.0, with the first version of the format.

OLD = Path(__file__).parent / "data" / "adapter-0.1.0.safetensors"


def _of_old(key):
    """The model that the file is an adapter of."""
    keys = jr.split(key, 8)
    stacked = jr.split(keys[3], 2)
    return {
        "linear": eqx.nn.Linear(3, 5, key=keys[0]),
        "conv": eqx.nn.Conv2d(2, 4, 3, key=keys[1]),
        "embedding": eqx.nn.Embedding(7, 3, key=keys[2]),
        "stacked": eqx.filter_vmap(lambda k: eqx.nn.Linear(3, 3, key=k))(stacked),
        "half": eqx.nn.Linear(4, 2, dtype=jnp.bfloat16, key=keys[4]),
        "nested": eqx.nn.Linear(4, 3, key=keys[5]),
        "free": eqx.nn.Linear(3, 2, key=keys[6]),
        "alone": jnp.zeros((4, 3)),
    }


def test_a_file_of_version_0_1_0(tmp_path):
    base = _of_old(jr.key(0))
    model = load_adapter(OLD, base)
    tensors = safetensors.numpy.load_file(OLD)

    # The numbers.
    leaves = named_leaves(model)
    assert bits({name: leaves[name] for name in tensors}) == bits(tensors)
    unloaded = eqx.tree_at(lambda m: m["free"].weight, base, leaves["free.weight.base"])
    model_alone, base_alone = dict(model), dict(unloaded)
    alone = model_alone.pop("alone")
    del base_alone["alone"]
    assert bits(unload(model_alone)) == bits(base_alone)

    # All else.
    low_rank = {
        "linear": (2, 3.0, 1, 1),
        "conv": (1, 3.0, 1, 3),
        "embedding": (2, 3.0, 1, 1),
        "stacked": (2, 3.0, 1, 1),
        "half": (2, 3.0, 1, 1),
        "nested": (2, 4.0, 1, 1),
        "free": (1, 1.0, 1, 1),
    }
    facts = lambda x: (x.rank, x.alpha, x.rows, x.cols)
    for name, wanted in low_rank.items():
        weight = model[name].weight
        assert type(weight) is LoraArray and facts(weight.delta) == wanted
        assert weight.stop_gradient == (name != "free")
        assert weight.allow_materialise == (name == "free")
    assert facts(model["nested"].weight.base.delta) == (1, 3.0, 1, 1)
    assert type(alone) is LowRankArray and facts(alone) == (2, 5.0, 1, 1)
    assert type(model["linear"].bias) is FullArray

    # Saved again, it is of the new version, and the same.
    save_adapter(tmp_path / "new", model)
    again = load_adapter(tmp_path / "new", base)
    assert jax.tree.structure(again) == jax.tree.structure(model)
    assert bits(again) == bits(model)


def test_an_old_sum_may_be_formed_although_its_update_may_not(tmp_path):
    """Each had a flag of its own; what was asked was that of the sum."""
    path = tmp_path / "old"
    path.write_bytes(OLD.read_bytes())
    change = lambda _, about: about["weights"]["linear.weight"].update(
        allow_materialise=True
    )
    rewritten(path, change)
    model = load_adapter(path, _of_old(jr.key(0)))
    assert model["linear"].weight.allow_materialise
    assert not model["conv"].weight.allow_materialise


def _old_weight(change):
    return lambda _, about: change(about["weights"]["linear.weight"])


# What is done to the description of a linear layer, and what is said of it.
OLD_DESCRIPTIONS = {
    "no rank": (_old_weight(lambda w: w["delta"].pop("rank")), "it has no 'rank'"),
    "no layer": (_old_weight(lambda w: w.pop("layer")), "it has no 'layer'"),
    "no update": (_old_weight(lambda w: w.pop("delta")), "it has no 'delta'"),
    "no object": (
        lambda _, about: about["weights"].update({"linear.weight": [1]}),
        r"\[1\] is no description of an array",
    ),
    "rank 0": (_old_weight(lambda w: w["delta"].update(rank=0)), "`rank` must be"),
    "rank 2.0": (_old_weight(lambda w: w["delta"].update(rank=2.0)), "is no shape"),
    "rows": (_old_weight(lambda w: w["delta"].update(rows=2)), "too few axes for 2"),
    "true rows": (
        _old_weight(lambda w: w["delta"].update(rows=True)),
        "`rows` must be",
    ),
    "shape": (
        _old_weight(lambda w: w["base"].update(shape=[9, 3])),
        r"has shape \(5, 3\); the adapter is for \[9, 3\]",
    ),
    "a number for a shape": (
        _old_weight(lambda w: w["base"].update(shape=3)),
        "3 is no shape",
    ),
    "type": (
        _old_weight(lambda w: w["delta"].update(dtype={"a": "int8", "b": "int8"})),
        "its type is 'int8'",
    ),
    "alpha": (_old_weight(lambda w: w["delta"].update(alpha=True)), "`alpha` must be"),
    "form": (
        _old_weight(lambda w: w.update(form="scaled")),
        "form 'scaled' is not known",
    ),
}


@pytest.mark.parametrize("name", OLD_DESCRIPTIONS)
def test_old_descriptions_that_make_no_sense(name, tmp_path):
    """They are listed weight by weight, with all else that is wrong."""
    change, line = OLD_DESCRIPTIONS[name]
    path, model = tmp_path / "old", _of_old(jr.key(0))
    path.write_bytes(OLD.read_bytes())

    def spoil(tensors, about):
        change(tensors, about)
        about["weights"]["conv.weight"]["stop_gradient"] = 1
        about["weights"]["elsewhere"] = about["weights"]["half.weight"]

    rewritten(path, spoil)
    lines = f"`linear.weight`: .*({line})", "`conv.weight`: .*true or false"
    with refused(*lines, "no `elsewhere`", folder=tmp_path, model=model):
        load_adapter(path, model)


@pytest.mark.parametrize("n", [10, 300, 900])
def test_old_adapters_on_adapters_without_end(n, tmp_path):
    path, model = tmp_path / "old", _of_old(jr.key(0))
    path.write_bytes(OLD.read_bytes())

    def deepen(tensors, about):
        weight = about["weights"]["linear.weight"]
        for _ in range(n):
            weight = {**weight, "base": weight}
        about["weights"]["linear.weight"] = weight

    rewritten(path, deepen)
    with pytest.raises(AdapterError, match="is missing|too many adapters|too deeply"):
        load_adapter(path, model)


# Forms of one's own.


class Unlike(AdaptedArray):
    """A weight with two scales, around another adapted one."""

    weight: LoraArray
    x: Array = role("magnitude")
    signs: Array = role("frozen")  # Integers, which do not train.
    allow_materialise: bool = eqx.field(static=True, default=False)

    def lower(self):
        return ScaledArray(self.weight, self.x * self.signs)


def _twofold(factor):
    """A class that is defined more than once, as in a cell of a notebook."""

    class Twofold(AbstractDelta):
        times: int = eqx.field(static=True)
        x: Array = role("b")

        def lower(self):
            return LowRankArray(self.x.T, factor * self.times * self.x)

    return Twofold


def test_forms_of_ones_own(tmp_path, capsys):
    base = {"w": jr.normal(jr.key(0), (4, 3)), "v": jr.normal(jr.key(1), (3, 3))}
    lora = LoraArray(base["w"], rank=2, key=jr.key(2), init_b=normal)
    unlike: Any = Unlike  # Its policy is a property, which type checkers do not see.
    _twofold(1)
    delta = _twofold(2)(3, jr.normal(jr.key(3), (3, 1)))
    model = {
        "w": unlike(lora, jnp.full((4, 1), 0.5), jnp.array([[1], [-1], [1], [1]])),
        "v": LoraArray.from_parts(base["v"], delta),
    }
    save_adapter(tmp_path / "x", model, base=base)
    loaded = load_adapter(tmp_path / "x", base)
    assert jax.tree.structure(loaded) == jax.tree.structure(model)
    assert bits(loaded) == bits(model) and bits(unload(loaded)) == bits(base)
    assert main(["inspect", str(tmp_path / "x")]) == 0
    shown = capsys.readouterr().out
    assert "w.x" in shown and "w.signs" in shown and "w.weight.delta.a" in shown


def _namesake(module):
    """A class whose name another one, in another module, has as well."""

    class Namesake(AbstractDelta):
        __module__, __qualname__ = module, "Namesake"
        x: Array = role("b")

        def lower(self):
            return LowRankArray(self.x, self.x)

    return Namesake


def test_forms_of_the_same_name(tmp_path):
    base = {"w": jr.normal(jr.key(0), (3, 3))}
    first, _ = (_namesake(module) for module in ("first", "second"))
    model = {"w": LoraArray.from_parts(base["w"], first(jnp.ones((3, 3))))}
    save_adapter(tmp_path / "x", model, base=base)
    several = "'Namesake' is that of several classes, first.Namesake and second.Name"
    with pytest.raises(AdapterError, match=several):
        load_adapter(tmp_path / "x", base)


def test_an_adapter_of_nothing(tmp_path):
    _, model, _ = models_of("mlp")
    save_adapter(tmp_path / "x", model)

    def empty(tensors, about):
        tensors.clear()
        about["weights"].clear()

    rewritten(tmp_path / "x", empty)
    with pytest.raises(AdapterError, match="is an adapter of no weight"):
        load_adapter(tmp_path / "x", unload(model))
