"""Lookup: `gather` and `dynamic_slice`, so `w[ids]`, `w[i]`, `jnp.take`, `.at[].get`.

A lookup acts on each factor that holds an axis it cuts. Of whole matrices (stacked
layers, experts) the result is still a low-rank weight, and so is one slice of any kind.
Of many rows or columns (an embedding) it is an activation, which what follows will use
densely, and is summed.
"""

import functools as ft
from collections.abc import Mapping

import jax.numpy as jnp
from jax import lax

from .._arrays.base import replace
from .._arrays.low_rank import LowRankArray, scaled
from .._arrays.thin_dot import arrange, contract
from .layout import BATCH, COL, contain, groups, on_factors, ROW, squeeze
from .register import linear, NotLazy


# What a primitive is given has been counted from the end already, if it was negative.
# What is negative still is out of bounds, and becomes the first.
slice_at = ft.partial(lax.dynamic_slice, allow_negative_indices=False)
_write_at = ft.partial(lax.dynamic_update_slice, allow_negative_indices=False)


@linear(lax.dynamic_slice_p)
def dynamic_slice(w: LowRankArray, *starts, slice_sizes):
    axes = {i for i, n in enumerate(w.shape) if slice_sizes[i] != n}
    zero = jnp.zeros((), jnp.result_type(*starts)) if starts else 0
    params = (starts, zero), (slice_sizes, w.rank)
    return on_factors(w, axes, slice_at, *params)


def fills(params) -> bool:
    return params["mode"] == lax.GatherScatterMode.FILL_OR_DROP


@linear(lax.gather_p, affine=fills)
def gather(
    w: LowRankArray, indices, *, dimension_numbers, slice_sizes, fill_value, **params
):
    """A slice of `w` for each index: `out[i, k] = w[start(i) + k]`, where `i` stands
    for the axes of `indices` but the last, and `k` for the axes of a slice.

    With `w = Σ_r b[·, r] a[r, ·]` each factor gives its own part of the slices,
    `b[i, k, r]` and `a[i, r, k]` with those `k` that are its axes, and the result is
    their product, for each `i`, over `r`. A factor that is not cut is the same for
    each `i`.
    """
    del fill_value  # Out of bounds, the base gives it, and the update zero.
    numbers = dimension_numbers
    if indices.ndim == 1 and not fills(params):
        return _slice_at(w, indices, numbers, slice_sizes)
    dropped = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    dropped = {*map(int, dropped)}  # Some of them are NumPy's.
    cut = dropped | {i for i, n in enumerate(w.shape) if slice_sizes[i] != n}
    if fills(params):  # A slice of all of an axis, too, may start out of bounds.
        cut |= {*map(int, numbers.start_index_map)}
        w = contain(w, cut)
    # Where each slice is all of the array, one factor has to be there for each index.
    cut = cut or {*map(int, numbers.start_index_map)} or {0}
    sizes = {"rank": w.rank, **dict(enumerate(slice_sizes))}

    def part(factor, labels):
        if cut.isdisjoint(labels):
            return factor, labels
        return look_up(factor, labels, sizes, indices, numbers, **params)

    a_labels, b_labels, _ = w.labels
    a, a_labels = part(w.a, a_labels)
    b, b_labels = part(w.b, b_labels)
    labels = result_labels(w.ndim, indices, numbers)
    ids = [label for label in labels if isinstance(label, tuple)]
    kept = [label for label in labels if not isinstance(label, tuple)]
    group = groups(w)
    if all(group[i] == BATCH for i in cut) and labels == [*ids, *kept]:
        # The indices become batch axes, in front of those that are left.
        return replace(w, a=a, b=b)
    b, a = scaled(b, a, w.scaling)
    out, out_labels = contract(b, b_labels, a, a_labels, keep=labels)
    return arrange(out, out_labels, labels)


def _slice_at(w: LowRankArray, index, numbers, slice_sizes):
    """The lookup at one index, as a `dynamic_slice` under `vmap` becomes."""
    starts = [jnp.zeros((), index.dtype)] * w.ndim
    for k, axis in enumerate(numbers.start_index_map):
        starts[axis] = index[k]
    out = dynamic_slice(w, *starts, slice_sizes=slice_sizes)
    return squeeze(out, dimensions=tuple(map(int, numbers.collapsed_slice_dims)))


