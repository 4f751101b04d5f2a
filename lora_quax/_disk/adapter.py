"""An adapter on disk: what trains, and how to put it around the weights again.

A file holds all of an adaptation, what trains and what does not, and nothing of what it
was put around: the leaves by their paths, and for each adapted weight a description
that mirrors its array.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from .._arrays.base import BASE, FROZEN, is_adapted, roles
from .._model.dropout import without_key
from .._model.merge import origin, refuse_partial
from .._model.paths import dotted, is_value, leaves_of, named
from .._model.placed import all_beside_bases
from .._model.ties import ties_of
from .._model.together import described, digest, in_step, is_shared, once
from .._model.training import partition
from .description import build, describe, describe_layer, NONSENSE, said
from .exchange import (
    refuse_ambiguous,
    refuse_changed,
    refuse_misfit,
    refuse_non_finite,
    to_numpy,
    too_wide,
)
from .files import (
    AdapterError,
    parse_json,
    read_tensors,
    write_tensors,
)
from .fingerprint import check_base, recorded
from .repeated import with_repeats, without_repeats
from .state import check_state, state_leaves, state_names
from .version_1 import upgraded
from .whole import written_whole


VERSION = 2
_KEY = "lora_quax"  # Of the metadata; one, because the library does not sort them.


class Adapter(NamedTuple):
    """What a file holds."""

    weights: dict[str, Any]  # path -> its description, as it is in the file
    tensors: dict[str, np.ndarray]  # path of a leaf -> its value
    version: int
    state: dict[str, np.ndarray] = {}  # of a model that has one
    base: Any = None  # its fingerprint; files had none before
    ties: Any = None  # path of what is tied to a weight -> that weight's path

    def about(self, path: str) -> Any:
        """What `describe` says of a weight, and its layer.

        **Raises:** one of `NONSENSE` if what is in the file cannot be read.
        """
        about = self.weights[path]
        if self.version > 1:
            return about
        return {**upgraded(about), "layer": about["layer"]}


def save_adapter(
    path: str | os.PathLike,
    model: PyTree,
    *,
    state: eqx.nn.State | None = None,
    base: PyTree = None,
    check_finite: bool = True,
) -> None:
    """Writes what trains of a model to a file, and nothing else of it.

    ```python
    lora_quax.save_adapter("digits.safetensors", model)
    model = lora_quax.load_adapter("digits.safetensors", pretrained)
    ```

    The file is in the safetensors format: the factors, the values of arrays trained in
    full and the bases that are not frozen, each in its dtype and named by its path,
    with a description of the adapted weights in the metadata, and a fingerprint of the
    arrays that they were put around. What does not train, and is the same for several
    weights, is there once. It is written beside its goal and moved into
    place, so that a file that is there is replaced as a whole or not at all.

    **Arguments:**

    - `path`: of the file, in a folder that exists.
    - `model`: a model with adapted weights.
    - `state`: its `eqx.nn.State`, if it has one. A batch norm keeps its statistics
        there, which change in training and are not part of the model.
    - `base`: the model that was adapted. If it is given, it is made sure that nothing
        of `model` differs from it but what is written. A training loop that knows
        nothing of LoRA trains biases and norms too, which would be lost.
    - `check_finite`: whether to refuse numbers that are infinite or not a number.

    Where several processes hold the model, each has to call this: the numbers are
    gathered, one process writes them, and the others wait for it.

    **Raises:** `ValueError` if nothing in the model trains, a leaf is missing, two
    leaves have the same dotted path, the processes disagree, `base` differs in what
    would not be written, the model has a state and `state` is not that, or a number
    is not finite; `TypeError` if the model is abstract or traced; `OSError` if the
    file cannot be written.
    """
    model, shared = without_key(model), is_shared(model)
    with in_step("save_adapter", shared) as said:
        check_state(model, state)
        if shared:
            said |= described(model)
            said |= described({"the state": state, "the base": base})
            said |= {"check_finite": str(check_finite)}
    if base is not None:
        refuse_changed(model, base)
    adapter = extract(model, state)
    if check_finite:
        refuse_non_finite({**adapter.tensors, **adapter.state})
    tensors, repeats = without_repeats(adapter.tensors, _frozen(model))
    about = {
        "version": VERSION,
        "weights": adapter.weights,
        "state": sorted(adapter.state),
        "base": adapter.base,
    }
    if adapter.ties:
        about["ties"] = adapter.ties
    if repeats:
        about["repeats"] = repeats
    metadata = {_KEY: json.dumps(about, sort_keys=True)}

    def write():
        with written_whole(Path(path)) as (new,):
            write_tensors(new, {**tensors, **adapter.state}, metadata)

    once("save_adapter", shared, write)


def load_adapter(
    path: str | os.PathLike,
    model: PyTree,
    *,
    state: eqx.nn.State | None = None,
    same_base: bool = False,
) -> PyTree:
    """Puts an adapter around the weights of a model. The model is not changed.

    **Arguments:**

    - `path`: of a file that `save_adapter` wrote.
    - `model`: the model that was adapted, or one that `loraify` has adapted in the same
        way, whose factors are replaced. Its arrays may be `jax.ShapeDtypeStruct`s.
    - `state`: the `eqx.nn.State` of the model, if the adapter was saved with one. It is
        not changed.
    - `same_base`: whether another base than that of the adapter is an error (true), or
        a warning that says in what it differs (false). Only some numbers of each array
        are compared, rounded if it is loaded in another precision.

    **Returns:** the model with the adapted weights. On the same base it computes what
    the saved one computed, bit for bit. With `state`, a pair of the model and of the
    state that was saved.

    **Raises:** `AdapterError`, which lists everything that is wrong, if the file is not
    an adapter, is truncated, or is of a newer version; if a tensor of it is missing,
    unexpected, or of a shape or dtype that does not fit. `FileNotFoundError` if there
    is no such file.
    """
    shared = is_shared(model)
    with in_step("load_adapter", shared) as said:
        adapter, called, params, rest = _fitted(path, model, state)
        if shared:
            said |= described(model)
            said |= described({"the file": adapter.tensors | adapter.state})
            about = [adapter.weights, adapter.base, adapter.ties]
            about = json.dumps(about, sort_keys=True).encode()
            said |= {"the description": digest(about), "same_base": str(same_base)}
    check_base(path, adapter.base, model, same_base)
    # One array for leaves that have their numbers in common.
    arrays = {id(x): jnp.asarray(x) for x in adapter.tensors.values()}
    params = jtu.tree_map_with_path(
        lambda keys, _: arrays[id(adapter.tensors[dotted(keys)])], params
    )
    model = all_beside_bases(eqx.combine(params, rest), model)
    if state is None:
        return model
    new = [jnp.asarray(adapter.state[name]) for name in called]
    return model, jax.tree.unflatten(jax.tree.structure(state), new)


def _fitted(path, model: PyTree, state):
    """An adapter, what the state is called, and the model that is adapted, as `written`
    gives it, without the numbers.

    **Raises:** as `load_adapter`, but for another base.
    """
    adapter = read_adapter(path)
    problems: list[str] = []
    called = [] if state is None else state_names(model, state)
    if adapter.state and state is None:
        problems.append(
            f"it has the state of a model, with {named(min(adapter.state))}: give that "
            "of this one, `model, state = load_adapter(path, model, state=state)`"
        )
    else:
        expected = _named_specs(zip(called, state_leaves(state)))
        problems += differences("the state", expected, _specs_of(adapter.state))
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
    problems += differences("its description", expected, _specs_of(adapter.tensors))
    for name, x in {**adapter.tensors, **adapter.state}.items():
        problems += too_wide(name, x.dtype)
    refuse_misfit(path, problems)
    return adapter, called, params, rest


def extract(model: PyTree, state: eqx.nn.State | None = None) -> Adapter:
    """What of a model goes into a file.

    **Raises:** as `save_adapter`.
    """
    refuse_partial(model)
    adapted = [leaf for leaf in leaves_of(model) if is_adapted(leaf.value)]
    leaves = jtu.tree_flatten_with_path(written(model)[0])[0]
    called = [] if state is None else state_names(model, state)
    refuse_ambiguous([*(dotted(keys) for keys, _ in leaves), *called])
    tensors = {dotted(keys): to_numpy(dotted(keys), x) for keys, x in leaves}
    beside = zip(called, state_leaves(state))
    kept = {name: to_numpy(name, x) for name, x in beside}
    weights = {
        leaf.path: {**describe(leaf.value), "layer": describe_layer(leaf)}
        for leaf in adapted
    }
    try:
        ties = {to: path for to, path in ties_of(model).items() if path in weights}
    except ValueError:  # Of what is made of an array nothing can be said.
        ties = {}
    return Adapter(weights, tensors, VERSION, kept, recorded(model), ties)


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


def _frozen(model: PyTree) -> list[str]:
    """The paths of what is written and does not train."""
    found = jtu.tree_flatten_with_path(roles(model))[0]
    return sorted(dotted(keys) for keys, name in found if name == FROZEN)


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
        state = {name: tensors.pop(name) for name in about.get("state", [])}
        tensors = with_repeats(tensors, about.get("repeats", {}))
    except (KeyError, TypeError, ValueError) as e:
        raise AdapterError(f"{path}: its description cannot be read: {said(e)}.") from e
    if not weights and version <= VERSION:
        raise AdapterError(f"{path} is an adapter of no weight.")
    if version > VERSION:
        raise AdapterError(
            f"{path} was written by a newer lora_quax, in version {version} of the "
            f"format; this one reads up to {VERSION}."
        )
    return Adapter(
        weights, tensors, version, state, about.get("base"), about.get("ties")
    )


_Specs = dict[str, tuple[tuple[int, ...], Any]]


def _specs(params) -> _Specs:
    leaves = jtu.tree_flatten_with_path(params)[0]
    return _named_specs((dotted(keys), x) for keys, x in leaves)


def _specs_of(tensors: dict[str, np.ndarray]) -> _Specs:
    return _named_specs(tensors.items())


def _named_specs(leaves: Iterable[tuple[str, Any]]) -> _Specs:
    return {name: (tuple(x.shape), x.dtype) for name, x in leaves}


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
