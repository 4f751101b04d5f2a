"""Layout: operations that move, split, merge or cut axes.

Each acts on the factors that hold the axis. Rows are axes of `b`, columns of `a`, batch
axes of both; what remains is to see that an operation does not tear a group apart.
"""

import math
from collections.abc import Callable, Sequence, Set

import jax.numpy as jnp
from jax import lax

from .._arrays.base import replace
from .._arrays.low_rank import LowRankArray
from .._arrays.probe import Probe
from .._arrays.thin_dot import arrange
from .register import linear, NotLazy, settle


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


def on_factors(
    w: LowRankArray, axes: Set[int], fn: Callable, *params: tuple[Sequence, object]
):
    """`fn(factor, *lists)` of the factors that hold one of `axes`.

    Each of `params` has a value for each axis of `w`, and one for the rank; a factor is
    given the list of those for the axes that it holds. The other factor is the very
    same one afterwards, by which a sum of two such arrays sees what they share.
    """

    def apply(factor, labels):
        if axes.isdisjoint(labels):
            return factor
        lists = (
            [rank if i == "rank" else values[i] for i in labels]
            for values, rank in params
        )
        return fn(factor, *lists)

    a_labels, b_labels, _ = w.labels
    return replace(w, a=apply(w.a, a_labels), b=apply(w.b, b_labels))


def contained(full, full_labels, sparse, sparse_labels):
    """Two factors, before zeros are put into the second of them.

    A zero beside a factor that is not finite is no zero in the product: 0 · inf. So
    what is not finite is taken from the first factor, and put, for the same index of
    the rank, into the second: all there is of the array by now is spoilt, and what is
    added to it is not. Where the factors are finite nothing changes.
    """
    own = [i for i in full_labels if i not in sparse_labels]
    shared = [i for i in full_labels if i in sparse_labels]
    bad = ~jnp.isfinite(full).all([full_labels.index(i) for i in own])

    def along(labels):
        order = [i for i in labels if i in shared]
        others = [k for k, i in enumerate(labels) if i not in shared]
        return jnp.expand_dims(arrange(bad, shared, order), others)

    full = jnp.where(along(full_labels), 0, full)
    return full, jnp.where(along(sparse_labels), jnp.nan, sparse)


def contain(w: LowRankArray, axes: Set[int]) -> LowRankArray:
    """`w`, before zeros are put in along `axes`."""
    a_labels, b_labels, _ = w.labels
    kinds = {group for i, group in enumerate(groups(w)) if i in axes}
    a, b = w.a, w.b
    if ROW in kinds:
        a, b = contained(a, a_labels, b, b_labels)
    if COL in kinds:
        b, a = contained(b, b_labels, a, a_labels)
    return replace(w, a=a, b=b)


@linear(lax.transpose_p)
def transpose(w: LowRankArray, *, permutation):
    """Rows and columns may change places, and then so do the factors."""
    old = groups(w)
    moved = [old[i] for i in permutation]
    new, exchanged = _nearest_groups(moved, [w.shape[i] for i in permutation])
    target = [new[permutation.index(i)] for i in range(w.ndim)]
    factors = _change_groups(w, target, f"permutation {tuple(permutation)}")
    if exchanged:
        factors = factors[::-1]
        new = [{ROW: COL, COL: ROW}.get(group, BATCH) for group in new]
    a, b = (
        arrange(factor, labels, [i if i == "rank" else permutation[i] for i in order])
        for (factor, labels), order in zip(factors, factor_axes(new))
    )
    return _with_factors(w, a, b, new)


def _nearest_groups(moved: Sequence[int], sizes: Sequence[int]):
    """Groups for the axes of a transposed array, and whether the factors change places.

    Behind the batch axes come all rows and then all columns, or the other way round.
    Where `moved`, the groups that the axes have, is neither, some have to change; of
    all ways that which changes the fewest, by the product of their sizes, is taken.
    """
    ndim = len(moved)
    n = next((i for i, group in enumerate(moved) if group != BATCH), ndim)
    candidates = [
        ([BATCH] * n + [first] * (cut - n) + [second] * (ndim - cut), first == COL)
        for first, second in ((ROW, COL), (COL, ROW))
        for cut in range(n + 1, ndim)
    ]

    def cost(candidate):
        torn = [size for size, u, v in zip(sizes, moved, candidate[0]) if u != v]
        return math.prod(max(2, size) for size in torn)

    return min(candidates, key=cost, default=(list(moved), False))


