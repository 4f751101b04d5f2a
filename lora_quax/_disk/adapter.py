"""An adapter on disk: what trains, and how to put it around the weights again.

A file holds all of an adaptation, what trains and what does not, and nothing of what it
was put around: the leaves by their paths, and for each adapted weight a description
that mirrors its array.
"""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from .._arrays.base import BASE, is_adapted, roles
from .._model.merge import origin, refuse_partial
from .._model.paths import dotted, is_value, leaves_of, named
from .._model.training import partition
from .description import build, describe, describe_layer, NONSENSE, said
from .exchange import (
    refuse_ambiguous,
    refuse_changed,
    refuse_misfit,
    to_numpy,
    too_wide,
)
from .files import (
    AdapterError,
    parse_json,
    read_tensors,
    write_tensors,
)
from .version_1 import upgraded
from .whole import written_whole


VERSION = 2
_KEY = "lora_quax"  # Of the metadata; one, because the library does not sort them.


class Adapter(NamedTuple):
    """What a file holds."""

    weights: dict[str, Any]  # path -> its description, as it is in the file
    tensors: dict[str, np.ndarray]  # path of a leaf -> its value
    version: int

    def about(self, path: str) -> Any:
        """What `describe` says of a weight, and its layer.

        **Raises:** one of `NONSENSE` if what is in the file cannot be read.
        """
        about = self.weights[path]
        if self.version > 1:
            return about
        return {**upgraded(about), "layer": about["layer"]}


def save_adapter(
    path: str | os.PathLike, model: PyTree, *, base: PyTree = None
) -> None:
    """Writes what trains of a model to a file, and nothing else of it.

    ```python
    lora_quax.save_adapter("digits.safetensors", model)
    model = lora_quax.load_adapter("digits.safetensors", pretrained)
    ```

    The file is in the safetensors format: the factors, the values of arrays trained in
    full and the bases that are not frozen, each in its dtype and named by its path,
    with a description of the adapted weights in the metadata. It is written beside its
    goal and moved into place, so that a file that is there is replaced as a whole or
    not at all.

    **Arguments:**

    - `path`: of the file, in a folder that exists.
    - `model`: a model with adapted weights.
    - `base`: the model that was adapted. If it is given, it is made sure that nothing
        of `model` differs from it but what is written. A training loop that knows
        nothing of LoRA trains biases and norms too, which would be lost.

    **Raises:** `ValueError` if nothing in the model trains, a leaf is missing, two
    leaves have the same dotted path, or `base` differs in what would not be written;
    `TypeError` if the model is abstract or traced; `OSError` if the file cannot be
    written.
    """
    if base is not None:
        refuse_changed(model, base)
    adapter = extract(model)
    about = {"version": VERSION, "weights": adapter.weights}
    metadata = {_KEY: json.dumps(about, sort_keys=True)}
    with written_whole(Path(path)) as (new,):
        write_tensors(new, adapter.tensors, metadata)


def load_adapter(path: str | os.PathLike, model: PyTree) -> PyTree:
    """Puts an adapter around the weights of a model. The model is not changed.

    **Arguments:**

    - `path`: of a file that `save_adapter` wrote.
    - `model`: the model that was adapted, or one that `loraify` has adapted in the same
        way, whose factors are replaced. Its arrays may be `jax.ShapeDtypeStruct`s.

    **Returns:** the model with the adapted weights. On the same base it computes what
    the saved one computed, bit for bit.

    **Raises:** `AdapterError`, which lists everything that is wrong, if the file is not
    an adapter, is truncated, or is of a newer version; if a tensor of it is missing,
    unexpected, or of a shape or dtype that does not fit. `FileNotFoundError` if there
    is no such file.
    """
    adapter = read_adapter(path)
    problems: list[str] = []
    leaves, treedef = jax.tree.flatten(model, is_leaf=is_value)
    paths = [leaf.path for leaf in leaves_of(model)]
    refuse_ambiguous(path for path in paths if path in adapter.weights)
    for name in adapter.weights:
        if name not in paths:
            problems.append(f"the model has no {named(name)}")
    skeletons = list(leaves)
    for i, name in enumerate(paths):
        if name in adapter.weights:
            try:
                base = origin(leaves[i])
                skeletons[i] = build(adapter.about(name), base)
            except NONSENSE as e:
                problems.append(f"{named(name)}: {said(e)}")
    skeleton = jax.tree.unflatten(treedef, skeletons)
    refuse_misfit(path, problems)

    params, rest = written(skeleton)
    expected = _specs(params)
    if any(map(is_adapted, leaves)):
        problems += differences("the model", _specs(written(model)[0]), expected)
    found = {name: (x.shape, x.dtype) for name, x in adapter.tensors.items()}
    problems += differences("its description", expected, found)
    for name, x in adapter.tensors.items():
        problems += too_wide(name, x.dtype)
    refuse_misfit(path, problems)
    params = jtu.tree_map_with_path(
        lambda keys, _: jnp.asarray(adapter.tensors[dotted(keys)]), params
    )
    return eqx.combine(params, rest)


