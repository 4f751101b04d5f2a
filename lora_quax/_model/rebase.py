"""From a base out of which a first update was taken to the one before."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from .._arrays.base import is_adapted, replace
from .._arrays.lora import LoraArray
from .._arrays.low_rank import LowRankArray
from .dropout import without_key
from .each import low_rank
from .initialise import less_update
from .merge import refuse_partial
from .paths import dotted, named
from .together import whole


def rebase(model: PyTree, initial: PyTree, plain: PyTree) -> PyTree:
    """Puts a model that was initialised by `initialise` back on the base before.

    With the factors `a₀`, `b₀` that were taken out, `base = plain - s · b₀ · a₀`, it is

        base + s · b · a = plain + s · (b · a - b₀ · a₀),

    an update of twice the rank, whose factors are those of both, and of the same
    scaling. So it is a model like any other: `save_adapter` and `peft.save` write it,
    and it is loaded onto the untouched base.

    **Arguments:**

    - `model`: the trained model. A key of dropout is left away.
    - `initial`: the model as `initialise` gave it.
    - `plain`: the model that `loraify` was given.

    **Returns:** the model with the bases of `plain`.

    **Raises:** `ValueError` if the three do not belong together.
    """

    model, initial = without_key(model), without_key(initial)
    refuse_partial(model)
    refuse_partial(initial)

    def change(where: str, w: LoraArray, first: Any, base: Any) -> LoraArray:
        alike = isinstance(first, LoraArray) and isinstance(first.delta, LowRankArray)
        if not alike or (first.rank, first.alpha) != (w.rank, w.alpha):
            raise ValueError(f"{where} has another update in `initial`.")
        if not _is_same(w.base, first.base):
            raise ValueError(f"{where} has another base in `initial`.")
        if not _is_before(base, first):
            raise ValueError(
                f"{where}: the base and first update in `initial` do not come to what "
                "it is in `plain`. Only what `initialise` took out of a base can be "
                "put back."
            )
        n = w.n_batch
        a = jnp.concatenate([w.a, first.a], n)
        b = jnp.concatenate([w.b, -first.b], -1)
        delta = replace(w.delta, a=a, b=b, rank=2 * w.rank, alpha=2 * w.alpha)
        return replace(w, base=base, delta=delta)

    is_sum = lambda x: isinstance(x, LoraArray)

    def change_inside(where: str, x: Any, first: Any, base: Any) -> Any:
        """A `DoRA` is around the sum that is changed; others are as they were."""
        parts, treedef = jtu.tree_flatten(x, is_leaf=is_sum)
        firsts = jax.tree.leaves(first, is_leaf=is_sum)
        if len(firsts) != len(parts):
            raise ValueError(f"{where} is adapted otherwise in `initial`.")
        out = [
            change(where, low_rank(where, y), z, base) if is_sum(y) else y
            for y, z in zip(parts, firsts)
        ]
        return jax.tree.unflatten(treedef, out)

    leaves, treedef = jtu.tree_flatten_with_path(model, is_leaf=is_adapted)
    firsts = jax.tree.leaves(initial, is_leaf=is_adapted)
    # Where an array is adapted, `plain` has one leaf.
    outline = jax.tree.map(lambda _: 0, model, is_leaf=is_adapted)
    try:
        bases = jax.tree.structure(outline).flatten_up_to(plain)
    except ValueError as e:
        raise ValueError("`plain` is another model than the one adapted.") from e
    if len(firsts) != len(leaves):
        raise ValueError("`initial` is another model than the one trained.")
    out = [
        change_inside(named(dotted(path)), x, first, base) if is_adapted(x) else x
        for (path, x), first, base in zip(leaves, firsts, bases)
    ]
    return jax.tree.unflatten(treedef, out)


def _is_same(x, y) -> bool:
    pairs = zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
    return all(u is v or np.array_equal(whole(u), whole(v)) for u, v in pairs)


def _is_before(base, first: LoraArray) -> bool:
    """Whether a weight less its first update is what its base is, but for rounding."""
    if getattr(base, "shape", None) != first.shape or not eqx.is_array(base):
        return False
    largest = lambda x: float(jnp.abs(x).max(initial=0))
    error = largest(less_update(base, first.delta) - first.base)
    scale = largest(first.base) + largest(base)
    return error <= 100 * float(jnp.finfo(base.dtype).eps) * scale
