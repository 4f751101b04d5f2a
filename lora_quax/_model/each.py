"""The weights of a model that have an update, one after another."""

from collections.abc import Callable
from typing import Any

import jax
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._arrays.lora import LoraArray
from .._arrays.low_rank import LowRankArray
from .merge import refuse_partial
from .paths import dotted, named, words


def is_lora(x: Any) -> bool:
    return isinstance(x, LoraArray)


def weights_of(model: PyTree) -> tuple[list[str], list, Any]:
    """The leaves of a model, a `LoraArray` being one, their paths, and the rest.

    **Raises:** `ValueError` if there is none, or a part of one is missing.
    """
    refuse_partial(model)
    found, treedef = jtu.tree_flatten_with_path(model, is_leaf=is_lora)
    if not any(is_lora(x) for _, x in found):
        raise ValueError("Nothing in the model is a `LoraArray`. Call `loraify` first.")
    return [dotted(path) for path, _ in found], [x for _, x in found], treedef


def low_rank(where: str, w: LoraArray) -> LoraArray:
    if not isinstance(w.delta, LowRankArray):
        raise ValueError(
            f"{where} has an update of the form {type(w.delta).__name__}; only the two "
            "factors of a `LowRankArray` are known from a weight."
        )
    return w


def on_each(model: PyTree, change: Callable, data: list | None = None) -> PyTree:
    """The model with `change(where, w, word, data)` of each `LoraArray`.

    One array in two places, as where weights are tied, stays one. What was observed of
    it is then the sum of what was in both places: `data` has an entry for each leaf.
    """
    paths, leaves, treedef = weights_of(model)
    data = [None] * len(leaves) if data is None else data
    identity = [tuple(map(id, jax.tree.leaves(x))) for x in leaves]
    sums: dict[tuple, Any] = {}
    for key, x, found in zip(identity, leaves, data):
        if is_lora(x) and found is not None:
            sums[key] = found if key not in sums else _sum(sums[key], found)
    done: dict[tuple, Any] = {}
    for key, path, word, x in zip(identity, paths, words(paths), leaves):
        if is_lora(x) and key not in done:
            w, where = low_rank(named(path), x), named(path)
            done[key] = change(where, w, word, sums.get(key))
    out = [done[key] if is_lora(x) else x for key, x in zip(identity, leaves)]
    return jax.tree.unflatten(treedef, out)


def _sum(x, y):
    is_type = lambda x: isinstance(x, jax.ShapeDtypeStruct)
    return jax.tree.map(lambda x, y: x if is_type(x) else x + y, x, y)


def at_weights(name: str, model: PyTree, tree: PyTree) -> list:
    """Of a tree like the model before it was adapted, what is at each leaf of it.

    **Raises:** `ValueError` if it is no such tree; `name` is the argument.
    """
    outline = jax.tree.map(lambda _: 0, model, is_leaf=is_lora)
    try:
        return jax.tree.structure(outline).flatten_up_to(tree)
    except ValueError as e:
        raise ValueError(
            f"`{name}` must be a tree as the model is, with one leaf in the place of "
            f"each weight: {e}"
        ) from e
