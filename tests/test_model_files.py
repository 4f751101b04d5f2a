"""A whole model in files: to the last bit, by name, in one file or in several."""

import json
import os
import subprocess
import sys
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import safetensors.numpy
from files import bits, listing
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxtyping import Array

from lora_quax import (
    AdapterError,
    load_adapter,
    load_model,
    loraify,
    merge,
    save_adapter,
    save_model,
)


class Net(eqx.Module):
    """Of every kind of leaf."""

    layers: list
    table: Array
    half: Array
    count: Array
    mask: Array
    scalar: Array
    empty: Array
    rate: float
    activation: object = jax.nn.relu

    def __init__(self, seed=0):
        keys = jr.split(jr.key(seed), 3)
        self.layers = [
            eqx.nn.Linear(4, 3, key=keys[0]),
            eqx.nn.Linear(3, 5, use_bias=False, key=keys[1]),
        ]
        self.table = jr.normal(keys[2], (6, 4)).T  # Its numbers lie in columns.
        self.half = jnp.arange(seed, seed + 5, dtype=jnp.bfloat16)
        self.count = jnp.arange(seed, seed + 3)
        self.mask = jnp.array([True, seed == 0])
        self.scalar = jnp.float16(seed + 0.5)
        self.empty = jnp.zeros((0, 3))
        self.rate = 0.5


