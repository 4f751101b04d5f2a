"""`--names`: what a name in the one place is called in the other."""

from pathlib import Path

from .._disk.files import AdapterError, read_json
from ..peft._names import Namer


def read_names(path: Path | None) -> dict[str, str] | None:
    """**Raises:** `FileNotFoundError`; `AdapterError` if it is no object of names."""
    if path is None:
        return None
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path} to read names from.")
    names = read_json(path)
    for key, name in names.items():
        if not isinstance(name, str):
            raise AdapterError(f"{path}: {key!r} is given {name!r}, which is no name.")
    return names


def namer(path: Path | None) -> Namer:
    return Namer(read_names(path))
