"""The model that an adapter is for, as far as its files tell: the layers that it names,
around types in place of arrays."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from .._arrays.lora import LoraArray
from .._arrays.low_rank import LowRankArray
from .._disk.adapter import read_adapter
from .._disk.files import AdapterError, refuse
from .._model.names import Namer, split
from .._model.paths import join, named
from .._model.targets import read_pattern
from ..peft._whole import lora_of
from .content import arrays_in, Content, Update


LayerType: TypeAlias = Literal["Linear", "Embedding", "Conv", "ConvTranspose"]


class Layer(NamedTuple):
    """What of a layer of Equinox decides how PEFT lays out its factors."""

    type: LayerType
    spatial: int = 0  # axes of a convolution
    groups: int = 1

    def make(self, weight: Any, bias: Any = None) -> eqx.Module:
        """The layer around a weight, a bias or both."""
        kind = getattr(eqx.nn, self.type)
        n = self.groups
        sizes = (self.spatial, n, n, 1) if "Conv" in self.type else (1, 1)
        options = {"groups": n} if "Conv" in self.type else {}
        layer = eqx.filter_eval_shape(kind, *sizes, **options, key=jr.key(0))
        if self.type == "Embedding":
            return eqx.tree_at(lambda l: l.weight, layer, weight)
        return eqx.tree_at(lambda l: (l.weight, l.bias), layer, (weight, bias))


# From a file of ours.


def skeleton_of_ours(source: Path) -> Any:
    """**Raises:** as `read_adapter` and `arrays_in`; `AdapterError` if PEFT has no name
    for one."""
    layers, others = {}, {}
    for path, (x, about) in arrays_in(source, read_adapter(source)).items():
        module, name = split(path)
        if about is None:
            others[path] = x
        elif name == "weight":
            layers[module] = x, _layer_of(x, about)
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


def _layer_of(x: Any, about: dict[str, Any]) -> Layer:
    if "groups" not in about:
        return Layer(about["type"])
    x = lora_of(x)
    delta = x.delta if isinstance(x, LoraArray) else x
    # The axes that stack layers are no axes of a convolution.
    axes = 1 + delta.cols if isinstance(delta, LowRankArray) else x.ndim
    return Layer(about["type"], axes - 2, about["groups"])


# From the files of PEFT.


class Skeleton:
    """A model of abstract arrays, and what its paths are called in PEFT."""

    def __init__(self, content: Content, namer: Namer, transposed: Sequence[str]):
        self.source = content.path
        self.values = dict(content.values)
        self.namer = namer
        self.transposed = [read_pattern(name)[0] for name in transposed]
        self.names: dict[str, str] = {}  # path -> parameter
        self.tree: Any = {}

    def update(self, name: str, update: Update) -> None:
        """Makes the layer or the array that an update is for."""
        path = self._place(name)
        kept = self.values.pop(name, update.a)  # PEFT may save the weight as well.
        if update.kind in ("experts", "parameter"):
            flips = any(pattern.fullmatch(path) for pattern in self.transposed)
            *batch, rows, cols = update.shape
            shape = (*batch, cols, rows) if flips else update.shape
            self.tree[path] = _abstract(shape, kept)
            return
        module, end = split(path)
        if end != "weight":
            raise AdapterError(
                f"{self.source}: `{name}` would be {named(path)}; a layer of Equinox "
                "has its weight by the name `weight`."
            )
        weight = _abstract(update.shape, kept)
        if update.kind != "convolution":
            kind = "Linear" if update.kind == "linear" else "Embedding"
            self.tree[module] = Layer(kind).make(weight)
            return
        spatial = len(update.shape) - 2
        bias = self._bias(split(name)[0], module, spatial)
        self.tree[module] = Layer("Conv", spatial).make(weight, bias)

    def value(self, name: str, x: np.ndarray) -> None:
        """Makes the array that is given whole."""
        self.tree[self._place(name)] = _abstract(x.shape, x)

    def _bias(self, module: str, path: str, spatial: int):
        """That of a convolution, which has as many axes as the kernel in Equinox."""
        name = join(module, "bias")
        if name not in self.values:
            return None
        if (placed := self._place(name)) != join(path, "bias"):
            raise AdapterError(
                f"{self.source}: `{name}` would be {named(placed)}, which is not with "
                f"the kernel in {named(path)}."
            )
        x = self.values.pop(name)
        return _abstract((*x.shape, *(1 for _ in range(spatial))), x)

    def _place(self, name: str) -> str:
        path = self.namer(name)
        if path in self.names:
            raise AdapterError(
                f"{self.source}: `{self.names[path]}` and `{name}` would both be "
                f"{named(path)}. Layers cannot be stacked by `--names`."
            )
        self.names[path] = name
        return path


def skeleton_of_peft(
    content: Content, namer: Namer, transposed: Sequence[str]
) -> Skeleton:
    """**Raises:** `AdapterError`, with the reasons, if the files do not say enough;
    `ValueError` if a name to be changed is none of the adapter's."""
    _refuse_the_unknown(content)
    out = Skeleton(content, namer, transposed)
    for name, update in content.updates.items():
        out.update(name, update)
    for name, x in out.values.items():
        out.value(name, x)
    namer.check()
    # The path of the model itself is empty, which no key of a dictionary would be.
    out.tree = out.tree.get("", out.tree)
    return out


def _abstract(shape: Sequence[int], like) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(shape), like.dtype)


def _refuse_the_unknown(content: Content) -> None:
    problems = [
        f"the factors of `{name}` may be of {' or '.join(update.weights)}, which PEFT "
        "tells apart by the order in the model"
        for name, update in content.updates.items()
        if len(update.weights) > 1
    ]
    problems += [
        f"`{name}` is added to, by `lora_bias`, and what it is to begin with is in the "
        "base alone"
        for name in content.added
        if name not in content.values
    ]
    for name, x in content.values.items():
        if not jnp.issubdtype(x.dtype, jnp.floating):
            problems.append(f"`{name}` is of type {x.dtype.name}; only floats train")
        elif x.ndim > 2 and split(name)[1] == "weight" and name not in content.updates:
            problems.append(
                f"`{name}` is saved whole with shape {x.shape}, and may be of a "
                "transposed convolution, which Equinox lays out otherwise"
            )
    refuse(f"{content.path} cannot be converted", problems)
