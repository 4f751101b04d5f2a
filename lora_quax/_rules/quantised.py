"""What is done to a quantised array: what moves its elements moves the codes, and a
product decodes them while it lasts.

All else, and what would cut through a tile, is done to the array that it stands for, as
Quax does by itself.
"""

import functools as ft
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import quax
from jax import lax
from jaxtyping import ArrayLike

from .._arrays.base import replace
from .._arrays.quantised import QuantisedArray
from .._compat import ragged_dot_general_p
from . import tiles
from .lookup import fills, look_up, result_labels
from .register import as_array, NotLazy


# Products.


@ft.partial(jax.jit, static_argnames=("primitive", "at", "params"))
def _product(primitive, at: int, operands, params):
    # The decoded weight is formed again in the backward pass, and not kept for it.
    @jax.checkpoint
    def run(operands):
        # Not before what it is multiplied with is there: weights that were all decoded
        # at the start would all be held.
        operands = lax.optimization_barrier(operands)
        w = operands[at].materialise()
        return primitive.bind(*operands[:at], w, *operands[at + 1 :], **dict(params))

    return run(operands)


def _decoded_within(primitive, at: int, *operands, **params):
    params = tuple(sorted(params.items()))
    operands = [x if isinstance(x, QuantisedArray) else as_array(x) for x in operands]
    return _product(primitive, at, operands, params)


def _with_kernel(primitive):
    @quax.register(primitive)
    def _(x: ArrayLike, w: QuantisedArray, *rest: ArrayLike, **params):
        return _decoded_within(primitive, 1, x, w, *rest, **params)


for _primitive in (lax.dot_general_p, lax.conv_general_dilated_p, ragged_dot_general_p):
    _with_kernel(_primitive)


@quax.register(lax.dot_general_p)
def _(w: QuantisedArray, x: ArrayLike, **params):
    return _decoded_within(lax.dot_general_p, 0, w, x, **params)


# Layout.


def _decoded(primitive, w: QuantisedArray, *rest, **params):
    return primitive.bind(w.materialise(), *rest, **params)


def _moves(primitive, move):
    @quax.register(primitive)
    def _(w: QuantisedArray, *rest: ArrayLike, **params):
        rest = tuple(map(as_array, rest))
        on_scale = lambda s: move(s, w.shape, *rest, **params)
        try:
            on_scale(w.scale)
        except NotLazy:
            return _decoded(primitive, w, *rest, **params)
        codes = _moved_codes(primitive, move, w, rest, params)
        if not isinstance(codes, list):
            return w.moved(codes, on_scale)
        parts = enumerate(codes)
        return [w.moved(x, lambda s, i=i: on_scale(s)[i]) for i, x in parts]


def _moved_codes(primitive, move, w: QuantisedArray, rest, params) -> Any:
    """The codes, and which axis is packed; a list of such pairs for several results."""
    bind = ft.partial(primitive.bind, **params)
    if w.packed is not None:
        try:
            codes = move(w.codes, w.shape, *rest, alike=False, **params)
            types = jax.eval_shape(bind, jax.ShapeDtypeStruct(w.shape, jnp.int8), *rest)
            return jax.tree.map(lambda x, of: (x, _packed_axis(x, of)), codes, types)
        except NotLazy:  # Two codes in a byte part.
            w = w.unpacked()
    return jax.tree.map(lambda x: (x, None), bind(w.codes, *rest))


def _packed_axis(codes, of) -> int:
    (axis,) = (i for i, n in enumerate(of.shape) if n != codes.shape[i])
    return axis - of.ndim


for _primitive, _move in {**tiles.TILES, lax.reshape_p: tiles.reshape}.items():
    _moves(_primitive, _move)


@quax.register(lax.gather_p)
def _(w: QuantisedArray, indices: ArrayLike, **params):
    indices = as_array(indices)
    try:
        return _gather(w, indices, **params)
    except NotLazy:
        return _decoded(lax.gather_p, w, indices, **params)


def _gather(
    w: QuantisedArray,
    indices,
    *,
    dimension_numbers,
    slice_sizes,
    fill_value,
    **params,
):
    """The slices of the codes, and with them those of the scales. Of whole matrices
    they are weights still; else what was looked up is an activation, and decoded."""
    numbers, n = dimension_numbers, w.ndim
    cut = {i for i in range(n) if slice_sizes[i] != w.shape[i]}
    if fills(params):  # A slice of all of an axis, too, may start out of bounds.
        cut |= {*map(int, numbers.start_index_map)}
    if any(w.tile[i] not in (1, w.shape[i]) for i in cut):
        raise NotLazy("slices along an axis with several tiles")
    if fills(params) and not np.isnan(fill_value):
        raise NotLazy("what is filled in is a number")
    if w.packed is not None and w.packed + n in cut:
        w = w.unpacked()
    shares = [x // y for x, y in zip(w.shape, w.codes.shape)]
    codes = lax.gather_p.bind(
        w.codes,
        indices,
        dimension_numbers=numbers,
        slice_sizes=tuple(k // share for k, share in zip(slice_sizes, shares)),
        fill_value=0,
        **params,
    )
    order = result_labels(n, indices, numbers)
    packed = None
    if w.packed is not None:
        packed = order.index(w.packed + n) - len(order)
    # Along these axes there is one number for all of the array.
    alone = [i for i in cut if w.scale.shape[i] == 1 != w.shape[i]]
    if fills(params) and alone:
        raise NotLazy("an index that is out of bounds there would find a scale")
    labels = [i for i in range(n) if i not in alone]
    sizes = {i: slice_sizes[i] if i in cut else w.scale.shape[i] for i in labels}

    def looked_up(s):
        fill = jnp.nan if fills(params) else 0
        s = s.squeeze(alone)
        s, found = look_up(s, labels, sizes, indices, numbers, fill=fill, **params)
        s = s.transpose([found.index(i) for i in order if i in found])
        return jnp.expand_dims(s, [k for k, i in enumerate(order) if i not in found])

    out = w.moved((codes, packed), looked_up)
    is_weight = sum(isinstance(i, int) for i in order) > 1
    return out if is_weight else out.materialise()


@quax.register(lax.convert_element_type_p)
def _(w: QuantisedArray, *, new_dtype, **params):
    if jnp.issubdtype(new_dtype, jnp.floating):
        new = jnp.dtype(new_dtype)
        return w if new == w.dtype else replace(w, casts=(*w.casts, new))
    params = dict(new_dtype=new_dtype, **params)
    return _decoded(lax.convert_element_type_p, w, **params)
