"""Layout of numbers of which there is one for each tile of an array.

Such are the scales of a quantised array, and those of a scaled one, whose tiles are of
length 1 along an axis where they vary, and all of it where they do not; and the bytes
that hold two codes each. They have the axes of the array, each a divisor of it. What
moves the elements of the array, moves them; an operation that would cut through a tile
is not for them. A scale is the same for all that is in its tile (`alike`), and serves a
part of it as well; a byte does not.
"""

import itertools
import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax

from .layout import blocks
from .lookup import slice_at
from .register import NotLazy


_CUT = "it cuts through a tile of numbers that share a scale"


def transpose(s, of, *, alike=True, permutation):
    del of, alike
    return s.transpose(permutation)


def squeeze(s, of, *, alike=True, dimensions):
    del of, alike
    return s.squeeze(dimensions)


def rev(s, of: Sequence[int], *, alike=True, dimensions):
    if not alike and any(of[i] != s.shape[i] for i in dimensions):
        raise NotLazy(_CUT)
    return lax.rev(s, dimensions)


def tile(s, of, *, alike=True, reps):
    del of
    return lax.tile(s, [1 if n == 1 and alike else m for n, m in zip(s.shape, reps)])


def broadcast_in_dim(
    s, of: Sequence[int], *, alike=True, shape, broadcast_dimensions, sharding
):
    del sharding
    sizes = [1] * len(shape) if alike else list(shape)
    for i, n, m in zip(broadcast_dimensions, of, s.shape):
        sizes[i] = m if alike or n != m else shape[i]
    return lax.broadcast_in_dim(s, sizes, broadcast_dimensions)


def slice_(s, of: Sequence[int], *, alike=True, start_indices, limit_indices, strides):
    strides = strides or [1] * s.ndim
    cuts = zip(of, s.shape, start_indices, limit_indices, strides)
    return lax.slice(s, *zip(*(_cut(alike, *cut) for cut in cuts))) if s.ndim else s


def _cut(
    alike: bool, n: int, m: int, start: int, stop: int, stride: int
) -> tuple[int, int, int]:
    """A cut out of `n` elements as one out of their `m` tiles."""
    if start >= stop:
        if not alike:
            raise NotLazy(_CUT)
        return 0, min(1, m), 1
    size = n // m
    if alike and start // size == (stop - 1) // size:  # All of it is in one tile.
        return start // size, start // size + 1, 1
    if size == 1:
        return start, stop, stride
    if stride == 1 and start % size == 0 and (stop % size == 0 or stop == n):
        return start // size, stop // size, 1
    raise NotLazy(_CUT)


def dynamic_slice(s, of: Sequence[int], *starts, alike=True, slice_sizes):
    if not starts:
        return s
    starts, sizes = list(starts), list(slice_sizes)
    for i, (n, m) in enumerate(zip(of, s.shape)):
        if sizes[i] == n or m == 1 and alike:
            starts[i], sizes[i] = jnp.zeros((), starts[i].dtype), m
        elif m != n:
            raise NotLazy(_CUT)
    return slice_at(s, starts, sizes)


def split(s, of: Sequence[int], *, alike=True, sizes, axis):
    out, start = [], 0
    for size in map(int, sizes):
        starts, limits = [0] * s.ndim, list(of)
        starts[axis], limits[axis] = start, start + size
        cut = dict(start_indices=starts, limit_indices=limits, strides=None)
        out.append(slice_(s, of, alike=alike, **cut))
        start += size
    return out


def unstack(s, of: Sequence[int], *, alike=True, axis):
    parts = split(s, of, alike=alike, sizes=(1,) * of[axis], axis=axis)
    return [part.squeeze(axis) for part in parts]


# What serves scaled arrays and quantised ones alike.
TILES = {
    lax.broadcast_in_dim_p: broadcast_in_dim,
    lax.dynamic_slice_p: dynamic_slice,
    lax.rev_p: rev,
    lax.slice_p: slice_,
    lax.split_p: split,
    lax.squeeze_p: squeeze,
    lax.tile_p: tile,
    lax.transpose_p: transpose,
    lax.unstack_p: unstack,
}


def reshape(s, of: Sequence[int], *, alike=True, new_sizes, dimensions, sharding):
    """A block of axes is `(tiles, numbers in one)` for each of them. What stands for it
    afterwards is cut out of these, and each new axis has to begin with tiles and end
    with what is within one."""
    del alike, sharding
    if dimensions is not None:
        s, of = s.transpose(dimensions), [of[i] for i in dimensions]
    if 0 in of:
        raise NotLazy("the array is empty")
    sizes = []
    for before, after in blocks(of, new_sizes):
        parts = [
            (k, varies)
            for i in before
            for k, varies in ((s.shape[i], True), (of[i] // s.shape[i], False))
        ]
        sizes += _tiles_of(parts, [new_sizes[j] for j in after])
    return s.reshape(sizes)


def _tiles_of(parts: list[tuple[int, bool]], axes: Sequence[int]) -> list[int]:
    """How many tiles each of some axes has, of which `parts` are the factors in order,
    each with whether the scale varies along it.

    **Raises:** `NotLazy` if an axis would have numbers of a tile in front of tiles.
    """
    parts = [part for part in parts if part[0] != 1]
    runs = itertools.groupby(parts, lambda part: part[1])
    parts = [(math.prod(n for n, _ in run), varies) for varies, run in runs][::-1]
    out = []
    for size in axes:
        tiles, within = 1, False
        while size > 1:
            n, varies = parts.pop()
            if n > size and n % size == 0:  # The rest of it is the next axis.
                parts.append((n // size, varies))
                n = size
            if size % n or varies and within:
                raise NotLazy(_CUT)
            size, within = size // n, within or not varies
            tiles *= n if varies else 1
        out.append(tiles)
    return out