def files_of(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


@pytest.fixture(scope="module")
def net():
    return Net()


LIKES = {
    "concrete": lambda: Net(1),
    "abstract": lambda: eqx.filter_eval_shape(Net),
}
SIZES = {"one file": 5e9, "several files": 64, "one each": 1}
NAMES = {"layers": "model.layers", "layers.1": "head", "table": "embed.weight"}


@pytest.mark.parametrize("like", LIKES.values(), ids=LIKES)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("names", [None, NAMES, lambda path: f"x.{path}"])
def test_a_model_comes_back_to_the_last_bit(tmp_path, net, like, size, names):
    save_model(tmp_path / "net", net, names=names, max_shard_size=size)
    out = load_model(tmp_path / "net", like(), names=names)
    assert bits(out) == bits(net)
    assert jax.tree.structure(out) == jax.tree.structure(net)
    assert out.rate == 0.5


def test_a_single_file(tmp_path, net):
    path = tmp_path / "net.safetensors"
    save_model(path, net)
    assert bits(load_model(path, net)) == bits(net)
    assert [*files_of(tmp_path)] == ["net.safetensors"]
    names = {*safetensors.numpy.load_file(path)}
    assert {"layers.0.weight", "layers.0.bias", "layers.1.weight", "table"} <= names
    assert "rate" not in names
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_several_files_and_their_index(tmp_path, net):
    save_model(tmp_path / "net", net, max_shard_size=64)
    index = json.loads((tmp_path / "net" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    n = len(files)
    assert n > 2
    assert files == [f"model-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)]
    total = 0
    for file in files:
        tensors = safetensors.numpy.load_file(tmp_path / "net" / file)
        size = sum(x.nbytes for x in tensors.values())
        assert size <= 64 or len(tensors) == 1
        assert {index["weight_map"][name] for name in tensors} == {file}
        total += size
    assert index["metadata"] == {"total_size": total}
    again = tmp_path / "again"
    save_model(again, load_model(tmp_path / "net", net), max_shard_size=64)
    assert files_of(again) == files_of(tmp_path / "net")


@pytest.mark.parametrize("first", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("second", SIZES.values(), ids=SIZES)
def test_a_model_takes_the_place_of_another(tmp_path, first, second):
    (tmp_path / "config.json").write_text("{}")
    save_model(tmp_path, Net(1), max_shard_size=first)
    save_model(tmp_path, Net(2), max_shard_size=second)
    assert bits(load_model(tmp_path, Net(0))) == bits(Net(2))
    # Nothing is left of the first.
    save_model(tmp_path / "alone", Net(2), max_shard_size=second)
    alone = files_of(tmp_path / "alone")
    assert len(files_of(tmp_path)) == len(alone) + 1


def test_the_model_that_is_there_stays_whole_until_the_index(tmp_path, monkeypatch):
    save_model(tmp_path, Net(1), max_shard_size=64)
    before = listing(tmp_path)
    replace = os.replace

    def stop(new, goal):
        if str(goal).endswith(".json"):
            assert bits(load_model(tmp_path, Net(0))) == bits(Net(1))
            raise OSError("stop")
        replace(new, goal)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(OSError, match="stop"):
        save_model(tmp_path, Net(2), max_shard_size=64)
    assert listing(tmp_path) == before


def test_stacked_layers(tmp_path):
    keys = jr.split(jr.key(0), 3)
    make = lambda key: eqx.nn.Linear(4, 2, key=key)
    model = {"blocks": eqx.filter_vmap(make)(keys), "head": jnp.ones(3)}
    names = {"blocks": "model.layers.{}.q"}
    save_model(tmp_path, model, names=names)
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    for i, key in enumerate(keys):
        assert bits(tensors[f"model.layers.{i}.q.weight"]) == bits(make(key).weight)
    assert bits(load_model(tmp_path, model, names=names)) == bits(model)


def test_tied_weights_are_one_tensor_and_one_array(tmp_path):
    table = jnp.arange(6.0).reshape(3, 2)
    model = {"embed": table, "head": table}
    names = {"head": "embed"}
    save_model(tmp_path, model, names=names)
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert [*tensors] == ["embed"]
    out = load_model(tmp_path, model, names=names)
    assert out["embed"] is out["head"] and bits(out) == bits(model)
    with pytest.raises(ValueError, match="`embed` and `head` would both be 'embed'"):
        save_model(tmp_path, {"embed": table, "head": table + 1}, names=names)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, "bfloat16"])
def test_another_type(tmp_path, net, dtype):
    cast = lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
    want = jax.tree.map(lambda x: cast(x) if eqx.is_array(x) else x, net)
    save_model(tmp_path / "as it is", net)
    assert bits(load_model(tmp_path / "as it is", net, dtype=dtype)) == bits(want)
    save_model(tmp_path / "narrow", net, dtype=dtype)
    assert bits(load_model(tmp_path / "narrow", want)) == bits(want)
    wide = eqx.tree_at(lambda n: n.half, net, net.table[0, :5])
    with pytest.raises(AdapterError, match="`half` is of type .*; `dtype` converts"):
        load_model(tmp_path / "as it is", wide)


FLOAT8 = [jnp.float8_e4m3fn, jnp.float8_e5m2]


@pytest.mark.parametrize("dtype", FLOAT8, ids=lambda x: x.dtype.name)
def test_eight_bits(tmp_path, dtype):
    model = {"w": jnp.arange(4.0).astype(dtype)}
    save_model(tmp_path, model)
    assert bits(load_model(tmp_path, model)) == bits(model)


def test_a_sharding(tmp_path, net):
    save_model(tmp_path, net)
    device = jax.devices()[0]
    mesh = jax.sharding.Mesh(np.array([device]), "x")
    split = NamedSharding(mesh, PartitionSpec("x"))
    plain = SingleDeviceSharding(device)
    out = load_model(tmp_path, net, sharding=NamedSharding(mesh, PartitionSpec()))
    assert out.table.sharding.mesh == mesh and bits(out) == bits(net)
    assert load_model(tmp_path, net, sharding=device).table.sharding == plain
    assert not load_model(tmp_path, net).table.committed
    # That of `like`.
    like = eqx.filter_eval_shape(Net)
    struct = jax.ShapeDtypeStruct((4, 6), jnp.float32, sharding=split)
    like = eqx.tree_at(lambda n: n.table, like, struct)
    out = load_model(tmp_path, like)
    assert out.table.sharding == split and not out.half.committed
    # A prefix.
    model = {"a": net.layers, "b": net.table}
    save_model(tmp_path / "dict", model)
    out = load_model(tmp_path / "dict", model, sharding={"a": plain, "b": split})
    assert out["b"].sharding == split and out["a"][0].weight.sharding == plain
    assert bits(out) == bits(model)


def test_each_device_reads_its_part(tmp_path):
    code = """
import jax, jax.numpy as jnp, numpy as np, sys
import lora_quax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from lora_quax._disk import model as files
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("x", "y"))
tree = {"w": jnp.arange(32.0).reshape(4, 8), "s": jnp.arange(16.0).reshape(4, 4)}
names = {"s": "layer.{}"}
lora_quax.save_model(sys.argv[1], tree, names=names)
read, part = [], files._part
files._part = lambda *args: read.append(part(*args)) or read[-1]
where = NamedSharding(mesh, PartitionSpec("x", "y"))
out = lora_quax.load_model(sys.argv[1], tree, names=names, sharding=where)
assert all((out[name] == tree[name]).all() for name in tree)
assert max(x.size for x in read) == 8, [x.shape for x in read]
"""
    flags = "--xla_force_host_platform_device_count=4"
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "m")],
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


WRONG = {
    "missing": (lambda x: x.pop("half"), "`half` is missing"),
    "unexpected": (lambda x: x.update(more=x["half"]), "`more` is unexpected"),
    "shape": (
        lambda x: x.update(half=x["half"][:2]),
        r"`half` has shape \(2,\); the model has \(5,\)",
    ),
    "transposed": (
        lambda x: x.update(table=x["table"].T.copy()),
        r"`table` has shape \(6, 4\); the model has \(4, 6\)",
    ),
    "integers for floats": (
        lambda x: x.update(half=x["half"].astype(np.int32)),
        "`half` is of type int32; the model has bfloat16",
    ),
    "floats for integers": (
        lambda x: x.update(count=x["count"].astype(np.float32)),
        "`count` is of type float32; the model has int32",
    ),
    "another float": (
        lambda x: x.update(half=x["half"].astype(np.float32)),
        "`half` is of type float32; the model has bfloat16; `dtype` converts",
    ),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_named(tmp_path, net, case):
    change, message = case
    save_model(tmp_path, net)
    path = tmp_path / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(AdapterError, match=message):
        load_model(tmp_path, net)


def test_all_that_is_wrong_is_listed(tmp_path, net):
    save_model(tmp_path, {"half": net.half[:1], "more": net.half})
    with pytest.raises(AdapterError, match="(?s)`half` has.*`more` is.*`table` is mis"):
        load_model(tmp_path, net)
    with pytest.raises(AdapterError, match="`x.table`, which is `table`, is missing"):
        load_model(tmp_path, net, names=lambda path: f"x.{path}")


INDEXES = {
    "no map": (lambda x: x.pop("weight_map"), "has no `weight_map`"),
    "another file": (
        lambda x: x["weight_map"].update(half="model-00001-of-00099.safetensors"),
        "There is no file",
    ),
    "a path": (
        lambda x: x["weight_map"].update(half="../model.safetensors"),
        "'../model.safetensors' for `half`, which is no file",
    ),
    "one too few": (
        lambda x: x["weight_map"].pop("half"),
        "says that `half` is in no file",
    ),
    "one too many": (
        lambda x: x["weight_map"].update(more=x["weight_map"]["half"]),
        "says that `more` is in model-.*; it is in none of them",
    ),
}


@pytest.mark.parametrize("case", INDEXES.values(), ids=INDEXES)
def test_an_index_at_odds_with_its_files(tmp_path, net, case):
    change, message = case
    save_model(tmp_path, net, max_shard_size=64)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    with pytest.raises((AdapterError, FileNotFoundError), match=message):
        load_model(tmp_path, net)


def _traced(path, net):
    jax.jit(lambda x: save_model(path, {"x": x}))(net.table)


MISNAMED: Any = {"table": "t", "half": 1}
UNSAVABLE = {
    "adapted": (
        lambda path, net: save_model(path, loraify(net, rank=1, key=jr.key(0))),
        ValueError,
        "`layers.0.weight` is adapted. `lora_quax.merge`",
    ),
    "abstract": (
        lambda path, net: save_model(path, eqx.filter_eval_shape(Net)),
        TypeError,
        "is abstract",
    ),
    "traced": (_traced, TypeError, "`x` is traced"),
    "keys": (
        lambda path, net: save_model(path, {"key": jr.key(0)}),
        TypeError,
        "`key` holds random keys",
    ),
    "small integers": (
        lambda path, net: save_model(path, {"x": jnp.zeros(3, jnp.int4)}),
        TypeError,
        "`x` is of type int4",
    ),
    "nothing": (lambda path, net: save_model(path, {"x": 3}), ValueError, "no array"),
    "the model is an array": (
        lambda path, net: save_model(path, net.table),
        ValueError,
        "The model is an array",
    ),
    "one path": (
        lambda path, net: save_model(path, {"a": {"b": net.table}, "a.b": net.half}),
        ValueError,
        "would both be 'a.b'",
    ),
    "a type by no name": (
        lambda path, net: save_model(path, net, dtype="bf16"),
        TypeError,
        "'bfloat16', got 'bf16'",
    ),
    "too large for it": (
        lambda path, net: save_model(path, {"x": jnp.array([1, 7e4])}, dtype="float16"),
        OverflowError,
        "`x` has numbers that are too large for float16, of which the largest is 65504",
    ),
    "too large for one without infinities": (
        lambda path, net: save_model(
            path, {"x": jnp.full(2, 1e3, jnp.bfloat16)}, dtype=jnp.float8_e4m3fn
        ),
        OverflowError,
        "`x` has numbers that are too large for float8_e4m3fn",
    ),
    "a name that is none": (
        lambda path, net: save_model(
            path, net, names=dict[str, Any](table="t", half=1)
        ),
        TypeError,
        "which are strings; got 1 for 'half'",
    ),
    "no such name": (
        lambda path, net: save_model(path, net, names={"nose": "n"}),
        ValueError,
        "'nose' of `names` matched no array",
    ),
    "too many axes": (
        lambda path, net: save_model(path, net, names={"half": "x.{}.{}"}),
        ValueError,
        "more stacked axes than it has",
    ),
    "no float": (
        lambda path, net: save_model(path, net, dtype=jnp.int8),
        TypeError,
        "`dtype` must be a floating-point type",
    ),
    "no size": (
        lambda path, net: save_model(path, net, max_shard_size=0),
        ValueError,
        "`max_shard_size` must be positive, got 0",
    ),
}


@pytest.mark.parametrize("case", UNSAVABLE.values(), ids=UNSAVABLE)
def test_what_cannot_be_saved_leaves_all_as_it_was(tmp_path, net, case):
    save, kind, message = case
    save_model(tmp_path / "net", net)
    before = listing(tmp_path)
    with pytest.raises(kind, match=message):
        save(tmp_path / "net", net)
    with pytest.raises(kind, match=message):
        save(tmp_path / "new" / "net", net)
    assert listing(tmp_path) == before


LARGE = {"x": jnp.array([-1e6, jnp.inf])}
UNLOADABLE = {
    "nothing there": (
        lambda path, net: load_model(path / "nothing", net),
        FileNotFoundError,
        "There is no file",
    ),
    "an empty folder": (
        lambda path, net: load_model(path / "empty", net),
        FileNotFoundError,
        "There is no model.safetensors in",
    ),
    "adapted": (
        lambda path, net: load_model(path, loraify(net, rank=1, key=jr.key(0))),
        ValueError,
        "is adapted",
    ),
    "no float": (
        lambda path, net: load_model(path, net, dtype=int),
        TypeError,
        "`dtype` must be a floating-point type",
    ),
    "too large for the type": (
        lambda path, net: load_model(path / "large", LARGE, dtype=jnp.float16),
        OverflowError,
        "`x` has numbers that are too large for float16",
    ),
    "too large, stacked and sharded": (
        lambda path, net: load_model(
            path / "large",
            LARGE,
            dtype=jnp.float16,
            names={"x": "x"},
            sharding=jax.devices()[0],
        ),
        OverflowError,
        "`x` has numbers that are too large for float16",
    ),
    "no prefix": (
        lambda path, net: load_model(path, net, sharding={"a": jax.devices()[0]}),
        ValueError,
        "`sharding` is no prefix of the model",
    ),
    "no sharding": (
        lambda path, net: load_model(path, net, sharding="cpu"),
        TypeError,
        "`sharding` must be",
    ),
    "an adapter": (
        lambda path, net: load_model(path / "adapter", net),
        AdapterError,
        "it is an adapter",
    ),
}


@pytest.mark.parametrize("case", UNLOADABLE.values(), ids=UNLOADABLE)
def test_what_cannot_be_loaded(tmp_path, net, case):
    load, kind, message = case
    save_model(tmp_path, net)
    (tmp_path / "empty").mkdir()
    save_model(tmp_path / "large", LARGE)
    save_adapter(tmp_path / "adapter", loraify(net, rank=1, key=jr.key(0)))
    with pytest.raises(kind, match=message):
        load(tmp_path, net)


def test_an_infinity_stays_one(tmp_path):
    model = {"x": jnp.array([1, jnp.inf, -jnp.inf, jnp.nan])}
    save_model(tmp_path, model, dtype=jnp.float16)
    out = load_model(tmp_path, model, dtype=jnp.bfloat16)["x"]
    np.testing.assert_array_equal(out.astype(jnp.float32), model["x"])


def test_double_precision_is_not_narrowed_in_silence(tmp_path):
    model = {"w": np.arange(3.0)}
    save_model(tmp_path, model)
    with pytest.raises(AdapterError, match="`w` is of type float64, which JAX has"):
        load_model(tmp_path, model)
    out = load_model(tmp_path, model, dtype=jnp.float32)
    assert out["w"].dtype == jnp.float32


def test_a_merged_model_leaves_and_comes_back(tmp_path, net):
    model = loraify(net, rank=1, key=jr.key(0), init_b=jax.nn.initializers.normal(1))
    save_adapter(tmp_path / "adapter", model)
    save_model(tmp_path / "merged", merge(model))
    out = load_model(tmp_path / "merged", eqx.filter_eval_shape(Net))
    assert bits(out) == bits(merge(model))
    assert bits(merge(load_adapter(tmp_path / "adapter", net))) == bits(out)
