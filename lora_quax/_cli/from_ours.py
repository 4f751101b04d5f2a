"""The model that a file of ours is an adapter of, as far as the file tells."""

from pathlib import Path
from typing import Any

from .._arrays.lora import LoraArray
from .._arrays.low_rank import LowRankArray
from .._disk.files import AdapterError
from .._model.paths import join, named
from ..peft._names import split
from .layer import Layer
from .ours import read_arrays


def skeleton_of_ours(source: Path) -> Any:
    """**Raises:** as `read_arrays`; `AdapterError` if PEFT has no name for one."""
    layers, others = {}, {}
    for path, (x, about) in read_arrays(source).items():
        module, name = split(path)
        if about is None:
            others[path] = x
        elif name == "weight":
            layers[module] = x, _layer(x, about)
        else:
            raise AdapterError(
                f"{source}: {named(path)} is within what stands for the weight of a "
                "layer, and has no name in PEFT."
            )
    tree = {}
    for module, (x, layer) in layers.items():
        has_bias = layer.type != "Embedding"
        bias = others.pop(join(module, "bias"), None) if has_bias else None
        tree[module] = layer.make(x, bias)
    for path, x in others.items():
        module, name = split(path)
        # A bias (out, 1, 1) is that of a convolution, and a vector in PyTorch.
        if name == "bias" and x.ndim > 1 and set(x.shape[1:]) == {1}:
            tree[module] = Layer("Conv", x.ndim - 1).make(None, x)
        else:
            tree[path] = x
    # The path of the model itself is empty, which no key of a dictionary would be.
    if "" in tree and len(tree) > 1:
        raise AdapterError(
            f"{source}: the model itself is a layer, and has others in it. PEFT cannot "
            "adapt such a model."
        )
    return tree.get("", tree)


def _layer(x: Any, about: dict[str, Any]) -> Layer:
    if "groups" not in about:
        return Layer(about["type"])
    delta = x.delta if isinstance(x, LoraArray) else x
    # The axes that stack layers are no axes of a convolution.
    axes = 1 + delta.cols if isinstance(delta, LowRankArray) else x.ndim
    return Layer(about["type"], axes - 2, about["groups"])
