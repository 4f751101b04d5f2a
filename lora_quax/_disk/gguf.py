"""Models in llama.cpp's format, of which the weights stay quantised.

The file is read by llama.cpp's own package, and so are its blocks: a block whose scales
are ones decodes to its codes.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .._arrays.quantised import QuantisedArray
from .._model.names import Names
from .._model.paths import named
from .exchange import cast
from .files import AdapterError, refuse
from .places import is_array, Place, places_of


class _Type(NamedTuple):
    """A type of blocks: where in the bytes of one its scales are."""

    tile: int  # how many numbers share a scale
    scale: slice  # of type float16
    offset: slice | None = None  # of type float16
    inner: slice | None = None  # a scale of type int8 for each tile in the block


_TYPES = {
    "Q4_0": _Type(32, slice(0, 2)),
    "Q4_1": _Type(32, slice(0, 2), slice(2, 4)),
    "Q8_0": _Type(32, slice(0, 2)),
    "Q6_K": _Type(16, slice(208, 210), inner=slice(192, 208)),
}
_ARCHITECTURE = "general.architecture"
_Q_HEADS = "llama.attention.head_count"
_K_HEADS = "llama.attention.head_count_kv"
_PLAIN = ("F32", "F16", "BF16")


def load_gguf(path: str | os.PathLike, like: PyTree, *, names: Names = None) -> PyTree:
    """Reads the arrays of a model from a GGUF file. What is quantised there stays so.

    ```python
    names = {"layers.{}.attn.q": "blk.{}.attn_q", "embed": "token_embd"}
    model = lora_quax.load_gguf("model-Q4_1.gguf", like, names=names)
    ```

    Weights of the types Q4_0, Q4_1, Q8_0 and Q6_K become `QuantisedArray`s, whose
    numbers are those of llama.cpp. Of a Llama the rows of q and k, which llama.cpp has
    in another order, are put back into that of Hugging Face.

    **Arguments:**

    - `path`: of the file.
    - `like`: a model of the same structure, of floating-point arrays. They may be
        `jax.ShapeDtypeStruct`s, and say which type the numbers are to stand for.
    - `names`: the names in the file, as for `load_model`. Several arrays may have one
        name: the weights are tied.

    **Returns:** the model. `like` is not changed.

    **Raises:** `AdapterError`, which lists everything that is wrong, if a tensor is
    missing, unexpected, of another shape, or of a type that is not known here, or if
    the file is damaged; `FileNotFoundError`; `ImportError` without the package `gguf`;
    `ValueError` if `like` is adapted or quantised, or `names` matches nothing.
    """
    path, places = Path(path), places_of(like, names)
    file = _read(path)
    _refuse_misfit(path, places, file)
    arrays: dict[tuple, Any] = {}
    loaded = []
    for place in places:
        # Arrays of one name are one array: the weights are tied.
        key = tuple(place.names.values()), jnp.dtype(place.value.dtype)
        if key not in arrays:
            tensors = [file.array(name, key[1]) for name in key[0]]
            arrays[key] = _stacked(tensors, place)
        loaded.append(arrays[key])
    leaves, treedef = jax.tree.flatten(like)
    rest = iter(loaded)
    leaves = [next(rest) if is_array(x) else x for x in leaves]
    return jax.tree.unflatten(treedef, leaves)


class _File(NamedTuple):
    """What is in a file, by name."""

    tensors: dict[str, Any]  # of gguf's type
    heads: dict[str, Any]  # q and k of a Llama: how many heads a tensor of that end has

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(n) for n in reversed(self.tensors[name].shape))

    def type(self, name: str) -> str:
        return self.tensors[name].tensor_type.name

    def n_heads(self, name: str) -> Any:
        """Of a tensor whose rows are those of heads; as the file says it."""
        return self.heads.get(".".join(name.split(".")[-2:]))

    def has_heads(self, name: str) -> bool:
        """Whether the rows of each head, if it has any, are as many, and even."""
        n = self.n_heads(name)
        if n is None:
            return True
        return type(n) is int and n > 0 and self.shape(name)[0] % (2 * n) == 0

    def array(self, name: str, dtype: np.dtype) -> jax.Array | QuantisedArray:
        tensor, shape, kind = self.tensors[name], self.shape(name), self.type(name)
        heads = self.n_heads(name)

        def ready(x: np.ndarray) -> jax.Array:
            return jnp.asarray(x if heads is None else _unturned(x, heads))

        if kind in _PLAIN:
            x = _dequantize(tensor.data, tensor.tensor_type).reshape(shape)
            return ready(cast(name, x, dtype))
        codes, scale, offset = _parts(tensor, shape, _TYPES[kind])
        offset = None if offset is None else ready(offset)
        kind = kind.lower()
        return QuantisedArray(
            ready(codes), ready(scale), offset, kind=kind, dtype=dtype
        )


def _read(path: Path) -> _File:
    """**Raises:** `FileNotFoundError`; `AdapterError` if it is no such file."""
    try:
        import gguf
    except ImportError as e:
        raise ImportError(
            "`lora_quax.load_gguf` needs gguf: `pip install 'lora_quax[quantised]'`."
        ) from e
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        reader = gguf.GGUFReader(path)
        fields = {
            name: field.contents()
            for name, field in reader.fields.items()
            if name in (_ARCHITECTURE, _Q_HEADS, _K_HEADS)
        }
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as e:
        raise AdapterError(f"{path} is no sound GGUF file: {e}.") from e
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    heads = {}
    if fields.get(_ARCHITECTURE) == "llama" and _Q_HEADS in fields:
        k_heads = fields.get(_K_HEADS, fields[_Q_HEADS])
        for end in ("weight", "bias"):
            heads |= {f"attn_q.{end}": fields[_Q_HEADS], f"attn_k.{end}": k_heads}
    return _File(tensors, heads)


def _dequantize(data: np.ndarray, kind) -> np.ndarray:
    import gguf

    return gguf.quants.dequantize(data, kind)


def _parts(tensor, shape: tuple[int, ...], kind: _Type):
    """The codes, scales and offsets of blocks."""
    tiles = (*shape[:-1], shape[-1] // kind.tile)
    n_blocks = tensor.data.size // _block_bytes(tensor)
    blocks = np.array(tensor.data).reshape(n_blocks, -1)
    half = lambda part: blocks[:, part].copy().view(np.float16)  # (n_blocks, 1)
    scale, offset = half(kind.scale), kind.offset and half(kind.offset)
    blocks[:, kind.scale] = np.ones(1, np.float16).view(np.uint8)
    if kind.inner is not None:
        # Their products have too many digits for float16.
        scale = scale.astype(np.float32) * blocks[:, kind.inner].view(np.int8)
        blocks[:, kind.inner] = 1
    if kind.offset is not None:
        blocks[:, kind.offset] = 0
    codes = _dequantize(blocks.reshape(tensor.data.shape), tensor.tensor_type)
    codes = codes.reshape(shape).astype(np.int8)
    offset = None if offset is None else offset.reshape(tiles)
    return [codes, scale.reshape(tiles), offset]


def _block_bytes(tensor) -> int:
    import gguf

    return gguf.GGML_QUANT_SIZES[tensor.tensor_type][1]


def _unturned(x: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp has the rows of each head with the two halves that RoPE turns
    interleaved, and Hugging Face one after the other."""
    halves = x.reshape(heads, -1, 2, *x.shape[1:])
    return halves.swapaxes(1, 2).reshape(x.shape)


