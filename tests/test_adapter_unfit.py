"""Adapters and models that do not fit each other, or cannot be saved, are refused."""

import collections
import os
import pickle
import zipfile

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import safetensors.numpy
from adapters import (
    a_linear,
    abstract,
    an_mlp,
    linears_and,
    lora,
    lora_mlp,
    lora_weight,
    models_of,
    refused,
    rewritten,
)
from files import bits, listing

from lora_quax import (
    AdapterError,
    FullArray,
    load_adapter,
    loraify,
    LowRankArray,
    partition,
    peft,
    save_adapter,
    unload,
)


@pytest.fixture
def mlp(tmp_path):
    """A model and its adapter's file."""
    _, model, _ = models_of("mlp")
    path = tmp_path / "adapter"
    save_adapter(path, model)
    return model, path


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
        lambda key: [an_mlp(key)],
        [f"the model has no `layers.{i}.weight`" for i in range(3)],
    ),
    "nothing": (
        lambda key: None,
        [f"the model has no `layers.{i}.weight`" for i in range(3)],
    ),
    "of another rank": (
        lambda key: loraify(an_mlp(key), 3, key),
        [rf"layers.{i}.weight.delta.{x}` has" for i in range(3) for x in "ab"],
    ),
    "with more that is adapted": (
        lambda key: loraify(an_mlp(key), 2, key, targets=linears_and("layers.0.bias")),
        ["`layers.0.bias.value` is missing"],
    ),
    "without numbers": (
        lambda key: eqx.tree_at(
            lambda m: m.layers[0].weight, an_mlp(key), replace_fn=lambda _: "a text"
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
        lora_weight,
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
    model = loraify([a_linear(jr.key(0))], 2, jr.key(1))
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
    "plain": (lambda: an_mlp(jr.key(0)), ValueError, "Nothing in the model trains"),
    "abstract": (
        lambda: abstract(lora_mlp()),
        TypeError,
        "`layers.0.weight.delta.a` is abstract.* Save a concrete model",
    ),
    "what trains": (
        lambda: partition(lora_mlp())[0],
        ValueError,
        "`layers.0.weight` has None for its `base`",
    ),
    "what is frozen": (
        lambda: partition(lora_mlp())[1],
        ValueError,
        "`layers.0.weight` has None for its `delta.a`",
    ),
    **{
        name: (
            lambda make=make: make(lora_weight()),
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
    model = lora_mlp()
    with pytest.raises(TypeError, match="is traced.*outside of `jax.jit`"):
        eqx.filter_jit(lambda model: save_adapter(tmp_path / "x", model))(model)
    assert not listing(tmp_path)


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_loading_onto_an_ambiguous_model(name, tmp_path):
    x = lora_weight()
    save_adapter(tmp_path / "x", {"a": {"b": x, "1": x}})
    with pytest.raises(ValueError, match="Several arrays of the model have the path"):
        load_adapter(tmp_path / "x", AMBIGUOUS[name](jnp.ones((3, 4))))


def test_float64_needs_x64(tmp_path):
    with jax.enable_x64(True):
        base = {"w": jnp.ones((3, 4), jnp.float64)}
        save_adapter(tmp_path / "x", {"w": lora(base["w"], key=jr.key(0))})
    problem = "`w.delta.[ab]` is of type float64, which JAX has with `jax_enable_x64`"
    base = {"w": jnp.ones((3, 4))}
    with refused(problem, problem, folder=tmp_path, model=base):
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
