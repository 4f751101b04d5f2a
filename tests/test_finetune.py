"""Runs of `finetune` on disk: checkpoints, interrupts, resuming."""

import errno
import json
import os
import signal
import subprocess
import sys

import jax
import pytest
from files import bits, contents, listing
from finetuned import config, GOOD, MOMENTS, ROOT, sets, stand, texts, written

import lora_quax
from lora_quax import AdapterError, peft
from lora_quax.__main__ import main
from lora_quax._cli.finetune import checkpoint, run as runs
from lora_quax._cli.finetune.report import report
from lora_quax._cli.finetune.run import Run, train
from lora_quax._cli.finetune.step import Stepper
from lora_quax._disk.whole import held


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing stopped."""
    pytest.importorskip("optax")
    folder = tmp_path_factory.mktemp("whole")
    train(config(folder), sets(), stand(), resume=False)
    return folder / "run"


def test_what_a_run_leaves(whole):
    names = {x.relative_to(whole).as_posix() for x in whole.rglob("*")}
    files = ("adapter.safetensors", "optimiser.safetensors", "run.json")
    steps = [f"checkpoints/step-{n:08}" for n in (8, 9)]
    assert names == {
        "log.jsonl",
        "adapter",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "checkpoints",
        *steps,
        *(f"{step}/{file}" for step in steps for file in files),
    }
    log = [json.loads(x) for x in (whole / "log.jsonl").read_text().splitlines()]
    assert [x["step"] for x in log if "loss" in x] == [*range(1, 10)]
    assert [x["step"] for x in log if "valid_loss" in x] == [0, 4, 8, 9]


def test_the_adapter_is_that_of_peft(whole):
    ours = whole / "checkpoints" / "step-00000009" / "adapter.safetensors"
    model = lora_quax.load_adapter(ours, stand().model)
    assert bits(peft.load(whole / "adapter", stand().model)) == bits(model)


_first, *_others = MOMENTS
_moments = [_first, *(pytest.param(x, marks=pytest.mark.slow) for x in _others)]


@pytest.mark.parametrize("moment", _moments)
def test_killed_and_resumed_it_is_the_same_bit_for_bit(moment, whole, tmp_path):
    program = [sys.executable, str(ROOT / "tests" / "finetuned.py"), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*program, moment], env=environment, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    train(config(tmp_path), sets(), stand(), resume=True)
    assert contents(tmp_path / "run") == contents(whole)


def test_an_interrupt_leaves_a_checkpoint(whole, tmp_path, monkeypatch, capsys):
    before, calls = Stepper.step, 0

    def step(*args):
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt("in step 6")
        return before(*args)

    monkeypatch.setattr(Stepper, "step", step)
    with pytest.raises(KeyboardInterrupt, match="in step 6"):
        train(config(tmp_path), sets(), stand(), resume=False)
    said = capsys.readouterr().err
    assert "stopped after step 5; `--resume` goes on" in said and "\r" not in said
    folder = tmp_path / "run" / "checkpoints"
    assert [x.name for x in folder.iterdir()].count("step-00000005") == 1
    train(config(tmp_path), sets(), stand(), resume=True)
    assert "goes on after step 5" in capsys.readouterr().err
    found = peft.load(tmp_path / "run" / "adapter", stand().model)
    assert bits(found) == bits(peft.load(whole / "adapter", stand().model))
    assert (tmp_path / "run" / "log.jsonl").read_text() == (
        whole / "log.jsonl"
    ).read_text()


def other_base():
    return stand()._replace(model=jax.tree.map(lambda x: x + 1, stand().model))


def other_data():
    return sets()._replace(train=texts(22, seed=5))


DIFFERENT = {
    "a key": (
        dict(learning_rate=0.5),
        sets,
        stand,
        "learning_rate was 0.01, and is 0.5",
    ),
    "steps": (dict(steps=10), sets, stand, "steps was 9, and is 10"),
    "data": ({}, other_data, stand, "digest of data.train was '"),
    "base": ({}, sets, other_base, "was trained on another base"),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_a_checkpoint_of_another_run_is_refused(case, whole):
    fields, data, base, message = DIFFERENT[case]
    before = listing(whole)
    with pytest.raises(AdapterError, match=message):
        train(config(whole.parent, **fields), data(), base(), resume=True)
    assert listing(whole) == before


@pytest.mark.parametrize("said", [{}, {"FORCE_COLOR": "1"}, {"TERM": "dumb"}])
def test_a_log_has_lines_and_no_frames(said, monkeypatch, capsys):
    for key, value in said.items():
        monkeypatch.setenv(key, value)
    with report(40) as out:
        for step in range(1, 41):
            out.step(step, 2.0, 8)
        out.valid(40, 3.0)
    lines = capsys.readouterr().err.splitlines(keepends=True)
    assert len(lines) == 21 and not any("\r" in x or "\x1b" in x for x in lines)
    assert lines[0].startswith("step 2/40  loss 2.0000  ")
    assert lines[-1] == "step 40/40  valid loss 3.0000\n"


def test_a_damaged_checkpoint_is_named(whole, tmp_path):
    train(config(tmp_path, steps=2, warmup=0), sets(), stand(), resume=False)
    file = tmp_path / "run/checkpoints/step-00000002/optimiser.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(AdapterError, match="optimiser.safetensors is truncated"):
        train(config(tmp_path, steps=2, warmup=0), sets(), stand(), resume=True)
    (file.parent / "run.json").write_text("[")
    with pytest.raises(AdapterError, match="run.json is not JSON"):
        train(config(tmp_path, steps=2, warmup=0), sets(), stand(), resume=True)


def test_a_full_disk_loses_no_checkpoint(whole, tmp_path, monkeypatch):
    before, calls = checkpoint.write_tensors, iter(range(9))

    def full(*args):
        if next(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return before(*args)

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    message = "after step 6 cannot be written: .*No space.*`--resume` goes on"
    with pytest.raises(OSError, match=message):
        train(config(tmp_path), sets(), stand(), resume=False)
    steps = [x.name for x in sorted((tmp_path / "run" / "checkpoints").iterdir())]
    assert steps == ["step-00000002", "step-00000004"]
    train(config(tmp_path), sets(), stand(), resume=True)
    assert contents(tmp_path / "run") == contents(whole)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    before = Stepper.step
    nan = lambda self, state, parts: (before(self, state, parts)[0], float("nan"))
    monkeypatch.setattr(Stepper, "step", nan)
    with pytest.raises(ValueError, match="loss of step 1 is nan.* `learning_rate`"):
        train(config(tmp_path), sets(), stand(), resume=False)
    assert not (tmp_path / "run" / "adapter").exists()


def test_an_interrupt_of_an_evaluation_loses_none(whole, tmp_path, monkeypatch):
    """Each is in the log once, whenever it was stopped."""
    before = Stepper.loss
    for n in (1, 2, 3):  # Of those after steps 0, 4, 8 and 9 the next two.
        calls = iter(range(1, 9))

        def loss(*args):
            if next(calls) == (1 if n == 1 else 2):
                raise KeyboardInterrupt("in an evaluation")
            return before(*args)

        monkeypatch.setattr(Stepper, "loss", loss)
        with pytest.raises(KeyboardInterrupt, match="in an evaluation"):
            train(config(tmp_path), sets(), stand(), resume=True)
    monkeypatch.setattr(Stepper, "loss", before)
    train(config(tmp_path), sets(), stand(), resume=True)
    log = (tmp_path / "run" / "log.jsonl").read_text()
    assert log == (whole / "log.jsonl").read_text()


def test_more_rows_than_examples(tmp_path):
    """They are no rows that are filled up, and accumulate what there is."""
    one = Run(config(tmp_path, batch=2**40, accumulate=2**20), sets(), stand())
    other = Run(config(tmp_path, batch=22), sets(), stand())
    assert one.order.steps_per_epoch == 1
    assert one.valid() == other.valid()
    assert bits(one.step()[0]) == bits(other.step()[0])


def test_two_runs_do_not_share_a_folder(whole, folder, capsys):
    for run in (whole, folder / "run"):
        text = GOOD.replace('"run"', json.dumps(str(run)))
        before = listing(run) if run.exists() else None
        with held(run / "checkpoints") as mine:
            assert mine
            assert main(["finetune", str(written(folder, text)), "--resume"]) == 2
        assert "Another process trains in" in capsys.readouterr().err
        assert (listing(run) if run.exists() else None) == before


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_run_that_ends_at_once_leaves_nothing(moment, folder, monkeypatch):
    """And what a killed one has left is no run."""
    left = folder / "run" / "checkpoints"
    if moment == "after":
        left.mkdir(parents=True)
    monkeypatch.setattr(runs, "needs", lambda name: 1 / 0)
    before = listing(folder)
    with pytest.raises(ZeroDivisionError, match="division"):
        runs.finetune(written(folder, GOOD), resume=False)
    assert [x for x in listing(folder) if "config.toml" not in str(x)] == [*before]
    (folder / "run" / "mine").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="is not empty"):
        runs.finetune(written(folder, GOOD), resume=False)


def test_a_run_is_not_written_over(whole, folder, capsys):
    text = GOOD.replace('"run"', json.dumps(str(whole)))
    assert main(["finetune", str(written(folder, text))]) == 2
    assert "has a run in it. Go on with it by `--resume`" in capsys.readouterr().err
    (folder / "run").mkdir()
    (folder / "run" / "mine").touch()
    assert main(["finetune", str(written(folder, GOOD))]) == 2
    assert "is not empty, and is left alone" in capsys.readouterr().err


def test_a_warm_up_as_long_as_the_epochs(tmp_path):
    fields = dict(steps=None, epochs=1, warmup=6)
    with pytest.raises(ValueError, match="less than the 6 steps, and is 6"):
        runs.Run(config(tmp_path, **fields), sets(), stand())
