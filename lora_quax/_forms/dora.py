"""DoRA: a weight and its update, of which the norms train by themselves."""

import functools as ft
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jaxtyping import Array, Float

from .._arrays.base import (
    AdaptedArray,
    checked,
    frozen,
    lower,
    lowered_type,
    make,
    role,
)
from .._arrays.check import aval_of, check_flag, default_dtype, is_abstract
from .._arrays.lora import LoraArray
from .._arrays.scaled import ScaledArray
from .._arrays.show import show
from .norms import axes_of, Per, squared_norms


class DoRA(AdaptedArray):
    """`magnitude / ‖W‖ · W` with `W = base + scaling · b · a`, row by row: a direction,
    which is that of a `LoraArray`, and a norm, which trains by itself.

    ```python
    model = lora_quax.loraify(model, rank=8, key=key, use_dora=True)
    ```

    Neither `b · a` nor the scaled weight is formed: products are scaled after they were
    taken, and the norms come from the factors. These are right to `eps · (‖base‖ /
    ‖W‖)²`, where eps is the rounding of float32: an update that takes almost all of its
    base away leaves fewer digits. The scale is accurate near one, and a row of zeros
    keeps the scale one.

    Liu et al., *DoRA: Weight-Decomposed Low-Rank Adaptation*, arXiv 2402.09353.
    """

    form = "dora"

    per: Per = eqx.field(static=True)
    detached: bool = eqx.field(static=True)
    lora: LoraArray = role()
    magnitude: Float[Array, "..."] = role("magnitude")  # (*batch, *rows), or columns

    def __init__(self, lora: LoraArray, *, per: Per = "rows", detached: bool = True):
        """**Arguments:**

        - `lora`: a weight and its update, `(*batch, *rows, *cols)`. It may be abstract.
        - `per`: what has a magnitude each: `"rows"`, the outputs of a linear layer or
            of a convolution; or `"columns"`, as PEFT has it for an embedding
            `(vocabulary, features)`, and as it has to be for a weight that is kept as
            `(in, out)`.
        - `detached`: whether the norm is a constant to differentiation, as the paper
            has it in section 4.3, and PEFT: fewer numbers are kept for the backward
            pass. With `False` the gradient is that of the function.

        The magnitudes start as the norms of the weight with its update, so that the
        function is as it was.

        **Raises:** `TypeError` if `lora` is no `LoraArray`; `ValueError` if `per` is
        not one of the two.
        """
        if not isinstance(lora, LoraArray):
            raise TypeError(
                "DoRA is around a `LoraArray`, a weight with its update; got "
                f"{lora!r:.80}."
            )
        _check_per(per)
        self.lora = lora
        self.per = per
        self.detached = check_flag("detached", detached)
        abstract = ft.partial(eqx.filter_eval_shape, _norms)
        run = abstract if is_abstract(lora) else _norms_jit
        self.magnitude = run(lora, per)

    def __check_init__(self):
        _check_per(self.per)
        if not isinstance(self.lora, LoraArray):
            raise TypeError(f"DoRA is around a `LoraArray`; got {self.lora!r:.80}.")
        wanted = _kept(self.lora, self.per)
        if self.magnitude.shape != wanted:
            raise ValueError(
                f"The magnitudes must be one for each of the {self.per}, of shape "
                f"{wanted}; got {self.magnitude.shape}."
            )

    @classmethod
    def from_parts(
        cls,
        lora: LoraArray,
        magnitude: Any,
        *,
        per: Per = "rows",
        detached: bool = True,
    ) -> "DoRA":
        """With magnitudes that are known.

        **Arguments:**

        - `magnitude`: `(*batch, *rows)`, or `(*batch, *cols)` for those of columns.
        - the others: as for `DoRA`.

        **Raises:** as `DoRA`; `ValueError` if the magnitudes are not of that shape.
        """
        detached = check_flag("detached", detached)
        parts = dict(lora=lora, magnitude=magnitude, per=per, detached=detached)
        return checked(make(cls, **parts))

    @property
    def allow_materialise(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the dense weight may be formed: what the update says of itself."""
        return self.lora.allow_materialise

    @property
    def rank(self) -> int:
        """The rank of the update."""
        return lower(self.lora).rank

    @property
    def alpha(self) -> float:
        """The numerator of the scaling of the update."""
        return lower(self.lora).alpha

    def lower(self) -> ScaledArray:
        # With dropout the norms are of the whole weight.
        scale = _scale(lower(self.lora), self.magnitude, self.per, self.detached)
        return ScaledArray(
            self.lora,
            scale,
            stop_gradient=False,
            allow_materialise=self.allow_materialise,
        )

    def aval(self) -> ShapedArray:
        return aval_of(self.lora)

    def __pdoc__(self, **kwargs):
        leaves = jax.tree.leaves(self.lora, is_leaf=lambda x: x is None)
        return show(self, self.magnitude, *leaves, **kwargs)


# Compiled so that weights that are alike are traced, differentiated and lowered once.
@ft.partial(jax.jit, static_argnames=("per", "detached"))
def _scale(lora: LoraArray, magnitude: Array, per: Per, detached: bool) -> Array:
    if detached:
        norms = squared_norms(frozen(lora), per)
    else:  # A base that is decoded, or cast, for them is not kept.
        norms = jax.checkpoint(squared_norms, static_argnums=1)(lora, per)
    axes = axes_of(lowered_type(lora.delta), per)
    return jnp.expand_dims(scale_of(magnitude, *norms), axes)


def scale_of(magnitude: Array, squares: Array, more: Array) -> Array:
    """`magnitude / √(squares + more)`, accurate where it is near one.

    With `n₀ = √squares` and `n` the root, `n - n₀ = more / (n + n₀)`, which has all the
    digits of `more`. So has

        scale - 1  =  ((magnitude - n₀) - (n - n₀)) / n

    as long as the two are not much larger than their difference; `magnitude - n₀` is
    exact where the one is at most twice the other. An update of zero and a magnitude
    of `n₀` give one, exactly. Related: arXiv 2603.22276.
    """
    magnitude = magnitude.astype(squares.dtype)
    before, now = _root(squares), _root(squares + more)
    change = more / _nonzero(before + now)
    return 1 + ((magnitude - before) - change) / _nonzero(now)


def _root(x: Array) -> Array:
    """√x, with the derivative zero at zero, and what rounding put below it as zero."""
    return jnp.where(x > 0, jnp.sqrt(_nonzero(x)), 0)


def _nonzero(x: Array) -> Array:
    return jnp.where(x > 0, x, 1)


def _norms(lora: LoraArray, per: Per) -> Array:
    squares, more = squared_norms(frozen(lora), per)
    return _root(squares + more).astype(default_dtype(lora))


_norms_jit = eqx.filter_jit(_norms)


def _check_per(per: Any) -> None:
    if per not in ("rows", "columns"):
        raise ValueError(f"`per` must be 'rows' or 'columns', got {per!r}.")


def _kept(lora: LoraArray, per: Per) -> tuple[int, ...]:
    """The shape of the magnitudes."""
    axes = axes_of(lowered_type(lora.delta), per)
    return tuple(n for i, n in enumerate(aval_of(lora).shape) if i not in axes)
