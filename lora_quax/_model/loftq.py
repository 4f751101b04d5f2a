"""Quantised bases, with first updates that make up for what that loses."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import PyTree

from .._arrays.base import dense, replace
from .._arrays.check import check_count, is_abstract, wider
from .._arrays.lora import LoraArray
from .._arrays.low_rank import LowRankArray
from .each import on_each
from .given import refuse_base
from .initialise import less_update, update_of
from .lay import laid_as
from .quantise import check_codec, Kind, quantised


def loftq(
    model: PyTree, kind: Kind = "nf4", *, tile: int | None = 64, steps: int = 1
) -> PyTree:
    """Quantises the bases of a model, with first updates that make up for the error.

    In each step the weight less its update is quantised, and the update is the best of
    its rank for what quantising lost (Li et al., *LoftQ*, arXiv 2310.08659).

    **Arguments:**

    - `model`: a model with `LoraArray`s around plain arrays, abstract or not.
    - `kind`, `tile`: as for `quantise`.
    - `steps`: how often.

    **Returns:** the model with quantised bases, and such updates. It is nearer to the
    model before than `quantise` alone is, and is no longer equal to it.

    **Raises:** as `quantise` and `initialise`.
    """
    check_codec(kind, tile)
    check_count("steps", steps)

    def change(where: str, w: LoraArray, *_) -> LoraArray:
        refuse_base(where, w, "the base is to be quantised")
        run = eqx.filter_eval_shape if is_abstract(w) else _called
        out, rest = w, w.base
        for _ in range(steps):
            base = quantised(where, rest, w.delta.cols, kind, tile)
            delta = laid_as(run(_best_update, w, base), w.delta)
            out = replace(w, base=base, delta=delta)
            rest = laid_as(run(less_update, w.base, delta), w.base)
        return out

    return on_each(model, change)


def _called(fn, *args):
    return fn(*args)


@eqx.filter_jit
def _best_update(w: LoraArray, base) -> LowRankArray:
    """That of what a quantised base lacks."""
    wide = wider(w.base.dtype, jnp.float32)
    lacking = w.base.astype(wide) - dense(base).astype(wide)
    return update_of(w, lacking, None, None, "pissa", w.rank)
