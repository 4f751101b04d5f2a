"""`conv_general_dilated`: a convolution, and a product at every point.

The update of a kernel `W[o, i, k] = Σ_r b[o, r] a[r, i, k]` is convolved with `a`, to
`rank` channels, and then taken to `o` by `b` at every point. Where rows and columns
have changed places, as in the gradient of a convolution, it is the inputs that stand
alone, and the pointwise map comes first. With feature groups each group meets its own
rows of the grouped kernel, and all of them the same columns; so merged equals unmerged.
"""

import math
from collections.abc import Hashable

import jax.numpy as jnp
from jax import lax
from jax.sharding import reshard

from .._arrays.check import wider
from .._arrays.low_rank import LowRankArray, preferred, scaled
from .._arrays.thin_dot import arrange, contract
from .layout import COL, groups, ROW
from .register import linear, NotLazy


@linear(lax.conv_general_dilated_p, operand=1, product=True)
def conv_general_dilated(
    x,
    w: LowRankArray,
    *,
    window_strides,
    padding,
    lhs_dilation,
    rhs_dilation,
    dimension_numbers,
    feature_group_count,
    batch_group_count,
    precision,
    preferred_element_type,
    **of_result,
):
    # `of_result` is `out_sharding`, which JAX has from 0.11 on.
    lhs_spec, (out_axis, in_axis, *window), out_spec = dimension_numbers
    if w.n_batch:
        raise NotLazy("the kernel has batch axes; call `quaxify` inside `vmap`")
    (point, point_labels), (kernel, labels) = _apart(w, out_axis, in_axis)
    dtype = wider(x.dtype, w.dtype)
    params = dict(precision=precision, preferred_element_type=preferred_element_type)
    x, kernel, point = (y.astype(dtype) for y in (x, kernel, point))
    spec = tuple(range(len(lhs_spec)))  # Of our kernels: (out, in, *window).

    def convolve(x, kernel, numbers, batch_groups, **of_result):
        return lax.conv_general_dilated(
            x,
            kernel,
            window_strides,
            padding,
            lhs_dilation,
            rhs_dilation,
            lax.ConvDimensionNumbers(*numbers),
            feature_group_count,
            batch_groups,
            precision,
            preferred(preferred_element_type, x),
            **of_result,
        )

    # Each group has its own rows, and all have the same columns.
    if out_axis in point_labels:
        down = arrange(kernel, labels, ["rank", in_axis, *window])
        down = jnp.tile(down, (feature_group_count, *(1,) * (len(spec) - 1)))
        z = convolve(x, down, (lhs_spec, spec, out_spec), 1)
        z = w.between(z, out_spec[1])
        up = arrange(point, point_labels, [out_axis, "rank"])
        z, up = scaled(z, up.astype(z.dtype), w.scaling)
        n_groups = feature_group_count * batch_group_count
        if n_groups > 1:
            up = up.reshape(n_groups, -1, w.rank)
        z, z_labels = _split(z, out_spec, feature_group_count, batch_group_count)
        out = _at_each_point(z, z_labels, up, out_spec, **params)
        out_sharding = of_result.get("out_sharding")
        return out if out_sharding is None else reshard(out, out_sharding)
    x, x_labels = _split(x, lhs_spec, feature_group_count, 1)
    down = arrange(point, point_labels, ["rank", in_axis])
    z = _at_each_point(x, x_labels, down, lhs_spec, **params)
    up = arrange(kernel, labels, [out_axis, "rank", *window])
    z, up = scaled(z, up.astype(z.dtype), w.scaling)
    numbers = lhs_spec, spec, out_spec
    return convolve(z, up, numbers, batch_group_count, **of_result)


def _apart(w: LowRankArray, out_axis: int, in_axis: int):
    """The factor that has the output axis, or the input axis, for itself, and the other
    one, each with the labels of its axes.

    An axis of length one is on either side as one likes. What else stands with rows or
    columns may be no more than that, and goes to the other factor: the gradient of a
    depthwise convolution has such an axis.
    """
    a_labels, b_labels, _ = w.labels
    b, a = (w.b, b_labels), (w.a, a_labels)
    for most in 0, w.ndim:  # How many go to the other side; none, if that will do.
        for (point, own), (kernel, others) in ((b, a), (a, b)):
            for axis in out_axis, in_axis:
                units = [i for i in own if i not in (axis, "rank")]
                if axis not in own or len(units) > most:
                    continue
                if any(w.shape[i] != 1 for i in units):
                    continue
                point = lax.squeeze(point, [own.index(i) for i in units])
                own = [i for i in own if i not in units]
                kernel = jnp.expand_dims(kernel, range(len(units)))
                return (point, own), (kernel, [*units, *others])
    rows = [i for i, group in enumerate(groups(w)) if group == ROW]
    cols = [i for i, group in enumerate(groups(w)) if group == COL]
    raise NotLazy(
        "a kernel must have its output axis, or its input axis, alone as rows or "
        f"as columns; here the rows are {rows}, the columns {cols}, and "
        f"dimension_numbers say out={out_axis}, in={in_axis}"
    )


def _split(x, spec, feature_groups: int, batch_groups: int):
    """`x` with an axis for its groups, if it has several, and the labels of its axes.

    `spec` says which of the axes are the batch, the features, and space.
    """
    labels: list[Hashable] = list(range(x.ndim))
    shape = list(x.shape)
    labels[spec[1]] = "feature"
    if (n_groups := feature_groups * batch_groups) > 1:
        axis = spec[0] if batch_groups > 1 else spec[1]
        labels.insert(axis, "group")
        shape[axis : axis + 1] = n_groups, shape[axis] // n_groups
    return x.reshape(shape), labels


def _at_each_point(x, labels, matrix, spec, *, precision, preferred_element_type):
    """The features at each point, by a matrix `(out, in)`, or by one for each group."""
    matrix_labels = ["group", "out", "feature"][-matrix.ndim :]
    operands = (x, labels), (matrix, matrix_labels)
    if spec[1] < len(spec) - 1:  # As the result is wanted: features before space.
        operands = operands[::-1]
        precision = precision[::-1] if isinstance(precision, tuple) else precision
    (u, u_labels), (v, v_labels) = operands
    out, out_labels = contract(
        u,
        u_labels,
        v,
        v_labels,
        keep=["group"],
        precision=precision,
        preferred_element_type=preferred(preferred_element_type, u),
    )
    # The new features stand where the old ones stood, as (group, out).
    grouped = ["group"] if "group" in labels else []
    order = [i for i in labels if i not in ("group", "feature")]
    order[spec[1] : spec[1]] = [*grouped, "out"]
    out = arrange(out, out_labels, order)
    features = slice(spec[1], spec[1] + len(grouped) + 1)
    shape = list(out.shape)
    shape[features] = [math.prod(shape[features])]
    return out.reshape(shape)
