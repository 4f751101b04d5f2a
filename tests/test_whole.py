"""Files are there whole or not at all, whoever is stopped, and whoever looks."""

import errno
import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import equinox as eqx
import jax.random as jr
import pytest

from lora_quax._disk import whole
from lora_quax._disk.whole import clear_leftovers, folder_whole, held, written_whole


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(path: Path, text: str) -> None:
    with written_whole(path) as (new,):
        new.write_text(text)


def test_what_is_written_may_be_written_whole(tmp_path):
    """A file beside its goal is nobody else's, so that nobody is waited for."""
    for text in ("old", "new"):
        with folder_whole(tmp_path / "folder", ["file"]) as (beside,):
            write(beside, text)
        assert (tmp_path / "folder" / "file").read_text() == text


def test_a_folder_is_held_by_one(tmp_path):
    folder = tmp_path / "above" / "folder"
    with held(folder) as mine:
        assert mine
        with held(folder) as other:
            assert not other
        assert folder.is_dir()
    assert not names_in(tmp_path)  # It was made for this.
    folder.mkdir(parents=True)
    with held(folder) as mine:
        assert mine
        (folder / "file").touch()
    assert names_in(folder) == ["file"]


def test_a_link_is_followed(tmp_path):
    (tmp_path / "far").mkdir()
    real, link = tmp_path / "far" / "real", tmp_path / "link"
    real.write_text("old")
    link.symlink_to(Path("far") / "real")
    write(link, "new")
    assert link.is_symlink() and real.read_text() == "new"
    assert names_in(tmp_path) == ["far", "link"]
    assert names_in(tmp_path / "far") == ["real"]


def test_a_link_to_a_file_that_is_not_there_yet(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far" / "real")
    write(tmp_path / "link", "new")
    assert (tmp_path / "far" / "real").read_text() == "new"
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere" / "real")
    with pytest.raises(FileNotFoundError, match="lost is a link to .*nowhere"):
        write(tmp_path / "lost", "new")


def test_a_folder_that_is_a_link_stays_one(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with folder_whole(tmp_path / "link", "ab") as files:
        for file in files:
            file.write_text("new")
    assert names_in(tmp_path / "real") == ["a", "b"]
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o755])
def test_the_mode_of_a_file_is_kept(tmp_path, mode):
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(mode)
    write(path, "new")
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_new_file_has_the_mode_of_any_other(tmp_path):
    (tmp_path / "other").touch()
    write(tmp_path / "new", "text")
    with folder_whole(tmp_path / "folder", "a") as (file,):
        file.touch(mode=0o600)  # As a library may make it.
    want = (tmp_path / "other").stat().st_mode
    for path in (tmp_path / "new", tmp_path / "folder" / "a"):
        assert path.stat().st_mode == want


@pytest.mark.parametrize("there", [True, False], ids=["there", "new"])
def test_a_failed_write_changes_nothing(tmp_path, there):
    folder = tmp_path / "above" / "folder"
    if there:
        folder.mkdir(parents=True)
        (folder / "a").write_text("old")
    with pytest.raises(ValueError, match="stop"):
        with folder_whole(folder, "ab") as files:
            for file in files:
                file.write_text("new")
            raise ValueError("stop")
    if there:
        assert names_in(folder) == ["a"] and (folder / "a").read_text() == "old"
    else:
        assert names_in(tmp_path) == []


def test_a_move_that_fails_is_taken_back(tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / name).write_text("old")
    replace, moved = os.replace, []

    def stop(new, goal):
        moved.append(goal)
        if len(moved) == 2:
            raise OSError("stop")
        replace(new, goal)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(OSError, match="stop"):
        with folder_whole(tmp_path, "abc") as files:
            for file in files:
                file.write_text("new")
    assert names_in(tmp_path) == ["a", "b"]
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text() == "old"


@pytest.mark.parametrize("below", ["", "a/b"])
def test_a_file_in_the_place_of_a_folder(tmp_path, below):
    (tmp_path / "file").write_text("text")
    with pytest.raises(NotADirectoryError, match="file is a file; a folder .* is to"):
        with folder_whole(tmp_path / "file" / below, "a"):
            pass
    assert (tmp_path / "file").read_text() == "text"


