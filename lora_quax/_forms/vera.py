"""VeRA: two vectors that train, around factors that do not and that weights share."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, PRNGKeyArray

from .._arrays.base import AbstractDelta, replace, role
from .._arrays.check import check_number, wider
from .._arrays.low_rank import LowRankArray


# Normal in the paper. This is what PEFT does.
_he_uniform = jax.nn.initializers.he_uniform()


class VeRA(AbstractDelta):
    """The update `diag(lambda_b) · b · diag(lambda_d) · a`: of random factors that stay
    as they are, two vectors train.

    ```python
    model = lora_quax.loraify(model, rank=256, key=key, update=lora_quax.VeRA)
    ```

    The weights that one call of `loraify` adapts share the factors: those of the
    largest of them, of which a smaller one has the first columns and rows, so that
    arrays of one shape are one array. An adapter's file has each of these once.

    Kopiczko et al., *VeRA: Vector-based Random Matrix Adaptation*, arXiv 2310.11454.
    """

    form = "vera"

    shared: LowRankArray = role("frozen")
    lambda_d: Array = role("lambda_d")  # (*batch, rank)
    lambda_b: Array = role("lambda_b")  # (*batch, *rows)

    def __check_init__(self):
        if not isinstance(self.shared, LowRankArray):
            raise TypeError(f"`shared` must be a `LowRankArray`, got {self.shared!r}.")
        w = self.shared
        wanted = w.a.shape[: w.n_batch + 1], w.b.shape[:-1]
        got = self.lambda_d.shape, self.lambda_b.shape
        if got != wanted:
            raise ValueError(
                "`lambda_d` must be (*batch, rank) and `lambda_b` (*batch, *rows), "
                f"here {wanted[0]} and {wanted[1]}; got {got[0]} and {got[1]}."
            )

    @classmethod
    def init(
        cls,
        shape: tuple[int, ...],
        *,
        rank: int,
        key: PRNGKeyArray,
        d_initial: float = 0.1,
        dtype: Any = jnp.float32,
        rows: int = 1,
        cols: int = 1,
        allow_materialise: bool = False,
    ) -> "VeRA":
        """An update of zero: `lambda_b` is zero and `lambda_d` is `d_initial`; the
        factors are uniform on ±√(6 / fan_in), as in PEFT.

        **Arguments:**

        - `shape`: of the weight, `(*batch, *rows, *cols)`.
        - `rank`: of the factors; much greater than LoRA's, for it costs no parameters.
        - `d_initial`: what `lambda_d` starts from.
        - the others: as for `LoraArray`.

        **Raises:** as `LoraArray`.
        """
        w = LowRankArray.init(
            shape,
            rank=rank,
            key=key,
            init_a=_he_uniform,
            init_b=_he_uniform,
            dtype=dtype,
            rows=rows,
            cols=cols,
            allow_materialise=allow_materialise,
        )
        start = check_number("d_initial", d_initial)
        d = jnp.full(w.a.shape[: w.n_batch + 1], start, dtype)
        b = jnp.zeros(w.b.shape[:-1], dtype)
        return cls(w, d, b, allow_materialise=allow_materialise)

    @classmethod
    def share(cls, updates: Sequence["VeRA"], key: PRNGKeyArray) -> list["VeRA"]:
        """The same updates with the same factors, of each rank and dtype one pair.

        An axis of batch is a copy for each index: a loop over layers takes a slice of
        every leaf.
        """
        sizes: dict[Any, tuple[int, int]] = {}
        for x in updates:
            old = sizes.get(_kind(x.shared), (0, 0))
            sizes[_kind(x.shared)] = max(old[0], _ins(x)), max(old[1], _outs(x))
        pairs = {kind: _pair(kind, size, key) for kind, size in sizes.items()}
        parts: dict[Any, tuple[Array, Array]] = {}
        out = []
        for x in updates:
            w = x.shared
            of_type = w.a.shape, w.b.shape, _kind(w), w.rows, w.cols
            if of_type not in parts:
                parts[of_type] = _part(*pairs[_kind(w)], x)
            a, b = parts[of_type]
            out.append(replace(x, shared=replace(w, a=a, b=b)))
        return out

    def lower(self) -> LowRankArray:
        w = lax.stop_gradient(self.shared)
        d = jnp.expand_dims(self.lambda_d, range(-w.cols, 0))
        dtype = wider(w.a.dtype, w.b.dtype, d.dtype, self.lambda_b.dtype)
        a = w.a.astype(dtype) * d.astype(dtype)
        b = w.b.astype(dtype) * self.lambda_b[..., None].astype(dtype)
        return replace(w, a=a, b=b, allow_materialise=self.allow_materialise)


def _kind(w: LowRankArray):
    return w.rank, jnp.dtype(w.a.dtype)


def _ins(x: VeRA) -> int:
    return math.prod(x.shared.a.shape[x.shared.n_batch + 1 :])


def _outs(x: VeRA) -> int:
    return math.prod(x.shared.b.shape[x.shared.n_batch : -1])


def _pair(kind, sizes: tuple[int, int], key: PRNGKeyArray) -> tuple[Array, Array]:
    """The factors `(rank, ins)` and `(outs, rank)` of the largest weight."""
    (rank, dtype), (ins, outs) = kind, sizes
    a_key, b_key = jr.split(key)
    # A matrix of the initialisers is (fan_in, fan_out), the transpose of ours.
    a = _he_uniform(a_key, (ins, rank), dtype).T
    return a, _he_uniform(b_key, (rank, outs), dtype).T


def _part(a: Array, b: Array, x: VeRA) -> tuple[Array, Array]:
    """What a weight has of them."""
    w = x.shared
    n = w.n_batch
    a = a[:, : _ins(x)].reshape(w.a.shape[n:])
    b = b[: _outs(x)].reshape(w.b.shape[n:])
    return jnp.broadcast_to(a, w.a.shape), jnp.broadcast_to(b, w.b.shape)
