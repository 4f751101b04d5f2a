"""The content of a file that `lora_quax.save_adapter` wrote."""

from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from .._arrays.base import AbstractDelta, is_adapted
from .._arrays.full import FullArray
from .._arrays.lora import LoraArray
from .._disk.adapter import differences, read_adapter, written
from .._disk.description import build, float_type
from .._disk.files import refuse
from .._model.paths import dotted, join, named
from .update import Content, Update


_KINDS = {
    "Linear": "linear",
    "Embedding": "embedding",
    "Conv": "convolution",
    "ConvTranspose": "transposed convolution",
}


def read_content(path: Path) -> Content:
    """**Raises:** as `read_arrays`."""
    out = Content(path, "lora_quax", {}, {}, {})
    for name, (x, layer) in read_arrays(path).items():
        kind = "array" if layer is None else _KINDS[layer["type"]]
        if layer is not None and layer.get("groups", 1) > 1:
            kind += f" of {layer['groups']} groups"
        _gather(out, name, name, x, kind)
    return out


def _gather(out: Content, weight: str, name: str, x, kind: str) -> None:
    if isinstance(x, LoraArray):
        out.updates[name] = _update(weight, x.delta, kind)
        _gather(out, weight, join(name, "base"), x.base, kind)
    elif isinstance(x, AbstractDelta):
        out.updates[name] = _update(weight, x, kind)._replace(has_base=False)
    elif isinstance(x, FullArray):
        out.values[weight] = np.asarray(x.value)
    elif is_adapted(x):  # Of any other form, what is in the file, leaf by leaf.
        for keys, leaf in _leaves(x):
            out.values[join(weight, dotted(keys))] = np.asarray(leaf)
    elif isinstance(x, np.ndarray):  # A base that trains; one that does not is a type.
        out.values[weight] = x


def _update(weight: str, delta: AbstractDelta, kind: str) -> Update:
    x = delta.lower()
    a, b = np.asarray(x.a), np.asarray(x.b)
    batch = a.shape[: a.ndim - x.cols - 1]
    shape = *b.shape[:-1], *a.shape[a.ndim - x.cols :]
    a = a.reshape(*batch, x.rank, -1)
    b = b.reshape(*batch, -1, x.rank)
    # Equinox keeps its layers as (out, in); the base may be another library's.
    turns = kind in ("linear", "array") and a.ndim == 2
    return Update((weight,), kind, a, b, x.alpha, shape, may_turn=turns)


def read_arrays(path: Path) -> dict[str, tuple[Any, dict[str, Any] | None]]:
    """The adapted weights of a file, around abstract bases, with their layers.

    **Raises:** `FileNotFoundError`; `AdapterError`, which lists everything that is
    wrong, if the file is no adapter, or its tensors are not those it describes.
    """
    adapter = read_adapter(path)
    problems, skeletons, expected = [], {}, {}
    for name, about in adapter.weights.items():
        try:
            skeletons[name] = build(about, _base(about)), _layer(about)
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            problems.append(f"{named(name)}: its description makes no sense: {e!r}")
            continue
        for keys, x in _leaves(skeletons[name][0]):
            expected[join(name, dotted(keys))] = tuple(x.shape), jnp.dtype(x.dtype)
    found = {name: (x.shape, x.dtype) for name, x in adapter.tensors.items()}
    if not problems:
        problems = differences("its description", expected, found)
    refuse(f"The adapter {path} is not sound", problems)

    def filled(name: str, skeleton):
        params, frozen = written(skeleton)
        params = jtu.tree_map_with_path(
            lambda keys, _: adapter.tensors[join(name, dotted(keys))], params
        )
        return eqx.combine(params, frozen)

    return {name: (filled(name, x), layer) for name, (x, layer) in skeletons.items()}


def _leaves(skeleton) -> list[tuple[Any, Any]]:
    return jtu.tree_flatten_with_path(written(skeleton)[0])[0]


def _base(about: dict[str, Any]) -> jax.ShapeDtypeStruct | None:
    """The type of the weight that was adapted, if there was one."""
    while "base" in about:
        about = about["base"]
    if about["form"] != "array":
        return None
    return jax.ShapeDtypeStruct(tuple(about["shape"]), float_type(about["dtype"]))


def _layer(about: dict[str, Any]) -> dict[str, Any] | None:
    layer = about["layer"]
    if layer is not None and layer["type"] not in _KINDS:
        raise ValueError(f"its layer {layer['type']!r} is not known")
    return layer
