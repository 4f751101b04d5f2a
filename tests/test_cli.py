"""The command line: on files alone, with no model and no PyTorch."""

import json
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import safetensors.numpy
from helpers import adapted, normal
from jaxtyping import Array
from rich.console import Console

import lora_quax
from lora_quax import LoraArray, peft
from lora_quax.__main__ import main


# Models, each adapted in ways that both formats have.


class Experts(eqx.Module):
    up: Array

    def __init__(self, shape, key):
        self.up = normal(key, shape)


class Net(eqx.Module):
    embed: eqx.nn.Embedding
    conv: eqx.nn.Conv2d
    layers: list[eqx.nn.Linear]
    experts: Experts
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jr.split(key, 6)
        self.embed = eqx.nn.Embedding(7, 4, key=keys[0])
        self.conv = eqx.nn.Conv2d(4, 5, 3, key=keys[1])
        self.layers = [
            eqx.nn.Linear(4, 5, key=keys[2]),
            eqx.nn.Linear(5, 5, key=keys[3]),
        ]
        self.experts = Experts((3, 5, 4), keys[4])
        self.head = eqx.nn.Linear(5, 2, key=keys[5])


TARGETS: dict[str, dict[Any, Any]] = {
    "linear": {"layers.0": True},
    "linear of two ranks": {"layers.0": 1, "layers.1": lora_quax.Adapt(3, alpha=0.5)},
    "embedding": {"embed": True},
    "convolution": {"conv": True},
    "convolution and its bias": {"conv": True, "conv.bias": "full"},
    "experts": {"up": True},
    "biases": {r"layers\..*\.weight": True, "layers.1.bias": "full"},
    "bias of another layer": {"layers.0": True, "layers.1.bias": "full"},
    "head": {"layers.0": True, "head": "full"},
    "everything": {
        eqx.nn.Linear: True,
        "embed": 3,
        "conv": 1,
        "up": True,
        "conv.bias": "full",
        "head": "full",
    },
}


@pytest.fixture(scope="module")
def net():
    return Net(jr.key(0))


def model(net, targets: str):
    return adapted(net, targets=TARGETS[targets])


def trained(x):
    """With what training changes changed."""
    params, frozen = lora_quax.partition(x)
    # In NumPy, which compiles nothing.
    return eqx.combine(
        jax.tree.map(
            lambda y: jnp.asarray((1.25 * np.asarray(y)).astype(y.dtype)), params
        ),
        frozen,
    )


def cast(net, dtype):
    return jax.tree.map(
        lambda x: jnp.asarray(np.asarray(x).astype(dtype)) if eqx.is_array(x) else x,
        net,
    )


def run(*arguments) -> int:
    return main([*map(str, arguments)])


def fails(capsys, *arguments) -> str:
    """The error of a command that has to fail."""
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("lora_quax: error: ")
    return err


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(path)


def equal_bits(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(
        (x.shape, x.dtype, x.tobytes())
        == (other[name].shape, other[name].dtype, other[name].tobytes())
        for name, x in one.items()
    )


def same_leaves(one, other) -> bool:
    trees = [lora_quax.partition(x)[0] for x in (one, other)]
    (first, structure), (second, other_structure) = map(jax.tree.flatten, trees)
    leaves = ({str(i): np.asarray(x) for i, x in enumerate(y)} for y in (first, second))
    return structure == other_structure and equal_bits(*leaves)


def base_of(x) -> dict[str, np.ndarray]:
    """The arrays of a plain model, by their paths."""
    from lora_quax._model.paths import leaves_of

    arrays = {leaf.path: leaf.value for leaf in leaves_of(lora_quax.unload(x))}
    return {name: np.asarray(y) for name, y in arrays.items() if eqx.is_array(y)}


# convert


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "targets",
    [
        "everything",
        *(
            pytest.param(x, marks=pytest.mark.slow)
            for x in TARGETS
            if x != "everything"
        ),
    ],
)
def test_there_and_back(targets, dtype, net, tmp_path):
    net = cast(net, dtype)
    first = trained(model(net, targets))
    ours, theirs, again = tmp_path / "a.safetensors", tmp_path / "p", tmp_path / "b"
    lora_quax.save_adapter(ours, first)
    assert run("convert", ours, theirs) == 0
    assert same_leaves(peft.load(theirs, net), first)
    assert run("convert", theirs, again) == 0
    assert same_leaves(lora_quax.load_adapter(again, net), first)
    assert equal_bits(tensors_of(ours), tensors_of(again))
    assert run("diff", ours, again) == 0


def test_dora(net, tmp_path, capsys):
    """Its magnitudes are converted, shown and compared, and no base is needed."""
    targets = {eqx.nn.Linear: True, "embed": 3, "conv": 1}
    first = trained(adapted(net, targets=targets, use_dora=True))
    ours, theirs, again = tmp_path / "a.safetensors", tmp_path / "p", tmp_path / "b"
    lora_quax.save_adapter(ours, first)
    assert run("convert", ours, theirs) == 0
    assert same_leaves(peft.load(theirs, net), first)
    assert run("convert", theirs, again) == 0
    assert same_leaves(lora_quax.load_adapter(again, net), first)
    assert run("diff", ours, again) == 0 == run("diff", ours, theirs)
    capsys.readouterr()
    assert run("inspect", theirs) == 0
    assert capsys.readouterr().out.count("magnitude") == 5
    lora_quax.save_adapter(tmp_path / "c", trained(first))
    assert run("diff", ours, tmp_path / "c") == 1
    assert "head.weight (magnitude): relative difference 0.2" in capsys.readouterr().out
    lora_quax.save_model(tmp_path / "base", net)
    for adapter in ours, theirs:
        said = fails(capsys, "merge", tmp_path / "base", adapter, tmp_path / "merged")
        assert "`head.weight` is adapted by DoRA" in said
        assert not (tmp_path / "merged").exists()


