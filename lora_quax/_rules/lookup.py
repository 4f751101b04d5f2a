"""Lookup: `gather` and `dynamic_slice`, so `w[ids]`, `w[i]`, `jnp.take`, `.at[].get`.

A lookup acts on each factor that holds an axis it cuts. Of whole matrices (stacked
layers, experts) the result is still a low-rank weight. Of rows or columns (an
embedding) it is an activation, which what follows will use densely, and is summed.
"""

import jax.numpy as jnp
from jax import lax

from .._arrays.array import LowRankArray, scale
from .._arrays.thin_dot import arrange, contract
from .layout import BATCH, groups, on_factors
from .register import linear


@linear(lax.dynamic_slice_p)
def dynamic_slice(w: LowRankArray, *starts, slice_sizes):
    zero = jnp.zeros((), jnp.result_type(*starts)) if starts else 0
    return on_factors(w, lax.dynamic_slice, (starts, zero), (slice_sizes, w.rank))


def _fills(params) -> bool:
    return params["mode"] == lax.GatherScatterMode.FILL_OR_DROP


@linear(lax.gather_p, affine=_fills)
def gather(
    w: LowRankArray,
    indices,
    *,
    dimension_numbers,
    slice_sizes,
    fill_value,
    **params,
):
    del fill_value  # Out of bounds, the base gives it, and the update zero.
    numbers = dimension_numbers
    dropped = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    kept = [i for i in range(w.ndim) if i not in dropped]
    ids = [("id", i) for i in range(indices.ndim - 1)]
    cut = {*numbers.start_index_map, *numbers.operand_batching_dims}
    if not _fills(params):  # Where a slice is all of an axis, there is no choice.
        cut = {i for i in cut if slice_sizes[i] != w.shape[i] or i in dropped}

    def look_up(factor, labels):
        """The factor's own part of the lookup: its axes are `(*ids, *kept)`."""
        if not cut.intersection(labels):
            return factor, list(labels)
        index = {label: position for position, label in enumerate(labels)}
        columns = [k for k, i in enumerate(numbers.start_index_map) if i in index]
        out_labels = [label for label in labels if label not in dropped]
        # Batching dimensions of the indices whose operand axis the factor lacks are
        # then indices like any other.
        batching = [
            (index[i], j)
            for i, j in zip(
                numbers.operand_batching_dims, numbers.start_indices_batching_dims
            )
            if i in index
        ]
        out = lax.gather(
            factor,
            indices[..., jnp.array(columns, int)] if columns else indices[..., :0],
            lax.GatherDimensionNumbers(
                offset_dims=tuple(range(len(ids), len(ids) + len(out_labels))),
                collapsed_slice_dims=tuple(
                    sorted(index[i] for i in numbers.collapsed_slice_dims if i in index)
                ),
                start_index_map=tuple(
                    index[numbers.start_index_map[k]] for k in columns
                ),
                operand_batching_dims=tuple(i for i, _ in batching),
                start_indices_batching_dims=tuple(j for _, j in batching),
            ),
            [w.rank if i == "rank" else slice_sizes[i] for i in labels],
            fill_value=0,
            **params,
        )
        return out, [*ids, *out_labels]

    a_labels, b_labels, _ = w.labels
    a, a_labels = look_up(w.a, a_labels)
    b, b_labels = look_up(w.b, b_labels)
    # The axes of the result: those kept of the array at offset_dims, indices elsewhere.
    rest, offsets = iter(ids), iter(kept)
    ndim = len(ids) + len(kept)
    labels = [
        next(offsets if axis in numbers.offset_dims else rest) for axis in range(ndim)
    ]
    group = groups(w)
    whole = all(group[i] == BATCH for i in cut)
    if whole and labels == [*ids, *kept]:
        return w.replace(a=a, b=b)
    out, out_labels = contract(b, b_labels, a, a_labels, keep=labels)
    return scale(arrange(out, out_labels, labels), w.scaling)
