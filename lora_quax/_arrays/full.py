"""A weight that is trained in full, beside the original that it started from."""

from typing import Any

import jax.numpy as jnp
import quax
import wadler_lindig as wl
from jax.core import ShapedArray
from jaxtyping import Array, Float

from .base import AdaptedArray, BASE, role
from .check import aval_of, check_weight


class FullArray(AdaptedArray):
    """An array that trains as a whole: the head of a classifier, a bias, a norm.

    Inside `quax.quaxify` it stands for `value`. The original is kept, as PEFT's
    `modules_to_save` keeps it, so that `lora_quax.unload` gives it back bit for bit.
    """

    form = "full"

    base: Float[Array, "..."] = role(BASE)
    value: Float[Array, "..."] = role("full")

    def __init__(self, base: Any):
        """**Arguments:**

        - `base`: the array, of floating-point numbers. Training starts from it.

        **Raises:** `TypeError` if `base` is not a floating-point array.
        """
        if isinstance(base, quax.Value):
            raise TypeError(
                f"A {type(base).__name__} cannot be trained in full: only a plain "
                "array can. Give it a rank instead."
            )
        self.base = check_weight(base)
        # A copy, because a buffer that is there twice cannot be donated.
        self.value = jnp.copy(self.base)

    def __check_init__(self):
        if self.base.shape != self.value.shape:
            raise ValueError(
                f"A value of shape {self.value.shape} stands beside an original of "
                f"shape {self.base.shape}."
            )

    @property
    def allow_materialise(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """True: it is dense as it is."""
        return True

    def lower(self) -> Any:
        return self.value

    def aval(self) -> ShapedArray:
        return aval_of(self.value)

    def __pdoc__(self, **kwargs):
        indent = kwargs.get("indent", 2)
        docs = []
        if hasattr(self.value, "shape"):
            name = jnp.dtype(self.value.dtype).name
            docs.append(wl.array_summary(self.value.shape, name, kind=None))
        elif self.value is not None:
            docs.append(wl.TextDoc(repr(self.value)))
        name = wl.TextDoc(f"{type(self).__name__}(")
        return wl.bracketed(name, docs, wl.comma, wl.TextDoc(")"), indent)
