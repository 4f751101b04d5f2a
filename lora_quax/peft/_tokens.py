"""Rows of an embedding that train alone: PEFT's `trainable_token_indices`.

PEFT keeps what the rows are to be; here is what is added to them.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import quax

from .._arrays.base import AdaptedArray, checked, make
from .._arrays.check import default_dtype
from .._arrays.full import FullArray
from .._arrays.lora import LoraArray, unsummed
from .._disk.exchange import to_numpy
from .._forms.rows import check_indices, Rows
from .._model.names import split
from .._model.paths import named
from ._places import Place
from ._read import TOKENS


FIELD = "trainable_token_indices"


def is_rows(x: Any) -> bool:
    return isinstance(x, LoraArray) and isinstance(x.delta, Rows)


def indices_of(field: Any, module: str) -> list[int]:
    """The rows of a module.

    **Raises:** `ValueError` if the configuration does not say.
    """
    if isinstance(field, dict):
        found = [ids for name, ids in field.items() if module.endswith(name)]
        field = found[0] if len(found) == 1 else None
    if not field:
        raise ValueError(f"`{FIELD}` does not say which rows of `{module}` they are")
    return field


def write_rows(places: list[Place]) -> tuple[dict[str, list[int]], dict[str, Any]]:
    """The rows that train, by module, and what they are to be, by module as well.

    **Raises:** `ValueError` for what PEFT has not.
    """
    indices, values = {}, {}
    for place in places:
        x = place.leaf.value
        if not is_rows(x):
            continue
        try:
            if not place.is_embedding or [*place.names] != [()]:
                raise ValueError("it is not the weight of one embedding")
            if isinstance(x.base, FullArray) or not x.stop_gradient:
                raise ValueError("its base trains as well")
            if isinstance(x.base, quax.Value):
                raise ValueError("its base is no plain array")
        except ValueError as e:
            raise ValueError(
                f"{named(place.path)} cannot be exchanged with PEFT: {e}."
            ) from e
        module = split(place.names[()])[0]
        ids = to_numpy(place.path, x.delta.indices)
        base = to_numpy(place.path, x.base)[ids]
        added = to_numpy(place.path, x.delta.values)
        dtype = jnp.promote_types(base.dtype, added.dtype)
        indices[module] = ids.tolist()
        values[module] = (base.astype(dtype) + added.astype(dtype)).astype(base.dtype)
    return indices, values


def with_rows(
    base: Any, place: Place, field: Any, value: np.ndarray, allow_materialise: bool
) -> AdaptedArray:
    """An embedding of which some rows are these.

    **Raises:** `ValueError` if they do not fit it.
    """
    module = split(place.names[()])[0]
    size, *cols = place.shape
    try:
        ids = check_indices(indices_of(field, module), size)
    except TypeError as e:
        raise ValueError(str(e)) from e
    if value.shape != (len(ids), *cols):
        raise ValueError(
            f"`{module}.{TOKENS}` has shape {value.shape}, for {len(ids)} rows of "
            f"{cols}"
        )
    if isinstance(base, quax.Value | jax.ShapeDtypeStruct):
        raise ValueError("it is no array whose rows are known")
    dtype = default_dtype(base)
    added = value.astype(dtype) - np.asarray(base)[ids].astype(dtype)
    delta = make(
        Rows,
        n_rows=size,
        cols=1,
        values=jnp.asarray(added),
        indices=jnp.asarray(ids),
        allow_materialise=allow_materialise,
    )
    return checked(unsummed(base, delta))
