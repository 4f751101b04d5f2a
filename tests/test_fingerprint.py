"""An adapter on another base than its own says so."""

import json
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from files import bits, Int8
from helpers import adapted
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from lora_quax import AdapterError, load_adapter, loraify, save_adapter
from lora_quax._disk.fingerprint import fingerprint


def mlp(key=0):
    return eqx.nn.MLP(4, 5, 6, 1, key=jr.key(key))


def cast(tree, dtype):
    is_float = lambda x: eqx.is_array(x) and jnp.issubdtype(x.dtype, jnp.floating)
    return jax.tree.map(lambda x: x.astype(dtype) if is_float(x) else x, tree)


@pytest.fixture
def path(tmp_path):
    save_adapter(tmp_path / "x", adapted(mlp()))
    return tmp_path / "x"


def at(where, value):
    return lambda: eqx.tree_at(where, mlp(), value)


OTHERS = {
    "another draw": (lambda: mlp(1), r"`layers\.0\.weight` has other numbers"),
    "a bias": (
        at(lambda m: m.layers[1].bias, jnp.zeros(5)),
        r"`layers\.1\.bias` has other numbers$",
    ),
    "no bias": (
        lambda: eqx.tree_at(lambda m: m.layers[1].bias, mlp(), None),
        r"it has no `layers\.1\.bias`$",
    ),
    "another bias": (
        at(lambda m: m.layers[1].bias, jnp.zeros(1)),
        r"`layers\.1\.bias` is float32\[1\], and was float32\[5\]$",
    ),
    "one array more": (
        at(lambda m: m.activation, jnp.zeros(5)),
        r"it has `activation` as well$",
    ),
    "other numbers, rounded": (
        lambda: cast(mlp(1), jnp.bfloat16),
        r"`layers\.0\.weight` has other numbers",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_bases(path, name):
    make, match = OTHERS[name]
    with pytest.warns(UserWarning, match="trained on another base") as caught:
        model = load_adapter(path, make())
    (warning,) = caught
    with pytest.raises(AdapterError, match=f"(?s)trained on another base.*{match}"):
        load_adapter(path, make(), same_base=True)
    with pytest.raises(AdapterError) as info:
        load_adapter(path, model, same_base=True)
    assert str(info.value) == str(warning.message)


SAME = {
    "as it was": mlp,
    "adapted": lambda: adapted(mlp()),
    "of NumPy": lambda: jax.tree.map(
        lambda x: np.asarray(x) if eqx.is_array(x) else x, mlp()
    ),
    "bfloat16": lambda: cast(mlp(), jnp.bfloat16),
    "abstract": lambda: eqx.filter_eval_shape(mlp),
    "sharded": lambda: jax.tree.map(
        lambda x: jax.device_put(x, sharding(x)) if eqx.is_array(x) else x, mlp()
    ),
}


def sharding(x):
    spec = P("x") if x.shape[0] % 2 == 0 else P()
    return NamedSharding(Mesh(jax.devices()[:2], "x"), spec)


@pytest.mark.parametrize("name", SAME)
def test_the_same_base(path, name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(path, SAME[name]())
        load_adapter(path, SAME[name](), same_base=True)


@pytest.mark.parametrize("name", SAME)
def test_fingerprints_of_the_same_base(name):
    known, other = fingerprint(mlp()), fingerprint(SAME[name]())
    assert known.keys() == other.keys()
    rounded = [x.split()[2] for x in known.values()]
    got = [x.split()[2] for x in other.values()]
    assert got == (["-"] * 4 if name == "abstract" else rounded)


def test_what_is_trained_and_lost():
    """An unmodified loop has trained a bias: the file is not for the old base."""
    trained = eqx.tree_at(lambda m: m.layers[0].bias, adapted(mlp()), jnp.ones(6))
    assert fingerprint(trained) != fingerprint(mlp())


def test_what_comes_with_the_adapter_has_no_numbers(tmp_path):
    model = loraify(mlp(), 2, jr.key(0), stop_gradient=False)
    assert fingerprint(model)["layers.0.weight"] == "float32[6,4] - -"
    save_adapter(tmp_path / "x", model)
    load_adapter(tmp_path / "x", mlp(), same_base=True)
    # What trains in full leaves its original as it was.
    model = loraify(mlp(), 2, jr.key(0), targets={"bias": "full"})
    assert fingerprint(model) == fingerprint(mlp())


def test_values_of_other_libraries(tmp_path):
    quantised = lambda w: Int8((16 * w).astype(jnp.int8))
    base = eqx.tree_at(lambda m: m.layers[0].weight, mlp(), replace_fn=quantised)
    save_adapter(tmp_path / "x", adapted(base))
    load_adapter(tmp_path / "x", base, same_base=True)
    assert fingerprint(base)["layers.0.weight"].startswith("Int8[6,4] ")
    with pytest.raises(AdapterError, match=r"`layers\.0\.weight` has other numbers"):
        load_adapter(tmp_path / "x", mlp(), same_base=True)


def test_arrays_of_any_shape_and_type():
    arrays = {
        "scalar": jnp.array(1.0),
        "empty": jnp.zeros((0, 3)),
        "flags": jnp.array([True, False]),
        "keys": jr.split(jr.key(0)),
        "small": jnp.ones((3, 3), jnp.float8_e4m3fn),
        "large": jnp.zeros((300, 300)),
        "not an array": 1.0,
        "a.b": jnp.ones(1),
        "a": {"b": jnp.ones(2)},
    }
    got = fingerprint(arrays)
    assert got.keys() == arrays.keys() - {"not an array", "a", "a.b"}
    assert got["keys"].endswith(" - -") and got["scalar"].startswith("float32[] ")
    assert max(map(len, got.values())) < 60
    deleted = jnp.ones(3)
    deleted.delete()
    assert fingerprint([deleted]) == {"0": "float32[3] - -"}


def changed(path, change):
    with safetensors.safe_open(path, framework="numpy") as file:
        about = json.loads(file.metadata()["lora_quax"])
    change(about)
    tensors = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file(tensors, path, {"lora_quax": json.dumps(about)})


def test_files_without_one(path):
    changed(path, lambda about: about.pop("base"))
    assert bits(load_adapter(path, mlp(1), same_base=True).layers[0].weight.b)


@pytest.mark.parametrize("base", [3, [], "x", {"a": 1}, {"a": "b"}, {"a": None}])
def test_nonsense_in_a_file(path, base):
    changed(path, lambda about: about.update(base=base))
    with pytest.raises(AdapterError, match="what it says of its base is no fingerpr"):
        load_adapter(path, mlp())


@pytest.mark.parametrize("state", [3, ["nope"], [1], {"a": 1}, "x", [[]]])
def test_nonsense_for_a_state(path, state):
    changed(path, lambda about: about.update(state=state))
    with pytest.raises(AdapterError, match="its description cannot be read"):
        load_adapter(path, mlp())


def test_a_plan_has_none(tmp_path):
    """As `convert` writes a file, with the layers that the adapter names alone."""
    abstract = eqx.filter_eval_shape(mlp)
    factors = adapted(mlp())
    where = lambda m: [layer.weight.base for layer in m.layers]
    skeleton = eqx.tree_at(where, factors, [l.weight for l in abstract.layers])
    skeleton = eqx.tree_at(lambda m: [l.bias for l in m.layers], skeleton, [None] * 2)
    save_adapter(tmp_path / "x", skeleton)
    load_adapter(tmp_path / "x", mlp(), same_base=True)
