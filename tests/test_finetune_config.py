"""The configuration of `finetune`: what is read, and what is named when it is wrong."""

import dataclasses
import shutil
import sys
import tomllib
import typing

import pytest
from files import listing
from finetuned import GOOD, ROOT, written

from lora_quax import AdapterError
from lora_quax.__main__ import main
from lora_quax._cli.finetune.config import Config, read_config, Train
from lora_quax._cli.finetune.data import read_examples
from lora_quax._cli.finetune.extra import needs


def test_defaults_and_paths(folder):
    found = read_config(written(folder, GOOD))
    assert found.model.path == folder / "model" and found.data.valid is None
    assert (found.lora.rank, found.lora.targets) == (8, ("all-linear",))
    assert found.train == Train()
    assert found.output.folder == folder / "run"


def test_what_the_example_says(tmp_path):
    folder = shutil.copytree(ROOT / "examples", tmp_path / "examples")
    (folder / "tiny").mkdir(exist_ok=True)
    found = read_config(folder / "tiny.toml")
    assert (found.lora.alpha, found.train.learning_rate) == (16.0, 1e-2)
    examples = read_examples(found.data.train)
    assert len(examples) == 16 and {x.text is None for x in examples} == {True, False}


BAD = {
    "a key of no such name": (
        GOOD + "[train]\nlearnig_rate = 1e-3\n",
        r"line 10: \[train\] has no key `learnig_rate`; `learning_rate` is meant\?",
    ),
    "a key of no name at all like it": (
        GOOD + "[lora]\nx = 1\n",
        r"line 10: \[lora\] has no key `x`; there are rank, alpha, targets, dropout",
    ),
    "a table of no such name": (
        GOOD + "[trian]\nsteps = 1\n",
        r"line 9: there is no table trian; `train` is meant\?",
    ),
    "a key of no table": ("x = 1\n" + GOOD, "line 1: there is no table x"),
    "a value of no table": (
        "train = 3\n" + GOOD,
        r"line 1: `train` has to be a table, \[train\]",
    ),
    "nothing": ("", r"at the end: \[model\] needs `path`"),
    "no path": (
        GOOD.replace('path = "model"', ""),
        r"line 1: \[model\] needs `path`",
    ),
    "a text for a number": (
        GOOD + '[lora]\nrank = "8"\n',
        r"line 10: `rank` of \[lora\] has to be an integer of at least 1, and is '8'",
    ),
    "a fraction for an integer": (
        GOOD + "[lora]\nrank = 8.0\n",
        "has to be an integer of at least 1, and is 8.0",
    ),
    "true for an integer": (GOOD + "[lora]\nrank = true\n", "and is True"),
    "too small": (GOOD + "[lora]\nrank = 0\n", "of at least 1, and is 0"),
    "what is no end of a line": (
        GOOD + "# \u2028 \x85\n[lora]\nrank = 0\n",
        "line 11: `rank` of",
    ),
    "no float": (
        GOOD + f"[lora]\nalpha = {10**400}\n",
        "`alpha` of .* has to be a number above 0, and is 1000",
    ),
    "no integer at all": (
        GOOD + f"[lora]\nalpha = 1{5000 * '0'}\n",
        "is no TOML: Exceeds the limit",
    ),
    "too large": (GOOD + f"[lora]\nrank = {2**63}\n", "of at least 1, and is 92"),
    "none above zero": (
        GOOD + "[train]\nlearning_rate = -1\n",
        "line 10: `learning_rate` of .* has to be a number above 0, and is -1",
    ),
    "not a number": (
        GOOD + "[train]\nweight_decay = nan\n",
        "has to be a number of at least 0, and is nan",
    ),
    "none of the names": (
        GOOD + '[train]\nschedule = "sine"\n',
        "has to be one of 'cosine', 'linear', 'constant', and is 'sine'",
    ),
    "a list of something else": (
        GOOD + "[lora]\ntargets = [\n  1,\n  2,\n]\n",
        r"line 10: `targets` .* has to be a list of names, and is \[1, 2\]",
    ),
    "an empty list": (GOOD + "[lora]\ntargets = []\n", "a list of names, and is"),
    "an empty path": (
        GOOD.replace('"model"', '""'),
        "line 2: `path` .* has to be a path, and is ''",
    ),
    "no such folder": (
        GOOD.replace('"model"', '"other"'),
        r"line 2: there is no folder .*other, and it is no \*.gguf",
    ),
    "no such file": (
        GOOD.replace('"model"', '"other.gguf"'),
        r"line 2: there is no file .*other\.gguf",
    ),
    "no such data": (
        GOOD.replace("train.jsonl", "t.jsonl"),
        r"line 5: there is no file .*t\.jsonl",
    ),
    "no such tokenizer": (
        GOOD.replace("[data]", 'tokenizer = "x"\n[data]'),
        "line 4: there is nothing at .*x",
    ),
    "quantised twice": (
        GOOD.replace('"model"', '"model.gguf"\nquantise = "nf4"'),
        "line 3: a GGUF file is quantised as it is; leave `quantise` out",
    ),
    "both lengths": (
        GOOD + "[train]\nsteps = 3\nepochs = 2\n",
        "line 11: give `steps` or `epochs`, and not both",
    ),
    "neither true nor false": (
        GOOD + "[lora]\nuse_dora = 1\n",
        "line 10: `use_dora` of .* has to be true or false, and is 1",
    ),
    "all of it dropped": (
        GOOD + "[lora]\ndropout = 1\n",
        "line 10: `dropout` has to be below 1: 1.0",
    ),
    "what is of LoRA": (
        GOOD + '[lora]\nupdate = "loha"\nuse_dora = true\ndropout = 0.1\n',
        "line 11: DoRA is of LoRA, and `update` is 'loha'\n  - line 12: PEFT has it of",
    ),
    "what VeRA has not": (
        GOOD + '[lora]\nupdate = "vera"\nalpha = 2\n',
        "line 11: `update` is 'vera', which has no alpha; leave it out",
    ),
    "a long warm-up": (
        GOOD + "[train]\nsteps = 3\nwarmup = 3\n",
        "line 11: `warmup` has to be less than the 3 steps, and is 3",
    ),
    "no TOML": (GOOD + "steps 3\n", r"is no TOML: .* \(at line 9, column 7\)"),
    "a key twice": (GOOD + 'folder = "x"\n', r"is no TOML: .* \(at line 9"),
    "too many lines": (GOOD + 2000 * "\n", "it has more than 64,000 bytes or 1,000"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_with_a_configuration_is_named(case, folder, capsys):
    text, message = BAD[case]
    path = written(folder, text)
    before = listing(folder)
    with pytest.raises(AdapterError, match=message) as e:
        read_config(path)
    assert str(e.value).startswith(str(path))
    # And so it is on the command line, at once.
    assert main(["finetune", str(path)]) == 2
    assert capsys.readouterr().err == f"lora_quax: error: {e.value}\n"
    assert listing(folder) == before


def test_what_editors_and_shells_are_used_to(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    path = written(folder, "\ufeff" + GOOD.replace('"run"', '"~/run"'))
    assert read_config(path).output.folder == folder / "run"
    (folder / "train.jsonl").write_text('\ufeff{"text": "abc"}\r\n')
    assert [x.text for x in read_examples(folder / "train.jsonl")] == ["abc"]


def test_all_that_is_wrong_is_named_in_order(folder):
    text = GOOD + "[train]\nbatch = 0\n[lora]\nrank = 0\nalpha = 0\n[x]\n"
    with pytest.raises(AdapterError, match="cannot be used") as e:
        read_config(written(folder, text))
    lines = str(e.value).splitlines()
    assert [x.split(":")[0] for x in lines[1:]] == [
        f"  - line {n}" for n in (10, 12, 13, 14)
    ]


def test_a_file_that_is_none(folder):
    with pytest.raises(FileNotFoundError, match="no file .* to read a configuration"):
        read_config(folder / "x.toml")
    (folder / "config.toml").write_bytes(b"[model]\n\xff")
    with pytest.raises(AdapterError, match="line 2 is not UTF-8"):
        read_config(folder / "config.toml")


@pytest.mark.parametrize("package", ["optax", "eqx_zoo", "jinja2.sandbox"])
def test_a_package_that_is_not_there_is_named(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package.split(".")[0], None)
    monkeypatch.delitem(sys.modules, "jinja2.sandbox", raising=False)
    with pytest.raises(ImportError, match=r"install 'lora_quax\[finetune\]'"):
        needs(package)


def test_the_page_has_every_key():
    text = (ROOT / "docs" / "guide" / "finetune.md").read_text()
    rows = [x.split(" | ") for x in text.splitlines() if x.startswith("| `")]
    shown = {row[0][3:-1]: row[1] for row in rows}
    for table in dataclasses.fields(Config):
        kind = typing.get_type_hints(Config)[table.name]
        for field in dataclasses.fields(kind):
            said = shown.pop(f"{table.name}.{field.name}")
            if said.startswith("`"):
                value = tomllib.loads(f"x = {said[1:-1]}")["x"]
                default = field.default
                assert value == (list(default) if type(default) is tuple else default)
            else:
                assert field.default in (None, dataclasses.MISSING)
    assert not shown
