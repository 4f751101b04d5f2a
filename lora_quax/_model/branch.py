"""A low-rank update beside something that is no weight."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import quax
from jaxtyping import Array, Float, PRNGKeyArray

from .. import init as _init
from .._arrays.check import check_count, check_key, wider
from .._arrays.low_rank import LowRankArray
from ..init import Initialiser


class LoraBranch(eqx.Module):
    """`module(x) + scaling · b · a · x`, of a module into which nobody needs to look.

    Where the weights of a module are out of reach, or what it computes is no product
    at all, the update stands beside it. Without a module it is a low-rank layer.

    ```python
    block = lora_quax.LoraBranch(block, 64, 64, rank=4, key=key)
    layer = lora_quax.LoraBranch(None, 64, 128, rank=4, key=key)
    ```

    It needs no `quaxify` of its own. What trains of it is what
    [`partition`][lora_quax.partition] says: the two factors, and in the module what is
    adapted there.
    """

    module: Callable | None
    weight: LowRankArray  # (out_features, in_features)

    def __init__(
        self,
        module: Callable | None,
        in_features: int,
        out_features: int,
        rank: int,
        key: PRNGKeyArray,
        *,
        alpha: Any = None,
        init_a: Initialiser = _init.uniform,
        init_b: Initialiser = _init.zeros,
        dtype: Any = jnp.float32,
    ):
        """**Arguments:**

        - `module`: any function of an array whose last axis are features, or `None`.
        - `in_features`, `out_features`: how many features it takes and gives.
        - `rank`, `key`, `alpha`, `init_a`, `init_b`, `dtype`: as for `LoraArray`. A
            fresh branch changes nothing.

        **Raises:** `TypeError` or `ValueError` if one of them is not what it should be.
        """
        check_key(key)
        if module is not None and not callable(module):
            raise TypeError(f"`module` must be a function or `None`, got {module!r}.")
        self.module = module
        shape = (
            check_count("out_features", out_features),
            check_count("in_features", in_features),
        )
        self.weight = LowRankArray.init(
            shape,
            rank=rank,
            key=key,
            alpha=alpha,
            init_a=init_a,
            init_b=init_b,
            dtype=dtype,
        )

    def __call__(
        self, x: Float[Array, "*batch in"], *args: Any, **kwargs: Any
    ) -> Float[Array, "*batch out"]:
        """**Arguments:**

        - `x`: `(*batch, in_features)`.
        - the others: for the module.

        **Returns:** `(*batch, out_features)`, in the dtype that the module gives.

        **Raises:** `ValueError` if what is given, or what the module gives, is no array
        of so many features.
        """
        out_features, in_features = self.weight.shape
        if jnp.shape(x)[-1:] != (in_features,):
            raise ValueError(
                f"A `LoraBranch` of {in_features} features was given an array of shape "
                f"{jnp.shape(x)}."
            )
        update = quax.quaxify(lambda x, w: x @ w.T)(x, self.weight)
        if self.module is None:
            return update
        out = self.module(x, *args, **kwargs)
        if getattr(out, "shape", None) != update.shape:
            raise ValueError(
                f"The module of a `LoraBranch` of {out_features} features must give an "
                f"array of shape {update.shape}; it gave {out!r:.80}."
            )
        wide = wider(out.dtype, update.dtype)
        return (out.astype(wide) + update.astype(wide)).astype(out.dtype)
