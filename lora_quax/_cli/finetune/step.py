"""A step: gradients of batches, summed, and the optimiser's update."""

import functools as ft
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import quax
from jaxtyping import PyTree

from ..._model.training import filter_value_and_grad, partition
from .batches import Batch
from .config import Train
from .extra import needs


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

    def __init__(self, optim, one_by_one: bool = False):
        """**Arguments:**

        - `one_by_one`: whether a model takes one row after another, as one with experts
            has to.
        """
        self._update = eqx.filter_jit(ft.partial(_update, optim))
        total = lambda model, batch: _total(model, batch, one_by_one)
        self._total = eqx.filter_jit(total)

        @eqx.filter_jit
        def add(model, sums, batch):
            loss, grads = filter_value_and_grad(total)(model, batch)
            return jax.tree.map(jnp.add, sums, (loss, grads))

        self._add = add

    def step(self, state: State, parts: Iterable[Batch]) -> tuple[State, float]:
        """One update, by the mean over all tokens of these batches that are learnt.

        **Returns:** the state after it, and the loss before it.
        """
        params = partition(state.model)[0]
        sums = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        n = 0
        for batch in parts:
            n += int(np.count_nonzero(batch.learnt))
            sums = self._add(state.model, sums, batch)
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


def _total(model: PyTree, batch: Batch, one_by_one: bool) -> jax.Array:
    """Minus the logarithm of the likelihood of what is learnt, each token given those
    before it."""
    logits = quax.quaxify(lambda model, ids: model(ids)[0])

    def of_row(row):
        ids, learnt = row
        scores = logits(model, ids)[:-1].astype(jnp.float32)  # (length - 1, vocabulary)
        right = jnp.take_along_axis(scores, ids[1:, None], axis=1)[:, 0]
        nll = jax.nn.logsumexp(scores, axis=1) - right
        return jnp.sum(jnp.where(learnt[1:], nll, 0.0))

    # Rows are filled up at their ends, which nothing before them attends to.
    rows = jnp.maximum(batch.ids, 0), jnp.asarray(batch.learnt)
    over = jax.lax.map if one_by_one else lambda f, xs: jax.vmap(f)(xs)
    return jnp.sum(over(of_row, rows))


def _update(optim, model, opt_state, sums, n):
    loss, grads = jax.tree.map(lambda x: x / n.astype(x.dtype), sums)
    params = partition(model)[0]
    updates, opt_state = optim.update(grads, opt_state, params)
    return eqx.apply_updates(model, updates), opt_state, loss
