"""A frozen weight and its update, unsummed."""

from typing import Any

import equinox as eqx
import jax
import quax
from jax import lax
from jaxtyping import Array, PRNGKeyArray

from .. import init as _init
from ..init import Initialiser
from .around import AroundBase
from .base import (
    AbstractDelta,
    BASE,
    checked,
    dense,
    lowered_type,
    make,
    role,
)
from .check import (
    aval_of,
    check_dropout,
    check_flag,
    check_number,
    check_weight,
    default_dtype,
    wider,
)
from .low_rank import LowRankArray
from .show import show


class LoraArray(AroundBase):
    """A frozen weight and its low-rank update, unsummed: `base + scaling · b · a`.

    Inside `quax.quaxify` it stands for the sum, of the base's shape and dtype, and what
    a program does to it is done to the parts, so that the sum is never formed:

    ```python
    linear = eqx.nn.Linear(10, 12, key=key1)
    weight = LoraArray(linear.weight, rank=2, key=key2)
    linear = eqx.tree_at(lambda l: l.weight, linear, weight)
    quax.quaxify(linear)(x)
    ```

    Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, arXiv 2106.09685.
    """

    form = "lora"

    stop_gradient: bool = eqx.field(static=True)
    stopped: bool = eqx.field(static=True)
    dropout: float = eqx.field(static=True)
    base: Any = role(BASE)  # an array or a `quax.ArrayValue`
    delta: Any = role()  # an `AbstractDelta`, most often a `LowRankArray`

    def __init__(
        self,
        weight: Any,
        *,
        rank: int,
        key: PRNGKeyArray,
        alpha: Any = None,
        init_a: Initialiser | None = None,
        init_b: Initialiser = _init.zeros,
        scale: Any = None,
        dtype: Any = None,
        rows: int = 1,
        cols: int = 1,
        dropout: Any = 0.0,
        stop_gradient: bool = True,
        allow_materialise: bool = False,
    ):
        """**Arguments:**

        - `weight`: the weight to adapt, `(*batch, *rows, *cols)`: an array, or any
            `quax.ArrayValue`. A `eqx.nn.Linear` has one axis of rows (its outputs) and
            one of columns; a convolution's columns are its inputs and its kernel. What
            is left over in front is batch, with separate factors for each index.
        - `rank`: the rank of the update. It may exceed what the weight can use.
        - `key`: for the initialisers.
        - `alpha`: the update is scaled by `alpha / rank`; defaults to the rank, so that
            the scaling is 1.
        - `init_a`, `init_b`: functions as in `jax.nn.initializers`, for the maps from
            columns to rank and from rank to rows. By default `a` is uniform on
            ±1/√fan_in, as in PEFT, and `b` is zero, so a fresh array equals its base.
        - `scale`: short for `init_a=gaussian(scale)`.
        - `dtype`: of the factors. By default the weight's, but at least float32, as in
            PEFT: small steps are lost in a bfloat16 factor.
        - `rows`, `cols`: how many axes of `weight` are rows, and how many are columns.
        - `dropout`: the part of what the update is given that is dropped in a step that
            has a key: see `with_dropout_key`.
        - `stop_gradient`: whether the base is frozen: no gradient reaches it.
        - `allow_materialise`: whether an operation that has no rule may form the dense
            weight (true), or raises `MaterialiseError` (false, the default).

        **Raises:** `TypeError` or `ValueError` if `weight` is no floating-point array,
        has too few axes, or if `rank`, `alpha`, `dtype` or `key` is not what it should
        be.
        """
        weight = check_weight(weight)
        if init_a is not None and scale is not None:
            raise ValueError("Give either `init_a` or `scale`, not both.")
        if scale is not None:
            init_a = _init.gaussian(check_number("scale", scale))
        self.base = weight
        self.delta = LowRankArray.init(
            weight.shape,
            rank=rank,
            key=key,
            alpha=alpha,
            init_a=init_a or _init.uniform,
            init_b=init_b,
            dtype=default_dtype(weight) if dtype is None else dtype,
            rows=rows,
            cols=cols,
            allow_materialise=allow_materialise,
        )
        self.stop_gradient = check_flag("stop_gradient", stop_gradient)
        self.stopped = False
        self.dropout = check_dropout(dropout)

    def __check_init__(self):
        if not isinstance(self.delta, AbstractDelta):
            raise TypeError(
                "The update of a `LoraArray` must be an `AbstractDelta`, such as a "
                f"`LowRankArray`; got {self.delta!r}."
            )
        if not isinstance(self._update, LowRankArray):
            raise TypeError(
                f"`lower` of a {type(self.delta).__name__} must give a `LowRankArray`; "
                f"it gives {self._update!r}."
            )
        weight, update = aval_of(self.base), aval_of(self.delta)
        if weight.shape != update.shape:
            raise ValueError(
                f"An update of shape {update.shape} does not fit a weight of shape "
                f"{weight.shape}."
            )

    @classmethod
    def from_parts(
        cls,
        base: Any,
        delta: AbstractDelta,
        *,
        dropout: Any = 0.0,
        stop_gradient: bool = True,
    ) -> "LoraArray":
        """The sum of a weight and an update that are known.

        **Arguments:**

        - `base`: an array or a `quax.ArrayValue`; it may be a `jax.ShapeDtypeStruct`.
        - `delta`: an update of its shape: a `LowRankArray`, or another form. Whether
            the dense weight may be formed is its `allow_materialise`.
        - `dropout`: the part of what the update is given that is dropped in a step that
            has a key: see `with_dropout_key`.
        - `stop_gradient`: whether the base is frozen: no gradient reaches it.

        **Raises:** `ValueError` if the two differ in shape; `TypeError` if `base` is no
        floating-point array, or `delta` no update.
        """
        if not isinstance(base, jax.ShapeDtypeStruct):
            base = check_weight(base)
        out = unsummed(
            base,
            delta,
            dropout=check_dropout(dropout),
            stop_gradient=check_flag("stop_gradient", stop_gradient),
        )
        return checked(out)

    @property
    def _update(self) -> Any:
        """The update as factors, or as the types of its factors."""
        delta = self.delta
        return delta if isinstance(delta, LowRankArray) else lowered_type(delta)

    @property
    def allow_materialise(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the dense weight may be formed: what the update says of itself."""
        return self.delta.allow_materialise

    @property
    def a(self) -> Any:
        """The factor `(*batch, rank, *cols)`, of an update that has one."""
        return self.delta.a

    @property
    def b(self) -> Any:
        """The factor `(*batch, *rows, rank)`, of an update that has one."""
        return self.delta.b

    @property
    def rank(self) -> int:
        """The rank of the update."""
        return self._update.rank

    @property
    def alpha(self) -> float:
        """The numerator of the scaling."""
        return self._update.alpha

    @property
    def scaling(self) -> float:
        """`alpha / rank`."""
        return self._update.scaling

    @property
    def n_batch(self) -> int:
        """How many leading axes are batch axes, each index with factors of its own."""
        return self._update.n_batch

    def dense(self) -> Array:
        return add(dense(self.frozen_base()), self.delta.lower().product())

    def __pdoc__(self, **kwargs):
        leaves = jax.tree.leaves(self.delta, is_leaf=lambda x: x is None)
        return show(self, self.base, *leaves, **kwargs)


def unsummed(
    base: Any,
    delta: Any,
    *,
    stop_gradient: bool = True,
    stopped: bool = False,
    dropout: float = 0.0,
) -> LoraArray:
    """A `LoraArray` of parts that are known to fit: see `make`."""
    return make(
        LoraArray,
        base=base,
        delta=delta,
        stop_gradient=stop_gradient,
        stopped=stopped,
        dropout=dropout,
    )


def add(base, delta):
    """`base + delta`, arrays or values, added in the wider dtype and in the base's.

    **Raises:** `ValueError` if they differ in shape: no update is broadcast.
    """
    if base.shape != delta.shape:
        raise ValueError(
            f"The weight and its update come to arrays of shapes {base.shape} and "
            f"{delta.shape}. Was one of the factors exchanged for one of another shape?"
        )
    dtype = base.dtype
    wide = wider(base.dtype, delta.dtype)
    total = quax.quaxify(lambda x, y: x.astype(wide) + y.astype(wide))(base, delta)
    return quax.quaxify(lax.convert_element_type)(total, dtype)
