"""`conv_general_dilated`: two convolutions, of which one is pointwise.

The update of a kernel `W[o, i, k] = Σ_r b[o, r] a[r, i, k]` is convolved with `a`, to
`rank` channels, and then taken to `o` by `b` at every point. Where rows and columns
have changed places, as in the gradient of a convolution, it is the inputs that stand
alone, and the pointwise map comes first. With feature groups each group meets its own
rows of the grouped kernel, and all of them the same columns; so merged equals unmerged.
"""

import jax.numpy as jnp
from jax import lax

from .._array import LowRankArray, scale
from .._product import arrange
from ._layout import COL, groups, ROW
from ._register import linear, NotLazy


@linear(lax.conv_general_dilated_p, operand=1)
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
    alone = [out_axis], [in_axis]
    rows = [i for i, group in enumerate(groups(w)) if group == ROW]
    cols = [i for i, group in enumerate(groups(w)) if group == COL]
    a_labels, b_labels, _ = w.labels
    if rows in alone:
        (point, point_labels), (kernel, labels) = (w.b, b_labels), (w.a, a_labels)
    elif cols in alone:
        (point, point_labels), (kernel, labels) = (w.a, a_labels), (w.b, b_labels)
    else:
        raise NotLazy(
            "a kernel must have its output axis, or its input axis, alone as rows or "
            f"as columns; here the rows are {rows}, the columns {cols}, and "
            f"dimension_numbers say out={out_axis}, in={in_axis}"
        )
    dtype = jnp.promote_types(x.dtype, w.dtype)
    if preferred_element_type is not None:
        preferred_element_type = jnp.promote_types(dtype, preferred_element_type)

    def convolve(x, kernel, numbers, batch_groups, **params):
        return lax.conv_general_dilated(
            x.astype(dtype),
            kernel.astype(dtype),
            dimension_numbers=lax.ConvDimensionNumbers(*numbers),
            feature_group_count=feature_group_count,
            batch_group_count=batch_groups,
            precision=precision,
            preferred_element_type=preferred_element_type,
            **params,
        )

    whole = dict(
        window_strides=window_strides,
        padding=padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
    )
    pointwise = dict(window_strides=[1] * len(window), padding=[(0, 0)] * len(window))
    spec = tuple(range(len(lhs_spec)))  # Of our kernels: (out, in, *window).
    repeats = (feature_group_count, *(1,) * (len(spec) - 1))

    def point_kernel(order):
        matrix = arrange(point, point_labels, order)
        return matrix.reshape(*matrix.shape, *(1,) * len(window))

    if out_axis in point_labels:
        down = arrange(kernel, labels, ["rank", in_axis, *window])
        down = jnp.tile(down, repeats)
        z = convolve(x, down, (lhs_spec, spec, out_spec), 1, **whole)
        up = scale(point_kernel([out_axis, "rank"]), w.scaling)
        numbers = (out_spec, spec, out_spec)
        return convolve(z, up, numbers, batch_group_count, **pointwise, **of_result)
    down = jnp.tile(point_kernel(["rank", in_axis]), repeats)
    z = convolve(x, down, (lhs_spec, spec, lhs_spec), 1, **pointwise)
    up = scale(arrange(kernel, labels, [out_axis, "rank", *window]), w.scaling)
    numbers = (lhs_spec, spec, out_spec)
    return convolve(z, up, numbers, batch_group_count, **whole, **of_result)
