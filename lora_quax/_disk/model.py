"""A whole model on disk: its arrays by name, and nothing of its structure."""

import itertools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import DTypeLike, PyTree

from .._arrays.check import check_float_dtype
from .._model.names import Names
from .._model.paths import named
from .._model.together import described, in_step, is_on_all, is_shared, is_writer
from .exchange import cast, same_bits, to_numpy, too_wide
from .files import AdapterError, refuse, refuse_type, TensorFile, write_tensors
from .places import is_array, Place, places_of
from .shards import file_names, index_text, open_model, shards_of, take_away_others
from .whole import folder_whole, written_whole


_METADATA = {"format": "pt"}  # Without it `transformers` does not read a file.


def save_model(
    path: str | os.PathLike,
    model: PyTree,
    *,
    names: Names = None,
    dtype: DTypeLike | None = None,
    max_shard_size: int | float = 5_000_000_000,
) -> None:
    """Writes the arrays of a model in the safetensors format.

    ```python
    lora_quax.save_model("merged", lora_quax.merge(model))
    model = lora_quax.load_model("merged", eqx.filter_eval_shape(Model, key=key))
    ```

    Each array is written by its path, such as `blocks.0.attn.q.weight`, or by the name
    that it is given. What is no array is not written: it is in the program. Everything
    is written beside its goal and moved, so that a model that is there is replaced as a
    whole or not at all; only a folder that turns from several files to one, or back,
    has both for a moment.

    **Arguments:**

    - `path`: of a file, if it ends in `.safetensors`, or else of a folder. A folder has
        one file `model.safetensors`, or several with an index, as Hugging Face has it.
        It is made if need be; files in it of other names are left alone.
    - `model`: any tree of arrays, such as a model or `(model, state)`.
    - `names`: what arrays are called, as for `lora_quax.peft.save`: `{}` in a name is
        the index of layers that are stacked, each of which is a tensor of its own. Two
        arrays that are equal, as where weights are tied, may have one name.
    - `dtype`: a floating-point type to write all floating-point arrays in; by default
        each is written in its own.
    - `max_shard_size`: how many bytes a file of several may have. A tensor that has
        more gets a file of its own.

    Where several processes hold the model, each has to call this: the arrays are
    gathered one after the other, and one process writes them.

    **Raises:** `ValueError` if the model is adapted or quantised, holds no array, two
    different arrays have the same name, or `names` matches nothing; `TypeError` if it
    is abstract or traced, or of a type that the format does not have, such as that of
    random keys; `OverflowError` if a number is too large for `dtype`; `OSError` if it
    cannot be written. What was there is still there then.
    """
    path = Path(path)
    shared = is_shared(model)
    with in_step("save_model", shared) as said:
        if not max_shard_size > 0:
            raise ValueError(
                f"`max_shard_size` must be positive, got {max_shard_size!r}."
            )
        places = places_of(model, names)
        wanted = _float_type(dtype)
        if shared:
            said |= described(model) | {"dtype": str(wanted)}
            said |= {f"the name of {x.path}": str(x.names) for x in places}
    held: dict[str, tuple[Place, tuple[int, ...]]] = {}
    for place in places:
        refuse_type(_written_type(place, wanted), named(place.path))
        for index, name in place.names.items():
            other, at = held.setdefault(name, (place, index))
            if other is not place and not _are_tied(other, at, place, index):
                raise ValueError(
                    f"{named(other.path)} and {named(place.path)} would both be "
                    f"{name!r}, and are not equal."
                )
    if not held:
        raise ValueError("The model holds no array.")

    sizes = {
        name: math.prod(place.shape()) * _written_type(place, wanted).itemsize
        for name, (place, _) in held.items()
    }
    is_file = path.suffix == ".safetensors"
    shards = [[*held]] if is_file else shards_of(sizes, max_shard_size)
    left = dict.fromkeys(name for shard in shards for name in shard)

    def gathered(name: str) -> np.ndarray:
        del left[name]
        place, index = held[name]
        return to_numpy(place.path, place.value[index] if index else place.value)

    def tensor(name: str) -> np.ndarray:
        place, _ = held[name]
        return cast(place.path, gathered(name), _written_type(place, wanted))

    with in_step("save_model", shared):
        try:
            if is_writer(shared):
                write = _write_file if is_file else _write_folder
                write(path, shards, sizes, tensor)
        finally:  # All gather what one of them writes, or would have written.
            for name in [*left] if shared else []:
                gathered(name)