def extract(model: PyTree) -> Adapter:
    """What of a model goes into a file.

    **Raises:** as `save_adapter`.
    """
    refuse_partial(model)
    adapted = [leaf for leaf in leaves_of(model) if is_adapted(leaf.value)]
    leaves = jtu.tree_flatten_with_path(written(model)[0])[0]
    refuse_ambiguous(dotted(keys) for keys, _ in leaves)
    tensors = {dotted(keys): to_numpy(dotted(keys), x) for keys, x in leaves}
    weights = {
        leaf.path: {**describe(leaf.value), "layer": describe_layer(leaf)}
        for leaf in adapted
    }
    return Adapter(weights, tensors, VERSION)


def written(model: PyTree) -> tuple[PyTree, PyTree]:
    """A model as the part that goes into a file and the part that does not.

    That is what trains, and what has trained: an adapter that is the frozen base of
    another one, say.

    **Raises:** `ValueError` if there is nothing to write.
    """
    spec = jax.tree.map(lambda name: name != BASE, roles(model))
    if not any(jax.tree.leaves(spec)):
        return partition(model)  # Raises, with the reason.
    return eqx.partition(model, spec)


def read_adapter(path: str | os.PathLike) -> Adapter:
    """What is in a file that `save_adapter` wrote.

    **Raises:** as `load_adapter`, but for what depends on a model.
    """
    if Path(path).is_dir():
        raise AdapterError(
            f"{path} is a folder. An adapter of PEFT is read by `lora_quax.peft.load`."
        )
    tensors, metadata = read_tensors(path)
    if _KEY not in metadata:
        raise AdapterError(
            f"{path} is a safetensors file, but no adapter of lora_quax. A file of "
            "PEFT is read by `lora_quax.peft.load`, together with its configuration."
        )
    try:
        about = parse_json(metadata[_KEY])
        version, weights = about["version"], about["weights"]
        if type(version) is not int or version < 1 or not isinstance(weights, dict):
            raise TypeError(f"it is of version {version!r:.40}")
    except (KeyError, TypeError, ValueError) as e:
        raise AdapterError(f"{path}: its description cannot be read: {said(e)}.") from e
    if not weights and version <= VERSION:
        raise AdapterError(f"{path} is an adapter of no weight.")
    if version > VERSION:
        raise AdapterError(
            f"{path} was written by a newer lora_quax, in version {version} of the "
            f"format; this one reads up to {VERSION}."
        )
    return Adapter(weights, tensors, version)


_Specs = dict[str, tuple[tuple[int, ...], Any]]


def _specs(params) -> _Specs:
    leaves = jtu.tree_flatten_with_path(params)[0]
    return {dotted(keys): (tuple(x.shape), x.dtype) for keys, x in leaves}


def differences(whose: str, expected: _Specs, found: _Specs) -> list[str]:
    problems = [f"`{name}` is missing" for name in expected if name not in found]
    problems += [f"`{name}` is unexpected" for name in found if name not in expected]
    for name in expected.keys() & found.keys():
        if expected[name] != found[name]:
            (shape, dtype), (got, got_dtype) = expected[name], found[name]
            problems.append(
                f"`{name}` has shape {got} and type {got_dtype.name}; {whose} has "
                f"{shape} and {dtype.name}"
            )
    return problems
