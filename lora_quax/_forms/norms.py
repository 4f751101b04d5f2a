"""The norms of the rows, or columns, of a sum that is not formed.

With `W` the base and `s · b · a` the update, each row `o` of the sum has

    ‖W + s·b·a‖²  =  ‖W‖²  +  2·s·⟨W, b·a⟩  +  s²·‖b·a‖²

    ⟨W, b·a⟩[o]   =  Σ_r b[o, r] · (W aᵀ)[o, r]         W aᵀ:  (rows, rank)
    ‖b·a‖²[o]     =  Σ_r b[o, r] · (b (a aᵀ))[o, r]     a aᵀ:  (rank, rank)

so that no array of the size of the weight is made. For columns `a` and `b` change
places. The products are exact to the type that they are taken in, also where a device
would by default round their operands: they are thin, and their digits are those of the
scale.
"""

import functools as ft
from collections.abc import Sequence
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import quax
from jax import lax
from jax.sharding import AxisType
from jaxtyping import Array

from .._arrays.base import dense, densify_or_refuse, is_adapted, lower
from .._arrays.check import aval_of, wider
from .._arrays.lora import LoraArray
from .._arrays.low_rank import LowRankArray
from .._arrays.scaled import ScaledArray
from .._arrays.thin_dot import arrange, contract, label_sharding
from .._compat import varying_axes


Per: TypeAlias = Literal["rows", "columns"]


def axes_of(w: LowRankArray, per: Per) -> list[int]:
    """The axes that each of the norms is taken over: columns for those of rows."""
    n, rows = w.n_batch, w.rows
    ndim = n + rows + w.cols
    return list(range(n + rows, ndim)) if per == "rows" else list(range(n, n + rows))


def squared_norms(w: LoraArray, per: Per) -> tuple[Array, Array]:
    """`‖W‖²`, and by how much that of the sum is more; both `(*batch, *rows)`, or
    `(*batch, *cols)`."""
    update = w.delta.lower()
    base = w.frozen_base()
    if not is_adapted(base):
        base = dense(base)  # A quantised one is decoded once for both.
    dtype = wider(aval_of(base).dtype, update.a.dtype, update.b.dtype, jnp.float32)
    axes = axes_of(update, per)
    _refuse_parts(update, per)
    return _squares(base, axes, dtype), _more(base, update, axes, dtype)


def _refuse_parts(update: LowRankArray, per: Per) -> None:
    """**Raises:** `ValueError` inside a `shard_map` that shards the axes that norms are
    taken over, as far as the types say so."""
    far, near = (update.a, update.b) if per == "rows" else (update.b, update.a)
    if names := sorted(varying_axes(far) - varying_axes(near)):
        over, factor = ("columns", "b") if per == "rows" else ("rows", "a")
        raise ValueError(
            f"The norms of the {per} of a DoRA were asked for inside a `shard_map`, "
            f"where each device along {', '.join(map(repr, names))} has {over} of its "
            "own, and so a part of each norm. Put `quaxify` around the `shard_map`, "
            "and the norms are taken before: `quaxify(shard_map(f))`. If the device "
            f"has all of the {over}, as after an `all_gather`, say so of the factor "
            f"`{factor}`, by `jax.lax.pcast({factor}, {tuple(names)}, to='varying')`."
        )


def _squares(x, axes: Sequence[int], dtype) -> Array:
    x = lower(x)
    if isinstance(x, LoraArray):
        base, update = x.frozen_base(), x.delta.lower()
        return _squares(base, axes, dtype) + _more(base, update, axes, dtype)
    if isinstance(x, LowRankArray):
        return _more(None, x, axes, dtype)
    if isinstance(x, ScaledArray) and all(x.scale.shape[i] == 1 for i in axes):
        scale = x.scale.squeeze(axes).astype(dtype)
        return scale**2 * _squares(x.frozen_base(), axes, dtype)
    why = "its norms are not those of the scaled rows, or columns"
    x = dense(densify_or_refuse("norm", x, [x], why))
    return jnp.square(x.astype(dtype)).sum(axes)


def _more(base, update: LowRankArray, axes: Sequence[int], dtype) -> Array:
    """`2·s·⟨base, b·a⟩ + s²·‖b·a‖²`; the second alone, of no base."""
    a_labels, b_labels, labels = update.labels
    a, b = (update.a.astype(dtype), a_labels), (update.b.astype(dtype), b_labels)
    # `far` is summed over, and `near` has the axes that are left.
    (far, far_labels), (near, near_labels) = (a, b) if axes[-1] in a_labels else (b, a)
    batch = [i for i in far_labels if i in near_labels and i != "rank"]

    product = ft.partial(
        contract,
        keep=batch,
        precision=lax.Precision.HIGHEST,
        out_sharding=_as_in(near, near_labels),
    )
    s = jnp.asarray(update.scaling, dtype)
    turned = ["turned" if i == "rank" else i for i in far_labels]
    gram, gram_labels = product(far, far_labels, far, turned)
    of_update, found = product(near, near_labels, gram, gram_labels)
    found = ["rank" if i == "turned" else i for i in found]
    total = s**2 * arrange(of_update, found, near_labels)
    if base is not None:
        wide = quax.quaxify(lambda x: x.astype(dtype))(base)
        of_base, found = product(wide, labels, far, far_labels)
        total = 2 * s * arrange(of_base, found, near_labels) + total
    return (near * total).sum(near_labels.index("rank"))


def _as_in(x: Array, labels):
    """How a product is sharded that has the axes of `x`, where that has to be said."""
    sharding = jax.typeof(x).sharding
    explicit = AxisType.Explicit in sharding.mesh.axis_types
    return label_sharding(sharding if explicit else None, labels)
