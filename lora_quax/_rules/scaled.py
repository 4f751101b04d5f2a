"""What is done to a scaled array: `scale · base`, multiplied out as late as can be.

What moves elements moves those of the scale as it moves those of the base, and the
product element by element is as it was. Along an axis where the scale does not vary it
has length 1, and stays as it is. A product sums over some axes: a scale along these is
put on the other operand, and one along the rest on the result.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import quax
from jax import lax
from jax.extend.core.primitives import all_gather_p
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from .._arrays.base import (
    dense,
    densify_or_refuse,
    is_adapted,
    lower,
    materialise_or_refuse,
    replace,
)
from .._arrays.check import aval_of, wider
from .._arrays.lora import LoraArray
from .._arrays.low_rank import LowRankArray
from .._arrays.scaled import ScaledArray, times
from .._arrays.thin_dot import arrange, contract
from .._compat import ragged_dot_general_p
from .layout import blocks
from .lookup import fills, look_up, result_labels
from .register import NotLazy, register
from .scalar import refuse_params, scaled_low_rank
from .tiles import TILES


def varying(w: ScaledArray) -> list[int]:
    """The axes along which the scale varies."""
    return [i for i, n in enumerate(w.scale.shape) if n != 1]


def on(primitive, *, operand: int = 0):
    """Registers `rule(*operands, **params)`, of which number `operand` is scaled.

    The rule raises `NotLazy` if the scale has to be multiplied out.
    """

    def decorate(rule):
        def run(*args, **params):
            try:
                return rule(*args, **params)
            except NotLazy as why:
                return materialise_or_refuse(primitive, args, params, str(why))

        register(primitive, operand, ScaledArray, run)
        return rule

    return decorate


# Of each primitive that moves elements: what it does to numbers that have the axes of
# an array, each of them as long as there, or 1 where they do not vary.
MOVES: dict[Any, Callable] = {}


def moves(primitive):
    """Registers an operation that moves elements: `scale(s, shape, *operands,
    **params)` is the scale of the result, or a list of them, of an array of that shape.
    """

    def decorate(scale):
        MOVES[primitive] = scale

        @on(primitive)
        def _(w: ScaledArray, *rest, **params):
            new = scale(w.scale, w.shape, *rest, **params)
            out = quax.quaxify(primitive.bind)(w.base, *rest, **params)
            if not isinstance(new, list):
                return settle(replace(w, base=out, scale=new))
            parts = zip(out, new)
            return [settle(replace(w, base=x, scale=s)) for x, s in parts]

        return scale

    return decorate


def settle(w: ScaledArray):
    """A vector is an activation, and multiplied out: nothing is saved."""
    return w if w.ndim > 1 else quax.quaxify(times)(w.frozen_base(), w.scale)


for _primitive, _move in TILES.items():
    moves(_primitive)(_move)


@moves(lax.reshape_p)
def _reshape(s, shape, *, new_sizes, dimensions, sharding):
    """Where the scale varies at all along axes that become others, it becomes a number
    for each element of these: along an axis it varies, or it does not."""
    del sharding
    if dimensions is not None:
        s, shape = s.transpose(dimensions), [shape[i] for i in dimensions]
    if 0 in shape:
        raise NotLazy("the array is empty")
    old, new = list(s.shape), []
    for before, after in blocks(shape, new_sizes):
        # An axis where the scale does not vary may be merged with one where it does.
        if any(s.shape[i] != 1 for i in before):
            for i in before:
                old[i] = shape[i]
            new += [new_sizes[j] for j in after]
        else:
            new += [1 for _ in after]
    return jnp.broadcast_to(s, old).reshape(new)


@moves(all_gather_p)
def _all_gather(s, of, *, all_gather_dimension, tiled, **params):
    del of
    if not tiled:
        raise NotLazy("an untiled `all_gather` adds an axis")
    if s.shape[all_gather_dimension] == 1:
        return s
    at = dict(all_gather_dimension=all_gather_dimension, tiled=True)
    return all_gather_p.bind(s, **at, **params)


def _running(primitive):
    @moves(primitive)
    def _(s, of, *, axis, reverse):
        del of, reverse
        if s.shape[axis] != 1:
            raise NotLazy("running sums along an axis that is scaled")
        return s


_running(lax.cumsum_p)


@on(lax.gather_p)
def _(w: ScaledArray, indices, **params):
    """A lookup is an activation, and multiplied out; unless it is itself a weight
    still."""
    out = quax.quaxify(lax.gather_p.bind)(w.frozen_base(), indices, **params)
    s = gathered(w.scale, w.shape, indices, **params)
    # Of whole matrices some were chosen; else what is looked up is an activation. A row
    # alone is one, too, where its axis is still there.
    order = result_labels(w.ndim, indices, params["dimension_numbers"])
    sizes = params["slice_sizes"]
    long = [i for i in order if isinstance(i, int) and sizes[i] != 1]
    if is_adapted(out) or len(long) > 1:
        return replace(w, base=out, scale=s, stopped=True)
    return quax.quaxify(times)(out, s)


def gathered(
    s,
    of: Sequence[int],
    indices,
    *,
    dimension_numbers,
    slice_sizes,
    fill_value=None,
    **params,
):
    """The scale of a lookup, each of its axes as long as there, or 1. What is filled in
    is not scaled."""
    del fill_value
    labels = [i for i, n in enumerate(s.shape) if n != 1]
    if fills(params):  # So that an index that is out of bounds finds no scale.
        labels = sorted({*labels, *map(int, dimension_numbers.start_index_map)})
    s = jnp.broadcast_to(s, [n if i in labels else 1 for i, n in enumerate(of)])
    s = s.squeeze([i for i in range(len(of)) if i not in labels])
    if labels:
        sizes = dict(enumerate(slice_sizes))
        s, labels = look_up(
            s, labels, sizes, indices, dimension_numbers, fill=1, **params
        )
    return _spread(s, labels, result_labels(len(of), indices, dimension_numbers))


def _compact(w: ScaledArray):
    """The scale without the axes along which it does not vary."""
    return w.scale.reshape([w.shape[i] for i in varying(w)])


def _spread(s, labels: Sequence, out_labels: Sequence):
    """`s`, of axes `labels`, with axes of length 1 for the rest of `out_labels`."""
    s = arrange(s, labels, [i for i in out_labels if i in labels])
    return jnp.expand_dims(s, [k for k, i in enumerate(out_labels) if i not in labels])


def _placed(s, x):
    """`s`, of which each axis is as long as that of `x` or 1, sharded as `x` is, where
    a program has to say so."""
    sharding = aval_of(x).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return s
    spec = (None if n == 1 else entry for n, entry in zip(s.shape, sharding.spec))
    return jax.reshard(s, NamedSharding(sharding.mesh, PartitionSpec(*spec)))


@on(lax.reduce_sum_p)
def _(w: ScaledArray, *, axes, out_sharding=None):
    """Along a scaled axis a sum is a product with the scale, and an activation."""
    del out_sharding
    labels, kept = list(range(w.ndim)), [i for i in range(w.ndim) if i not in axes]
    out = w.frozen_base()
    inside = [i for i in varying(w) if i in axes]
    if inside:
        s, s_labels = _compact(w), varying(w)
        out, labels = contract(s, s_labels, out, labels, keep=kept, dot=lax.dot_general)
    rest = [k for k, i in enumerate(labels) if i in axes]
    out = quax.quaxify(lambda x: x.sum(rest))(out)
    labels = [i for i in labels if i in kept]
    out = arrange(out, labels, kept)
    if inside:
        return quax.quaxify(lax.convert_element_type)(out, w.dtype)
    scale = w.scale.squeeze(axes)
    if is_adapted(out):
        return settle(replace(w, base=out, scale=scale, stopped=True))
    return quax.quaxify(times)(out, scale)


# Scalars and casts.


@on(lax.neg_p)
def _(w: ScaledArray):
    return replace(w, scale=-w.scale)


@on(lax.convert_element_type_p)
def _(w: ScaledArray, *, new_dtype, **params):
    if not jnp.issubdtype(new_dtype, jnp.inexact):
        raise NotLazy(f"a cast to {jnp.dtype(new_dtype).name} is not linear")
    bind = quax.quaxify(lax.convert_element_type_p.bind)
    return replace(w, base=bind(w.base, new_dtype=new_dtype, **params))


def _scale_again(w: ScaledArray, x, apply) -> ScaledArray:
    shape = jnp.broadcast_shapes(w.shape, x.shape)
    x = x.reshape((1,) * (len(shape) - x.ndim) + x.shape)
    broadcast: Callable = quax.quaxify(jnp.broadcast_to)
    w = broadcast(w, shape)
    varies = [i for i, n in enumerate(x.shape) if n != 1]
    if len(varies) > 1 and x.size == math.prod(shape):
        raise NotLazy("a product element by element with a full array is no scale")
    if {*varies} <= {*varying(w)} or {*varies} >= {*varying(w)}:
        wide = wider(x.dtype, w.scale.dtype)
        return replace(w, scale=apply(w.scale.astype(wide), x.astype(wide)))
    # Along other axes: of two scales each can be put where it belongs.
    scale = apply(jnp.ones((), x.dtype), x)
    outer = dict(stop_gradient=False, stopped=False)
    return replace(w, base=w, scale=scale, **outer)


@on(lax.mul_p)
def _(w: ScaledArray, x, **params):
    refuse_params(params)
    return _scale_again(w, x, jnp.multiply)


@on(lax.mul_p, operand=1)
def _(x, w: ScaledArray, **params):
    refuse_params(params)
    return _scale_again(w, x, jnp.multiply)


@on(lax.div_p)
def _(w: ScaledArray, x, **params):
    refuse_params(params)
    return _scale_again(w, x, jnp.divide)


# Products.


def scaled_product(x, w: ScaledArray, axes, *, out_sharding, **params):
    """`x · w`, its axes labelled as in `contract`, with the labels of the result.

    Along contracted axes the scale is put on `x`, along others on the result. If it
    varies along both at once, as that of experts that are summed, the sum over these
    contracted axes is taken last.
    """
    x_labels, w_labels, keep = axes
    s, labels = _compact(w), [w_labels[i] for i in varying(w)]
    contracted = [i for i in x_labels if i in w_labels and i not in keep]
    late = [i for i in labels if i in contracted]
    if late and len(labels) == w.ndim:
        why = "the scale varies along every axis"
        base, s, late = densify_or_refuse("dot_general", w, [x, w], why), None, []
    else:
        base = w.frozen_base()
    before = late != [] and {*labels} <= {*x_labels}
    if before:
        late = []
        x = quax.quaxify(times)(x, _placed(_spread(s, labels, x_labels), x))
    out, out_labels = contract(
        x,
        x_labels,
        base,
        w_labels,
        keep=[*keep, *late],
        out_sharding=out_sharding,
        dot=lax.dot_general,
        **params,
    )
    if not before and s is not None:
        s = _placed(_spread(s, labels, out_labels), out)
        out = quax.quaxify(times)(out, s)
    if late:
        summed = [out_labels.index(i) for i in late]
        out = quax.quaxify(lambda y: y.sum(summed))(out)
        out_labels = [i for i in out_labels if i not in late]
    return out, out_labels


@on(lax.conv_general_dilated_p, operand=1)
def _(x, w: ScaledArray, *, dimension_numbers, feature_group_count, **params):
    lhs_spec, (out_axis, in_axis, *_), out_spec = dimension_numbers
    scaled, s = varying(w), w.scale.ravel()

    def on_features(y, spec, s):
        return times(y, s.reshape([-1 if i == spec[1] else 1 for i in range(y.ndim)]))

    if scaled == [in_axis]:  # Each group has all the inputs of the kernel.
        x = on_features(x, lhs_spec, jnp.tile(s, feature_group_count))
    out = quax.quaxify(lax.conv_general_dilated_p.bind)(
        x,
        w.frozen_base(),
        dimension_numbers=dimension_numbers,
        feature_group_count=feature_group_count,
        **params,
    )
    if scaled in ([], [out_axis]):
        return on_features(out, out_spec, s)
    if scaled != [in_axis]:
        raise NotLazy("the scale of a kernel varies along more than outputs, or inputs")
    return out


@on(ragged_dot_general_p, operand=1)
def _(x, w: ScaledArray, group_sizes, *, ragged_dot_dimension_numbers, **params):
    """A scale that differs from group to group is spread over their rows by a product
    of the same kind, with ones."""
    numbers = ragged_dot_dimension_numbers
    ((x_contract, w_contract), batch) = numbers.dot_dimension_numbers
    (row,), groups = numbers.lhs_ragged_dimensions, numbers.rhs_group_dimensions
    known = x.ndim == 2 and w.ndim == 3 and groups == (0,) and not any(batch)
    scaled = {*varying(w)} - {0}
    if not known or len(scaled) > 1:
        raise NotLazy("the scale varies along rows and columns of an expert")
    bind = quax.quaxify(ragged_dot_general_p.bind)

    def over_rows(axis):
        """The scale along an axis of the experts, for each row: `(rows, axis or 1)`."""
        s = w.scale if axis == 1 else w.scale.swapaxes(1, 2)
        s = jnp.broadcast_to(s, (w.shape[0], *s.shape[1:]))  # (groups, axis or 1, 1)
        ones = jnp.ones((x.shape[row], 1), s.dtype)
        return lax.ragged_dot(ones, s.swapaxes(1, 2), group_sizes)

    before = scaled <= {*w_contract}
    (contracted,) = w_contract
    if before:
        s = over_rows(contracted)
        x = times(x, s if row == 0 else s.T)
    out = bind(
        x,
        w.frozen_base(),
        group_sizes,
        ragged_dot_dimension_numbers=numbers,
        **params,
    )
    return out if before else times(out, over_rows(3 - contracted))


# Joins.


def into_parts(w: ScaledArray):
    """Of a scaled sum the sum of scaled parts; what has no parts as it is."""
    base = lower(w.frozen_base())
    if isinstance(base, ScaledArray):
        base = into_parts(base)
    try:
        if isinstance(base, LowRankArray):
            return scaled_low_rank(base, w.scale)
        if isinstance(base, LoraArray):
            delta = scaled_low_rank(lower(base.delta), w.scale)
            inner = replace(
                w, base=base.frozen_base(), stop_gradient=False, stopped=False
            )
            return replace(base, base=inner, delta=delta, stopped=True)
    except NotLazy:
        pass
    return w


def multiplied_out(w: ScaledArray, primitive, values):
    """The dense array, of a plain base. Of an adapted one it would hold the update, and
    needs leave."""
    why = "the scale of an update varies along its rows and its columns"
    if is_adapted(lower(w.base)):
        return densify_or_refuse(str(primitive), w, values, why)
    return dense(w)


def _among_others(primitive):
    """Registers an operation that puts numbers beside those of the array, or adds to
    them. These are not scaled, so that the scale is multiplied out, as in a join."""

    @on(primitive)
    def _(w: ScaledArray, *rest, **params):
        parts = into_parts(w)
        if isinstance(parts, ScaledArray):
            parts = multiplied_out(parts, primitive, [w])
        return quax.quaxify(primitive.bind)(parts, *rest, **params)


for _primitive in (lax.pad_p, lax.dynamic_update_slice_p, lax.scatter_add_p):
    _among_others(_primitive)
