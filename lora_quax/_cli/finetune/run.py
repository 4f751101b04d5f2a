"""The command: everything is read and checked, and then the steps are done."""

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from ... import __version__
from ..._disk.files import refuse
from ..._model.training import partition
from ..console import refuse_existing
from .base import adapt, Causal, read_base, write_adapter
from .batches import batches, Order, padded_length
from .checkpoint import differences, load_checkpoint, Log, newest, save_checkpoint
from .config import Config, decides, read_config
from .data import encode, Encoded, read_examples
from .extra import needs
from .report import Report, report
from .step import optimiser, schedule, State, Stepper
from .tokens import Encoder, read_encoder


LOG = "log.jsonl"


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
    _check_folder(folder, resume)
    for package in ("optax", "tokenizers", "eqx_zoo"):
        needs(package)
    encoder = read_encoder(config.model.tokenizer or config.model.path)
    sets = read_sets(config, encoder)
    base = read_base(config.model)
    encoder.check(base.vocabulary)
    train(config, sets, base, resume)
    print(folder / "adapter")
    return 0


def _check_folder(folder: Path, resume: bool) -> None:
    """**Raises:** `FileExistsError` if it is not that of the run."""
    # A run that was killed early has no checkpoint yet.
    is_run = newest(folder / "checkpoints") is not None or (folder / LOG).is_file()
    if is_run and not resume:
        raise FileExistsError(
            f"{folder} has a run in it. Go on with it by `--resume`, or name another "
            "folder."
        )
    if not is_run:
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


class Run:
    """A run in memory: what its steps are, and what it has come to."""

    def __init__(self, config: Config, sets: Sets, base: Causal):
        """**Raises:** `AdapterError` if the warm-up is as long as the run; `ValueError`
        if a target is not there."""
        self.config, self.sets = config, sets
        rows, n = config.train.batch, config.train.accumulate
        self._most = config.data.max_length
        lengths = [padded_length(len(x.ids), self._most) for x in sets.train.examples]
        self.order = Order(lengths, rows * n, config.train.seed)
        epochs = config.train.epochs or 1
        self.steps = config.train.steps or epochs * self.order.steps_per_epoch
        if config.train.warmup >= self.steps:
            raise ValueError(
                f"`warmup` of [train] has to be less than the {self.steps} steps, and "
                f"is {config.train.warmup}."
            )
        optim = optimiser(config.train, self.steps)
        self.stepper = Stepper(optim, one_by_one=base.has_experts)
        self.rate = schedule(config.train, self.steps)
        model = adapt(base, config.lora, config.train.seed)
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

    def step(self) -> tuple[float, int]:
        """**Returns:** the loss before the step, and how many tokens it had."""
        rows, n = self.config.train.batch, self.config.train.accumulate
        examples = self.sets.train.examples
        chosen = [examples[i] for i in self.order(self.state.step)]
        parts = batches(chosen, rows, n, self._most)
        # At once, so that an interrupt finds the state before the step or after it.
        self.state, loss = self.stepper.step(self.state, parts)
        return loss, sum(x.n_tokens for x in parts)

    def valid(self) -> float | None:
        if self.sets.valid is None:
            return None
        examples = sorted(self.sets.valid.examples, key=lambda x: len(x.ids))
        rows = self.config.train.batch
        parts = [
            batches(examples[i : i + rows], rows, 1, self._most)[0]
            for i in range(0, len(examples), rows)
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
        found = newest(folder / "checkpoints") if resume else None
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
    if run.state.step == 0:
        _evaluate(run, log, said)
    while run.state.step < run.steps:
        rate = float(run.rate(run.state.step))
        loss, tokens = run.step()
        step, last = run.state.step, run.state.step == run.steps
        if not loss < float("inf"):
            raise ValueError(
                f"The loss of step {step} is {loss}. The checkpoints before it are as "
                f"they were; a smaller `learning_rate` may help, of {rate:g} there."
            )
        said.step(step, loss, tokens)
        log.add(step=step, loss=loss, learning_rate=rate, tokens=tokens)
        if last or step % run.config.output.evaluate_every == 0:
            _evaluate(run, log, said)
        if last or step % run.config.output.checkpoint_every == 0:
            _checkpoint(run)
            said.went_on()


def _evaluate(run: Run, log: Log, said: Report) -> None:
    loss = run.valid()
    if loss is not None:
        log.add(step=run.state.step, valid_loss=loss)
        said.valid(run.state.step, loss)


def _checkpoint(run: Run) -> None:
    output = run.config.output
    folder = output.folder / "checkpoints"
    save_checkpoint(folder, run.state, run.about(), output.keep)