def result_labels(ndim: int, indices, numbers) -> list:
    """The axes of the result: `("id", j)` for axis `j` of the indices, and for an axis
    of a slice, which stand at `offset_dims`, the number that it has in the operand."""
    dropped = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    kept = [i for i in range(ndim) if i not in dropped]
    labels: list = [("id", j) for j in range(indices.ndim - 1)]
    for axis, i in zip(numbers.offset_dims, kept):
        labels.insert(axis, i)
    return labels


def look_up(
    factor,
    labels,
    sizes: Mapping,
    indices,
    numbers: lax.GatherDimensionNumbers,
    *,
    unique_indices: bool,
    indices_are_sorted: bool,
    fill: int | float = 0,
    **params,
):
    """The lookup of an array in a factor of it, which holds the axes `labels`.

    Returns the slices, with axes for the indices in front, and their labels. Of an
    index only the columns count that are for axes of the factor. Two that differ in
    other columns are then the same, so that nothing more is promised of them.
    """
    position = {label: k for k, label in enumerate(labels)}
    columns = [k for k, i in enumerate(numbers.start_index_map) if i in position]
    all_there = len(columns) == len(numbers.start_index_map)
    ids = [("id", j) for j in range(indices.ndim - 1)]
    # A batching axis that the factor lacks leaves one of the indices like any other.
    batching = [
        (position[i], j)
        for i, j in zip(
            numbers.operand_batching_dims, numbers.start_indices_batching_dims
        )
        if i in position
    ]
    collapsed = sorted(
        position[i] for i in numbers.collapsed_slice_dims if i in position
    )
    dropped = {*collapsed, *(i for i, _ in batching)}
    out_labels = [label for label in labels if position[label] not in dropped]
    if not columns and not batching:
        # The same slice for each index. As a lookup by no numbers XLA would get its
        # gradient wrong, where the slices are as large as the operand.
        part = lax.slice(factor, [0] * factor.ndim, [sizes[i] for i in labels])
        part = part.squeeze(collapsed)
        shape = *indices.shape[:-1], *part.shape
        return jnp.broadcast_to(part, shape), [*ids, *out_labels]
    out = lax.gather(
        factor,
        indices if all_there else indices[..., jnp.array(columns, int)],
        lax.GatherDimensionNumbers(
            offset_dims=tuple(range(len(ids), len(ids) + len(out_labels))),
            collapsed_slice_dims=tuple(collapsed),
            start_index_map=tuple(
                position[numbers.start_index_map[k]] for k in columns
            ),
            operand_batching_dims=tuple(i for i, _ in batching),
            start_indices_batching_dims=tuple(j for _, j in batching),
        ),
        [sizes[label] for label in labels],
        fill_value=fill,
        unique_indices=unique_indices and all_there,
        indices_are_sorted=indices_are_sorted and all_there,
        **params,
    )
    return out, [*ids, *out_labels]


# Updates in place.


@linear(lax.dynamic_update_slice_p, affine=lambda params: True)
def dynamic_update_slice(w: LowRankArray, update, *starts):
    """What is written over has no update any more: zeros, in one of the factors."""
    cut = {i for i, n in enumerate(w.shape) if update.shape[i] != n}
    kinds = {groups(w)[i] for i in cut}
    if {ROW, COL} <= kinds:
        raise NotLazy("a block of some rows and some columns is written over")
    w = contain(w, cut)
    # Which of the two holds the zeros is free if the cut is of batch axes alone.
    name = "a" if COL in kinds else "b"
    a_labels, b_labels, _ = w.labels
    labels = a_labels if name == "a" else b_labels
    shape = [w.rank if i == "rank" else update.shape[i] for i in labels]
    zero = jnp.zeros((), jnp.result_type(*starts))
    at = [zero if i == "rank" else starts[i] for i in labels]
    factor = getattr(w, name)
    zeros = jnp.zeros(shape, factor.dtype)
    return replace(w, **{name: _write_at(factor, zeros, at)})


@linear(lax.scatter_add_p, affine=lambda params: True)
def scatter_add(w: LowRankArray, indices, updates, **params):
    """`w.at[...].add(x)`: all of it is the base's."""
    del indices, updates, params
    return w
