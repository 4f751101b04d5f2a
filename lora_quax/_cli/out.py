"""Where a command may write."""

from pathlib import Path


def refuse_existing(path: Path) -> None:
    """Nothing that is there is written over: an empty folder is nothing.

    **Raises:** `FileExistsError`; `FileNotFoundError` if it would be in no folder.
    """
    is_empty = path.is_dir() and not any(path.iterdir())
    if (path.exists() or path.is_symlink()) and not is_empty:
        what = "is not empty" if path.is_dir() else "exists"
        raise FileExistsError(f"{path} {what}, and is left alone. Name another place.")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"There is no folder {path.parent} to write to.")
