"""What the tests of files share: models that need no compiler, and exact comparison."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import quax
from jax.core import ShapedArray

from lora_quax import partition


def bits(tree):
    """Exactly what is in memory, of each array."""
    leaves = jax.tree.leaves(eqx.filter(tree, eqx.is_array))
    return [(x.dtype, x.shape, np.asarray(x).tobytes()) for x in leaves]


def listing(folder) -> dict[str, bytes | None]:
    """All that is in a folder, and in the folders below it."""
    found = sorted(folder.rglob("*"))
    return {str(p): p.read_bytes() if p.is_file() else None for p in found}


def contents(folder) -> dict[str, bytes | None]:
    """The same, wherever the folder is."""
    start = len(str(folder))
    return {path[start:]: x for path, x in listing(folder).items()}


def numbers(tree):
    """An abstract tree with numbers in it, and one with others where it trains.

    All of them are NumPy's: nothing has to be compiled for a model.
    """
    rng = np.random.default_rng(0)

    def draw(x):
        if not isinstance(x, jax.ShapeDtypeStruct):
            return x
        x = np.asarray(rng.uniform(-2, 2, x.shape) * 30).astype(x.dtype)
        return jnp.asarray(x / 30 if jnp.issubdtype(x.dtype, jnp.floating) else x)

    draw_all = lambda tree: jax.tree.map(draw, tree)
    params, frozen = partition(tree)
    frozen = draw_all(frozen)
    return tuple(eqx.combine(draw_all(params), frozen) for _ in range(2))


class Int8(quax.ArrayValue):
    """A quantised array, in little."""

    q: jax.Array

    def aval(self):
        return ShapedArray(self.q.shape, jnp.float32)

    def materialise(self):
        return self.q.astype(jnp.float32) / 16
