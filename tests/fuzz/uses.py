"""What a weight is used for: products, convolutions, lookups, sums.

Each returns an expression of `w` that is no weight any more, but an activation.
"""

import math
from typing import Any

from hypothesis import reject

from .drawing import Draft


# Products.


def dot_general(d: Draft):
    """Any axes contracted, in any order; of the others, the first may be batch."""
    axes = list(range(len(d.shape)))
    batch = axes[: d.integer(1, 1)] if len(axes) > 2 and d.flag() else []
    contract = d.some([i for i in axes if i not in batch], 0 if batch else 1, 2)
    if not batch and not contract:
        reject()
    free = [d.integer(1, 3) for _ in range(d.integer(0, 2))]
    # The axes of x: those of the weight by their number, and free ones.
    labels = d.order([*batch, *contract, *(("free", i) for i in range(len(free)))])
    x = d.input([free[i[1]] if isinstance(i, tuple) else d.shape[i] for i in labels])
    of_x = lambda axes: tuple(labels.index(i) for i in axes)
    w_numbers = tuple(contract), tuple(batch)
    x_numbers = of_x(contract), of_x(batch)
    if d.flag():
        numbers = tuple(zip(w_numbers, x_numbers))
        return f"lax.dot_general(w, {x}, {numbers})"
    numbers = tuple(zip(x_numbers, w_numbers))
    return f"lax.dot_general({x}, w, {numbers})"


def matmul(d: Draft):
    n = d.shape[-1]
    if d.flag():
        return f"{d.input((3, n))} @ jnp.swapaxes(w, -1, -2)"
    return f"w @ {d.input((n, 2) if d.flag() else (n,))}"


def left_matmul(d: Draft):
    return f"{d.input((2, d.shape[-2]))} @ w"


def einsum(d: Draft):
    """Each example of a batch, or each expert, with its own input."""
    letters = "ijkl"[: len(d.shape)]
    kept = d.some(letters, 1, len(letters) - 1)
    shape = [n for n, i in zip(d.shape, letters) if i in kept]
    names = "".join(i for i in letters if i in kept)
    x = d.input((2, *shape))
    rest = [i for i in letters if i not in kept] + d.some(kept[:1])
    out = "".join(d.order(["b", *rest]))
    return f"jnp.einsum('{letters},b{names}->{out}', w, {x})"


def two_weights(d: Draft):
    """A product of two weights, and then with an input."""
    v = d.second_weight()
    x = d.input((d.shape[-2],))
    return f"(w @ jnp.swapaxes({v}, -1, -2)) @ {x}"


def ragged_dot(d: Draft):
    if len(d.shape) != 3:
        reject()
    sizes = [d.integer(0, 2) for _ in range(d.shape[0])]
    x = d.input((max(1, sum(sizes)), d.shape[1]))
    return f"lax.ragged_dot({x}.astype(w.dtype), w, jnp.array({sizes}))"


# Convolutions.


def conv(d: Draft):
    if len(d.shape) not in (3, 4):
        reject()
    n = len(d.shape) - 2
    out_axis, in_axis, *window = range(n + 2)
    if d.integer(0, 3) == 0:
        out_axis, in_axis, *window = d.order(range(n + 2))
    kernel = (out_axis, in_axis, *window)
    groups = d.one([1, 1, *(g for g in (2, 3) if d.shape[out_axis] % g == 0)])
    batch_groups = 1
    if groups > 1 and d.flag():
        groups, batch_groups = 1, groups
    space = [d.integer(3, 5) for _ in window]
    sizes = [2 * batch_groups, d.shape[in_axis] * groups, *space]
    x_order = d.order(range(n + 2)) if d.flag() else list(range(n + 2))
    x_shape = [0] * (n + 2)
    for size, axis in zip(sizes, x_order):
        x_shape[axis] = size
    out_order = d.order(range(n + 2)) if d.flag() else list(range(n + 2))
    numbers = tuple(x_order), kernel, tuple(out_order)
    padding = [(d.integer(0, 2), d.integer(1, 2)) for _ in window]
    wide = [
        size + low + high >= d.shape[axis] * 2
        for size, (low, high), axis in zip(space, padding, window)
    ]
    # XLA of JAX 0.12 aborts on some gradients with groups of the batch and strides or
    # gaps; of dense kernels as well.
    most = 1 if batch_groups > 1 else 2
    options: dict[str, Any] = dict(
        window_strides=tuple(d.integer(1, most) for _ in window),
        padding=padding,
        lhs_dilation=tuple(d.integer(1, most) for _ in window),
        rhs_dilation=tuple(1 + (ok and most > 1 and d.flag()) for ok in wide),
        feature_group_count=groups,
        batch_group_count=batch_groups,
    )
    steps = ("window_strides", "lhs_dilation", "rhs_dilation")
    d.is_dilated |= max(n for name in steps for n in options[name]) > 1
    x = d.input(x_shape)
    written = ", ".join(f"{name}={value}" for name, value in options.items())
    # The weight may have been cast, and of a convolution both are of one dtype.
    return (
        f"lax.conv_general_dilated({x}.astype(w.dtype), w, {written}, "
        f"dimension_numbers=lax.ConvDimensionNumbers{numbers})"
    )


# Lookups. What they give is an activation, or a weight still: whole matrices of a
# stack, for one. Contracted with an input, it is a number in either case.


def _ids(d: Draft, n: int, low: int = 0, count: int = 2) -> str:
    ids = [d.integer(low, n - 1) for _ in range(d.integer(1, count))]
    return f"jnp.array({ids})"


def _shape(d: Draft, expression: str) -> tuple[int, ...]:
    d.let("y", expression)
    d.lines.pop()
    return d.types.pop("y").shape


