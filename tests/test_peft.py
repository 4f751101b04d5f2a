"""PEFT's files, written and read without PyTorch: what is in them, and what is refused.

That PEFT itself reads them as they are meant is tested elsewhere; here, that nothing is
lost on the way, and that what would be lost is refused.
"""

import functools as ft
import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import hypothesis as hp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import safetensors.numpy
from files import bits, Int8, listing, numbers

from lora_quax import (
    Adapt,
    AdapterError,
    DoRA,
    FullArray,
    load_adapter,
    LoraArray,
    loraify,
    LowRankArray,
    merge,
    partition,
    peft,
    save_adapter,
    unload,
)


PREFIX = "base_model.model."
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


# Models. They are abstract until `adapted` gives them numbers, so nothing is compiled.


@ft.cache
def _abstract(make, *args, **kwargs):
    return eqx.filter_eval_shape(make, *args, key=jr.key(0), **kwargs)


def linear(n_in=3, n_out=4, use_bias=True):
    return _abstract(eqx.nn.Linear, n_in, n_out, use_bias=use_bias)


def embedding(n=5, dim=4):
    return _abstract(eqx.nn.Embedding, n, dim)


def conv(dims=2, n_in=3, n_out=4, kernel=2):
    return _abstract(eqx.nn.Conv, dims, n_in, n_out, kernel)


def norm(n=4):
    return eqx.filter_eval_shape(eqx.nn.LayerNorm, n)


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def stacked(layer, n=3):
    """Layers along a leading axis, as `equinox.filter_vmap` makes them."""
    return jax.tree.map(
        lambda x: (
            jax.ShapeDtypeStruct((n, *x.shape), x.dtype)
            if isinstance(x, jax.ShapeDtypeStruct)
            else x
        ),
        layer,
    )


def adapted(tree, targets=None, rank=2, **options):
    """A model with numbers, in which nothing that trains is what it started from."""
    model = loraify(tree, rank, jr.key(0), targets=targets, **options)
    return numbers(model)[0]


def exported(folder: Path, model, **kwargs) -> tuple[dict, dict]:
    """The configuration and the tensors that are saved of a model."""
    peft.save(folder, model, **kwargs)
    tensors = safetensors.numpy.load_file(folder / WEIGHTS)
    assert all(name.startswith(PREFIX) for name in tensors)
    tensors = {name.removeprefix(PREFIX): x for name, x in tensors.items()}
    return json.loads((folder / CONFIG).read_text()), tensors


def dense(x: LoraArray) -> np.ndarray:
    """The update of a matrix, in float64."""
    b, a = (np.asarray(y, np.float64) for y in (x.b, x.a))
    return x.alpha / x.rank * b @ a


# Any model comes back as it was.


class Layer(NamedTuple):
    """A layer, and the adapter that it gets."""

    layer: Any
    rank: int | None  # None: it is not adapted.
    alpha: float
    stack: int | None  # How many of it lie along a leading axis.


sizes = st.integers(1, 4)
kinds = st.one_of(
    st.builds(linear, sizes, sizes, st.booleans()),
    st.builds(embedding, sizes, sizes),
    st.builds(conv, st.integers(1, 3), sizes, sizes, st.integers(1, 2)),
)
layers = st.builds(
    Layer,
    kinds,
    st.none() | st.integers(1, 5),
    st.floats(-1e3, 1e3, width=32).filter(bool),
    st.none() | st.integers(1, 3),
)
# A dot parts segments, and braces stand for one.
keys = st.sampled_from(
    ["q", "q_proj", "xq", "0", "a b", "a+", "(", "[x]", "^", "$", "\\d", "β", "\n", "/"]
    + ["..".replace(".", "\u2024"), "lora_A", "base_layer", "weight", "bias", "default"]
) | st.text(
    st.characters(exclude_characters=".{}", exclude_categories=["Cs"]), min_size=1
)
trees = st.recursive(
    st.lists(layers, min_size=1, max_size=3)
    | st.dictionaries(keys, layers, min_size=1),
    lambda inner: (
        st.dictionaries(keys, inner, min_size=1, max_size=3)
        | st.lists(inner, min_size=1, max_size=2)
    ),
    max_leaves=4,
)