_Tensor = Callable[[str], np.ndarray]


def _write_file(path: Path, shards, _, tensor: _Tensor) -> None:
    with written_whole(path) as (new,):
        write_tensors(new, {name: tensor(name) for name in shards[0]}, _METADATA)


def _write_folder(path: Path, shards, sizes, tensor: _Tensor) -> None:
    files = file_names(path, len(shards))
    with folder_whole(path, files) as beside:
        for new, shard in zip(beside, shards):
            write_tensors(new, {name: tensor(name) for name in shard}, _METADATA)
        if len(shards) > 1:
            where = dict(zip(files, shards))
            beside[-1].write_text(index_text(where, sum(sizes.values())))
    take_away_others(path, files)


def load_model(
    path: str | os.PathLike,
    like: PyTree,
    *,
    names: Names = None,
    dtype: DTypeLike | None = None,
    sharding: Any = None,
) -> PyTree:
    """Reads the arrays of a model, which has to have all that is in the files and
    nothing more.

    ```python
    like = eqx.filter_eval_shape(Model, key=jr.key(0))
    model = lora_quax.load_model("merged", like, dtype=jnp.bfloat16)
    ```

    **Arguments:**

    - `path`: of a file, or of a folder with `model.safetensors`, or with several files
        and their index.
    - `like`: a model of the same structure. Its arrays may be `jax.ShapeDtypeStruct`s;
        what of it is no array is taken over.
    - `names`: as for `save_model`. Several arrays may have one name.
    - `dtype`: a floating-point type for all floating-point arrays, whatever they have
        in the files and in `like`. By default both have to have the same.
    - `sharding`: a `jax.sharding.Sharding` or a device for all arrays, or a tree of
        them that is a prefix of `like`. Of the files each device reads its part alone.
        By default an array has the sharding that it has in `like`, if it has one there.

    Where several processes are to hold the model, each has to call this, and an error
    of one is an error of all.

    **Returns:** the model. `like` is not changed.

    **Raises:** `AdapterError`, which lists everything that is wrong, if a tensor is
    missing, unexpected, or of another shape or type, or if a file is damaged;
    `FileNotFoundError`; `ValueError` if `like` is adapted or quantised, or `names`
    matches nothing;
    `OverflowError` if a number is too large for `dtype`; `ValueError` if the processes
    disagree about the model or its layout.
    """
    path, wanted = Path(path), _float_type(dtype)
    shardings = _shardings(like, sharding)
    shared = any([x is not None and is_on_all(x) for x in {*shardings}])
    with in_step("load_model", shared) as said:
        places = places_of(like, names)
        loaded = _loaded(path, places, shardings, wanted)
        if shared:
            paths = [place.path for place in places]
            said |= described(dict(zip(paths, loaded)))
    leaves, treedef = jax.tree.flatten(like)
    rest = iter(loaded)
    leaves = [next(rest) if is_array(x) else x for x in leaves]
    return jax.tree.unflatten(treedef, leaves)


def _loaded(
    path: Path,
    places: list[Place],
    shardings: list[jax.sharding.Sharding | None],
    wanted: np.dtype | None,
) -> list[jax.Array]:
    """The array at each place.

    **Raises:** as `load_model`.
    """
    with open_model(path) as files:
        _refuse_misfit(path, places, files, wanted)
        arrays: dict[tuple, jax.Array] = {}
        loaded = []
        for place, where in zip(places, shardings, strict=True):
            to = _written_type(place, wanted)
            # Arrays of one name are one array: the weights are tied.
            key = tuple(place.names.items()), tuple(place.value.shape), to, where
            if key not in arrays:
                arrays[key] = _read(place, files, to, where)
            loaded.append(arrays[key])
    return loaded


def _float_type(dtype: DTypeLike | None) -> np.dtype | None:
    return None if dtype is None else check_float_dtype(dtype)


def _written_type(place: Place, wanted: np.dtype | None) -> np.dtype:
    dtype = jnp.dtype(place.value.dtype)
    is_float = jnp.issubdtype(dtype, jnp.floating)
    return wanted if wanted is not None and is_float else dtype


