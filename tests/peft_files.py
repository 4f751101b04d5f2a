"""Adapters of PEFT's, by hand: what its own library writes that ours does not, and what
a base comes to with them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy


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


Q = pair("q", 5, 4)