def _is_layer(x) -> bool:
    return isinstance(x, Layer)


def _model_of(tree, full_biases: bool):
    """The adapted model that a tree of layers describes, and the names of its parts."""
    found = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_layer)[0]
    specs, names = {}, {}
    for path, layer in found:
        name = ".".join(str(getattr(k, "key", getattr(k, "idx", None))) for k in path)
        specs[name] = layer
        if layer.stack is not None:
            names[name] = f"{name}.{{}}"
    hp.assume(any(layer.rank is not None for layer in specs.values()))

    def target(path, x):
        name, _, field = path.rpartition(".")
        layer = specs[name]
        if layer.rank is None:
            return None
        if field == "bias":
            return "full" if full_biases else None
        return Adapt(rank=layer.rank, alpha=layer.alpha)

    base = jax.tree.map(
        lambda x: x.layer if x.stack is None else stacked(x.layer, x.stack),
        tree,
        is_leaf=_is_layer,
    )
    return adapted(base, target), names


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("adapters")


@pytest.mark.slow
@hp.given(trees, st.booleans())
@hp.settings(max_examples=40, deadline=None)
def test_any_model_comes_back_as_it_was(folder, tree, full_biases):
    model, names = _model_of(tree, full_biases)
    base = unload(model)
    for save, load in [
        (ft.partial(peft.save, names=names), ft.partial(peft.load, names=names)),
        (
            lambda path, model: save_adapter(path / "adapter", model),
            lambda path, model: load_adapter(path / "adapter", model),
        ),
    ]:
        save(folder, model)
        first = listing(folder)
        got = load(folder, base)
        assert jax.tree.structure(got) == jax.tree.structure(model)
        assert bits(got) == bits(model)
        assert bits(load(folder, model)) == bits(model)
        save(folder, got)
        assert listing(folder) == first


@hp.given(trees)
@hp.settings(max_examples=10, deadline=None)
def test_patterns_mean_one_name_each(folder, tree):
    """Whatever the order of the patterns, the update of a module is its own."""
    model, names = _model_of(tree, False)
    config, tensors = exported(folder, model, names=names)
    modules = {re.sub(r"\.lora_.*", "", name, flags=re.DOTALL) for name in tensors}
    for field in "rank_pattern", "alpha_pattern":
        for pattern in config[field]:
            matches = [m for m in modules if re.match(rf"(.*\.)?({pattern})$", m)]
            assert len(matches) <= 1


# What the files say of a model.


class Export(NamedTuple):
    """A model, how it is saved, and what is in the files."""

    tree: Any
    targets: Any
    config: dict[str, Any]
    tensors: dict[str, tuple[int, ...]]
    options: dict[str, Any] = {}


_only = lambda *paths: {re.compile(path): True for path in paths}
_A, _B = "lora_A.weight", "lora_B.weight"


def factors(*modules, rank=2, n_in=3, n_out=4):
    return {f"{m}.{_A}": (rank, n_in) for m in modules} | {
        f"{m}.{_B}": (n_out, rank) for m in modules
    }


