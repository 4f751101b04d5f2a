"""A model and texts that `finetune` trains on with no package of others but optax; and,
as a program, a run of it that is killed at a moment that is named:

    python finetuned.py FOLDER MOMENT
"""

import os
import signal
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from lora_quax._cli.finetune import checkpoint, run
from lora_quax._cli.finetune.base import Causal
from lora_quax._cli.finetune.config import Base, Config, Data, Lora, Output, Train
from lora_quax._cli.finetune.data import Encoded, Tokens
from lora_quax._cli.finetune.run import Sets
from lora_quax._cli.finetune.step import Stepper


ROOT = Path(__file__).parents[1]
VOCABULARY = 32


# The least that a configuration says.
GOOD = """\
[model]
path = "model"

[data]
train = "train.jsonl"

[output]
folder = "run"
"""


class Stand(eqx.Module):
    """Tokens by the mean of those before them."""

    embed: eqx.nn.Embedding
    up: eqx.nn.Linear
    lm_head: eqx.nn.Linear

    def __init__(self, key):
        keys = jr.split(key, 3)
        self.embed = eqx.nn.Embedding(VOCABULARY, 16, key=keys[0])
        self.up = eqx.nn.Linear(16, 16, key=keys[1])
        self.lm_head = eqx.nn.Linear(16, VOCABULARY, key=keys[2])

    def __call__(self, ids, cache=None):
        x = jax.vmap(self.embed)(ids)
        mean = jnp.cumsum(x, 0) / jnp.arange(1, len(ids) + 1)[:, None]
        return jax.vmap(self.lm_head)(x + jnp.tanh(jax.vmap(self.up)(mean))), cache


def stand() -> Causal:
    return Causal(Stand(jr.key(0)), VOCABULARY, has_head=True)


def texts(n: int = 22, seed: int = 0) -> Encoded:
    """Sentences in which each token says the next, of many lengths."""
    rng = np.random.default_rng(seed)
    starts, lengths = rng.integers(0, 8, n), rng.integers(5, 60, n)
    ids = [
        ((s + 3 * np.arange(k)) % 8).astype(np.int32) for s, k in zip(starts, lengths)
    ]
    return Encoded([Tokens(x, np.ones(len(x), bool)) for x in ids], 0)


def written(folder: Path, text: str) -> Path:
    path = folder / "config.toml"
    path.write_text(text)
    return path


def sets() -> Sets:
    return Sets(texts(), texts(5, seed=1))


def config(folder: Path, **train) -> Config:
    fields = dict(steps=9, batch=4, learning_rate=0.01, warmup=2, weight_decay=0.1)
    return Config(
        Base(folder),
        Data(folder, max_length=64),
        Lora(rank=4, targets=("up", "lm_head")),
        Train(**{**fields, **train}),
        Output(folder / "run", evaluate_every=4, checkpoint_every=2, keep=2),
    )


def killed(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(n: int, before):
    """A function that kills at its n-th call, and does what it did at the others."""
    left = n

    def f(*args, **kwargs):
        nonlocal left
        left -= 1
        return before(*args, **kwargs) if left else killed()

    return f


# Where a run of nine steps is killed: checkpoints are written after the second, fourth,
# sixth, eighth and last.
MOMENTS = {
    "before any checkpoint": (Stepper, "step", 2),
    "in a step": (Stepper, "step", 6),
    "in writing an optimiser": (checkpoint, "write_tensors", 3),
    "in the first checkpoint": (checkpoint, "save_adapter", 1),
    "in taking one away": (checkpoint, "rmtree", 2),
    "in writing the adapter": (run, "write_adapter", 2),
}


if __name__ == "__main__":
    where, name, n = MOMENTS[sys.argv[2]]
    setattr(where, name, at_call(n, getattr(where, name)))
    folder = Path(sys.argv[1])
    run.train(config(folder), sets(), stand(), resume=True)