def _stacked(parts: list, place: Place) -> Any:
    """One array of the tensors that it stands for, along the axes that stack them."""
    lead = tuple(place.value.shape)[: len(next(iter(place.names)))]

    def joined(*xs):
        return jnp.stack(xs).reshape(*lead, *xs[0].shape)

    return jax.tree.map(joined, *parts) if lead else parts[0]


def _refuse_misfit(path: Path, places: list[Place], file: _File) -> None:
    """**Raises:** `AdapterError`, which lists what is wrong."""
    problems, expected = [], set()
    for place in places:
        if not jnp.issubdtype(place.value.dtype, jnp.floating):
            problems.append(f"{named(place.path)} is no floating-point array")
        kinds = set()
        for name in place.names.values():
            expected.add(name)
            whose = "" if name == place.path else f", which is {named(place.path)},"
            if name not in file.tensors:
                problems.append(f"`{name}`{whose} is missing")
                continue
            kinds.add(kind := file.type(name))
            if kind not in (*_PLAIN, *_TYPES):
                problems.append(
                    f"`{name}`{whose} is of type {kind}; {', '.join(_TYPES)} and "
                    f"{', '.join(_PLAIN)} are known here"
                )
            elif not file.has_heads(name):
                problems.append(
                    f"`{name}`{whose} of shape {file.shape(name)} has not the rows of "
                    f"the heads that the file says, {file.n_heads(name)!r:.80}"
                )
            elif (shape := file.shape(name)) != place.shape():
                problems.append(
                    f"`{name}`{whose} has shape {shape}; the model has {place.shape()}"
                )
        if len(kinds) > 1:
            problems.append(
                f"{named(place.path)} is a stack of tensors of the types "
                f"{' and '.join(sorted(kinds))}, which are kept differently"
            )
    problems += [f"`{name}` is unexpected" for name in file.tensors.keys() - expected]
    refuse(f"{path} is not the model wanted, and nothing was loaded", problems)