def _are_tied(one: Place, at, other: Place, index) -> bool:
    if one.value is other.value and at == index:
        return True
    return same_bits(
        to_numpy(one.path, one.value)[at], to_numpy(other.path, other.value)[index]
    )


def _refuse_misfit(
    path: Path,
    places: list[Place],
    files: dict[str, TensorFile],
    wanted: np.dtype | None,
) -> None:
    """**Raises:** `AdapterError`, which lists what is wrong."""
    problems, expected = [], set()
    for place in places:
        for name in place.names.values():
            expected.add(name)
            whose = "" if name == place.path else f", which is {named(place.path)},"
            if name not in files:
                problems.append(f"`{name}`{whose} is missing")
                continue
            try:
                dtype = files[name].dtype(name)
            except AdapterError as e:
                problems.append(str(e))
                continue
            shape = files[name].specs[name][1]
            to = _written_type(place, wanted)
            floats = all(jnp.issubdtype(t, jnp.floating) for t in (dtype, to))
            if shape != place.shape():
                problems.append(
                    f"`{name}`{whose} has shape {shape}; the model has {place.shape()}"
                )
            elif dtype != to and not (floats and wanted is not None):
                cure = "; `dtype` converts" if floats else ""
                problems.append(
                    f"`{name}`{whose} is of type {dtype.name}; the model has "
                    f"{to.name}{cure}"
                )
        problems += too_wide(place.path, _written_type(place, wanted))
    problems += [f"`{name}` is unexpected" for name in files.keys() - expected]
    if any("lora_quax" in file.metadata for file in files.values()):
        problems = ["it is an adapter, which `load_adapter` reads"]
    refuse(f"{path} is not the model wanted, and nothing was loaded", problems)


def _shardings(like: PyTree, sharding: Any) -> list[jax.sharding.Sharding | None]:
    """For each array, where it is to be."""
    arrays = eqx.filter(like, is_array)
    if sharding is None:
        return [_own_sharding(x) for x in jax.tree.leaves(arrays)]
    if isinstance(sharding, jax.Device):
        sharding = jax.sharding.SingleDeviceSharding(sharding)
    try:
        given = jax.tree.leaves(jax.tree.broadcast(sharding, arrays))
    except ValueError as e:
        raise ValueError(f"`sharding` is no prefix of the model: {e}") from e
    for x in given:
        if not isinstance(x, jax.sharding.Sharding):
            raise TypeError(f"`sharding` must be a `jax.sharding.Sharding`, got {x!r}.")
    return given


def _own_sharding(x) -> jax.sharding.Sharding | None:
    if isinstance(x, jax.ShapeDtypeStruct) or isinstance(x, jax.Array) and x.committed:
        return x.sharding
    return None


def _read(
    place: Place,
    files: dict[str, TensorFile],
    dtype: np.dtype,
    sharding: jax.sharding.Sharding | None,
) -> jax.Array:
    shape = tuple(place.value.shape)
    views = {index: files[name].view(name) for index, name in place.names.items()}

    def part(index: Any) -> np.ndarray:
        return _part(views, shape, index, place.path, dtype)

    if sharding is None:
        return jnp.asarray(part((slice(None),) * len(shape)))
    try:
        return jax.make_array_from_callback(shape, sharding, part)
    except ValueError as e:
        raise ValueError(f"{named(place.path)} cannot be sharded so: {e}") from e


def _part(
    views: dict[tuple[int, ...], np.ndarray],
    shape: tuple[int, ...],
    index: tuple[slice, ...],
    path: str,
    dtype: np.dtype,
) -> np.ndarray:
    """A part of an array, of its slices along the axes that stack it."""
    n = len(next(iter(views), ()))
    stacked = [range(size)[at] for size, at in zip(shape[:n], index[:n])]
    parts = [views[at][index[n:]] for at in itertools.product(*stacked)]
    # A copy: what is in the file is not to change under the model.
    if not n:
        return np.array(cast(path, parts[0], dtype))
    rest = [len(range(size)[at]) for size, at in zip(shape[n:], index[n:])]
    out = np.empty((*map(len, stacked), *rest), dtype)
    for at, x in zip(itertools.product(*(range(len(r)) for r in stacked)), parts):
        out[at] = cast(path, x, dtype)
    return out