EXPORTS = {
    "one rank": Export(
        {"q": linear(), "v": linear(), "o": linear()},
        ["q", "v"],
        dict(
            peft_type="LORA",
            r=2,
            lora_alpha=2,
            rank_pattern={},
            alpha_pattern={},
            target_modules=["q", "v"],
            target_parameters=None,
            modules_to_save=None,
            bias="none",
            use_rslora=False,
            use_dora=False,
            inference_mode=True,
            init_lora_weights=True,
        ),
        factors("q", "v"),
    ),
    "the rank that most have": Export(
        {"a": {"q": linear()}, "b": {"q": linear()}, "o": [linear()]},
        {eqx.nn.Linear: 2, "a.q": Adapt(rank=4, alpha=0.5)},
        dict(
            r=2,
            lora_alpha=2,
            rank_pattern={r"^a\.q": 4},
            alpha_pattern={r"^a\.q": 0.5},
            target_modules=["a.q", "b.q", "o.0"],
        ),
        factors("b.q", "o.0") | factors("a.q", rank=4),
    ),
    "a name that is the end of another": Export(
        {"q+": linear(), "x": {"q+": linear()}},
        _only(r"q\+\.weight"),
        dict(target_modules=r"q\+"),
        factors("q+"),
    ),
    "a name that is the end of another, dot or no dot": Export(
        {"q": linear(), "xq": linear()},
        _only(r"q\.weight"),
        dict(target_modules=["q"]),
        factors("q"),
    ),
    "biases of adapted layers": Export(
        {"q": linear(), "v": linear(), "o": linear()},
        {"q": True, "v": True, "q.bias": "full"},
        dict(bias="lora_only", modules_to_save=None),
        factors("q", "v") | {"q.base_layer.bias": (4,), "v.base_layer.bias": (4,)},
    ),
    "all biases": Export(
        {"q": linear(), "o": linear(), "c": conv()},
        {"q": True, "o.bias": "full"},
        dict(bias="all", modules_to_save=None),
        factors("q") | {"q.base_layer.bias": (4,), "o.bias": (4,), "c.bias": (4,)},
    ),
    "a module in full": Export(
        {"q": linear(), "head": linear()},
        {"q": True, "head": "full"},
        dict(bias="none", modules_to_save=["head"]),
        factors("q") | {"head.weight": (4, 3), "head.bias": (4,)},
    ),
    "an array of a module in full": Export(
        {"q": linear(), "head": linear()},
        {"q": True, "head.weight": "full"},
        dict(bias="none", modules_to_save=["head"]),
        factors("q") | {"head.weight": (4, 3), "head.bias": (4,)},
    ),
    "a module whose name is the end of another": Export(
        {"q": linear(), "norm": norm(), "final_norm": norm()},
        {"q": True, re.compile(r"norm\.(weight|bias)"): "full"},
        dict(modules_to_save=["final_norm", "norm"]),
        factors("q")
        | {
            f"{m}.{x}": (4,) for m in ("norm", "final_norm") for x in ("weight", "bias")
        },
    ),
    "rsLoRA": Export(
        {"q": linear()},
        {"q": Adapt(rank=4, alpha=8)},
        dict(use_rslora=True, lora_alpha=4, r=4),
        factors("q", rank=4),
        dict(use_rslora=True),
    ),
    "what is said of the base": Export(
        {"q": linear()},
        None,
        dict(
            base_model_name_or_path="org/model",
            task_type="CAUSAL_LM",
            lora_dropout=0.1,
            fan_in_fan_out=True,
        ),
        factors("q"),
        dict(
            base_model_name_or_path="org/model",
            task_type="CAUSAL_LM",
            lora_dropout=0.1,
            fan_in_fan_out=True,
        ),
    ),
    "an embedding": Export(
        {"e": embedding(5, 4)},
        eqx.nn.Embedding,
        dict(target_modules=["e"]),
        {"e.lora_embedding_A": (2, 5), "e.lora_embedding_B": (4, 2)},
    ),
    "a convolution": Export(
        {"c": conv(2, 3, 4, 2)},
        None,
        dict(target_modules=["c"]),
        {f"c.{_A}": (2, 3, 2, 2), f"c.{_B}": (4, 2, 1, 1)},
    ),
    "a base that trains": Export(
        {"q": linear(use_bias=False)},
        None,
        dict(modules_to_save=None),
        factors("q") | {"q.base_layer.weight": (4, 3)},
    ),
    "experts": Export(
        {"m": {"up": array(3, 4, 5), "down": array(3, 5, 4)}},
        ["up", "down"],
        dict(target_modules=[], target_parameters=["m.down", "m.up"]),
        {
            f"m.base_layer.{_A}": (6, 4),
            f"m.base_layer.{_B}": (5, 6),
            f"m.{_A}": (6, 5),
            f"m.{_B}": (4, 6),
        },
    ),
    "experts, (in, out)": Export(
        {"m": {"up": array(3, 4, 5)}},
        ["up"],
        dict(target_parameters=["m.up"]),
        {f"m.{_A}": (6, 4), f"m.{_B}": (5, 6)},
        dict(transposed=["up"]),
    ),
    "a raw matrix": Export(
        {"m": {"weight": array(4, 3)}},
        ["m.weight"],
        dict(target_modules=["m"]),
        factors("m"),
    ),
    "a raw matrix, (in, out)": Export(
        {"m": {"weight": array(3, 4)}},
        ["m.weight"],
        dict(target_modules=["m"]),
        factors("m"),
        dict(transposed=["m.weight"]),
    ),
    "stacked layers": Export(
        {"h": stacked(linear(), 2)},
        None,
        dict(target_modules=["h.0", "h.1"]),
        factors("h.0", "h.1"),
        dict(names={"h": "h.{}"}),
    ),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_exports(name, tmp_path):
    case = EXPORTS[name]
    options = dict(stop_gradient=False) if name == "a base that trains" else {}
    model = adapted(case.tree, case.targets, **options)
    config, tensors = exported(tmp_path, model, **case.options)
    assert {key: config[key] for key in case.config} == case.config
    assert {key: x.shape for key, x in tensors.items()} == case.tensors
    reads = {k: v for k, v in case.options.items() if k in ("names", "transposed")}
    got = peft.load(tmp_path, unload(model), **reads)
    for x, y in zip(loras(got), loras(model), strict=True):
        assert bits([x.a, x.b]) == bits([y.a, y.b])
        assert math.isclose(x.scaling, y.scaling)
        assert bits(getattr(x.base, "value", x.base)) == bits(y.base)


def loras(model) -> list[LoraArray]:
    is_lora = lambda x: isinstance(x, LoraArray)
    return [x for x in jax.tree.leaves(model, is_leaf=is_lora) if is_lora(x)]


def test_the_layout_of_factors(tmp_path):
    """What the shapes do not say: the order of experts, and which factor is which."""
    tree = {"m": {"up": array(3, 4, 5)}, "e": embedding(), "w": {"weight": array(3, 4)}}
    model = adapted(tree, ["up", "e", "w.weight"])
    kwargs = dict(transposed=["w.weight"])
    _, tensors = exported(tmp_path, model, **kwargs)
    up, table, w = model["m"]["up"], model["e"].weight, model["w"]["weight"]
    A, B = tensors[f"m.{_A}"], tensors[f"m.{_B}"]
    for e in range(3):
        got = B[:, e::3] @ A[2 * e : 2 * e + 2]
        np.testing.assert_allclose(got, up.b[e] @ up.a[e], rtol=1e-5)
    got = tensors["e.lora_embedding_B"] @ tensors["e.lora_embedding_A"]
    np.testing.assert_allclose(got.T, table.b @ table.a, rtol=1e-5)
    got = tensors[f"w.{_B}"] @ tensors[f"w.{_A}"]
    np.testing.assert_allclose(got.T, w.b @ w.a, rtol=1e-5)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_an_initial_update_is_taken_out(use_rslora, tmp_path):
    tree = {"q": linear(), "e": embedding(), "c": conv(1, 3, 4, 1)}
    targets = {"q": True, "e": Adapt(rank=3, alpha=5.0), "c": True}
    model, initial = numbers(loraify(tree, 2, jr.key(0), targets=targets))
    kwargs = dict(initial=initial, use_rslora=use_rslora)
    config, _ = exported(tmp_path, model, **kwargs)
    assert config["init_lora_weights"] is True
    got = peft.load(tmp_path, unload(model))
    for name in ("q", "e"):
        new, old, first = (m[name].weight for m in (got, model, initial))
        assert new.rank == 2 * old.rank
        want = dense(old) - dense(first)
        np.testing.assert_allclose(dense(new), want, rtol=1e-5, atol=1e-5)


# Names.


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
    assert {key.removesuffix(f".{_A}") for key in tensors if _A in key} == set(modules)
    for layer, module in zip([*model["blocks"], {"q": model["head"]}], modules):
        assert bits(tensors[f"{module}.{_A}"]) == bits(layer["q"].weight.a)
    assert bits(peft.load(tmp_path, unload(model), names=names)) == bits(model)


def test_two_axes_of_layers(tmp_path):
    model = adapted({"h": stacked(stacked(linear(), 2), 3)})
    names = {"h": "g.{}.h.{}"}
    _, tensors = exported(tmp_path, model, names=names)
    a = np.asarray(model["h"].weight.a)
    for i, j in np.ndindex(3, 2):
        assert bits(tensors[f"g.{i}.h.{j}.{_A}"]) == bits(a[i, j])
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


# What has no counterpart in PEFT.


def by_hand(**options):
    """A weight that is adapted otherwise than `loraify` does it."""
    weight = LoraArray(jnp.ones((3, 4, 5)), rank=2, key=jr.key(0), **options)
    return {"m": {"weight": weight}}


def lone():
    layer = numbers({"q": linear(), **adapted({"v": linear()})})[0]
    low_rank = LowRankArray.init((4, 3), rank=2, key=jr.key(0))
    return eqx.tree_at(lambda m: m["q"].weight, layer, low_rank)


def twice():
    outer = LoraArray(
        LoraArray(jnp.ones((4, 3)), rank=2, key=jr.key(0)), rank=2, key=jr.key(0)
    )
    return {"m": {"weight": outer}}


def quantised():
    base = Int8(jnp.ones((4, 3), jnp.int8))
    weight = LoraArray(base, rank=2, key=jr.key(0))
    return {"m": {"weight": weight, "other": FullArray(jnp.ones(3))}}


def grouped():
    return _abstract(eqx.nn.Conv1d, 4, 4, 2, groups=2)


def transposed_conv():
    return _abstract(eqx.nn.ConvTranspose1d, 3, 4, 2)


class _WithState(eqx.Module):
    q: eqx.nn.Linear
    norm: eqx.nn.BatchNorm

    def __init__(self, key):
        self.q = eqx.nn.Linear(3, 4, key=key)
        self.norm = eqx.nn.BatchNorm(4, "batch", mode="ema")


def with_state():
    return eqx.nn.make_with_state(_WithState)(jr.key(0))[0]


def _tied():
    pair = {"embed_tokens": embedding(5, 4), "lm_head": linear(4, 5, False)}
    where, get = lambda m: m["lm_head"].weight, lambda m: m["embed_tokens"].weight
    return {"m": eqx.nn.Shared(pair, where, get)}


_per_column = ft.partial(DoRA, per="columns")
_in_full = lambda name: {"q": True, name: "full"}
REFUSED = {
    "a plain model": (lambda: numbers_of(linear()), "has no low-rank update"),
    "a grouped convolution": (
        lambda: adapted({"c": grouped()}),
        "`c.weight` .* convolution of 2 groups.* dense A and a grouped B",
    ),
    "a transposed convolution": (
        lambda: adapted({"c": transposed_conv()}),
        "`c.weight` .* transposed convolution, of which PEFT has no LoRA",
    ),
    "a transposed convolution in full": (
        lambda: adapted({"q": linear(), "c": transposed_conv()}, _in_full("c")),
        "`c.weight` is trained in full .* transposed convolution otherwise",
    ),
    "an adapter on an adapter": (
        twice,
        "`m.weight` .* adapter on an adapter; merge one of them first",
    ),
    "a low-rank array alone": (lone, "`q.weight` .* there is no `LoraArray`"),
    "rows that are not PEFT's": (
        lambda: by_hand(rows=2),
        "`m.weight` .* 2 axes of rows and 1 of columns; PEFT has 1 and 1",
    ),
    "columns that are not PEFT's": (
        lambda: by_hand(cols=2),
        "`m.weight` .* 1 axes of rows and 2 of columns; PEFT has 1 and 1",
    ),
    "a norm that has a state": (
        lambda: adapted(with_state(), _in_full("norm")),
        "`norm.weight` is trained in full .* running statistics",
    ),
    "an array in full that is in no module": (
        lambda: adapted({"q": linear(), "x": array(3)}, _in_full("x")),
        "`x` is trained in full .* it is no part of a module",
    ),
    "a layer alone": (
        lambda: adapted(linear()),
        "`weight` .* cannot be adapted.*`names={'': 'layer'}`",
    ),
    "stacked layers without a name for each": (
        lambda: adapted({"h": stacked(linear())}),
        r"`h.weight` .* has 3 axes, and 2 are wanted.* `names={'blocks'",
    ),
    "a module in full with an adapter in it": (
        lambda: adapted(
            {"m": {"q": linear(), "weight": array(3, 3)}}, _in_full("m.weight")
        ),
        "save the module `m` whole.* but `m.q` is adapted",
    ),
    "an expert whose name is the end of another": (
        lambda: adapted(
            {"up": array(3, 4, 5), "m": {"up": array(3, 4, 5)}}, _only("up")
        ),
        "`up` cannot be exchanged",
    ),
    "a module whose name is there twice": (
        lambda: adapted({"a.b": linear(), "a": {"b": linear()}}),
        "the path `a.b.weight`",
    ),
    "a base that is no plain array": (
        lambda: in_full_beside_int8(),
        "`m.table` would have to be written whole, and is no plain array but a Int8",
    ),
    "a module and a parameter of it": (
        lambda: adapted(
            {"m": {"weight": array(4, 4), "u": array(4, 4)}}, ["m.weight", "m.u"]
        ),
        "`m.weight` is adapted, and so is another parameter of its module",
    ),
    "parameters of one shape in a dictionary": (
        lambda: adapted({"m": {"z": array(4, 4), "u": array(4, 4)}}, ["m.z", "m.u"]),
        "m.u, m.z are of one shape, and PEFT tells them apart by their order alone",
    ),
    "DoRA beside LoRA": (
        lambda: adapted(
            {"q": linear(), "v": linear()}, {"q": Adapt(use_dora=True), "v": True}
        ),
        "`q.weight` is adapted by DoRA and `v.weight` is not, which PEFT has for all",
    ),
    "DoRA of experts": (
        lambda: adapted({"m": {"up": array(3, 4, 5)}}, {"up": Adapt(use_dora=True)}),
        "`m.up` .* PEFT has no DoRA of experts",
    ),
    "DoRA of a parameter": (
        lambda: adapted({"m": {"u": array(4, 5)}}, {"m.u": Adapt(use_dora=True)}),
        "PEFT has no DoRA of `m.u`, a single parameter",
    ),
    "DoRA of columns": (
        lambda: adapted({"q": linear()}, {"q": Adapt(use_dora=_per_column)}),
        "`q.weight` .* a magnitude for each of its columns; PEFT .* its rows",
    ),
    "DoRA of what is tied": (
        lambda: adapted(_tied(), {"embed_tokens": Adapt(use_dora=True)}),
        "is adapted by DoRA: PEFT gives the embedding a magnitude for each feature",
    ),
    "what trains alone": (
        lambda: partition(adapted({"m": {"weight": array(3, 3)}}, ["m.weight"]))[0],
        "`m.weight` has None for its `base`",
    ),
}


def numbers_of(tree):
    return unload(adapted({"q": tree}))


def in_full_beside_int8():
    model = adapted({"q": linear(), "m": {"x": array(3)}}, _in_full("m.x"))
    model["m"]["table"] = Int8(jnp.ones((4, 3), jnp.int8))
    return model


@pytest.mark.parametrize("name", REFUSED)
def test_what_peft_cannot_have(name, tmp_path):
    make, match = REFUSED[name]
    with pytest.raises(ValueError, match=match):
        peft.save(tmp_path / "x", make())
    assert not listing(tmp_path)


def test_abstract_models_are_refused(tmp_path):
    with pytest.raises(TypeError, match="`q.weight` is abstract"):
        peft.save(tmp_path / "x", loraify({"q": linear()}, 2, jr.key(0)))
    assert not listing(tmp_path)


@pytest.mark.parametrize("option", [{"lora_dropout": 0.1}, {"fan_in_fan_out": True}])
def test_parameters_have_no_dropout_and_no_conv1d(option, tmp_path):
    model = adapted({"m": {"up": array(3, 4, 5)}}, ["m.up"])
    with pytest.raises(ValueError, match="`m.up`, a single parameter, with neither"):
        peft.save(tmp_path / "x", model, **option)
    assert not listing(tmp_path)


@pytest.mark.parametrize("use_dora", [False, True])
def test_the_dropout_of_updates_is_written(use_dora, tmp_path):
    layer = eqx.nn.Linear(3, 4, key=jr.key(0))
    model = loraify(layer, 2, jr.key(1), dropout=0.25, use_dora=use_dora)
    peft.save(tmp_path / "a", {"q": model})
    about = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert about["lora_dropout"] == 0.25


def test_known_layers_are_not_transposed(tmp_path):
    with pytest.raises(ValueError, match="`q.weight` is of a known layer, and not"):
        peft.save(tmp_path / "x", adapted({"q": linear()}), transposed=["q.weight"])


def test_a_model_that_is_an_array(tmp_path):
    model = LoraArray(jnp.ones((3, 4, 5)), rank=2, key=jr.key(0))
    names = {"": "m.up"}
    peft.save(tmp_path, model, names=names)
    assert bits(peft.load(tmp_path, model.base, names=names)) == bits(model)


# Bases that are written as well.


class _Experts(eqx.Module):
    up: Any
    down: Any
    bias: Any


def test_bases_of_several_parameters_are_below_as_many_layers(tmp_path):
    base = {"m": _Experts(array(3, 4, 5), array(3, 5, 4), array(4))}
    targets = {"m.up": True, "m.down": True, "m.bias": "full"}
    model = adapted(base, targets, stop_gradient=False)
    _, tensors = exported(tmp_path, model)
    assert {name for name in tensors if "lora" not in name} == {
        f"m.base_layer.base_layer.{name}" for name in ("up", "down", "bias")
    }
    got = peft.load(tmp_path, jax.tree.map(jnp.zeros_like, unload(model)))
    assert np.array_equal(got["m"].up.base.value, model["m"].up.base)
    assert np.array_equal(got["m"].bias.value, model["m"].bias.value)


def test_a_layer_without_an_update_keeps_what_it_was_trained_to(tmp_path):
    """Of a stack, one layer is adapted and another one is saved whole."""
    base = numbers({"q": linear(), **adapted({"v": linear()})})[0]
    layers = {"layers": [base["q"], unload(base)["v"]]}
    model = loraify(
        layers, 2, jr.key(0), targets={"layers.0": True, "layers.1": "full"}
    )
    model = eqx.tree_at(lambda m: m["layers"][1].weight.value, model, jnp.ones((4, 3)))
    peft.save(tmp_path / "x", model)
    both = jax.tree.map(lambda *x: jnp.stack(x), *layers["layers"])
    names = {"blocks": "layers.{}"}
    for folder, again in ("x", "y"), ("y", "z"):
        got = peft.load(tmp_path / folder, {"blocks": both}, names=names)
        assert jnp.all(merge(got)["blocks"].weight[1] == 1)
        peft.save(tmp_path / again, got, names=names)


def test_layers_of_several_types_of_number_are_not_narrowed(tmp_path):
    model = adapted({"layers": [linear(), linear()]})
    layers = unload(model)
    narrow = lambda m: m["layers"][0].weight.delta.a
    model = eqx.tree_at(narrow, model, replace_fn=lambda x: x.astype(jnp.bfloat16))
    peft.save(tmp_path, model)
    both = jax.tree.map(lambda *x: jnp.stack(x), *layers["layers"])
    got = peft.load(tmp_path, {"blocks": both}, names={"blocks": "layers.{}"})
    for i, layer in enumerate(model["layers"]):
        a = layer.weight.a.astype(jnp.float32)
        assert np.array_equal(got["blocks"].weight.a[i], a)


@pytest.mark.parametrize("alpha,rank", [(14, 8), (7, 2), (28, 8), (0.3, 5), (16, 4)])
def test_alpha_comes_back_as_it_was(alpha, rank, tmp_path):
    model = adapted({"q": linear()}, rank=rank)
    config, _ = exported(tmp_path, model, use_rslora=True)
    config["lora_alpha"] = alpha
    (tmp_path / CONFIG).write_text(json.dumps(config))
    got = peft.load(tmp_path, unload(model))
    again, _ = exported(tmp_path, got, use_rslora=True)
    assert again["lora_alpha"] == pytest.approx(alpha, rel=1e-15)
    assert alpha != int(alpha) or again["lora_alpha"] == alpha


def test_a_tensor_is_not_there_by_two_names(tmp_path):
    model = adapted({"q": linear()}, {"q": True, "q.bias": "full"})
    _, tensors = exported(tmp_path, model)
    tensors["q.bias"] = tensors["q.base_layer.bias"]
    tensors = {PREFIX + name: x for name, x in tensors.items()}
    safetensors.numpy.save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(AdapterError, match="with `base_layer` in its name and without"):
        peft.load(tmp_path, unload(model))


def test_an_entry_of_transposed_that_matches_nothing(tmp_path):
    model = adapted({"q": linear()})
    with pytest.raises(ValueError, match="'w' of `transposed` matched no array"):
        peft.save(tmp_path / "x", model, transposed=["w"])
    assert not listing(tmp_path)


INITIAL = {
    "another base": (lambda m: with_leaf(m, lambda w: w.base), "would not be written"),
    "another rank": (lambda m: loraify(unload(m), 3, jr.key(0)), "another rank or alp"),
    "not adapted": (unload, "there is no `LoraArray`"),
}


def with_leaf(model, where):
    """The model with one leaf of its weight changed."""
    return eqx.tree_at(
        lambda m: where(m["q"].weight), model, replace_fn=lambda x: x + 1
    )


@pytest.mark.parametrize("change,match", INITIAL.values(), ids=INITIAL)
def test_initial_models_that_do_not_fit(change, match, tmp_path):
    model = adapted({"q": linear()})
    with pytest.raises(ValueError, match=match):
        peft.save(tmp_path / "x", model, initial=change(model))
    assert not listing(tmp_path)


def test_a_base_that_trained_is_not_that_of_the_initial_model(tmp_path):
    initial = adapted({"q": linear()}, stop_gradient=False)
    model = with_leaf(initial, lambda w: w.base)
    with pytest.raises(ValueError, match="its base is not the one that it has in `ini"):
        peft.save(tmp_path / "x", model, initial=initial)
    assert not listing(tmp_path)


# What is saved must be all that was trained.

SAVERS = {
    "ours": lambda folder, model, **kwargs: save_adapter(folder / "x", model, **kwargs),
    "PEFT's": peft.save,
}


@pytest.mark.parametrize("save", SAVERS.values(), ids=SAVERS)
def test_what_else_was_trained(save, tmp_path):
    base = {"q": linear(), "norm": norm()}
    model = adapted(base, {"q": True, "norm.bias": "full"})
    sound = unload(model)
    save(tmp_path, model, base=sound)
    before = listing(tmp_path)
    moved = lambda m: (m["q"].bias, m["q"].weight.base, m["norm"].weight)
    model = eqx.tree_at(moved, model, replace_fn=lambda x: x + 1)
    with pytest.raises(ValueError, match="would not be written") as caught:
        save(tmp_path, model, base=sound)
    for name in "norm.weight", "q.bias", "q.weight":
        assert f"`{name}`" in str(caught.value)
    assert "norm.bias" not in str(caught.value)
    assert listing(tmp_path) == before


# Reading is strict.

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
    del tensors[f"{PREFIX}a.0.{_A}"], tensors[f"{PREFIX}a.0.{_B}"]
    tensors[f"{PREFIX}a.9.{_A}"] = np.zeros((2, 3), np.float32)
    tensors[f"{PREFIX}a.9.{_B}"] = np.zeros((4, 2), np.float32)
    tensors[f"{PREFIX}a.1.{_A}"] = np.zeros((2, 9), np.float32)
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
    del tensors[f"{PREFIX}a.0.{_A}"], tensors[f"{PREFIX}a.1.{_B}"]
    tensors[f"a.2.{_A}"] = np.zeros(1, np.float32)
    tensors[f"{PREFIX}a.2.lora_magnitude_vector"] = np.zeros(4, np.int32)
    tensors[f"{PREFIX}head.lora_B.bias"] = np.zeros(4, np.float32)
    tensors[f"{PREFIX}norm.{_A}"] = np.zeros((2, 4), np.int32)


def test_one_error_lists_all_that_is_wrong_in_the_file(sound):
    _, load, _ = sound
    with pytest.raises(AdapterError, match="is not sound") as caught:
        load(_break)
    found = str(caught.value).split("\n  - ")[1:]
    assert found == sorted(
        [
            "`a.0` has no A",
            "`a.1` has no B",
            f"`a.2.{_A}` does not begin with `{PREFIX}`",
            f"`{PREFIX}a.2.lora_magnitude_vector` is of type int32, no floating point",
            "`a.2` has magnitudes alone",
            "`head` has a bias alone",
            f"`{PREFIX}norm.{_A}` is of type int32, no floating point",
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
