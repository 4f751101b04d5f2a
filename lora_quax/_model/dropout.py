"""The keys of dropout, given to a model for one step."""

import math

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import PRNGKeyArray, PyTree

from .._arrays.base import make
from .._arrays.check import check_key
from .._arrays.dropout import DropoutArray
from .._arrays.lora import LoraArray
from .paths import dotted, words


def with_dropout_key(model: PyTree, key: PRNGKeyArray) -> PyTree:
    """A model whose updates drop part of what they are given, for one step of training.

    The rate is what `loraify` was given as `dropout`. A model without a key computes
    all of its updates, as in inference; so nothing has to be switched off.

    ```python
    def loss(model, x, y, key):
        model = lora_quax.with_dropout_key(model, key)
        return jnp.mean((jax.vmap(quax.quaxify(model))(x) - y) ** 2)
    ```

    Under `vmap(quaxify(f))` with one key each example has the same mask, as with
    Equinox's own dropout; for masks of their own give it inside of the `vmap`, a key
    for each example. Under `quaxify(vmap(f))` each number of the batch is dropped by
    itself. A step of a scan over stacked layers has a key of its own; a weight that a
    loop uses in each step has the same mask in each, as variational dropout does (Gal
    and Ghahramani, arXiv 1512.05287). Derivatives are taken outside of `quaxify`.

    **Arguments:**

    - `model`: a model with adapted weights.
    - `key`: what a weight gets of it depends on the key and the weight's path alone.

    **Returns:** the model with a `DropoutArray` in place of each `LoraArray` that has a
    rate. It is for this step: the model that is updated is the one without, and so is
    the one that is saved, whichever is given.

    **Raises:** `ValueError` if no weight has dropout; `TypeError` if `key` is none.
    """
    check_key(key)
    if key.dtype == jnp.uint32:
        key = jr.wrap_key_data(key)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(model, is_leaf=_has_key)
    paths = words([dotted(path) for path, _ in leaves])
    out = [
        _with_key(x, jr.fold_in(jr.fold_in(key, word[0]), word[1]))
        for (_, x), word in zip(leaves, paths)
    ]
    if not any(isinstance(x, DropoutArray) for x in out):
        raise ValueError(
            "No weight of the model has dropout. Its rate is given when the model is "
            "adapted: `loraify(model, rank, key, dropout=0.1)`."
        )
    return jax.tree.unflatten(treedef, out)


def without_key(model: PyTree) -> PyTree:
    """The model that `with_dropout_key` was given."""
    is_leaf = lambda x: isinstance(x, DropoutArray)
    bare = lambda x: x.w if is_leaf(x) else x
    return jax.tree.map(bare, model, is_leaf=is_leaf)


def _has_key(x) -> bool:
    return isinstance(x, LoraArray | DropoutArray)


def _with_key(x, key):
    w = x.w if isinstance(x, DropoutArray) else x
    if not (isinstance(w, LoraArray) and w.dropout):
        return x
    batch, n = w.shape[: w.n_batch], w.ndim
    keys = jr.split(key, math.prod(batch)) if batch else key
    keys = keys.reshape(*batch, *(1,) * (n - len(batch)))
    return make(DropoutArray, rate=w.dropout, w=w, key=keys)