def _with_factors(w: LowRankArray, a, b, groups) -> LowRankArray:
    """`w` with other factors, perhaps of a multiple of the rank, scaled the same."""
    rank = b.shape[-1]
    alpha = w.alpha if rank == w.rank else w.alpha * (rank // w.rank)
    rows, cols = groups.count(ROW), groups.count(COL)
    return replace(w, a=a, b=b, rank=rank, alpha=alpha, rows=rows, cols=cols)


def in_groups(w: LowRankArray, target: Sequence[int], operation: str) -> LowRankArray:
    """`w` with each axis in its target group: batch first, then rows, then columns.

    **Raises:** `NotLazy` if the factors would be larger than the array.
    """
    if list(target) == groups(w):
        return w
    factors = _change_groups(w, target, operation)
    axes = factor_axes(target)
    a, b = (arrange(*factor, order) for factor, order in zip(factors, axes))
    return _with_factors(w, a, b, list(target))


def _change_groups(w: LowRankArray, target: Sequence[int], operation: str):
    """The factors `a` and `b`, with labels, once each axis belongs to its target group.

    A grouped convolution merges its groups with its inputs, a vmapped one its batch
    with its outputs. An axis `x` leaves a factor by entering the rank,

        Σ_r b[x, o, r] a[r, i] = Σ_{y,r} b[y, o, r] · δ[x, y] a[r, i],

    with the pair (y, r) as the new rank: the factor that loses the axis has it in the
    rank, and the other one, which had it or gains it, in a block diagonal. An axis of
    rows or of columns that is one of batch from now on is in both factors, of which the
    one that lacked it is the same all along it.
    """
    a_labels, b_labels, _ = w.labels
    factors = {COL: (w.a, a_labels), ROW: (w.b, b_labels)}
    for axis, (old, new) in enumerate(zip(groups(w), target)):
        if old != new == BATCH:
            lacking = ROW if old == COL else COL
            factor, labels = factors[lacking]
            factor = jnp.broadcast_to(factor, (w.shape[axis], *factor.shape))
            factors[lacking] = factor, [axis, *labels]
        elif old != new:
            other = ROW if new == COL else COL
            lost = lose(*factors[other], axis)
            spread = _spread(*factors[new], axis, w.shape[axis])
            lost_factor, spread_factor = contained(*lost, *spread)
            factors[other] = lost_factor, lost[1]
            factors[new] = _diagonal(spread_factor), spread[1]
    (a, _), (b, _) = factors[COL], factors[ROW]
    refuse_growth(a.size + b.size, [w], w.size, operation)
    return factors[COL], factors[ROW]


def refuse_growth(size: int, of: Sequence[LowRankArray], dense: int, operation: str):
    """**Raises:** `NotLazy` if factors of this size in all are larger than the array,
    and than those they come from. A probe is as large from the first."""
    if any(isinstance(w, Probe) for w in of):
        return
    if size > dense and size > max(w.a.size + w.b.size for w in of):
        raise NotLazy(
            f"{operation} takes a rank at which the factors would have {size} numbers, "
            f"and the dense array has {dense}"
        )


def lose(factor, labels, axis: int):
    """The factor with `axis` in its rank: `(axis, rank, …)` as `(axis · rank, …)`."""
    rest = [i for i in labels if i not in (axis, "rank")]
    factor = arrange(factor, labels, [axis, "rank", *rest])
    rank = factor.shape[0] * factor.shape[1]
    return factor.reshape(rank, *factor.shape[2:]), ["rank", *rest]


def _spread(factor, labels, axis: int, size: int):
    """The factor with `axis` in its rank and as an axis: `(axis, axis · rank, …)`."""
    rest = [i for i in labels if i not in (axis, "rank")]
    if axis in labels:
        factor = jnp.expand_dims(arrange(factor, labels, [axis, "rank", *rest]), 1)
    else:
        factor = jnp.expand_dims(arrange(factor, labels, ["rank", *rest]), (0, 1))
    shape = size, size, *factor.shape[2:]
    factor = jnp.broadcast_to(factor, shape)
    return factor.reshape(size, size * shape[2], *shape[3:]), [axis, "rank", *rest]


def _diagonal(factor):
    """What `_spread` gives, with zeros where the two indices of the axis differ."""
    size, rank = factor.shape[0], factor.shape[1] // factor.shape[0]
    same = jnp.repeat(jnp.eye(size, dtype=bool), rank, 1)  # (axis, axis · rank)
    return jnp.where(jnp.expand_dims(same, range(2, factor.ndim)), factor, 0)


@linear(lax.reshape_p)
def reshape(w: LowRankArray, *, new_sizes, dimensions, sharding):
    del sharding  # Of the dense result; the factors keep their own.
    if dimensions is not None:
        w = transpose(w, permutation=dimensions)
    shape, new_sizes = w.shape, tuple(new_sizes)
    if 0 in shape:
        raise NotLazy("the array is empty")
    target, new, group = groups(w), [], BATCH
    for before, after in blocks(shape, new_sizes):
        wide = [i for i in before if shape[i] != 1]
        # A new axis of length 1 joins the last.
        group = max([group, *(target[i] for i in wide or before)])
        for i in wide:
            target[i] = group
        new += [group] * len(after)
    w = in_groups(w, target, f"reshaping {shape} to {new_sizes}")
    return _resize(w, new_sizes, new)


def _resize(w: LowRankArray, sizes, groups):
    """`w` with its factors reshaped to axes of the given sizes and groups."""
    a_axes, b_axes = factor_axes(groups)
    a = w.a.reshape([w.rank if i == "rank" else sizes[i] for i in a_axes])
    b = w.b.reshape([w.rank if i == "rank" else sizes[i] for i in b_axes])
    rows, cols = groups.count(ROW), groups.count(COL)
    return settle(replace(w, a=a, b=b, rows=rows, cols=cols))


def blocks(old: Sequence[int], new: Sequence[int]):
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
    return replace(w, a=a, b=b, rows=new.count(ROW), cols=new.count(COL))


def expand(w: LowRankArray, shape: Sequence[int]) -> LowRankArray:
    """`w` with its axes of length 1 broadcast to those of `shape`, of equal number."""
    if w.shape == tuple(shape):
        return w
    return broadcast_in_dim(
        w, shape=shape, broadcast_dimensions=range(w.ndim), sharding=None
    )


@linear(lax.rev_p)
def rev(w: LowRankArray, *, dimensions):
    flags = [i in dimensions for i in range(w.ndim)]

    def fn(factor, flags):
        return lax.rev(factor, [i for i, flag in enumerate(flags) if flag])

    return on_factors(w, {*dimensions}, fn, (flags, False))


@linear(lax.tile_p)
def tile(w: LowRankArray, *, reps):
    axes = {i for i, n in enumerate(reps) if n != 1}
    return on_factors(w, axes, lax.tile, (reps, 1))


@linear(lax.slice_p)
def slice_(w: LowRankArray, *, start_indices, limit_indices, strides):
    strides = [1] * w.ndim if strides is None else strides
    cuts = list(zip(start_indices, limit_indices, strides))
    axes = {i for i, n in enumerate(w.shape) if cuts[i] != (0, n, 1)}
    params = (start_indices, 0), (limit_indices, w.rank), (strides, 1)
    return on_factors(w, axes, lax.slice, *params)


@linear(lax.split_p)
def split(w: LowRankArray, *, sizes, axis):
    start, out = 0, []
    for size in map(int, sizes):
        starts = [start if i == axis else 0 for i in range(w.ndim)]
        limits = [start + size if i == axis else n for i, n in enumerate(w.shape)]
        out.append(slice_(w, start_indices=starts, limit_indices=limits, strides=None))
        start += size
    return out


@linear(lax.unstack_p)
def unstack(w: LowRankArray, *, axis):
    parts = split(w, sizes=(1,) * w.shape[axis], axis=axis)
    return [squeeze(part, dimensions=(axis,)) for part in parts]


@linear(lax.pad_p, affine=lambda params: True)
def pad(w: LowRankArray, padding_value, *, padding_config):
    del padding_value  # The base is padded with it, and the update with zeros.
    axes = {i for i, config in enumerate(padding_config) if any(config)}

    def fn(factor, config):
        return lax.pad(factor, factor.dtype.type(0), config)

    return on_factors(contain(w, axes), axes, fn, (padding_config, (0, 0, 0)))


@linear(lax.reduce_sum_p)
def reduce_sum(w: LowRankArray, *, axes, out_sharding=None):
    """Rows and columns are summed in their factor. A batch axis joins the rank, over
    which the product is summed anyway: `Σ_e b[e, o, r] a[e, r, i]` has rank `e · r`."""
    del out_sharding
    old = groups(w)
    a_labels, b_labels, _ = w.labels
    a, b = (w.a, a_labels), (w.b, b_labels)
    summed = [int(i) for i in axes if old[i] == BATCH]
    for i in summed:
        a, b = lose(*a, i), lose(*b, i)
    kept = [i for i in range(w.ndim) if i not in axes]
    new = [old[i] for i in kept]

    def rest(factor, labels, order):
        factor = factor.sum([k for k, i in enumerate(labels) if i in axes])
        labels = [i for i in labels if i not in axes]
        return arrange(factor, labels, [i if i == "rank" else kept[i] for i in order])

    a_order, b_order = factor_axes(new)
    out = _with_factors(w, rest(*a, a_order), rest(*b, b_order), new)
    if summed:
        size = math.prod(w.shape[i] for i in kept)
        refuse_growth(out.a.size + out.b.size, [w], size, "a sum over a batch axis")
    return settle(out)


def _cumulative(primitive):
    @linear(primitive)
    def _(w: LowRankArray, *, axis, reverse):
        if groups(w)[axis] == BATCH:
            raise NotLazy("running sums along a batch axis are of a higher rank")
        marks = [i == axis for i in range(w.ndim)]

        def fn(factor, marks):
            return primitive.bind(factor, axis=marks.index(True), reverse=reverse)

        return on_factors(w, {axis}, fn, (marks, False))


_cumulative(lax.cumsum_p)
