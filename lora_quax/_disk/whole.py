"""Files and folders that are there whole, or not at all.

What is to be written is written in a folder beside its goal, and moved when all of it
is done. A reader sees what was there or what is there now; a write that fails changes
nothing; and of one that was killed no more is left than its folder, which the next one
takes away.
"""

import contextlib
import errno
import functools as ft
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path


try:
    import fcntl
except ImportError:  # Windows has no such locks. Nothing is taken away there.
    fcntl = None

_BESIDE = re.compile(r"\..+\.[0-9a-f]{8}\.lora_quax", re.DOTALL)
_LONGEST_NAME = 200  # Of the 255 bytes that file systems have.
_TRIES = 10


@contextlib.contextmanager
def written_whole(*paths: Path) -> Iterator[list[Path]]:
    """Files to write beside their goals, which are moved into place when all are done.

    A link is followed, and a file that was there keeps its mode. If anything fails,
    what was at the goals is still there, and nothing else is. Only a machine that stops
    between two moves leaves one file new and another old.

    **Raises:** `FileNotFoundError`, `IsADirectoryError` or another `OSError`.
    """
    goals = [_goal(path) for path in paths]
    with contextlib.ExitStack() as stack:
        beside = [stack.enter_context(_beside(goal)) / goal.name for goal in goals]
        yield beside
        for new, goal in zip(beside, goals):
            _finish(new, goal)
        _locked_move(dict(zip(beside, goals)))


@contextlib.contextmanager
def folder_whole(folder: Path, names: Iterable[str]) -> Iterator[list[Path]]:
    """Files of a folder, as `written_whole`. The folder is made if need be, with those
    above it, and is there with all of them or not at all.

    The files in it of other names are left alone.

    **Raises:** `NotADirectoryError` if there is a file in its place; another `OSError`.
    """
    goals = [folder / name for name in names]
    if folder.is_dir():
        with written_whole(*goals) as beside:
            yield beside
        return
    folder = Path(os.path.realpath(folder))
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(
                f"{path} is a file; a folder {folder} is to be written."
            )
    with _made(folder.parent), _beside(folder) as room:
        new = room / folder.name
        new.mkdir()
        beside = [new / goal.name for goal in goals]
        yield beside
        for file in beside:
            _finish(file, file)
        try:
            os.rename(new, folder)
            _sync(folder.parent)
        except OSError as e:
            # Another program has made it in the meantime.
            if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            _locked_move({file: folder / file.name for file in beside})


@contextlib.contextmanager
def held(folder: Path) -> Iterator[bool]:
    """Makes a folder, with those above it, and holds it against other programs that ask
    for it here. One that is killed holds it no more. What was made and is empty in the
    end is taken away.

    **Returns:** whether it is held, or there is no telling.

    **Raises:** `OSError` if it cannot be made.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder, wait=False) as mine:
        try:
            yield mine is not False
        finally:
            with contextlib.suppress(OSError):  # There is something in it.
                for path in missing if mine is not False else ():
                    path.rmdir()


def clear_leftovers(folder: Path) -> None:
    """Takes away what programs that were killed have left in a folder."""
    try:
        found = [*folder.iterdir()]
    except OSError:  # It may be written to, and not be read.
        return
    for path in found:
        if _BESIDE.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            with _lock(path, wait=False) as mine:
                if mine:
                    shutil.rmtree(path, ignore_errors=True)


def _goal(path: Path) -> Path:
    """The file itself, if a link is to be written to."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {path.parent} to write to.")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; a file is to be written.")
    goal = Path(os.path.realpath(path))
    if goal.exists() and not goal.is_file():
        raise OSError(f"{path} is no regular file, and would be replaced by one.")
    if not goal.parent.is_dir():
        raise FileNotFoundError(
            f"{path} is a link to {goal}, and there is no folder {goal.parent}."
        )
    return goal


@contextlib.contextmanager
def _beside(goal: Path) -> Iterator[Path]:
    """A new folder beside a goal, on the same file system."""
    clear_leftovers(goal.parent)
    with contextlib.ExitStack() as stack:
        name = goal.name.encode()[:_LONGEST_NAME].decode(errors="ignore")
        for _ in range(_TRIES):
            # It is locked for as long as it is in use, so as not to be taken away.
            room = goal.with_name(f".{name}.{secrets.token_hex(4)}.lora_quax")
            try:
                room.mkdir()
            except OSError as e:  # Of the folder, not of what is hidden in it.
                raise OSError(e.errno, e.strerror, str(goal.parent)) from e
            stack.callback(shutil.rmtree, room, ignore_errors=True)
            if stack.enter_context(_lock(room, wait=False)) is not False:
                break
        else:
            raise OSError(
                f"There is no writing in {goal.parent}: what is made is gone."
            )
        yield room


@contextlib.contextmanager
def _lock(folder: Path, wait: bool) -> Iterator[bool | None]:
    """Locks a folder against other programs, by no file of its own: nothing is left.

    **Returns:** whether it is locked; `None` if there is no telling, as on a system or
    a file system without locks.
    """
    if fcntl is None:
        yield None
        return
    try:
        fd = os.open(folder, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            # It may have been taken away before it was locked.
            is_locked = folder.exists() and os.path.samestat(
                os.fstat(fd), folder.stat()
            )
        except BlockingIOError:
            is_locked = False
        except OSError:
            is_locked = None
        yield is_locked
    finally:
        os.close(fd)


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Makes a folder and those above it, and takes them away if anything fails."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # Another program may be using it.
            for path in missing:
                path.rmdir()
        raise


def _finish(new: Path, goal: Path) -> None:
    """Gives a file the mode of its goal, and sees that it is on the disk."""
    if new != goal and goal.exists():
        mode = goal.stat().st_mode
    else:
        # As the system gives it to any new file; a library may have made this one.
        probe = new.with_name(f".{secrets.token_hex(4)}")
        probe.touch()
        mode = probe.stat().st_mode
        probe.unlink()
    new.chmod(mode & 0o7777)
    with new.open("rb") as file:
        os.fsync(file.fileno())


def _locked_move(goals: dict[Path, Path]) -> None:
    """Moves files to their goals while no other program moves any there."""
    folders = sorted({goal.parent for goal in goals.values()})
    # One that is beside a goal is locked already, by whoever writes there.
    folders = [path for path in folders if not _BESIDE.fullmatch(path.name)]
    with contextlib.ExitStack() as stack:
        for folder in folders:
            stack.enter_context(_lock(folder, wait=True))
        _move(goals)
        for folder in folders:
            _sync(folder)


def _move(goals: dict[Path, Path]) -> None:
    """Moves each file to its goal; if one cannot be, those before it are taken back."""
    with contextlib.ExitStack() as on_failure:
        *first, (last, goal) = goals.items()
        for new, path in first:
            back = ft.partial(path.unlink)
            if path.exists():
                old = new.with_name(f"{new.name}.old")
                _keep(path, old)
                back = ft.partial(old.replace, path)
            os.replace(new, path)
            on_failure.callback(back)
        os.replace(last, goal)
        on_failure.pop_all()


def _keep(path: Path, copy: Path) -> None:
    try:
        os.link(path, copy)
    except OSError:  # Not every file system has links.
        shutil.copy2(path, copy)


def _sync(folder: Path) -> None:
    """Sees that a move is on the disk, where a system can tell."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
