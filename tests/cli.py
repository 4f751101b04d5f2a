"""What tests of the command line share: models, adapted in ways that both formats have,
their files, and commands."""

import json
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import safetensors.numpy
from helpers import adapted, normal
from jaxtyping import Array

import lora_quax
from lora_quax import LoraArray
from lora_quax.__main__ import main


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


def nested(key):
    once = adapted(eqx.nn.Linear(4, 5, key=key))
    again = LoraArray(once.weight, rank=2, key=key, stop_gradient=False)
    return {"layer": eqx.tree_at(lambda l: l.weight, once, again)}


def stacked(key):
    linear = eqx.filter_vmap(lambda key: eqx.nn.Linear(4, 5, key=key))
    return {"layers": adapted(linear(jr.split(key, 3)))}


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