def test_names_of_pytorch_and_back(net, tmp_path):
    first = trained(model(net, "everything"))
    ours, theirs, again = tmp_path / "a.safetensors", tmp_path / "p", tmp_path / "b"
    there = {"layers.{}": "model.blocks.{}.q_proj", "embed": "model.tokens"}
    back = {"model.blocks.{}.q_proj": "layers.{}", "model.tokens": "embed"}
    for name, names in ("there", there), ("back", back):
        (tmp_path / name).write_text(json.dumps(names))
    lora_quax.save_adapter(ours, first)
    assert run("convert", ours, theirs, "--names", tmp_path / "there") == 0
    key = "base_model.model.model.blocks.1.q_proj.lora_A.weight"
    assert key in tensors_of(theirs / "adapter_model.safetensors")
    assert run("convert", theirs, again, "--names", tmp_path / "back") == 0
    assert equal_bits(tensors_of(ours), tensors_of(again))


def test_the_bias_of_a_convolution_alone_is_a_vector_in_peft(net, tmp_path):
    """Its files do not say that it is one of a convolution: there is no way back."""
    targets = {"layers.0": True, "conv.bias": "full"}
    first = trained(adapted(net, targets=targets))
    lora_quax.save_adapter(tmp_path / "a", first)
    assert run("convert", tmp_path / "a", tmp_path / "p") == 0
    assert same_leaves(peft.load(tmp_path / "p", net), first)


def test_experts_kept_as_in_out(tmp_path):
    first = adapted(Experts((3, 4, 5), jr.key(0)), targets="up")
    tree = {"moe": first}
    ours, theirs, again = tmp_path / "a.safetensors", tmp_path / "p", tmp_path / "b"
    lora_quax.save_adapter(ours, tree)
    assert run("convert", ours, theirs, "--transposed", "up") == 0
    A = tensors_of(theirs / "adapter_model.safetensors")[
        "base_model.model.moe.lora_A.weight"
    ]
    assert A.shape == (3 * 2, 4)
    assert run("convert", theirs, again, "--transposed", "up") == 0
    assert equal_bits(tensors_of(ours), tensors_of(again))


