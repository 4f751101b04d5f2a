"""The weights of a model on disk, as Hugging Face lays them out: one file, or several
and an index that says which tensor is in which."""

import contextlib
import json
import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path

from .files import AdapterError, open_tensors, read_json, TensorFile


SINGLE = "model.safetensors"
INDEX = f"{SINGLE}.index.json"
_SHARD = re.compile(r"model(-[0-9a-f]{8})?-\d{5}-of-\d{5}\.safetensors")


def read_index(path: Path) -> dict[str, str]:
    """Which tensor is in which file.

    **Raises:** `AdapterError` if it is no such index.
    """
    where = read_json(path).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise AdapterError(f"{path} has no `weight_map`.")
    for name, file in where.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise AdapterError(
                f"{path} has {file!r:.80} for `{name}`, which is no file."
            )
    return where


@contextlib.contextmanager
def open_model(path: Path) -> Iterator[dict[str, TensorFile]]:
    """The file that each tensor of a model is in, open.

    **Raises:** `FileNotFoundError`; `AdapterError` if a file is not sound, or an index
    and its files are at odds.
    """
    with contextlib.ExitStack() as stack:
        if not path.is_dir():
            files = [stack.enter_context(open_tensors(path))]
        elif (path / SINGLE).exists():
            files = [stack.enter_context(open_tensors(path / SINGLE))]
        elif (path / INDEX).exists():
            files = _open_shards(path, stack)
        else:
            raise FileNotFoundError(f"There is no {SINGLE} in {path}, and no {INDEX}.")
        yield {name: file for file in files for name in file.specs}


def _open_shards(path: Path, stack: contextlib.ExitStack) -> list[TensorFile]:
    while True:
        where = read_index(path / INDEX)
        try:
            with contextlib.ExitStack() as opened:
                names = dict.fromkeys(where.values())
                files = [opened.enter_context(open_tensors(path / n)) for n in names]
                stack.enter_context(opened.pop_all())
            break
        except FileNotFoundError:
            # Another program may have put a new model in the place of this one.
            if read_index(path / INDEX) == where:
                raise
    held = {name: file.path.name for file in files for name in file.specs}
    for name in held | where:
        if held.get(name) != where.get(name):
            said, found = where.get(name, "no file"), held.get(name, "none of them")
            raise AdapterError(
                f"{path / INDEX} says that `{name}` is in {said}; it is in {found}."
            )
    return files


def shards_of(sizes: Mapping[str, int], limit: int | float) -> list[list[str]]:
    """Tensors by files, in their order, each of so many bytes at most; a tensor that is
    larger has a file of its own."""
    out: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if out[-1] and filled + size > limit:
            out.append([])
            filled = 0
        out[-1].append(name)
        filled += size
    return out


def file_names(folder: Path, n: int) -> list[str]:
    """What files to write so many shards to, with the index last if there is one.

    None of several is one of a model that is there: it stays whole until the index,
    which comes last, says otherwise.
    """
    if n == 1:
        return [SINGLE]
    for tag in ("", f"-{secrets.token_hex(4)}"):
        names = [f"model{tag}-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)]
        if not any((folder / name).exists() for name in names):
            break
    return [*names, INDEX]


def index_text(shards: Mapping[str, list[str]], total: int) -> str:
    where = {name: file for file, names in shards.items() for name in names}
    about = {"metadata": {"total_size": total}, "weight_map": where}
    return json.dumps(about, indent=2, sort_keys=True) + "\n"


def take_away_others(folder: Path, names: list[str]) -> None:
    """Takes away what is left of the model that was there before these files."""
    # The single file first: it is read in preference to an index.
    others = [path.name for path in folder.iterdir() if _SHARD.fullmatch(path.name)]
    for name in (SINGLE, INDEX, *others):
        if name not in names:
            (folder / name).unlink(missing_ok=True)
