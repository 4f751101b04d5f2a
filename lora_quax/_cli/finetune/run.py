"""The command: everything is read and checked, and then the steps are done."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.random as jr

from ... import __version__
from ..._disk.files import refuse
from ..._disk.whole import held
from ..._model.training import partition
from ..console import refuse_existing
from .base import adapt, Causal, read_base, write_adapter
from .batches import batches, Order, padded_length
from .checkpoint import differences, load_checkpoint, Log, newest, save_checkpoint
from .config import Config, decides, read_config
from .data import encode, Encoded, read_examples
from .extra import needs
from .loss import Loss
from .report import Report, report
from .step import optimiser, schedule, State, Stepper
from .tokens import Encoder, read_encoder


LOG, CHECKPOINTS = "log.jsonl", "checkpoints"


_DROPOUT = 1  # Of what keys are drawn, beside the factors.


class Sets(NamedTuple):
    train: Encoded
    valid: Encoded | None


def finetune(path: Path, resume: bool) -> int:
    """Trains as a configuration says, and writes an adapter as PEFT has it.

    **Arguments:**

    - `resume`: whether to go on from the newest checkpoint, if there is one.

    **Raises:** `ValueError` and `OSError` for all that is wrong, before anything is
    trained. `KeyboardInterrupt`, when what was trained is in a checkpoint.
    """
    config = read_config(path)
    folder = config.output.folder
    with _own(folder, resume):
        for package in ("optax", "tokenizers", "eqx_zoo"):
            needs(package)
        encoder = read_encoder(config.model.tokenizer or config.model.path)
        sets = read_sets(config, encoder)
        base = read_base(config.model)
        encoder.check(base.vocabulary)
        _check_context(config, sets, base)
        train(config, sets, base, resume)
    print(folder / "adapter")
    return 0


@contextlib.contextmanager
def _own(folder: Path, resume: bool) -> Iterator[None]:
    """A folder for this run alone, while it runs.

    **Raises:** `FileExistsError` if it is not that of the run; `BlockingIOError` if
    another process runs in it.
    """
    _check_folder(folder, resume)
    with held(folder / CHECKPOINTS) as mine:
        if not mine:
            raise BlockingIOError(
                f"Another process trains in {folder}. Wait until it has ended, or name "
                "another folder."
            )
        _check_folder(folder, resume)  # One may have ended since then.
        yield


def _check_folder(folder: Path, resume: bool) -> None:
    """**Raises:** `FileExistsError` if it is not that of the run."""
    # A run that was killed early has no checkpoint yet, or nothing but their folder.
    checkpoints = folder / CHECKPOINTS
    is_run = newest(checkpoints) is not None or (folder / LOG).is_file()
    if is_run and not resume:
        raise FileExistsError(
            f"{folder} has a run in it. Go on with it by `--resume`, or name another "
            "folder."
        )
    is_begun = checkpoints.is_dir() and [*folder.iterdir()] == [checkpoints]
    if not is_run and not (is_begun and not any(checkpoints.iterdir())):
        refuse_existing(folder)


def read_sets(config: Config, encoder: Encoder) -> Sets:
    """**Raises:** as `read_examples` and `encode`."""
    paths = [x for x in (config.data.train, config.data.valid) if x is not None]
    examples = [read_examples(path) for path in paths]
    found = [
        encode(path, x, encoder, config.data.max_length)
        for path, x in zip(paths, examples)
    ]
    return Sets(found[0], found[1] if len(found) > 1 else None)


def _check_context(config: Config, sets: Sets, base: Causal) -> None:
    """**Raises:** `ValueError` for what is longer than anything the model knows."""
    for path, found in zip((config.data.train, config.data.valid), sets):
        longest = max(len(x.ids) for x in found.examples) if found else 0
        if base.context is not None and longest > base.context:
            raise ValueError(
                f"{path} has an example of {longest:,} tokens, and the context of the "
                f"model is {base.context:,}: `max_length` of [data] is to be no more."
            )


class Run:
    """A run in memory: what its steps are, and what it has come to."""

    def __init__(self, config: Config, sets: Sets, base: Causal):
        """**Raises:** `AdapterError` if the warm-up is as long as the run; `ValueError`
        if a target is not there."""
        self.config, self.sets = config, sets
        self._most = config.data.max_length
        lengths = [padded_length(len(x.ids), self._most) for x in sets.train.examples]
        self._rows = min(config.train.batch, len(lengths))
        per_step = config.train.batch * config.train.accumulate
        self.order = Order(lengths, per_step, config.train.seed)
        epochs = config.train.epochs or 1
        self.steps = config.train.steps or epochs * self.order.steps_per_epoch
        if config.train.warmup >= self.steps:
            raise ValueError(
                f"`warmup` of [train] has to be less than the {self.steps} steps, and "
                f"is {config.train.warmup}."
            )
        optim = optimiser(config.train, self.steps)
        seed = config.train.seed
        key = jr.fold_in(jr.key(seed), _DROPOUT) if config.lora.dropout else None
        loss = Loss(base.has_experts, config.train.checkpoint)
        self.stepper = Stepper(optim, loss, key)
        self.rate = schedule(config.train, self.steps)
        model = adapt(base, config.lora, seed)
        self.state = State(0, model, optim.init(partition(model)[0]))

    def about(self) -> dict[str, Any]:
        """What decides the numbers of a run, but for its base, which the file of an
        adapter knows itself."""
        return {
            "configuration": decides(self.config),
            "steps": self.steps,
            "digest of data.train": self.sets.train.digest(),
            "versions": {
                "lora_quax": __version__,
                **{x: needs(x).__version__ for x in ("jax", "optax")},
            },
        }

    def step(self) -> tuple[State, float, int]:
        """**Returns:** the state after a step, the loss before it, and how many tokens
        it had."""
        examples = self.sets.train.examples
        chosen = [examples[i] for i in self.order(self.state.step)]
        parts = batches(chosen, self._rows, self._most)
        state, loss = self.stepper.step(self.state, parts)
        return state, loss, sum(x.n_tokens for x in parts)

    def valid(self) -> float:
        """The loss of the examples for validation, of which there are some."""
        found = self.sets.valid
        assert found is not None
        examples = sorted(found.examples, key=lambda x: len(x.ids))
        # Rows beyond the examples would be filled up in vain.
        rows = min(self.config.train.batch, len(examples))
        parts = [
            batch
            for i in range(0, len(examples), rows)
            for batch in batches(examples[i : i + rows], rows, self._most)
        ]
        return self.stepper.loss(self.state.model, parts)


def train(config: Config, sets: Sets, base: Causal, resume: bool) -> None:
    """Does the steps, and writes what they come to.

    **Raises:** `AdapterError` if there is a checkpoint, and it is of another run;
    `ValueError` if the loss is not finite; as `Run`.
    """
    run, folder = Run(config, sets, base), config.output.folder
    with tempfile.TemporaryDirectory() as room:  # What PEFT has not is refused now.
        write_adapter(Path(room) / "adapter", run.state.model, base)
    log = Log(folder / LOG)
    with report(run.steps) as said:
        _say_what_is_cut(config, sets, said)
        found = newest(folder / CHECKPOINTS) if resume else None
        if found is not None:
            before, now = found.about, run.about()
            said_other = before.pop("versions", None) != now.pop("versions")
            what = f"{found.folder} is of another run, and nothing was done"
            refuse(what, differences(before, now))
            run.state = load_checkpoint(found, run.state)
            if said_other:
                said.say("Other versions wrote the checkpoint: digits may differ.")
            said.resumed(run.state.step)
        folder.mkdir(parents=True, exist_ok=True)
        log.begin(None if found is None else run.state.step)
        try:
            _steps(run, log, said)
        except KeyboardInterrupt:
            _checkpoint(run)
            said.say(f"stopped after step {run.state.step}; `--resume` goes on")
            raise
    write_adapter(folder / "adapter", run.state.model, base)


def _say_what_is_cut(config: Config, sets: Sets, said: Report) -> None:
    for path, found in zip((config.data.train, config.data.valid), sets):
        if found is not None and found.n_cut:
            said.say(
                f"{path}: {found.n_cut} of {len(found.examples)} are longer than "
                f"`max_length`, {config.data.max_length} tokens, and are cut"
            )


def _steps(run: Run, log: Log, said: Report) -> None:
    every = run.config.output.checkpoint_every
    _evaluate(run, log, said)
    while run.state.step < run.steps:
        rate = float(run.rate(run.state.step))
        state, loss, tokens = run.step()
        if not loss < float("inf"):
            raise ValueError(
                f"The loss of step {state.step} is {loss}. The checkpoints before it "
                "are as they were. A smaller `learning_rate`, of another folder, may "
                f"help: it was {rate:g} there."
            )
        said.step(state.step, loss, tokens)
        log.add(step=state.step, loss=loss, learning_rate=rate, tokens=tokens)
        # An interrupt finds what is not in the log yet as not done.
        run.state = state
        if state.step == run.steps or state.step % every == 0:
            _checkpoint(run)
            said.went_on()
        _evaluate(run, log, said)


def _evaluate(run: Run, log: Log, said: Report) -> None:
    """If it is time, and was not done before a run was stopped."""
    step = run.state.step
    is_time = step == run.steps or step % run.config.output.evaluate_every == 0
    if run.sets.valid is None or not is_time or step in log.evaluated:
        return
    loss = run.valid()
    log.add(step=step, valid_loss=loss)
    said.valid(step, loss)


def _checkpoint(run: Run) -> None:
    output = run.config.output
    folder = output.folder / CHECKPOINTS
    try:
        save_checkpoint(folder, run.state, run.about(), output.keep)
    except OSError as e:
        raise OSError(
            f"The checkpoint after step {run.state.step} cannot be written: {e}. Those "
            "before it are as they were, and `--resume` goes on from the newest."
        ) from e
