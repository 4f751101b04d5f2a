"""Writes that break off change nothing."""

import errno
import os
from pathlib import Path

import pytest
import safetensors.numpy
from adapters import lora_mlp, models_of
from files import listing

from lora_quax import peft, save_adapter


def _save_peft(path, model, **kwargs):
    peft.save(path.parent, model, **kwargs)


def _full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _half(tensors, path, metadata):
    del tensors, metadata
    path.write_bytes(bytes(100))
    _full_disk()


def _second(function):
    """A function of which the second call fails."""
    calls = []

    def run(*args, **kwargs):
        calls.append(args)
        return _full_disk() if len(calls) == 2 else function(*args, **kwargs)

    return run


# What fails, where it is, and what makes its stand-in.
FAILURES = {
    "writing": (safetensors.numpy, "save_file", lambda: _full_disk),
    "writing halfway": (safetensors.numpy, "save_file", lambda: _half),
    "writing text": (Path, "write_text", lambda: _full_disk),
    "flushing": (os, "fsync", lambda: _full_disk),
    "flushing the second": (os, "fsync", lambda: _second(os.fsync)),
    "moving": (os, "replace", lambda: _full_disk),
    "moving the second": (os, "replace", lambda: _second(os.replace)),
}


WRITERS = {
    "ours": (save_adapter, ["writing", "writing halfway", "flushing", "moving"]),
    "PEFT's": (_save_peft, list(FAILURES)),
}


@pytest.mark.parametrize("is_there", [False, True], ids=["new", "old"])
@pytest.mark.parametrize(
    "writer,failure", [(w, f) for w, (_, failures) in WRITERS.items() for f in failures]
)
def test_a_write_that_fails_changes_nothing(
    writer, failure, is_there, tmp_path, monkeypatch
):
    save, _ = WRITERS[writer]
    path = tmp_path / "folder" / "adapter"
    path.parent.mkdir()
    _, model, other = models_of("mlp")
    if is_there:
        save(path, model)
    before = listing(tmp_path)
    with monkeypatch.context() as patch:
        *where, stand_in = FAILURES[failure]
        patch.setattr(*where, stand_in())
        with pytest.raises(OSError, match="No space left"):
            save(path, other)
    assert listing(tmp_path) == before
    save(path, model)  # And the next one goes through.


@pytest.mark.parametrize(
    "path,error,match",
    [
        ("missing/x", FileNotFoundError, "There is no folder .*missing"),
        ("folder", IsADirectoryError, "folder is a folder; a file is to be written"),
        ("file/x", FileNotFoundError, "There is no folder .*file"),
    ],
)
def test_paths_that_cannot_be_written(path, error, match, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("text")
    before = listing(tmp_path)
    with pytest.raises(error, match=match):
        save_adapter(tmp_path / path, lora_mlp())
    assert listing(tmp_path) == before
