"""A weight of which rows or columns are scaled, unmultiplied."""

from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Float

from .around import AroundBase
from .base import BASE, dense, role
from .check import aval_of, check_weight, wider
from .show import show


class ScaledArray(AroundBase):
    """The array `scale · base`, element by element, unmultiplied.

    What is multiplied with it is scaled, before or after, in place of the weight. IA³
    (Liu et al., arXiv 2205.05638) is one around a plain weight, and DoRA (Liu et al.,
    arXiv 2402.09353) comes to one around a `LoraArray`.
    """

    form = "scaled"

    stop_gradient: bool = eqx.field(static=True)
    stopped: bool = eqx.field(static=True)
    allow_materialise: bool = eqx.field(static=True)
    base: Any = role(BASE)  # an array or a `quax.ArrayValue`
    scale: Float[Array, "..."] = role("scale")  # each axis as that of the base, or 1

    def __init__(
        self,
        base: Any,
        scale: Float[Array, "..."],
        *,
        stop_gradient: bool = True,
        allow_materialise: bool = False,
    ):
        """**Arguments:**

        - `base`: the weight, an array or any `quax.ArrayValue`; an adapted one as well.
        - `scale`: with as many axes as `base`, of length 1 where it does not vary:
            `(rows, 1)` scales the rows of a matrix.
        - `stop_gradient`: whether the base is frozen: no gradient reaches it. With
            `False`, what of it trains is what its own roles say.
        - `allow_materialise`: whether an operation that has no rule may form the
            product (true), or raises `MaterialiseError` (false, the default).

        **Raises:** `TypeError` if `base` is no floating-point array; `ValueError` if
        `scale` does not fit it.
        """
        self.base = base
        self.scale = scale
        self.stop_gradient = stop_gradient
        self.stopped = False
        self.allow_materialise = allow_materialise

    def __check_init__(self):
        if not isinstance(self.base, jax.ShapeDtypeStruct):
            check_weight(self.base)
        shape, scale = aval_of(self.base).shape, self.scale.shape
        if len(scale) != len(shape) or any(
            m not in (1, n) for m, n in zip(scale, shape)
        ):
            raise ValueError(
                "`scale` must have the axes of the weight, each as long as there or of "
                f"length 1; got {scale} for a weight of shape {shape}."
            )

    def dense(self) -> Array:
        return times(dense(self.frozen_base()), self.scale)

    def __pdoc__(self, **kwargs):
        return show(self, self.base, self.scale, **kwargs)


def times(x, scale):
    """`scale · x`, taken in the wider type and returned in that of `x`."""
    wide = wider(x.dtype, scale.dtype)
    return (x.astype(wide) * scale.astype(wide)).astype(x.dtype)
