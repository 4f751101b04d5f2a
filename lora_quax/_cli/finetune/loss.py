"""The loss of a batch, and what of it need not be in memory all at once."""

import math
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import quax
from jaxtyping import PRNGKeyArray, PyTree

from ..._model.dropout import with_dropout_key
from .batches import Batch


_MOST_SCORES = 2**25  # That are there at once: 128 MiB of float32.


class Loss(NamedTuple):
    """Minus the logarithm of the likelihood of what is learnt, each token given those
    before it; the sum over a batch.

    - `one_by_one`: whether a model takes one row after another, as one with experts has
        to.
    - `checkpoint`: whether a layer is computed again for its gradient, so that of each
        no more than what goes into it is kept (Chen et al., arXiv 1604.06174).
    - `most_scores`: how many scores of tokens are there at once. If a batch has more,
        they are computed in parts, and again for the gradient.
    """

    one_by_one: bool = False
    checkpoint: bool = False
    most_scores: int = _MOST_SCORES

    def __call__(
        self, model: PyTree, batch: Batch, key: PRNGKeyArray | None = None
    ) -> jax.Array:
        """**Arguments:**

        - `key`: for what is dropped. Each row has its own.
        """
        body = quax.quaxify(lambda model, ids: self._body(model)(ids)[0])

        def of_row(row):
            ids, key = row
            return body(_with_key(model, key), ids)[:-1]

        # Rows are filled up at their ends, which nothing before them attends to.
        ids = jnp.maximum(batch.ids, 0)
        head_key, row_keys = None, None
        if key is not None:
            head_key, key = jr.split(key)
            row_keys = jr.split(key, len(ids))
        over = jax.lax.map if self.one_by_one else lambda f, xs: jax.vmap(f)(xs)
        hidden = over(of_row, (ids, row_keys))  # (rows, length - 1, width)
        tokens = (
            hidden.reshape(-1, hidden.shape[-1]),
            ids[:, 1:].reshape(-1),
            jnp.asarray(batch.learnt)[:, 1:].reshape(-1),
        )
        return self._of_tokens(_with_key(model, head_key), *tokens)

    def _body(self, model: PyTree) -> PyTree:
        """What gives that of which the head makes scores."""
        is_none = lambda x: x is None  # Where the embedding is the head.
        identity = eqx.nn.Identity()
        model = eqx.tree_at(lambda m: m.lm_head, model, identity, is_leaf=is_none)
        if not self.checkpoint:
            return model
        layers = [_Again(layer) for layer in model.model.layers]
        return eqx.tree_at(lambda m: m.model.layers, model, layers)

    def _of_tokens(self, model, hidden, right, learnt) -> jax.Array:
        """**Arguments:**

        - `hidden`: of shape `(tokens, width)`.
        - `right`, `learnt`: of shape `(tokens,)`.
        """
        scores = quax.quaxify(_scores)
        tokens, vocabulary = jax.eval_shape(lambda x: scores(model, x), hidden).shape
        n = math.ceil(tokens / max(1, self.most_scores // vocabulary))

        def of_part(part):
            hidden, right, learnt = part
            x = scores(model, hidden).astype(jnp.float32)  # (part, vocabulary)
            of_right = jnp.take_along_axis(x, right[:, None], axis=1)[:, 0]
            nll = jax.nn.logsumexp(x, axis=1) - of_right
            return jnp.sum(jnp.where(learnt, nll, 0.0))

        whole = hidden, right, learnt
        if n == 1:
            return of_part(whole)
        parts = tuple(_split(x, n, math.ceil(tokens / n)) for x in whole)
        return jnp.sum(jax.lax.map(jax.checkpoint(of_part), parts))


class _Again(eqx.Module):
    """A layer that is computed again for its gradient."""

    layer: PyTree

    def __call__(self, *args):
        return eqx.filter_checkpoint(self.layer)(*args)


def _split(x: jax.Array, n: int, size: int) -> jax.Array:
    """In so many parts, the last of which is filled up with nothing to be learnt."""
    left = n * size - len(x)
    x = jnp.pad(x, [(0, left), *[(0, 0)] * (x.ndim - 1)])
    return x.reshape(n, size, *x.shape[1:])


def _scores(model: PyTree, hidden: jax.Array) -> jax.Array:
    if model.lm_head is None:
        return hidden @ model.model.embed_tokens.weight.T
    return jax.vmap(model.lm_head)(hidden)


def _with_key(model: PyTree, key: PRNGKeyArray | None) -> PyTree:
    return model if key is None else with_dropout_key(model, key)