def test_a_folder_that_takes_no_files_is_named(tmp_path, monkeypatch):
    """And not what would have been hidden in it."""

    def refuse(path, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(PermissionError, match=rf"denied: '{re.escape(str(tmp_path))}'"):
        write(tmp_path / "goal", "text")


def test_two_programs_make_one_folder(tmp_path):
    goal = tmp_path / "folder"
    with folder_whole(goal, "ab") as one, folder_whole(goal, "abc") as other:
        for files, text in ((one, "one"), (other, "other")):
            for file in files:
                file.write_text(text)
    texts = {path.name: path.read_text() for path in goal.iterdir()}
    assert texts == {"a": "one", "b": "one", "c": "other"}
    assert names_in(tmp_path) == ["folder"]


_WRITER = """
import sys, time
from pathlib import Path
from lora_quax._disk.whole import folder_whole, written_whole
goal = Path(sys.argv[1])
with (folder_whole(goal, "a") if sys.argv[2] == "folder" else written_whole(goal)) as f:
    f[0].write_text("half")
    print("ready", flush=True)
    time.sleep(600)
"""


def stopped_in(goal: Path, kind: str) -> subprocess.Popen:
    """A program that has written half of something."""
    command = [sys.executable, "-c", _WRITER, str(goal), kind]
    out = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert out.stdout is not None and out.stdout.readline() == "ready\n"
    return out


@pytest.mark.skipif(whole.fcntl is None, reason="there are no locks")
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_program_left_is_cleared(tmp_path, kind):
    goal = tmp_path / "goal"
    if kind == "folder":
        goal.mkdir()
    (tmp_path / ".mine.01234567").mkdir()
    alive, killed = stopped_in(goal, kind), stopped_in(goal, kind)
    where = goal if kind == "folder" else tmp_path
    left = lambda: [name for name in names_in(where) if name.endswith(".lora_quax")]
    try:
        assert len(left()) == 2
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        clear_leftovers(where)
        # What is in use stays, and so does what is not known.
        assert len(left()) == 1
    finally:
        for program in (alive, killed):
            program.kill()
            program.wait()
    write(where / "other", "text")
    assert not left()
    assert (tmp_path / ".mine.01234567").is_dir()


_ADAPTERS = """
import itertools, sys
import equinox as eqx, jax.numpy as jnp, jax.random as jr
import lora_quax
alpha = int(sys.argv[2])
model = {"q": eqx.nn.Linear(3, 2, key=jr.key(0))}
model = lora_quax.loraify(model, rank=1, alpha=alpha, key=jr.key(1))
b = jnp.full_like(model["q"].weight.b, alpha)
model = eqx.tree_at(lambda m: m["q"].weight.delta.b, model, b)
print("ready", flush=True)
while True:
    lora_quax.peft.save(sys.argv[1], model)
"""


def test_a_reader_beside_two_writers(tmp_path):
    """It finds the factors of one with the alpha of that one, or says that it does
    not."""
    import lora_quax

    folder = tmp_path / "adapter"
    command = [sys.executable, "-c", _ADAPTERS, str(folder)]
    writers = [
        subprocess.Popen([*command, alpha], stdout=subprocess.PIPE) for alpha in "12"
    ]
    model = {"q": eqx.nn.Linear(3, 2, key=jr.key(0))}
    seen = set()
    try:
        for writer in writers:
            assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
        while not folder.exists():
            time.sleep(0.01)
        for _ in range(300):
            weight = lora_quax.peft.load(folder, model)["q"].weight
            seen.add((float(weight.b[0, 0]), float(weight.alpha)))
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
    assert seen <= {(1.0, 1.0), (2.0, 2.0)}


def test_the_files_of_two_writers_are_told(tmp_path):
    import lora_quax
    from lora_quax import AdapterError

    model = {"q": eqx.nn.Linear(3, 2, key=jr.key(0))}
    for alpha in (1, 2):
        adapted = lora_quax.loraify(model, rank=1, alpha=alpha, key=jr.key(1))
        lora_quax.peft.save(tmp_path / str(alpha), adapted)
    name = "adapter_config.json"
    (tmp_path / "1" / name).write_bytes((tmp_path / "2" / name).read_bytes())
    with pytest.raises(AdapterError, match="was not written with the adapter_config"):
        lora_quax.peft.load(tmp_path / "1", model)
