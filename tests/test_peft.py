"""What PEFT's files say of a model, written without PyTorch, and that nothing is lost.

That PEFT itself reads them as they are meant is tested elsewhere.
"""

import json
import math
import re
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import safetensors.numpy
from files import bits, listing, numbers
from peft_models import (
    adapted,
    array,
    CONFIG,
    conv,
    dense,
    embedding,
    exported,
    factors,
    linear,
    LORA_A,
    LORA_B,
    loras,
    norm,
    only,
    PREFIX,
    stacked,
    WEIGHTS,
)

from lora_quax import Adapt, AdapterError, loraify, merge, peft, save_adapter, unload


class Export(NamedTuple):
    """A model, how it is saved, and what is in the files."""

    tree: Any
    targets: Any
    config: dict[str, Any]
    tensors: dict[str, tuple[int, ...]]
    options: dict[str, Any] = {}


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
        only(r"q\+\.weight"),
        dict(target_modules=r"q\+"),
        factors("q+"),
    ),
    "a name that is the end of another, dot or no dot": Export(
        {"q": linear(), "xq": linear()},
        only(r"q\.weight"),
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
        {f"c.{LORA_A}": (2, 3, 2, 2), f"c.{LORA_B}": (4, 2, 1, 1)},
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
            f"m.base_layer.{LORA_A}": (6, 4),
            f"m.base_layer.{LORA_B}": (5, 6),
            f"m.{LORA_A}": (6, 5),
            f"m.{LORA_B}": (4, 6),
        },
    ),
    "experts, (in, out)": Export(
        {"m": {"up": array(3, 4, 5)}},
        ["up"],
        dict(target_parameters=["m.up"]),
        {f"m.{LORA_A}": (6, 4), f"m.{LORA_B}": (5, 6)},
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


def test_the_layout_of_factors(tmp_path):
    """What the shapes do not say: the order of experts, and which factor is which."""
    tree = {"m": {"up": array(3, 4, 5)}, "e": embedding(), "w": {"weight": array(3, 4)}}
    model = adapted(tree, ["up", "e", "w.weight"])
    kwargs = dict(transposed=["w.weight"])
    _, tensors = exported(tmp_path, model, **kwargs)
    up, table, w = model["m"]["up"], model["e"].weight, model["w"]["weight"]
    A, B = tensors[f"m.{LORA_A}"], tensors[f"m.{LORA_B}"]
    for e in range(3):
        got = B[:, e::3] @ A[2 * e : 2 * e + 2]
        np.testing.assert_allclose(got, up.b[e] @ up.a[e], rtol=1e-5)
    got = tensors["e.lora_embedding_B"] @ tensors["e.lora_embedding_A"]
    np.testing.assert_allclose(got.T, table.b @ table.a, rtol=1e-5)
    got = tensors[f"w.{LORA_B}"] @ tensors[f"w.{LORA_A}"]
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
