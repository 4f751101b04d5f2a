"""The arrays of a model, and the tensors of a file that they stand for."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from .._arrays.base import is_adapted
from .._arrays.quantised import QuantisedArray
from .._model.names import Namer, Names, stack_axes, unstack
from .._model.paths import dotted, leaves_of, named


class Place(NamedTuple):
    """An array of a model, and the tensors that it stands for."""

    path: str
    value: Any
    names: dict[tuple[int, ...], str]  # index along the stacking axes -> tensor

    def shape(self) -> tuple[int, ...]:
        """Of one of the tensors."""
        return tuple(self.value.shape)[len(next(iter(self.names), ())) :]


def is_array(x) -> bool:
    return eqx.is_array(x) or isinstance(
        x, np.ndarray | np.generic | jax.ShapeDtypeStruct
    )


def places_of(model: PyTree, names: Names) -> list[Place]:
    """**Raises:** `ValueError` if the model is adapted or quantised, or `names` does
    not fit; `TypeError` if it holds random keys."""
    for leaf in leaves_of(model):
        if is_adapted(leaf.value):
            raise ValueError(
                f"{named(leaf.path)} is adapted. `lora_quax.merge` makes a plain model "
                "of it; `save_adapter` and `load_adapter` are for what adapts one."
            )
        if isinstance(leaf.value, QuantisedArray):
            raise ValueError(
                f"{named(leaf.path)} is quantised, and here are plain arrays alone. "
                "`lora_quax.dequantise` makes a plain model of it."
            )
    namer, out = Namer(names), []
    for keys, x in jtu.tree_flatten_with_path(model)[0]:
        if not is_array(x):
            continue
        path = dotted(keys)
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            raise TypeError(
                f"{named(path)} holds random keys, which the format does not have. "
                "Leave them out with `eqx.partition`, or see `jax.random.key_data`."
            )
        name = namer(path)
        if not name:
            raise ValueError("The model is an array; `names={'': 'weight'}` names it.")
        shape = tuple(x.shape)
        if stack_axes(name) > len(shape):
            raise ValueError(
                f"{named(path)} is called {name!r}, which is for more stacked axes "
                f"than it has: its shape is {shape}."
            )
        out.append(Place(path, x, unstack(name, shape)))
    namer.check()
    return out
