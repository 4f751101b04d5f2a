"""What a program is given, described: weights of every kind, and inputs."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from helpers import KINDS, low_rank

from lora_quax import LoraArray


# The kinds of which the base can train: `stop_gradient` is given on to the array.
TRAINABLE = ("lora", "on_scaled")
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
        return _cast(w, self.factors)


class Input(NamedTuple):
    shape: tuple[int, ...]
    seed: int = 0
    dtype: str = "float64"

    def make(self, leave: bool) -> Any:
        del leave
        return _normal(np.random.default_rng(100 + self.seed), self)


def abstract(x: Weight | Input) -> jax.ShapeDtypeStruct:
    """What a dense program sees of it."""
    narrow = isinstance(x, Weight) and KINDS[x.kind] is low_rank
    return jax.ShapeDtypeStruct(x.shape, jnp.dtype(x.factors if narrow else x.dtype))


def _normal(rng, like) -> np.ndarray:
    return rng.normal(size=like.shape).astype(jnp.dtype(like.dtype))


def _fill(tree, seed: int):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: _normal(rng, x), tree)


def _cast(tree, dtype: str):
    return jax.tree.map(lambda x: np.asarray(x).astype(jnp.dtype(dtype)), tree)
