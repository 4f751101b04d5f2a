"""Layout: operations that move, split, merge or cut axes.

Each acts on the factors that hold the axis. Rows are axes of `b`, columns of `a`, batch
axes of both; what remains is to see that an operation does not tear a group apart.
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import lax

from .._array import LowRankArray
from .._product import arrange
from ._register import linear, NotLazy, settle


BATCH, ROW, COL = 0, 1, 2


def groups(w: LowRankArray) -> list[int]:
    """To which group each axis belongs."""
    return [BATCH] * w.n_batch + [ROW] * w.rows + [COL] * w.cols


def factor_axes(groups: Sequence[int]) -> tuple[list, list]:
    """The axes, and the rank, of `a` and of `b`, for axes that belong to `groups`."""
    batch, rows, cols = (
        [i for i, group in enumerate(groups) if group == kind]
        for kind in (BATCH, ROW, COL)
    )
    return [*batch, "rank", *cols], [*batch, *rows, "rank"]


def on_factors(w: LowRankArray, fn: Callable, *params: tuple[Sequence, object]):
    """`fn(factor, *lists)` of both factors.

    Each of `params` has a value for each axis of `w`, and one for the rank; a factor is
    given the list of those for the axes that it holds.
    """

    def apply(factor, labels):
        lists = (
            [rank if i == "rank" else values[i] for i in labels]
            for values, rank in params
        )
        return fn(factor, *lists)

    a_labels, b_labels, _ = w.labels
    return w.replace(a=apply(w.a, a_labels), b=apply(w.b, b_labels))


@linear(lax.transpose_p)
def transpose(w: LowRankArray, *, permutation):
    a_labels, b_labels, _ = w.labels
    old = groups(w)
    new = [old[i] for i in permutation]
    if new == old:
        a_order, b_order = factor_axes(old)
        a_order = [i if i == "rank" else permutation[i] for i in a_order]
        b_order = [i if i == "rank" else permutation[i] for i in b_order]
        a, b = arrange(w.a, a_labels, a_order), arrange(w.b, b_labels, b_order)
        return w.replace(a=a, b=b)
    swapped = [ROW if group == COL else COL if group else BATCH for group in new]
    if swapped == sorted(swapped):
        # Rows and columns change places, and so do the factors.
        a_order, b_order = factor_axes(swapped)
        a_order = [i if i == "rank" else permutation[i] for i in a_order]
        b_order = [i if i == "rank" else permutation[i] for i in b_order]
        a, b = arrange(w.b, b_labels, a_order), arrange(w.a, a_labels, b_order)
        return w.replace(a=a, b=b, rows=w.cols, cols=w.rows)
    raise NotLazy(f"permutation {permutation} mixes batch, row and column axes")


@linear(lax.reshape_p)
def reshape(w: LowRankArray, *, new_sizes, dimensions, sharding):
    del sharding  # Of the dense result; the factors keep their own.
    if dimensions is not None:
        w = transpose(w, permutation=dimensions)
    shape, new_sizes = w.shape, tuple(new_sizes)
    if 0 in shape:
        raise NotLazy("the array is empty")
    blocks, rank = list(_blocks(shape, new_sizes)), w.rank
    for before, _ in blocks:
        w = _unite(w, [i for i in before if shape[i] != 1])
    if w.rank > rank and w.a.size + w.b.size >= w.size:
        raise NotLazy(
            f"reshaping {shape} to {new_sizes} merges rows with columns, and the factors "
            f"of the result, at rank {w.rank}, would be larger than it"
        )
    old, new, group = groups(w), [], BATCH
    for before, after in blocks:
        wide = [old[i] for i in before if shape[i] != 1] or [old[i] for i in before]
        group = max([group, *wide])  # A new axis of length 1 joins the last.
        new += [group] * len(after)
    return _resize(w, new_sizes, new)


def _unite(w: LowRankArray, axes: Sequence[int]) -> LowRankArray:
    """`w` with these neighbouring axes in one group, for a higher rank if need be.

    A grouped convolution merges its groups with its inputs, a vmapped one its batch with
    its outputs. An axis `x` changes groups by entering the rank,

        Σ_r b[x, o, r] a[r, i] = Σ_{y,r} b[y, o, r] · δ[x, y] a[r, i],

    with the pair (y, r) as the new rank: one factor has lost the axis, to the rank, and
    the other has it in a block diagonal.
    """
    kinds = [groups(w)[i] for i in axes]
    for axis in reversed([i for i, kind in zip(axes, kinds) if kind != kinds[-1]]):
        if groups(w)[axis] == BATCH:
            w = _batch_to_row(w)
        if kinds[-1] == COL:
            w = _row_to_col(w)
    return w


def _batch_to_row(w: LowRankArray) -> LowRankArray:
    n, x = w.n_batch, w.shape[w.n_batch - 1]
    shape = w.b.shape
    # a: (*batch, x, rank, *cols) -> (*batch, x rank, *cols)
    a = w.a.reshape(*w.a.shape[: n - 1], x * w.rank, *w.a.shape[n + 1 :])
    # b: (*batch, x, *rows, rank) -> (*batch, x, *rows, x rank)
    eye = jnp.eye(x, dtype=w.b.dtype).reshape(x, *(1,) * w.rows, x, 1)
    b = (jnp.expand_dims(w.b, -2) * eye).reshape(*shape[:-1], x * w.rank)
    return _enlarged(w, a, b, x, rows=w.rows + 1)


def _row_to_col(w: LowRankArray) -> LowRankArray:
    n, x = w.n_batch, w.b.shape[-2]
    # b: (*batch, *rows, x, rank) -> (*batch, *rows, x rank)
    b = w.b.reshape(*w.b.shape[:-2], x * w.rank)
    # a: (*batch, rank, *cols) -> (*batch, x rank, x, *cols)
    eye = jnp.eye(x, dtype=w.a.dtype).reshape(x, 1, x, *(1,) * w.cols)
    a = jnp.expand_dims(w.a, (n, n + 2)) * eye
    a = a.reshape(*a.shape[:n], x * w.rank, x, *w.a.shape[n + 1 :])
    return _enlarged(w, a, b, x, rows=w.rows - 1, cols=w.cols + 1)


def _enlarged(w: LowRankArray, a, b, factor: int, **changes) -> LowRankArray:
    """`w` with factors of a rank `factor` times as high, and the same scaling."""
    rank, alpha = w.rank * factor, w.alpha * factor
    return w.replace(a=a, b=b, rank=rank, alpha=alpha, **changes)


def _resize(w: LowRankArray, sizes, groups):
    """`w` with its factors reshaped to axes of the given sizes and groups."""
    a_axes, b_axes = factor_axes(groups)
    a = w.a.reshape([w.rank if i == "rank" else sizes[i] for i in a_axes])
    b = w.b.reshape([w.rank if i == "rank" else sizes[i] for i in b_axes])
    rows, cols = groups.count(ROW), groups.count(COL)
    return settle(w.replace(a=a, b=b, rows=rows, cols=cols))


def _blocks(old: Sequence[int], new: Sequence[int]):
    """Cuts a reshape into the smallest pairs of old axes and new ones of equal size."""
    i = j = 0
    while i < len(old) or j < len(new):
        old_one = i < len(old) and old[i] == 1
        new_one = j < len(new) and new[j] == 1
        i_start, j_start = i, j
        if old_one or new_one:
            i, j = i + old_one, j + new_one
        else:
            i, j = i + 1, j + 1
            old_size, new_size = old[i_start], new[j_start]
            while old_size != new_size:
                if old_size < new_size:
                    old_size *= old[i]
                    i += 1
                else:
                    new_size *= new[j]
                    j += 1
        yield range(i_start, i), range(j_start, j)


@linear(lax.squeeze_p)
def squeeze(w: LowRankArray, *, dimensions):
    kept = [i for i in range(w.ndim) if i not in dimensions]
    old = groups(w)
    return _resize(w, [w.shape[i] for i in kept], [old[i] for i in kept])


@linear(lax.broadcast_in_dim_p)
def broadcast_in_dim(w: LowRankArray, *, shape, broadcast_dimensions, sharding):
    del sharding
    if list(broadcast_dimensions) != sorted(broadcast_dimensions):
        raise NotLazy("the axes are reordered")
    old, new, group = groups(w), [], BATCH
    for axis in range(len(shape)):
        if axis in broadcast_dimensions:
            group = old[broadcast_dimensions.index(axis)]
        new.append(group)  # A new axis joins the group before it.

    def broadcast(factor, labels, axes):
        sizes = [w.rank if i == "rank" else shape[i] for i in axes]
        moved = [i if i == "rank" else broadcast_dimensions[i] for i in labels]
        return lax.broadcast_in_dim(factor, sizes, [axes.index(i) for i in moved])

    a_labels, b_labels, _ = w.labels
    a_axes, b_axes = factor_axes(new)
    a, b = broadcast(w.a, a_labels, a_axes), broadcast(w.b, b_labels, b_axes)
    return w.replace(a=a, b=b, rows=new.count(ROW), cols=new.count(COL))


@linear(lax.rev_p)
def rev(w: LowRankArray, *, dimensions):
    flags = [i in dimensions for i in range(w.ndim)]

    def fn(factor, flags):
        return lax.rev(factor, [i for i, flag in enumerate(flags) if flag])

    return on_factors(w, fn, (flags, False))


@linear(lax.tile_p)
def tile(w: LowRankArray, *, reps):
    return on_factors(w, lax.tile, (reps, 1))


@linear(lax.slice_p)
def slice_(w: LowRankArray, *, start_indices, limit_indices, strides):
    strides = [1] * w.ndim if strides is None else strides
    return on_factors(
        w, lax.slice, (start_indices, 0), (limit_indices, w.rank), (strides, 1)
    )


@linear(lax.split_p)
def split(w: LowRankArray, *, sizes, axis):
    start, out = 0, []
    for size in map(int, sizes):
        starts = [start if i == axis else 0 for i in range(w.ndim)]
        limits = [start + size if i == axis else n for i, n in enumerate(w.shape)]
        out.append(
            slice_(w, start_indices=starts, limit_indices=limits, strides=None)
        )
        start += size
    return out


@linear(lax.pad_p, affine=lambda params: True)
def pad(w: LowRankArray, padding_value, *, padding_config):
    del padding_value  # The base is padded with it, and the update with zeros.

    def fn(factor, config):
        return lax.pad(factor, factor.dtype.type(0), config)

    return on_factors(w, fn, (padding_config, (0, 0, 0)))


@linear(lax.reduce_sum_p)
def reduce_sum(w: LowRankArray, *, axes, out_sharding=None):
    del out_sharding
    old = groups(w)
    if any(old[i] == BATCH for i in axes):
        raise NotLazy("a sum over a batch axis has a higher rank")
    a_labels, b_labels, _ = w.labels
    a = w.a.sum([i for i, label in enumerate(a_labels) if label in axes])
    b = w.b.sum([i for i, label in enumerate(b_labels) if label in axes])
    removed = [old[i] for i in axes]
    rows, cols = w.rows - removed.count(ROW), w.cols - removed.count(COL)
    return settle(w.replace(a=a, b=b, rows=rows, cols=cols))
