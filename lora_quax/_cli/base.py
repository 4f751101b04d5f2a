"""A base model in safetensors: one file, or a folder of shards."""

from pathlib import Path
from typing import NamedTuple

from .._disk.files import AdapterError, open_tensors, read_header, read_json


_SUFFIX = ".safetensors"
_INDEX = "model.safetensors.index.json"
# Other copies of the weights: they would be those of the model before the merge.
_WEIGHTS = (
    ".bin .bin.index.json .ckpt .gguf .h5 .h5.index.json .index .msgpack "
    ".msgpack.index.json .npz .onnx .ot .pkl .pt .pth .safetensors.index.json .tflite"
).split()


class Tensor(NamedTuple):
    """Where a tensor lies."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int  # in the file


class Base(NamedTuple):
    """The tensors of a model, and the files that make it up."""

    tensors: dict[str, Tensor]
    shards: list[Path]
    others: list[Path]  # configuration, tokeniser, index


def read_base(path: Path) -> Base:
    """**Raises:** `FileNotFoundError`; `AdapterError` if a file is not sound, a tensor
    is in two files, or an index and its files are at odds."""
    if not path.exists():
        raise FileNotFoundError(f"There is no file or folder {path}.")
    if not path.is_dir():
        return Base(_tensors(path), [path], [])
    index = path / _INDEX
    where = _read_index(index) if index.is_file() else None
    files = sorted(path.iterdir())
    shards = [file for file in files if file.name.endswith(_SUFFIX)]
    if where is not None:
        shards = [path / name for name in sorted(set(where.values()))]
    if not shards:
        raise FileNotFoundError(f"There is no file *{_SUFFIX} in {path}.")
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        for name, tensor in _tensors(shard).items():
            if name in tensors:
                raise AdapterError(
                    f"`{name}` is in {tensors[name].file} and in {shard}: which is "
                    f"meant? A file {_INDEX} would say it."
                )
            tensors[name] = tensor
    for name, file in (where or {}).items():
        if name not in tensors or tensors[name].file.name != file:
            raise AdapterError(f"{index} says that `{name}` is in {file}; it is not.")
    others = [file for file in files if _is_other(file)]
    return Base(tensors, shards, [*others, *([index] if where is not None else [])])


def _is_other(file: Path) -> bool:
    ends = (_SUFFIX, *_WEIGHTS)
    return (
        file.is_file()
        and not file.name.startswith(".")
        and not file.name.endswith(ends)
    )


def _read_index(path: Path) -> dict[str, str]:
    where = read_json(path).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise AdapterError(f"{path} has no `weight_map`.")
    for name, file in where.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise AdapterError(f"{path} has {file!r} for `{name}`, which is no file.")
    return where


def _tensors(path: Path) -> dict[str, Tensor]:
    with open_tensors(path) as file:
        specs = file.specs
    with path.open("rb") as file:
        data = 8 + int.from_bytes(file.read(8), "little")
    header = read_header(path)
    return {
        name: Tensor(path, dtype, shape, data + header[name]["data_offsets"][0])
        for name, (dtype, shape) in specs.items()
    }
