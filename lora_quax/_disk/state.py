"""The state of a model, such as the running statistics of a batch norm.

Equinox keeps it beside the model, in an `eqx.nn.State`. Training changes it, and what
was learnt with it is lost without it.
"""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._model.paths import dotted, named


def state_names(model: PyTree, state: eqx.nn.State) -> list[str]:
    """What each leaf of a state is called: the path of its index in the model, and its
    own within the value that belongs to it.

    **Raises:** `ValueError` if the state is not that of this model, or out of date.
    """
    leaves, treedef = jtu.tree_flatten(state)
    numbered = jtu.tree_unflatten(treedef, range(len(leaves)))
    names: dict[int, str] = {}
    for keys, index in _indices(model):
        try:
            value = numbered.get(index)
        except KeyError as e:
            raise ValueError(
                f"The state has nothing for {named(dotted(keys))}: it is that of "
                "another model."
            ) from e
        for inner, number in jtu.tree_flatten_with_path(value)[0]:
            names.setdefault(number, dotted((*keys, *inner)))
    if len(names) < len(leaves):
        raise ValueError("The state has more than this model: it is that of another.")
    return [names[number] for number in range(len(leaves))]


def state_leaves(state: eqx.nn.State | None) -> list[Any]:
    """The leaves of a state; a number of Python's, which Equinox may leave in one, as
    an array."""
    leaves = jtu.tree_leaves(state)
    is_number = lambda x: isinstance(x, bool | int | float | complex)
    return [jnp.asarray(x) if is_number(x) else x for x in leaves]


def check_state(model: PyTree, state: eqx.nn.State | None) -> None:
    """**Raises:** `ValueError` if a model with a state comes without it."""
    if state is None and (paths := state_paths(model)):
        raise ValueError(
            f"The model has a state, at {paths}, which is not part of it and which "
            "training changes: the statistics of a batch norm, say. Give it too, so "
            "that it is not lost: `save_adapter(path, model, state=state)`."
        )


def state_paths(model: PyTree) -> str:
    """Where a model has a state, for a message; nothing if it has none."""
    return ", ".join(named(dotted(keys)) for keys, _ in _indices(model)[:4])


def _indices(model: PyTree) -> list[tuple[Any, eqx.nn.StateIndex]]:
    is_index = lambda x: isinstance(x, eqx.nn.StateIndex)
    found = jtu.tree_flatten_with_path(model, is_leaf=is_index)[0]
    return [(keys, x) for keys, x in found if is_index(x)]
