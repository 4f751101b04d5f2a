"""An array that is made around another one, its base."""

from typing import Any

import equinox as eqx
from jax.core import ShapedArray

from .base import AdaptedArray, frozen
from .check import aval_of


class AroundBase(AdaptedArray):
    """Has a base, of its own shape and dtype, which may be frozen."""

    base: eqx.AbstractVar[Any]
    stop_gradient: eqx.AbstractVar[bool]
    # Whether what `base` holds is behind `stop_gradient` already, as a result that
    # depends on more than the base has to be. Whether the base trains does not change.
    stopped: eqx.AbstractVar[bool]

    def lower(self):
        return self

    def aval(self) -> ShapedArray:
        return aval_of(self.base)

    def frozen_base(self) -> Any:
        """The base as it enters a result: behind `stop_gradient`, if it is frozen."""
        passes = self.stopped or not self.stop_gradient
        return self.base if passes else frozen(self.base)