def test_float64_is_not_narrowed(x64, net, tmp_path):
    net = cast(net, float)
    lora_quax.save_adapter(tmp_path / "a", model(net, "everything"))
    with jax.enable_x64(False):
        assert run("convert", tmp_path / "a", tmp_path / "p") == 0
        assert run("convert", tmp_path / "p", tmp_path / "b") == 0
    assert equal_bits(tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b"))


def nested(key):
    once = adapted(eqx.nn.Linear(4, 5, key=key))
    again = LoraArray(once.weight, rank=2, key=key, stop_gradient=False)
    return {"layer": eqx.tree_at(lambda l: l.weight, once, again)}


def stacked(key):
    linear = eqx.filter_vmap(lambda key: eqx.nn.Linear(4, 5, key=key))
    return {"layers": adapted(linear(jr.split(key, 3)))}


REFUSED = {
    "groups": (
        lambda key: {"conv": adapted(eqx.nn.Conv1d(4, 4, 3, groups=2, key=key))},
        "a convolution of 2 groups",
    ),
    "transposed": (
        lambda key: {"conv": adapted(eqx.nn.ConvTranspose1d(4, 4, 3, key=key))},
        "a transposed convolution",
    ),
    "nested": (nested, "an adapter on an adapter"),
    "stacked": (stacked, "Layers that are stacked need a name"),
    "product": (
        lambda key: {"m.w": lora_quax.LowRankArray.init((4, 5), rank=2, key=key)},
        "there is no `LoraArray`",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_peft_does_not_have(case, tmp_path, capsys):
    make, reason = REFUSED[case]
    lora_quax.save_adapter(tmp_path / "a", make(jr.key(0)))
    assert reason in fails(capsys, "convert", tmp_path / "a", tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_stacked_layers_have_names(tmp_path, capsys):
    tree = stacked(jr.key(0))
    lora_quax.save_adapter(tmp_path / "a", tree)
    names = tmp_path / "names.json"
    names.write_text('{"layers": "model.layers.{}.q"}')
    assert run("convert", tmp_path / "a", tmp_path / "p", "--names", names) == 0
    base = lora_quax.unload(tree)
    loaded = peft.load(tmp_path / "p", base, names={"layers": "model.layers.{}.q"})
    assert same_leaves(loaded, tree)
    # One by one they come back, and no two to one place.
    assert run("convert", tmp_path / "p", tmp_path / "b") == 0
    assert "model.layers.2.q.weight.delta.a" in tensors_of(tmp_path / "b")
    names.write_text('{"model.layers.{}.q": "layers"}')
    error = fails(capsys, "convert", tmp_path / "p", tmp_path / "c", "--names", names)
    assert "would both be `layers.weight`" in error


# An adapter of PEFT's, by hand: what its own library writes that ours does not.


def write_peft(folder: Path, tensors: dict[str, np.ndarray], **config) -> Path:
    folder.mkdir(parents=True)
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, **config}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    tensors = {f"base_model.model.{name}": x for name, x in tensors.items()}
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def draw(*shape, seed=0, dtype: Any = np.float32) -> np.ndarray:
    x = np.random.default_rng((seed, *shape)).normal(size=shape)
    return x.astype(np.float32).astype(dtype)


def pair(module: str, n_out: int, n_in: int, rank=2, seed=0) -> dict[str, np.ndarray]:
    return {
        f"{module}.lora_A.weight": draw(rank, n_in, seed=seed),
        f"{module}.lora_B.weight": draw(n_out, rank, seed=seed + 1),
    }


FROM_PEFT_REFUSED = {
    "order": (
        pair("m", 5, 4, 6) | pair("m.base_layer", 4, 5, 6),
        {"target_parameters": ["m.down", "m.up"]},
        "may be of m.down or m.up",
    ),
    "bias of B": (
        pair("q", 5, 4) | {"q.lora_B.bias": draw(5)},
        {"target_modules": ["q"], "lora_bias": True},
        "`q.bias` is added to, by `lora_bias`",
    ),
    "groups": (
        {"c.lora_A.weight": draw(2, 4, 3), "c.lora_B.weight": draw(4, 1, 1)},
        {"target_modules": ["c"]},
        "a convolution of 2 groups",
    ),
    "convolution saved whole": (
        pair("q", 5, 4) | {"c.weight": draw(4, 4, 3)},
        {"target_modules": ["q"], "modules_to_save": ["c"]},
        "may be of a transposed convolution",
    ),
    "statistics": (
        pair("q", 5, 4) | {"n.count": np.asarray([3])},
        {"target_modules": ["q"], "modules_to_save": ["n"]},
        "`n.count` is of type int64",
    ),
    "rank": (
        pair("q", 5, 4, rank=3),
        {"target_modules": ["q"]},
        r"A of shape (3, 4) and B of shape (5, 3) are not of the rank 2",
    ),
}


@pytest.mark.parametrize("case", FROM_PEFT_REFUSED)
def test_what_the_files_do_not_say(case, tmp_path, capsys):
    tensors, config, reason = FROM_PEFT_REFUSED[case]
    source = write_peft(tmp_path / "p", tensors, **config)
    assert reason in fails(capsys, "convert", source, tmp_path / "a")
    assert not (tmp_path / "a").exists()


# merge


def write_base(folder: Path, tensors: dict[str, np.ndarray], n_shards: int) -> None:
    """A model as transformers would save it."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"old weights")
    names = sorted(tensors)
    files, where = {}, {}
    for i in range(n_shards):
        file = f"model-{i + 1:05}-of-{n_shards:05}.safetensors"
        file = file if n_shards > 1 else "model.safetensors"
        files[file] = {name: tensors[name] for name in names[i::n_shards]}
        where |= dict.fromkeys(files[file], file)
    for file, part in files.items():
        safetensors.numpy.save_file(part, folder / file, metadata={"format": "pt"})
    if n_shards > 1:
        index = {"metadata": {}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def read_folder(folder: Path) -> dict[str, np.ndarray]:
    out = {}
    for file in folder.glob("*.safetensors"):
        out |= tensors_of(file)
        with safetensors.safe_open(file, "numpy") as handle:
            assert handle.metadata() == {"format": "pt"}
    return out


def expected(x) -> dict[str, np.ndarray]:
    """The merged arrays in float64, by NumPy."""
    from lora_quax._model.paths import leaves_of

    out = {}
    for leaf in leaves_of(x):
        y = leaf.value
        if isinstance(y, LoraArray):
            delta = y.delta
            a, b = (np.asarray(z, np.float64) for z in (delta.a, delta.b))
            a = a.reshape(*a.shape[: a.ndim - delta.cols], -1)
            product = delta.alpha / delta.rank * (b @ a)
            y = np.asarray(y.base, np.float64) + product.reshape(y.shape)
        elif isinstance(y, lora_quax.FullArray):
            y = y.value
        if eqx.is_array(y) or isinstance(y, np.ndarray):
            out[leaf.path] = np.asarray(y, np.float64)
    return out


EPS = {"float64": 1e-12, "float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}


@pytest.mark.parametrize("n_shards", [1, 3])
@pytest.mark.parametrize("form", ["ours", "PEFT"])
@pytest.mark.parametrize("dtype", EPS)
def test_merge(dtype, form, n_shards, net, x64, tmp_path):
    net = cast(net, dtype)
    first = trained(model(net, "everything"))
    save = lora_quax.save_adapter if form == "ours" else peft.save
    save(tmp_path / "adapter", first)
    tensors = base_of(first)
    write_base(tmp_path / "base", tensors, n_shards)
    out = tmp_path / "out"
    assert run("merge", tmp_path / "base", tmp_path / "adapter", out) == 0
    merged, wanted = read_folder(out), expected(first)
    assert merged.keys() == tensors.keys() == wanted.keys()
    for name, x in merged.items():
        assert x.dtype == tensors[name].dtype and x.shape == tensors[name].shape
        np.testing.assert_allclose(
            x.astype(float), wanted[name], rtol=EPS[dtype], atol=EPS[dtype]
        )
    sources = {file.name for file in (tmp_path / "base").iterdir()}
    assert {file.name for file in out.iterdir()} == sources - {"pytorch_model.bin"}


def test_merge_of_a_file(net, tmp_path):
    """Into a file of that name, or an empty folder; what does not change stays."""
    first = trained(model(net, "linear"))
    lora_quax.save_adapter(tmp_path / "a", first)
    (tmp_path / "folder").mkdir()
    base = tmp_path / "base.safetensors"
    tensors = base_of(first) | {"index": np.arange(3)}
    safetensors.numpy.save_file(tensors, base, metadata={"some": "thing"})
    assert run("merge", base, tmp_path / "a", tmp_path / "out") == 0
    assert run("merge", base, tmp_path / "a", tmp_path / "folder") == 0
    merged = tensors_of(tmp_path / "out")
    assert (
        merged.pop("layers.0.weight").tobytes()
        != tensors.pop("layers.0.weight").tobytes()
    )
    assert equal_bits(merged, tensors)
    in_folder = tmp_path / "folder" / "base.safetensors"
    assert in_folder.read_bytes() == (tmp_path / "out").read_bytes()


def test_an_update_of_zero_changes_no_bit(tmp_path):
    weight = draw(5, 4)
    weight[0, 0] = -0.0
    update = {"q.lora_A.weight": draw(2, 4), "q.lora_B.weight": draw(5, 2) * 0}
    adapter = write_peft(tmp_path / "p", update, target_modules=["q"])
    safetensors.numpy.save_file({"q.weight": weight}, tmp_path / "base")
    assert run("merge", tmp_path / "base", adapter, tmp_path / "out") == 0
    assert equal_bits(tensors_of(tmp_path / "out"), {"q.weight": weight})


def test_merge_of_stacked_layers(tmp_path):
    tree = stacked(jr.key(0))
    lora_quax.save_adapter(tmp_path / "a", tree)
    weight = np.asarray(tree["layers"].weight.base)
    base = {f"model.layers.{i}.q.weight": x for i, x in enumerate(weight)}
    safetensors.numpy.save_file(base, tmp_path / "base")
    names = tmp_path / "names.json"
    names.write_text('{"layers": "model.layers.{}.q"}')
    arguments = tmp_path / "base", tmp_path / "a", tmp_path / "out"
    assert run("merge", *arguments, "--names", names) == 0
    wanted = expected(tree)["layers.weight"]
    for name, x in tensors_of(tmp_path / "out").items():
        np.testing.assert_allclose(x, wanted[int(name.split(".")[2])], rtol=1e-5)


def test_merge_of_an_adapter_on_an_adapter(tmp_path):
    tree = nested(jr.key(0))
    tree = eqx.tree_at(
        lambda x: x["layer"].weight.delta.b, tree, replace_fn=lambda x: x + 1
    )
    lora_quax.save_adapter(tmp_path / "a", tree)
    outer = tree["layer"].weight
    base = {"layer.weight": np.asarray(outer.base.base)}
    safetensors.numpy.save_file(base, tmp_path / "base")
    assert run("merge", tmp_path / "base", tmp_path / "a", tmp_path / "out") == 0
    wanted = np.asarray(lora_quax.merge(tree)["layer"].weight)
    merged = tensors_of(tmp_path / "out")["layer.weight"]
    np.testing.assert_allclose(merged, wanted, rtol=1e-5, atol=1e-6)


# Cases of PEFT's: the adapter, its configuration, the base, and what a base tensor is
# to become, in float64; `S` is the scaling.

S = 3 / 2


def product(tensors, module: str) -> np.ndarray:
    A, B = (tensors[f"{module}.lora_{side}.weight"].astype(float) for side in "AB")
    return S * B @ A


def experts(tensors, module: str) -> np.ndarray:
    """The updates of three experts, (out, in) each."""
    A, B = (tensors[f"{module}.lora_{side}.weight"].astype(float) for side in "AB")
    return np.stack([S * B[:, e::3] @ A[2 * e : 2 * e + 2] for e in range(3)])


def conv1d():
    tensors = pair("wide", 6, 4) | pair("square", 4, 4)
    base = {"wide.weight": draw(4, 6), "square.weight": draw(4, 4)}
    deltas = {f"{name}.weight": product(tensors, name).T for name in ("wide", "square")}
    config = {"target_modules": ["wide", "square"], "fan_in_fan_out": True}
    return tensors, config, base, deltas


def bias_of_b():
    bias = draw(5)
    tensors = pair("q", 5, 4) | {"q.lora_B.bias": bias}
    base = {"q.weight": draw(5, 4), "q.bias": draw(5, seed=3)}
    deltas = {"q.weight": product(tensors, "q"), "q.bias": S * bias}
    return tensors, {"target_modules": ["q"], "lora_bias": True}, base, deltas


def rank_stabilised():
    tensors = pair("q", 5, 4, rank=4)
    base = {"q.weight": draw(5, 4)}
    config = {"target_modules": ["q"], "r": 4, "use_rslora": True}
    return tensors, config, base, {"q.weight": product(tensors, "q")}  # 3/√4 is S too.


def saved_embedding():
    saved = draw(7, 4, seed=9)
    tensors = {
        "e.lora_embedding_A": draw(2, 7),
        "e.lora_embedding_B": draw(4, 2),
        "e.base_layer.weight": saved,
    }
    A, B = tensors["e.lora_embedding_A"], tensors["e.lora_embedding_B"]
    base = {"e.weight": draw(7, 4)}
    delta = S * (B.astype(float) @ A).T + saved - base["e.weight"]
    return tensors, {"target_modules": ["e"]}, base, {"e.weight": delta}


def saved_modules():
    tensors = pair("q", 5, 4) | {"n.weight": draw(4), "n.count": np.asarray([3])}
    base = {
        "q.weight": draw(5, 4),
        "n.weight": draw(4, seed=2),
        "n.count": np.asarray([1]),
    }
    deltas = {name: tensors[name] - base[name] for name in ("n.weight", "n.count")}
    deltas["q.weight"] = product(tensors, "q")
    config = {"target_modules": ["q"], "modules_to_save": ["n"]}
    return tensors, config, base, deltas


def two_parameters():
    """Of one module, kept as (in, out): which is which, the shapes say; and the square
    one lies as its neighbour does."""
    tensors = pair("m", 4, 4, 6) | pair("m.base_layer", 8, 4, 6, seed=5)
    base = {"m.up": draw(3, 4, 8), "m.down": draw(3, 4, 4)}
    deltas = {
        "m.up": experts(tensors, "m.base_layer").swapaxes(1, 2),
        "m.down": experts(tensors, "m").swapaxes(1, 2),
    }
    return tensors, {"target_parameters": ["m.down", "m.up"]}, base, deltas


def one_parameter():
    tensors = pair("m", 5, 4, 6)
    base = {"m.up": draw(3, 5, 4)}
    return (
        tensors,
        {"target_parameters": ["m.up"]},
        base,
        {"m.up": experts(tensors, "m")},
    )


def flat_parameter():
    tensors = pair("m", 4, 4)
    base = {"m.p": draw(4, 4)}
    config = {"target_parameters": ["m.p"]}
    return tensors, config, base, {"m.p": product(tensors, "m")}


def single_expert():
    tensors, config, base, deltas = flat_parameter()
    base, deltas = ({name: x[None] for name, x in y.items()} for y in (base, deltas))
    return tensors, config, base, deltas


OF_PEFT = [
    single_expert,
    conv1d,
    bias_of_b,
    rank_stabilised,
    saved_embedding,
    saved_modules,
    one_parameter,
    two_parameters,
    flat_parameter,
]


@pytest.mark.parametrize("case", OF_PEFT)
def test_merge_of_what_peft_writes(case, tmp_path):
    tensors, config, base, deltas = case()
    adapter = write_peft(tmp_path / "p", tensors, **config)
    safetensors.numpy.save_file(base, tmp_path / "base")
    assert run("merge", tmp_path / "base", adapter, tmp_path / "out") == 0
    merged = tensors_of(tmp_path / "out")
    assert merged.keys() == base.keys()
    for name, x in merged.items():
        wanted = base[name].astype(float) + deltas[name]
        np.testing.assert_allclose(x, wanted, rtol=1e-6, atol=1e-6)


CONVERTIBLE = [conv1d, rank_stabilised, saved_embedding, one_parameter, flat_parameter]


@pytest.mark.parametrize("case", CONVERTIBLE)
def test_from_peft_and_back(case, tmp_path):
    tensors, config, _, _ = case()
    source = write_peft(tmp_path / "p", tensors, **config)
    assert run("convert", source, tmp_path / "a") == 0
    assert run("convert", tmp_path / "a", tmp_path / "q") == 0
    file = "adapter_model.safetensors"
    assert equal_bits(tensors_of(source / file), tensors_of(tmp_path / "q" / file))
    assert run("diff", source, tmp_path / "q") == 0


def test_square_experts(tmp_path, capsys):
    adapter = write_peft(tmp_path / "p", pair("m", 4, 4, 6), target_parameters=["m.up"])
    safetensors.numpy.save_file({"m.up": draw(3, 4, 4)}, tmp_path / "base")
    error = fails(capsys, "merge", tmp_path / "base", adapter, tmp_path / "out")
    assert "`m.up` is square, and nothing says whether" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_how_a_square_weight_lies_the_fingerprint_says(turned, dtype, tmp_path, capsys):
    """Of a name too by which GPT-2 has a weight the other way round."""
    model = adapted({"c_proj": eqx.nn.Linear(4, 4, key=jr.key(0))})
    lora_quax.save_adapter(tmp_path / "a", model)
    base, merged = base_of(model), base_of(lora_quax.merge(model))
    turn = (lambda x: x.T.copy()) if turned else lambda x: x
    write = lambda x: {"c_proj.weight": turn(x["c_proj.weight"].astype(dtype))}
    safetensors.numpy.save_file(write(base), tmp_path / "base")
    run("merge", tmp_path / "base", tmp_path / "a", tmp_path / "out")
    assert capsys.readouterr().err == ""
    atol = 1e-6 if dtype is np.float32 else 2e-2
    found = tensors_of(tmp_path / "out")["c_proj.weight"].astype(np.float32)
    wanted = write(merged)["c_proj.weight"].astype(np.float32)
    np.testing.assert_allclose(found, wanted, rtol=atol, atol=atol)


def test_another_base_is_said_to_be_one(tmp_path, capsys):
    model = adapted({"q": eqx.nn.Linear(4, 3, key=jr.key(0))})
    lora_quax.save_adapter(tmp_path / "a", model)
    other = draw(3, 4)
    safetensors.numpy.save_file({"q.weight": other}, tmp_path / "base")
    assert run("merge", tmp_path / "base", tmp_path / "a", tmp_path / "out") == 0
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("lora_quax: The adapter ")
    assert err.endswith(
        "was trained on another base:\n  - `q.weight` has other numbers\n"
    )


GOOD = pair("q", 5, 4)
UNFIT: dict[str, tuple[dict, dict, dict, str]] = {
    "missing": ({}, {}, {}, "the base has no `q.weight`"),
    "shape": ({}, {}, {"q.weight": draw(5, 3)}, "has shape (5, 3) in the base"),
    "type": (
        {},
        {},
        {"q.weight": np.zeros((5, 4), np.int8)},
        "`q.weight` is of type I8 in the base",
    ),
    "not finite": (
        {"q.lora_A.weight": GOOD["q.lora_A.weight"] * np.nan},
        {},
        {"q.weight": draw(5, 4)},
        "`q.weight, a` is not finite",
    ),
    "missing module": (
        {"n.weight": draw(4)},
        {"modules_to_save": ["n"]},
        {"q.weight": draw(5, 4)},
        "the base has no `n.weight`",
    ),
    "too large": (
        {"q.lora_A.weight": GOOD["q.lora_A.weight"] * np.float32(1e6)},
        {},
        {"q.weight": draw(5, 4, dtype=np.float16)},
        "is not finite in the type of the base, float16",
    ),
    "mixed": (
        pair("r", 4, 4) | pair("s", 6, 4),
        {"target_modules": ["q", "r", "s"]},
        {"q.weight": draw(5, 4), "r.weight": draw(4, 4), "s.weight": draw(4, 6)},
        "`r.weight` is square, and nothing says",
    ),
}


@pytest.mark.parametrize("n_shards", [1, 2])
@pytest.mark.parametrize("is_there", [False, True])
@pytest.mark.parametrize("case", UNFIT)
def test_what_does_not_fit_leaves_no_trace(case, is_there, n_shards, tmp_path, capsys):
    tensors, config, base, reason = UNFIT[case]
    config = {"target_modules": ["q"], **config}
    adapter = write_peft(tmp_path / "p", GOOD | tensors, **config)
    write_base(tmp_path / "base", base | {"z": draw(3), "zz": draw(3)}, n_shards)
    out = tmp_path / "out"
    if is_there:
        out.mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert reason in fails(capsys, "merge", tmp_path / "base", adapter, out)
    assert sorted(tmp_path.rglob("*")) == before


def test_all_that_does_not_fit_is_listed(tmp_path, capsys):
    tensors = pair("q", 5, 4) | pair("r", 5, 4)
    adapter = write_peft(tmp_path / "p", tensors, target_modules=["q", "r"])
    safetensors.numpy.save_file({"z": draw(3)}, tmp_path / "base")
    error = fails(capsys, "merge", tmp_path / "base", adapter, tmp_path / "out")
    assert "no `q.weight`" in error and "no `r.weight`" in error


# inspect and diff


@pytest.mark.parametrize("form", ["ours", "PEFT"])
def test_inspect(form, net, tmp_path, capsys):
    first = trained(model(net, "everything"))
    save = lora_quax.save_adapter if form == "ours" else peft.save
    save(tmp_path / "a", first)
    assert run("inspect", tmp_path / "a") == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line for line in lines}
    deltas = {
        name: expected(first)[name] - base_of(first)[name].astype(float)
        for name in ("layers.1.weight", "embed.weight", "conv.weight", "experts.up")
    }
    for name, delta in deltas.items():
        assert rows[name].split()[-1] == f"{np.linalg.norm(delta):.4g}"
    assert "(5, 4, 3, 3)" in rows["conv.weight"] and "whole" in rows["head.weight"]
    file = tmp_path / "a" / ("adapter_model.safetensors" if form == "PEFT" else "")
    count = sum(x.size for x in tensors_of(file).values())
    assert f"{count} parameters, {4 * count:,} bytes" in lines[-1]


def test_a_path_is_whole_in_80_columns(tmp_path, capsys, monkeypatch):
    path = "decoder.layers.0.attention.query"
    base = {path: eqx.nn.Linear(3, 2, key=jr.key(0))}
    lora_quax.save_adapter(tmp_path / "a", adapted(base))
    narrow = lambda stderr=False: Console(width=80, force_terminal=True)
    monkeypatch.setattr("lora_quax._cli.console.console", narrow)
    monkeypatch.setattr("lora_quax._cli.inspect.console", narrow)
    assert run("inspect", tmp_path / "a") == 0
    lines = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    assert max(map(len, lines)) <= 80
    assert any(f"{path}.weight" in line for line in lines)
    assert any("linear" in line and "float" in line for line in lines)


def test_inspect_marks_what_is_not_finite(tmp_path, capsys):
    tensors = pair("layer" * 50, 5, 4) | {"n.weight": np.asarray([np.inf])}
    tensors[f"{'layer' * 50}.lora_B.weight"][0, 0] = np.nan
    config = {"target_modules": ["layer" * 50], "modules_to_save": ["n"]}
    assert run("inspect", write_peft(tmp_path / "p", tensors, **config)) == 1
    out = capsys.readouterr().out
    assert f"{'layer' * 50}.weight " in out and "not finite: b" in out
    assert out.rstrip().endswith("not finite: 2")


def changed(tensors: dict, config: dict, **more):
    return {"tensors": tensors, "config": config | more}


Q = pair("q", 5, 4)
ROTATED = {
    "q.lora_A.weight": 2 * Q["q.lora_A.weight"],
    "q.lora_B.weight": Q["q.lora_B.weight"] / 2,
}
DIFFERENT = {
    "nothing": (Q, {}, None),
    "other factors of the same update": (
        ROTATED,
        {},
        "q.weight: relative difference ",
    ),
    "alpha": (Q, {"lora_alpha": 6}, "q.weight: alpha 3.0 and 6.0, relative difference"),
    "only in one": (
        Q | pair("r", 5, 4),
        {"target_modules": ["q", "r"]},
        "r.weight: only in",
    ),
    "rank": (
        pair("q", 5, 4, rank=3),
        {"r": 3},
        "q.weight: rank 2 and 3, relative difference",
    ),
    "shape": (pair("q", 5, 6), {}, "q.weight: shape (5, 4) and (5, 6)"),
    "type": (
        {name: x.astype(np.float16) for name, x in Q.items()},
        {},
        "q.weight: dtype float32 and float16, relative difference",
    ),
    "half": (
        Q | {"q.lora_B.weight": Q["q.lora_B.weight"] / 2},
        {},
        "q.weight: relative difference 0.5",
    ),
    "opposite": (
        Q | {"q.lora_B.weight": -Q["q.lora_B.weight"]},
        {},
        "q.weight: relative difference 2",
    ),
    "saved": (
        Q | {"n.weight": draw(4)},
        {"modules_to_save": ["n"]},
        "n.weight: only in",
    ),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_diff(case, tmp_path, capsys):
    tensors, config, line = DIFFERENT[case]
    one = write_peft(tmp_path / "one", Q, target_modules=["q"])
    config = {"target_modules": ["q"], "lora_alpha": 3, **config}
    other = write_peft(tmp_path / "other", tensors, **config)
    assert run("diff", one, other) == (line is not None)
    out = capsys.readouterr().out
    assert out.startswith(line) and out.count("\n") == 1 if line else out == ""


def test_a_small_difference_keeps_its_digits(tmp_path, capsys):
    """Where updates nearly cancel, squares would lose the difference."""
    near = Q | {
        "q.lora_B.weight": Q["q.lora_B.weight"].astype(np.float64) * (1 + 1e-12)
    }
    wide = {name: x.astype(np.float64) for name, x in Q.items()}
    near["q.lora_A.weight"] = wide["q.lora_A.weight"]
    one = write_peft(tmp_path / "one", wide, target_modules=["q"])
    other = write_peft(tmp_path / "other", near, target_modules=["q"])
    assert run("diff", one, other) == 1
    assert "relative difference 1e-12" in capsys.readouterr().out


# Trouble


def no_adapter(folder: Path) -> None:
    safetensors.numpy.save_file({"x": draw(2)}, folder / "no")


def unsound(folder: Path) -> None:
    lora_quax.save_adapter(folder / "a", adapted(eqx.nn.Linear(4, 5, key=jr.key(0))))
    with safetensors.safe_open(folder / "a", "numpy") as file:
        metadata = file.metadata()
    tensors = tensors_of(folder / "a")
    tensors["weight.delta.a"] = tensors["weight.delta.a"][:, 1:]
    safetensors.numpy.save_file(tensors, folder / "no", metadata=metadata)


def two_files(folder: Path) -> None:
    write_base(folder / "no", {"q.weight": draw(5, 4), "z": draw(3)}, 2)
    (folder / "no" / "model.safetensors.index.json").unlink()
    part = tensors_of(folder / "no" / "model-00001-of-00002.safetensors")
    safetensors.numpy.save_file(part, folder / "no" / "other.safetensors")


def index(weight_map) -> Any:
    def write(folder: Path) -> None:
        write_base(folder / "no", {"q.weight": draw(5, 4), "z": draw(3)}, 2)
        path = folder / "no" / "model.safetensors.index.json"
        path.write_text(json.dumps({"weight_map": weight_map}))

    return write


def text(content: str) -> Any:
    return lambda folder: (folder / "no").write_text(content)


def nothing(folder: Path) -> None:
    del folder


MERGE = ("merge", "no", "good", "out")
TROUBLE = {
    "no command": (nothing, (), "the following arguments are required: COMMAND"),
    "command": (nothing, ("sing",), "invalid choice: 'sing'"),
    "argument": (nothing, ("diff", "good"), "are required: B; see `python -m"),
    "no file": (nothing, ("inspect", "no"), "There is no file or folder"),
    "no adapter": (no_adapter, ("inspect", "no"), "but no adapter of lora_quax"),
    "no safetensors": (text("hello, world"), ("inspect", "no"), "is no safetensors"),
    "short file": (text("hello"), ("inspect", "no"), "is truncated"),
    "half an adapter": (
        nothing,
        ("inspect", "good/adapter_model.safetensors"),
        "is half of an adapter of PEFT; give its folder",
    ),
    "unsound": (unsound, ("inspect", "no"), "its description has (2, 4)"),
    "no configuration": (
        lambda folder: (folder / "no").mkdir(),
        ("inspect", "no"),
        "There is no file",
    ),
    "no base": (nothing, MERGE, "There is no file or folder"),
    "no shards": (lambda folder: (folder / "no").mkdir(), MERGE, "no file *.safetens"),
    "twice": (two_files, MERGE, "which is meant?"),
    "index elsewhere": (index({"q.weight": "../x"}), MERGE, "has '../x' for"),
    "index at odds": (
        index({"z": "model-00001-of-00002.safetensors"}),
        MERGE,
        "says that `z` is in",
    ),
    "no shard": (index({"q.weight": "x.safetensors"}), MERGE, "There is no file"),
    "no weight map": (index(None), MERGE, "has no `weight_map`"),
    "names": (
        text('{"q": 1}'),
        ("merge", "base", "good", "out", "--names", "no"),
        "'q' is given 1, which is no name",
    ),
    "no names": (
        nothing,
        ("convert", "good", "out", "--names", "no"),
        "There is no file",
    ),
    "two of one name": (
        text('{"q.weight": "z", "q.bias": "z"}'),
        ("merge", "base", "biased", "out", "--names", "no"),
        "`q.weight` and `q.bias` are both called `z`",
    ),
    "unused names": (
        text('{"x": "y"}'),
        ("merge", "base", "good", "out", "--names", "no"),
        "'x' of `names` matched no array",
    ),
    "out is a file": (text("x"), ("merge", "base", "good", "no"), "no exists, and is"),
    "out is a folder": (nothing, ("merge", "base", "good", "good"), "is not empty"),
    "out is nowhere": (
        nothing,
        ("merge", "base", "good", "no/where"),
        "There is no folder",
    ),
    "converted out is a file": (text("x"), ("convert", "good", "no"), "no exists, and"),
}


@pytest.mark.parametrize("case", TROUBLE)
def test_trouble_is_one_line(case, tmp_path, capsys, monkeypatch):
    prepare, arguments, reason = TROUBLE[case]
    monkeypatch.chdir(tmp_path)
    write_peft(tmp_path / "good", Q, target_modules=["q"])
    biased = Q | {"q.base_layer.bias": draw(5)}
    write_peft(tmp_path / "biased", biased, target_modules=["q"], bias="lora_only")
    base = {"q.weight": draw(5, 4), "z": draw(5, 4)}
    safetensors.numpy.save_file(base, tmp_path / "base")
    prepare(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    error = fails(capsys, *arguments)
    assert reason in error
    lines = [line for line in error.splitlines() if not line.startswith("  - ")]
    assert len(lines) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_program_of_its_own(tmp_path):
    bad = {name: x * np.nan for name, x in Q.items()}
    folder = write_peft(tmp_path / "bad", bad, target_modules=["q"])
    done = subprocess.run(
        [sys.executable, "-m", "lora_quax", "inspect", str(folder)],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert "not finite: a and b" in done.stdout


HELP = {
    (): "Exit code 2 is trouble",
    ("inspect",): "Exit code 1 if anything is not finite",
    ("diff",): "Exit code 0 if nothing differs",
    ("convert",): "What the other format does not have is refused",
    ("merge",): "rounded once",
}


@pytest.mark.parametrize("command", HELP, ids=" ".join)
def test_help(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([*command, "--help"])
    assert HELP[command] in " ".join(capsys.readouterr().out.split())


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"lora_quax {lora_quax.__version__}\n"


def test_a_merge_takes_some_rows_at_a_time(tmp_path, monkeypatch):
    from lora_quax._cli import merge

    base = draw(1024, 2048)
    adapter = write_peft(tmp_path / "p", factors(base.shape), target_modules=["q"])
    safetensors.numpy.save_file({"q.weight": base}, tmp_path / "b.safetensors")
    assert run("merge", tmp_path / "b.safetensors", adapter, tmp_path / "one") == 0
    monkeypatch.setattr(merge, "_BLOCK", 1 << 14)
    tracemalloc.start()
    try:
        assert run("merge", tmp_path / "b.safetensors", adapter, tmp_path / "two") == 0
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < base.nbytes / 2
    one, two = (
        safetensors.numpy.load_file(tmp_path / name)["q.weight"]
        for name in ("one", "two")
    )
    np.testing.assert_allclose(one, two, rtol=0, atol=1e-5)
    assert np.abs(one - base).max() > 0.1


def factors(shape):
    start = "q"
    return {
        f"{start}.lora_A.weight": draw(2, shape[1]),
        f"{start}.lora_B.weight": draw(shape[0], 2),
    }


def test_too_little_memory_is_an_error(capsys, monkeypatch):
    def inspect(path):
        raise MemoryError("Unable to allocate 7 TiB")

    monkeypatch.setattr("lora_quax.__main__.inspect", inspect)
    assert run("inspect", "x") == 2
    assert capsys.readouterr().err == (
        "lora_quax: error: the memory does not suffice. Unable to allocate 7 TiB\n"
    )


def test_a_reader_who_has_enough_is_no_error(net, tmp_path):
    lora_quax.save_adapter(tmp_path / "a", model(net, "everything"))
    command = [sys.executable, "-m", "lora_quax", "inspect", str(tmp_path / "a")]
    program = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert program.stdout is not None and program.stderr is not None
    program.stdout.close()
    assert program.stderr.read() == ""
    assert program.wait() == 141


def tied_base(folder: Path, **config) -> Path:
    folder.mkdir()
    tensors = {"embed_tokens.weight": draw(7, 4), "q.weight": draw(4, 4)}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    about = {"tie_word_embeddings": True, "vocab_size": 7, **config}
    (folder / "config.json").write_text(json.dumps(about))
    return folder


def embedding_and_head(scale=1.0):
    A, B = draw(2, 7), draw(4, 2)
    head = {"lora_A.weight": scale * B.T, "lora_B.weight": A.T}
    head = {name: np.ascontiguousarray(x) for name, x in head.items()}
    table = {"lora_embedding_A": A, "lora_embedding_B": B}
    return (
        {f"embed_tokens.{name}": x for name, x in table.items()},
        {f"lm_head.{name}": x for name, x in head.items()},
    )


TIED = {
    "said by the adapter": (True, True, {}, (), True),
    "said, with no factors for the head": (True, False, {}, (), True),
    "equal factors": (False, True, {}, (), True),
    "said by the user": (False, False, {}, ("--tied",), True),
    "not said": (False, False, {}, (), False),
    "not tied": (False, False, {"tie_word_embeddings": False}, (), True),
    "tied below": (
        False,
        False,
        {"tie_word_embeddings": None, "text_config": {"tie_word_embeddings": True}},
        (),
        False,
    ),
}


@pytest.mark.parametrize("case", TIED.values(), ids=TIED)
def test_a_base_whose_head_is_its_embedding(tmp_path, capsys, case):
    ensures, has_head, config, flags, merges = case
    base = tied_base(tmp_path / "base", **config)
    table, head = embedding_and_head()
    tensors = table | (head if has_head else {})
    adapter = write_peft(
        tmp_path / "p",
        tensors,
        target_modules=["embed_tokens", "lm_head"],
        ensure_weight_tying=ensures,
    )
    arguments = "merge", base, adapter, tmp_path / "out", *flags
    if not merges:
        assert "says that the head of the base is its embedding" in fails(
            capsys, *arguments
        )
        assert not (tmp_path / "out").exists()
        return
    assert run(*arguments) == 0
    merged = tensors_of(tmp_path / "out" / "model.safetensors")
    before = tensors_of(base / "model.safetensors")
    A, B = table.values()
    settings = json.loads((adapter / "adapter_config.json").read_text())
    scaling = settings["lora_alpha"] / settings["r"]
    want = before["embed_tokens.weight"] + scaling * (B @ A).T
    np.testing.assert_allclose(merged["embed_tokens.weight"], want, atol=1e-6)
    assert equal_bits({"q": merged["q.weight"]}, {"q": before["q.weight"]})


def test_the_mapping_of_peft_serves_either_way(net, tmp_path):
    first = model(net, "linear of two ranks")
    lora_quax.save_adapter(tmp_path / "a", first)
    names = tmp_path / "names.json"
    names.write_text('{"layers.{}": "model.blocks.{}.q_proj"}')
    option = "--names", names
    assert run("convert", tmp_path / "a", tmp_path / "p", *option) == 0
    assert run("convert", tmp_path / "p", tmp_path / "b", *option) == 0
    assert equal_bits(tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b"))
    assert run("diff", tmp_path / "a", tmp_path / "b") == 0
    for one, other in ("a", "p"), ("p", "a"):
        assert run("diff", tmp_path / one, tmp_path / other) == 1
        assert run("diff", tmp_path / one, tmp_path / other, *option) == 0
    # A base as lora_quax.save_model writes it.
    lora_quax.save_model(tmp_path / "base", net)
    merge = "merge", tmp_path / "base", tmp_path / "p", tmp_path / "out", *option
    assert run(*merge) == 0
    got = lora_quax.load_model(tmp_path / "out", net)
    for x, y in zip(*map(jax.tree.leaves, (got, lora_quax.merge(first)))):
        np.testing.assert_allclose(x, y, atol=1e-5)
