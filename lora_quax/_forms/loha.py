"""LoHa: the product, element by element, of two low-rank arrays."""

from typing import Any

import jax.numpy as jnp
import jax.random as jr
from jaxtyping import PRNGKeyArray

from .. import init as _init
from .._arrays.base import AbstractDelta, make, role
from .._arrays.check import check_alpha, check_rank
from .._arrays.low_rank import LowRankArray


class LoHa(AbstractDelta):
    """The update `w1 ∘ w2`, element by element, of two low-rank arrays.

    ```python
    model = lora_quax.loraify(model, rank=4, key=key, update=lora_quax.LoHa)
    ```

    Of two arrays of rank r it is exactly of rank r², with the parameters of two LoRAs
    of rank r; its factors are formed from those of the two, and the array never is.

    Hyeon-Woo et al., *FedPara*, arXiv 2108.06098, as LyCORIS and PEFT have it.
    """

    form = "loha"

    w1: LowRankArray = role()
    w2: LowRankArray = role()

    def __check_init__(self):
        for w in (self.w1, self.w2):
            if not isinstance(w, LowRankArray):
                raise TypeError(f"`w1` and `w2` must be `LowRankArray`s, got {w!r}.")
        shapes = self.w1.aval().shape, self.w2.aval().shape
        axes = (self.w1.rows, self.w1.cols), (self.w2.rows, self.w2.cols)
        if shapes[0] != shapes[1] or axes[0] != axes[1]:
            raise ValueError(
                f"`w1` and `w2` must be alike but for their ranks; they are of shapes "
                f"{shapes[0]} and {shapes[1]}, with {axes[0]} and {axes[1]} axes of "
                "rows and columns."
            )

    @classmethod
    def init(
        cls,
        shape: tuple[int, ...],
        *,
        rank: int,
        key: PRNGKeyArray,
        alpha: Any = None,
        dtype: Any = jnp.float32,
        rows: int = 1,
        cols: int = 1,
        allow_materialise: bool = False,
    ) -> "LoHa":
        """Draws an update of zero, as PEFT does: three of the four factors are uniform
        on ±1/√fan_in, and the last one is zero.

        **Arguments:**

        - `shape`: of the weight, `(*batch, *rows, *cols)`.
        - `rank`: of each of the two arrays.
        - `alpha`: the update is scaled by `alpha / rank`; defaults to the rank.
        - the others: as for `LoraArray`.

        **Raises:** as `LoraArray`.
        """
        rank = check_rank(rank)
        alpha = check_alpha(alpha, rank)

        def draw(word: int, alpha: float | None, init_a) -> LowRankArray:
            return LowRankArray.init(
                shape,
                rank=rank,
                key=jr.fold_in(key, word),
                alpha=alpha,
                init_a=init_a,
                init_b=_init.uniform,
                dtype=dtype,
                rows=rows,
                cols=cols,
                allow_materialise=allow_materialise,
            )

        w1, w2 = draw(0, alpha, _init.uniform), draw(1, None, _init.zeros)
        return cls(w1, w2, allow_materialise=allow_materialise)

    def lower(self) -> LowRankArray:
        x, y, n = self.w1, self.w2, self.w1.n_batch
        rank = x.rank * y.rank
        # Σ_rs (b1[o, r] b2[o, s]) (a1[r, i] a2[s, i]).
        b = x.b[..., :, None] * y.b[..., None, :]
        a = jnp.expand_dims(x.a, n + 1) * jnp.expand_dims(y.a, n)
        return make(
            LowRankArray,
            a=a.reshape(*a.shape[:n], rank, *a.shape[n + 2 :]),
            b=b.reshape(*b.shape[:-2], rank),
            rank=rank,
            alpha=x.scaling * y.scaling * rank,
            rows=x.rows,
            cols=x.cols,
            allow_materialise=self.allow_materialise,
        )
