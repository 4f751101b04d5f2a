"""What the commands share of the world outside: where they print, where they may
write, and the file that `--names` names."""

from collections.abc import Iterable
from pathlib import Path

from rich.console import Console

from .._disk.files import AdapterError, read_json
from .._disk.whole import clear_leftovers
from .._model.names import Namer


_WIDE = 10_000  # A path is never cut off for want of room.


def console(stderr: bool = False) -> Console:
    """A console as wide as the terminal or, in a pipe or a file, as the text."""
    out = Console(stderr=stderr, highlight=False)
    if out.is_terminal:
        return out
    return Console(stderr=stderr, highlight=False, width=_WIDE)


def show(table) -> None:
    """Prints a table with no blanks at the ends of its lines."""
    out = console()
    if out.is_terminal:
        out.print(table)
        return
    with out.capture() as capture:
        out.print(table)
    lines = (line.rstrip() for line in capture.get().splitlines())
    print(*filter(None, lines), sep="\n")


def refuse_existing(path: Path) -> None:
    """A command never writes over anything. An empty folder may be written to.

    **Raises:** `FileExistsError`; `FileNotFoundError` if it would be in no folder.
    """
    if path.is_dir():
        clear_leftovers(path)
    is_empty = path.is_dir() and not any(path.iterdir())
    if (path.exists() or path.is_symlink()) and not is_empty:
        what = "is not empty" if path.is_dir() else "exists"
        raise FileExistsError(f"{path} {what}, and is left alone. Name another place.")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"There is no folder {path.parent} to write to.")


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


def namer(path: Path | None, weights: Iterable[str]) -> Namer:
    """From the names of an adapter to those wanted.

    The mapping may be the one that `lora_quax.peft.save` takes, which for an adapter of
    PEFT is the other way round: it is turned if none of its entries is of use.
    """
    names = read_names(path)
    if names is None:
        return Namer(None)
    weights, there, back = [*weights], Namer(names), inverse(names)
    for weight in weights:
        there(weight)
    if back is not None and there.unused == set(names):
        other = Namer(back)
        for weight in weights:
            other(weight)
        if other.unused != set(back):
            return Namer(back)
    return Namer(names)


def inverse(names: dict[str, str]) -> dict[str, str] | None:
    """A mapping the other way round, if there is one."""
    out = {name: key for key, name in names.items()}
    segments = lambda name: name.split(".").count("{}")
    alike = all(
        key.count("{}") == name.count("{}") == segments(key) == segments(name)
        for key, name in names.items()
    )
    return out if alike and len(out) == len(names) else None
