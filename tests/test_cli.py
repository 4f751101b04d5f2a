"""The command line: its errors, its help, and how it is started."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import jax.random as jr
import numpy as np
import pytest
import safetensors.numpy
from cli import fails, model, run, tensors_of, write_base
from helpers import adapted
from peft_files import draw, Q, write_peft

import lora_quax
from lora_quax.__main__ import main


def no_adapter(folder: Path) -> None:
    safetensors.numpy.save_file({"x": draw(2)}, folder / "no")


def unsound(folder: Path) -> None:
    lora_quax.save_adapter(folder / "a", adapted(eqx.nn.Linear(4, 5, key=jr.key(0))))
    with safetensors.safe_open(folder / "a", "numpy") as file:
        metadata = file.metadata()
    tensors = tensors_of(folder / "a")
    tensors["weight.delta.a"] = tensors["weight.delta.a"][:, 1:]
    safetensors.numpy.save_file(tensors, folder / "no", metadata=metadata)


def two_files(folder: Path) -> None:
    write_base(folder / "no", {"q.weight": draw(5, 4), "z": draw(3)}, 2)
    (folder / "no" / "model.safetensors.index.json").unlink()
    part = tensors_of(folder / "no" / "model-00001-of-00002.safetensors")
    safetensors.numpy.save_file(part, folder / "no" / "other.safetensors")


def index(weight_map) -> Any:
    def write(folder: Path) -> None:
        write_base(folder / "no", {"q.weight": draw(5, 4), "z": draw(3)}, 2)
        path = folder / "no" / "model.safetensors.index.json"
        path.write_text(json.dumps({"weight_map": weight_map}))

    return write


def text(content: str) -> Any:
    return lambda folder: (folder / "no").write_text(content)


def nothing(folder: Path) -> None:
    del folder


MERGE = ("merge", "no", "good", "out")


TROUBLE = {
    "no command": (nothing, (), "the following arguments are required: COMMAND"),
    "command": (nothing, ("sing",), "invalid choice: 'sing'"),
    "argument": (nothing, ("diff", "good"), "are required: B; see `python -m"),
    "no file": (nothing, ("inspect", "no"), "There is no file or folder"),
    "no adapter": (no_adapter, ("inspect", "no"), "but no adapter of lora_quax"),
    "no safetensors": (text("hello, world"), ("inspect", "no"), "is no safetensors"),
    "short file": (text("hello"), ("inspect", "no"), "is truncated"),
    "half an adapter": (
        nothing,
        ("inspect", "good/adapter_model.safetensors"),
        "is half of an adapter of PEFT; give its folder",
    ),
    "unsound": (unsound, ("inspect", "no"), "its description has (2, 4)"),
    "no configuration": (
        lambda folder: (folder / "no").mkdir(),
        ("inspect", "no"),
        "There is no file",
    ),
    "no base": (nothing, MERGE, "There is no file or folder"),
    "no shards": (lambda folder: (folder / "no").mkdir(), MERGE, "no file *.safetens"),
    "twice": (two_files, MERGE, "which is meant?"),
    "index elsewhere": (index({"q.weight": "../x"}), MERGE, "has '../x' for"),
    "index at odds": (
        index({"z": "model-00001-of-00002.safetensors"}),
        MERGE,
        "says that `z` is in",
    ),
    "no shard": (index({"q.weight": "x.safetensors"}), MERGE, "There is no file"),
    "no weight map": (index(None), MERGE, "has no `weight_map`"),
    "names": (
        text('{"q": 1}'),
        ("merge", "base", "good", "out", "--names", "no"),
        "'q' is given 1, which is no name",
    ),
    "no names": (
        nothing,
        ("convert", "good", "out", "--names", "no"),
        "There is no file",
    ),
    "two of one name": (
        text('{"q.weight": "z", "q.bias": "z"}'),
        ("merge", "base", "biased", "out", "--names", "no"),
        "`q.weight` and `q.bias` are both called `z`",
    ),
    "unused names": (
        text('{"x": "y"}'),
        ("merge", "base", "good", "out", "--names", "no"),
        "'x' of `names` matched no array",
    ),
    "out is a file": (text("x"), ("merge", "base", "good", "no"), "no exists, and is"),
    "out is a folder": (nothing, ("merge", "base", "good", "good"), "is not empty"),
    "out is nowhere": (
        nothing,
        ("merge", "base", "good", "no/where"),
        "There is no folder",
    ),
    "converted out is a file": (text("x"), ("convert", "good", "no"), "no exists, and"),
}


@pytest.mark.parametrize("case", TROUBLE)
def test_trouble_is_one_line(case, tmp_path, capsys, monkeypatch):
    prepare, arguments, reason = TROUBLE[case]
    monkeypatch.chdir(tmp_path)
    write_peft(tmp_path / "good", Q, target_modules=["q"])
    biased = Q | {"q.base_layer.bias": draw(5)}
    write_peft(tmp_path / "biased", biased, target_modules=["q"], bias="lora_only")
    base = {"q.weight": draw(5, 4), "z": draw(5, 4)}
    safetensors.numpy.save_file(base, tmp_path / "base")
    prepare(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    error = fails(capsys, *arguments)
    assert reason in error
    lines = [line for line in error.splitlines() if not line.startswith("  - ")]
    assert len(lines) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_program_of_its_own(tmp_path):
    bad = {name: x * np.nan for name, x in Q.items()}
    folder = write_peft(tmp_path / "bad", bad, target_modules=["q"])
    done = subprocess.run(
        [sys.executable, "-m", "lora_quax", "inspect", str(folder)],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert "not finite: a and b" in done.stdout


HELP = {
    (): "Exit code 2 is trouble",
    ("inspect",): "Exit code 1 if anything is not finite",
    ("diff",): "Exit code 0 if nothing differs",
    ("convert",): "What the other format does not have is refused",
    ("merge",): "rounded once",
}


@pytest.mark.parametrize("command", HELP, ids=" ".join)
def test_help(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([*command, "--help"])
    assert HELP[command] in " ".join(capsys.readouterr().out.split())


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"lora_quax {lora_quax.__version__}\n"


def test_too_little_memory_is_an_error(capsys, monkeypatch):
    def inspect(path):
        raise MemoryError("Unable to allocate 7 TiB")

    monkeypatch.setattr("lora_quax.__main__.inspect", inspect)
    assert run("inspect", "x") == 2
    assert capsys.readouterr().err == (
        "lora_quax: error: the memory does not suffice. Unable to allocate 7 TiB\n"
    )


def test_a_reader_who_has_enough_is_no_error(net, tmp_path):
    lora_quax.save_adapter(tmp_path / "a", model(net, "everything"))
    command = [sys.executable, "-m", "lora_quax", "inspect", str(tmp_path / "a")]
    program = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert program.stdout is not None and program.stderr is not None
    program.stdout.close()
    assert program.stderr.read() == ""
    assert program.wait() == 141
