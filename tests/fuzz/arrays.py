"""What a program is given, described: weights of every kind, and inputs."""

import functools as ft
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from helpers import dense, KINDS

from lora_quax import LoraArray, LowRankArray


# The kinds that are not given `stop_gradient`.
UNTRAINABLE = ("nested",)
# The kinds that cannot be stacked leaf by leaf: the base has a scale of one number.
UNSTACKED = ("on_scaled",)
# The kinds of which one leaf follows from others, and so cannot be filled at random.
DERIVED: tuple[str, ...] = ()


class Weight(NamedTuple):
    kind: str
    shape: tuple[int, ...]
    rows: int = 1
    cols: int = 1
    rank: int = 2
    seed: int = 0
    dtype: str = "float64"
    factors: str = "float64"
    trains: bool = False

    def make(self, leave: bool) -> Any:
        options: dict[str, Any] = dict(rows=self.rows, cols=self.cols, rank=self.rank)
        if self.trains:
            options["stop_gradient"] = False

        def draw():
            return KINDS[self.kind](
                self.shape,
                seed=self.seed,
                dtype=self.dtype,
                allow_materialise=leave,
                **options,
            )

        # To draw with JAX would compile as much as the program does.
        derived = self.kind in DERIVED
        w = (
            jax.device_get(draw())
            if derived
            else _fill(jax.eval_shape(draw), self.seed)
        )
        if isinstance(w, LoraArray):
            return eqx.tree_at(lambda w: w.delta, w, _cast(w.delta, self.factors))
        return _cast(w, self.factors) if isinstance(w, LowRankArray) else w


class Input(NamedTuple):
    shape: tuple[int, ...]
    seed: int = 0
    dtype: str = "float64"

    def make(self, leave: bool) -> Any:
        del leave
        return _normal(np.random.default_rng(100 + self.seed), self)


@ft.cache
def abstract(x: Weight | Input) -> jax.ShapeDtypeStruct:
    """What a dense program sees of it."""
    return jax.eval_shape(dense, x.make(leave=True))


def _normal(rng, like) -> np.ndarray:
    return rng.normal(size=like.shape).astype(jnp.dtype(like.dtype))


def _fill(tree, seed: int):
    """Numbers for the leaves; for integers, which choose among others, 0 or 1; and for
    keys, of which a rate of zero makes no use, any."""
    rng = np.random.default_rng(seed)

    def fill(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.split(jax.random.key(seed), x.shape)
        if jnp.issubdtype(x.dtype, jnp.inexact):
            return _normal(rng, x)
        return rng.integers(0, 2, x.shape).astype(x.dtype)

    return jax.tree.map(fill, tree)


def _cast(tree, dtype: str):
    floats, rest = eqx.partition(tree, eqx.is_inexact_array_like)
    cast = lambda x: np.asarray(x).astype(jnp.dtype(dtype))
    return eqx.combine(jax.tree.map(cast, floats), rest)
