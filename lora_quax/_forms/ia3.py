"""IA³: a frozen weight of which the rows, or the columns, are scaled."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._arrays.base import AdaptedArray, BASE, checked, make, role
from .._arrays.check import (
    aval_of,
    check_axes,
    check_factor_dtype,
    check_flag,
    check_weight,
    default_dtype,
)
from .._arrays.scaled import ScaledArray


class IA3(AdaptedArray):
    """A frozen weight, times a number for each row, or for each column.

    ```python
    model = lora_quax.loraify(
        model, None, key, targets=["k_proj", "v_proj"], update=lora_quax.IA3
    )
    ```

    The weight is never multiplied out; what it is multiplied with is scaled, before or
    after. It stands for the weight alone. PEFT scales the output of a layer, and with
    it the bias: where there is one it has to be scaled by the same numbers for the two
    to compute the same.

    Liu et al., *Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than
    In-Context Learning*, arXiv 2205.05638.
    """

    form = "ia3"

    feedforward: bool = eqx.field(static=True)
    stop_gradient: bool = eqx.field(static=True)
    allow_materialise: bool = eqx.field(static=True)
    base: Any = role(BASE)  # (*batch, *rows, *cols), an array or a `quax.ArrayValue`
    scale: Float[Array, "..."] = role("scale")  # as many axes, of length 1 or as there

    def __check_init__(self):
        checked(self.lower())

    @classmethod
    def init(
        cls,
        base: Any,
        *,
        feedforward: bool = False,
        dtype: Any = None,
        rows: int = 1,
        cols: int = 1,
        stop_gradient: bool = True,
        allow_materialise: bool = False,
    ) -> "IA3":
        """A weight, scaled by ones.

        **Arguments:**

        - `base`: the weight, `(*batch, *rows, *cols)`: an array, or any
            `quax.ArrayValue`.
        - `feedforward`: whether its inputs are scaled, which are its first axis of
            columns (true), or its outputs, the rows. PEFT's `feedforward_modules` are
            of the first kind. The outputs of an embedding are its columns.
        - `dtype`: of the scale. By default the weight's, but at least float32.
        - the others: as for `LoraArray`.

        **Raises:** `TypeError` or `ValueError` if an argument is not what it should be.
        """
        if not isinstance(base, jax.ShapeDtypeStruct):
            base = check_weight(base)
        shape = aval_of(base).shape
        check_axes(shape, rows, cols, least=1)
        n = len(shape) - rows - cols
        kept = {*range(n)} | ({n + rows} if feedforward else {*range(n, n + rows)})
        sizes = tuple(k if i in kept else 1 for i, k in enumerate(shape))
        dtype = default_dtype(base) if dtype is None else check_factor_dtype(dtype)
        return checked(
            make(
                cls,
                feedforward=check_flag("feedforward", feedforward),
                stop_gradient=check_flag("stop_gradient", stop_gradient),
                allow_materialise=check_flag("allow_materialise", allow_materialise),
                base=base,
                scale=jnp.ones(sizes, dtype),
            )
        )

    def lower(self) -> ScaledArray:
        return make(
            ScaledArray,
            base=self.base,
            scale=self.scale,
            stop_gradient=self.stop_gradient,
            stopped=False,
            allow_materialise=self.allow_materialise,
        )