def _looked_up(d: Draft, expression: str) -> str:
    shape = _shape(d, expression)
    d.looked_up = max(d.looked_up, math.prod(shape))
    if d.integer(0, 3) == 0:
        return f"{expression} * {d.input(())}"
    return f"jnp.tensordot({expression}, {d.input(shape)}, {len(shape)})"


def rows(d: Draft):
    return _looked_up(d, f"w[{_ids(d, d.shape[0], -1)}]")


def one_row(d: Draft):
    """By a static index, or by a dynamic one, which may be out of bounds."""
    n = d.shape[0]
    i = d.one([f"{d.integer(-n, n - 1)}", f"jnp.int32({d.integer(-2 * n, 2 * n)})"])
    return _looked_up(d, f"w[{i}]")


def columns(d: Draft):
    return _looked_up(d, f"w[..., {_ids(d, d.shape[-1])}]")


def elements(d: Draft):
    count = d.integer(1, 3)
    ids = lambda n: [d.integer(0, n - 1) for _ in range(count)]
    return _looked_up(
        d, f"w[jnp.array({ids(d.shape[0])}), jnp.array({ids(d.shape[1])})]"
    )


def take(d: Draft):
    axis = d.axis(d.shape)
    n = d.shape[axis]
    mode = d.one(["clip", "wrap", "fill"])
    ids = _ids(d, n + 2, -1 if mode != "fill" else 0)
    return _looked_up(d, f"jnp.nan_to_num(jnp.take(w, {ids}, {axis}, mode='{mode}'))")


def get(d: Draft):
    ids = _ids(d, d.shape[0] + 1)
    fill = d.one([0.0, 2.0])
    return _looked_up(d, f"w.at[{ids}].get(mode='fill', fill_value={fill})")


def promised(d: Draft):
    n = d.shape[0]
    ids = sorted(set(d.some(range(n), 1)))
    return _looked_up(
        d,
        f"w.at[jnp.array({ids})].get(mode='promise_in_bounds', "
        "unique_indices=True, indices_are_sorted=True)",
    )


def take_along_axis(d: Draft):
    axis = d.axis(d.shape)
    ids = [d.integer(0, d.shape[axis] - 1) for _ in range(2)]
    shape = [2 if i == axis else 1 for i in range(len(d.shape))]
    return _looked_up(
        d, f"jnp.take_along_axis(w, jnp.array({ids}).reshape({shape}), {axis})"
    )


def gather(d: Draft):
    """Any axes indexed, any of those with slices of one dropped, any sizes."""
    ndim = len(d.shape)
    indexed = d.some(range(ndim), 1, 2)
    sizes = tuple(d.integer(1, n) for n in d.shape)
    dropped = tuple(i for i in range(ndim) if sizes[i] == 1 and d.flag())
    count = d.integer(1, 2)
    starts = [[d.integer(0, d.shape[i]) for i in indexed] for _ in range(count)]
    kept = ndim - len(dropped)
    at = d.integer(0, kept)
    offset = tuple(i for i in range(kept + 1) if i != at)
    mode = d.one(["clip", "fill"])
    numbers = f"lax.GatherDimensionNumbers({offset}, {dropped}, {tuple(indexed)})"
    return _looked_up(
        d,
        f"lax.gather(w, jnp.array({starts}), {numbers}, {sizes}, mode='{mode}', "
        f"fill_value={d.one([0.0, 2.0])})",
    )


def batched_gather(d: Draft):
    """For each index of the first axis, one of the second."""
    n, m, *rest = d.shape
    ids = [[d.integer(0, m - 1)] for _ in range(n)]
    offset = tuple(range(1, 1 + len(rest)))
    numbers = (
        f"lax.GatherDimensionNumbers({offset}, (1,), (1,), "
        "operand_batching_dims=(0,), start_indices_batching_dims=(0,))"
    )
    sizes = (1, 1, *rest)
    return _looked_up(d, f"lax.gather(w, jnp.array({ids}), {numbers}, {sizes})")


def by_input(d: Draft):
    """An index that is computed, and so traced."""
    return _looked_up(d, f"w[jnp.argmax({d.input((d.shape[0],))})]")


# Sums, and the weight itself.


def reduce_sum(d: Draft):
    axes = tuple(d.some(range(len(d.shape)), 1))
    return _looked_up(d, f"w.{d.one(['sum', 'mean'])}({axes})")


def scan_over(d: Draft):
    """Slices of the first axis, one in each step. Rows are activations, and dense."""
    d.looked_up = max(d.looked_up, math.prod(d.shape))
    return f"lax.scan(lambda c, r: (c + r.sum(), 2 * r), {d.input(())}, w)[0]"


def itself(d: Draft):
    """The weight is what is returned, where the program is simple enough."""
    if d.flag():
        return f"jnp.tensordot(w, {d.input(d.shape)}, {len(d.shape)})"
    d.returns_weight = True
    return f"w * {d.input(())}"


PRODUCTS = (dot_general, matmul, left_matmul, einsum, two_weights, ragged_dot)
LOOKUPS = (
    rows,
    one_row,
    columns,
    elements,
    take,
    get,
    promised,
    take_along_axis,
    gather,
    batched_gather,
    by_input,
)
SUMS = (reduce_sum, scan_over, itself)


def use(d: Draft, name: str, kernel: bool):
    if len(d.shape) < 2:
        table = (itself, one_row, reduce_sum)
    elif kernel and len(d.shape) in (3, 4):
        table = (conv,)
    else:
        table = d.one([PRODUCTS, PRODUCTS, LOOKUPS, SUMS])
    d.let(name, d.one(table)(d))
