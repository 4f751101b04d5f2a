"""Rows: an update of chosen rows alone, such as those of new tokens."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._arrays.base import AbstractDelta, make, role
from .._arrays.check import check_factor_dtype
from .._arrays.low_rank import LowRankArray


class Rows(AbstractDelta):
    """The update that adds `values` to chosen rows of a weight, and nothing elsewhere.

    ```python
    update = functools.partial(lora_quax.Rows.init, indices=[5, 50257])
    model = lora_quax.loraify(
        model, None, key, targets={eqx.nn.Embedding: lora_quax.Adapt(update=update)}
    )
    ```

    Of an embedding the rows are the tokens. A head that is tied to it by
    `equinox.nn.Shared`, or that is the same array transposed, has them as well.

    For k rows it is the array of rank k whose factors are `values` and one-hot columns.
    A lookup takes rows of these, and a product costs `(rows + cols) · k` for each
    vector; the columns, `(rows, k)`, are what it needs of memory.
    """

    form = "rows"

    n_rows: int = eqx.field(static=True)  # how many rows the weight has
    cols: int = eqx.field(static=True)
    values: Array = role("values")  # (*batch, k, *cols)
    indices: Array = role("frozen")  # (*batch, k), integers

    def __check_init__(self):
        n = self.values.ndim - self.cols
        if n < 1 or self.indices.shape != self.values.shape[:n]:
            raise ValueError(
                "`values` must be (*batch, k, *cols) and `indices` (*batch, k); got "
                f"values of shape {self.values.shape}, with {self.cols} axes of "
                f"columns, and indices of shape {self.indices.shape}."
            )

    @classmethod
    def init(
        cls,
        shape: tuple[int, ...],
        *,
        indices: Sequence[int],
        dtype: Any = jnp.float32,
        rows: int = 1,
        cols: int = 1,
        allow_materialise: bool = False,
    ) -> "Rows":
        """An update of zero.

        **Arguments:**

        - `shape`: of the weight, `(*batch, rows, *cols)`.
        - `indices`: of the rows, each of them once, from zero on. They are the same
            ones along axes of batch.
        - `dtype`, `rows`, `cols`, `allow_materialise`: as for `LoraArray`; there may be
            one axis of rows.

        **Raises:** `TypeError` or `ValueError` if an index is no row, or is there
        twice.
        """
        n = len(shape) - 1 - cols
        if rows != 1 or n < 0:
            raise ValueError(
                f"Of an array of shape {shape} with {rows} axes of rows and {cols} of "
                "columns no rows can be chosen: there must be one axis of rows."
            )
        ids = check_indices(indices, shape[n])
        check_factor_dtype(dtype)
        batch, k = shape[:n], len(ids)
        return cls(
            n_rows=shape[n],
            cols=cols,
            values=jnp.zeros((*batch, k, *shape[n + 1 :]), dtype),
            indices=jnp.broadcast_to(jnp.asarray(ids), (*batch, k)),
            allow_materialise=allow_materialise,
        )

    def lower(self) -> LowRankArray:
        rank = self.indices.shape[-1]
        dtype = self.values.dtype
        one_hot = jax.nn.one_hot(self.indices, self.n_rows, dtype=dtype, axis=-2)
        return make(
            LowRankArray,
            a=self.values,
            b=one_hot,
            rank=rank,
            alpha=float(rank),
            rows=1,
            cols=self.cols,
            allow_materialise=self.allow_materialise,
        )


def check_indices(indices: Any, size: int) -> np.ndarray:
    """**Raises:** `TypeError` or `ValueError` if they are no rows of `size` rows."""
    ids = np.asarray(indices)
    if ids.ndim != 1 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(f"`indices` must be a list of integers, got {indices!r}.")
    if wrong := [int(i) for i in ids if not 0 <= i < size]:
        raise ValueError(
            f"`indices` has {wrong[0]}, and the weight has rows from 0 to {size - 1}."
        )
    values, counts = np.unique(ids, return_counts=True)
    if (counts > 1).any():
        raise ValueError(f"`indices` has {values[counts > 1][0]} more than once.")
    return ids.astype(np.int32)
