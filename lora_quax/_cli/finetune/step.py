"""A step: gradients of batches, summed, and the optimiser's update."""

import functools as ft
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from ..._model.training import filter_value_and_grad, partition
from .batches import Batch
from .config import Train
from .extra import needs
from .loss import Loss


class State(NamedTuple):
    """All that a step changes."""

    step: int  # How many are done.
    model: PyTree
    opt_state: PyTree


def schedule(config: Train, steps: int) -> Callable[[Any], Any]:
    """The learning rate of a step, counted from 0."""
    optax = needs("optax")
    rate, warmup = config.learning_rate, config.warmup
    rest = {
        "constant": lambda n: optax.constant_schedule(rate),
        "linear": lambda n: optax.linear_schedule(rate, 0.0, n),
        "cosine": lambda n: optax.cosine_decay_schedule(rate, n),
    }[config.schedule](steps - warmup)
    if not warmup:
        return rest
    start = optax.linear_schedule(rate / (warmup + 1), rate, warmup)
    return optax.join_schedules([start, rest], [warmup])


def optimiser(config: Train, steps: int) -> Any:
    """AdamW, with the gradient clipped by its norm."""
    optax = needs("optax")
    rate = schedule(config, steps)
    adamw = optax.adamw(rate, weight_decay=config.weight_decay)
    if config.clip is None:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip), adamw)


class Stepper:
    """The programs of a run, each of which is compiled once for each shape of batch."""

    def __init__(self, optim, loss: Loss = Loss(), key: PRNGKeyArray | None = None):
        """**Arguments:**

        - `key`: for what is dropped, if anything is.
        """
        self._update = eqx.filter_jit(ft.partial(_update, optim))
        self._total = eqx.filter_jit(loss)

        @eqx.filter_jit
        def add(model, sums, batch, step, i):
            of_batch = key if key is None else jr.fold_in(jr.fold_in(key, step), i)
            value, grads = filter_value_and_grad(loss)(model, batch, of_batch)
            return jax.tree.map(jnp.add, sums, (value, grads))

        self._add = add

    def step(self, state: State, parts: Iterable[Batch]) -> tuple[State, float]:
        """One update, by the mean over all tokens of these batches that are learnt.

        **Returns:** the state after it, and the loss before it.
        """
        params = partition(state.model)[0]
        sums = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        n = 0
        for i, batch in enumerate(parts):
            n += int(np.count_nonzero(batch.learnt))
            of = jnp.uint32(state.step), jnp.uint32(i)
            sums = self._add(state.model, sums, batch, *of)
        model, opt_state, loss = self._update(
            state.model, state.opt_state, sums, jnp.float32(n)
        )
        return State(state.step + 1, model, opt_state), float(loss)

    def loss(self, model: PyTree, parts: Iterable[Batch]) -> float:
        """The mean over all tokens that are learnt."""
        total, n = 0.0, 0
        for batch in parts:
            total += float(self._total(model, batch))
            n += int(np.count_nonzero(batch.learnt))
        return total / n


def _update(optim, model, opt_state, sums, n):
    loss, grads = jax.tree.map(lambda x: x / n.astype(x.dtype), sums)
    params = partition(model)[0]
    updates, opt_state = optim.update(grads, opt_state, params)
    return eqx.apply_updates(model, updates), opt_state, loss
