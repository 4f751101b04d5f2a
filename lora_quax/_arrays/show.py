"""How an array prints: a line with what matters, also when leaves are filtered out."""

import jax.numpy as jnp
import jax.tree_util as jtu
import wadler_lindig as wl

from .check import aval_of


def show(x, *leaves, indent: int = 2, **kwargs):
    """`Name(f32[5,3], rank=2, alpha=4)`, for `wadler_lindig`.

    The shape is left out if one of `leaves`, of which the type is made, is missing.
    """
    del kwargs
    rank, alpha = getattr(x, "rank", None), getattr(x, "alpha", None)
    docs = [] if rank is None else [wl.TextDoc(f"rank={rank}")]
    docs += [] if alpha is None else [wl.TextDoc(f"alpha={alpha:g}")]
    parts = jtu.tree_leaves(leaves, is_leaf=lambda leaf: leaf is None)
    if all(hasattr(part, "dtype") for part in parts):
        aval = aval_of(x)
        docs.insert(0, wl.array_summary(aval.shape, aval.dtype.name, kind=None))
        factors = getattr(x, "a", None)
        if factors is not None and jnp.dtype(factors.dtype) != aval.dtype:
            docs.append(wl.TextDoc(f"factors={jnp.dtype(factors.dtype).name}"))
    name = wl.TextDoc(f"{type(x).__name__}(")
    return wl.bracketed(name, docs, wl.comma, wl.TextDoc(")"), indent)
