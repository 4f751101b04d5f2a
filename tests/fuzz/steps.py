"""Steps that leave a weight a weight: layouts, scales and casts, joins, control flow.

Each returns an expression of `w`.
"""

import math

from hypothesis import reject

from .drawing import Draft


# Layouts.


def transpose(d: Draft):
    """Mostly rows among rows, columns among columns, or these as blocks."""
    w = d.arguments["w"]
    axes = list(range(len(d.shape)))
    n = len(axes) - w.rows - w.cols
    if n < 0 or d.integer(0, 3) == 0:
        return f"jnp.transpose(w, {tuple(d.order(axes))})"
    rows, cols = d.order(axes[n : n + w.rows]), d.order(axes[n + w.rows :])
    blocks = [*rows, *cols] if d.flag() else [*cols, *rows]
    return f"jnp.transpose(w, {(*axes[:n], *blocks)})"


def split_axis(d: Draft):
    axis = d.one([i for i, n in enumerate(d.shape) if n in (4, 6) and len(d.shape) < 4])
    n = d.one([2, d.shape[axis] // 2])  # pyright: ignore
    shape = (*d.shape[:axis], n, d.shape[axis] // n, *d.shape[axis + 1 :])
    return f"jnp.reshape(w, {shape})"


def merge_axes(d: Draft):
    w = d.arguments["w"]
    n = len(d.shape) - w.rows - w.cols
    inside = [i for i in range(len(d.shape) - 1) if i + 1 not in (n, n + w.rows)]
    i = d.one(range(len(d.shape) - 1) if d.integer(0, 4) == 0 else inside)
    shape = (*d.shape[:i], d.shape[i] * d.shape[i + 1], *d.shape[i + 2 :])
    if len(shape) < 2:
        reject()
    return f"jnp.reshape(w, {shape})"


def squeeze(d: Draft):
    axis = d.one([i for i, n in enumerate(d.shape) if n == 1 and len(d.shape) > 2])
    return f"jnp.squeeze(w, {axis})"


def expand_dims(d: Draft):
    if len(d.shape) > 3:
        reject()
    return f"jnp.expand_dims(w, {d.integer(0, len(d.shape))})"


def broadcast(d: Draft):
    ones = [i for i, n in enumerate(d.shape) if n == 1]
    if ones and d.flag():
        axis = d.one(ones)
        shape = (*d.shape[:axis], 2, *d.shape[axis + 1 :])
    elif len(d.shape) < 4:
        shape = (2, *d.shape)
    else:
        reject()
    return f"jnp.broadcast_to(w, {shape})"


def _bounds(d: Draft, n: int):
    start = d.integer(0, n - 1)
    stop = d.integer(start + 1, n)
    return start, stop, d.integer(1, 2)


def slice_(d: Draft):
    starts, stops, strides = zip(*(_bounds(d, n) for n in d.shape))
    return f"lax.slice(w, {starts}, {stops}, {strides})"


def index(d: Draft):
    """Slices as Python writes them."""
    parts = []
    for n in d.shape:
        start, stop, step = _bounds(d, n)
        parts.append(d.one([":", "::-1", f"{start}:{stop}", f"{start}:{stop}:{step}"]))
    return f"w[{', '.join(parts)}]"


def dynamic_slice(d: Draft):
    sizes = tuple(n if d.flag() else d.integer(1, n) for n in d.shape)
    starts = tuple(d.integer(-2 * n, n) for n in d.shape)  # Some out of bounds.
    return f"lax.dynamic_slice(w, {starts}, {sizes})"


def rev(d: Draft):
    return f"lax.rev(w, {tuple(d.some(range(len(d.shape)), 1))})"


def roll(d: Draft):
    return f"jnp.roll(w, {d.integer(-2, 2)}, {d.axis(d.shape)})"


def tile(d: Draft):
    reps = tuple(d.integer(1, 2) for _ in d.shape)
    return f"jnp.tile(w, {reps})"


def repeat(d: Draft):
    return f"jnp.repeat(w, 2, {d.axis(d.shape)})"


def pad(d: Draft):
    config = []
    for n in d.shape:
        low, high, inner = d.integer(-1, 2), d.integer(-1, 2), d.integer(0, 1)
        if n + low + high + inner * (n - 1) < 1:
            low = high = 0
        config.append((low, high, inner))
    value = d.one([0.0, 2.0])
    return f"lax.pad(w, jnp.asarray({value}, w.dtype), {config})"


def split(d: Draft):
    axis = d.one([i for i, n in enumerate(d.shape) if n > 1])
    first = d.integer(1, d.shape[axis] - 1)
    return f"jnp.split(w, [{first}], {axis})[{d.integer(0, 1)}]"


def unstack(d: Draft):
    if len(d.shape) < 3:
        reject()
    axis = d.axis(d.shape)
    which = d.integer(0, d.shape[axis] - 1)
    return f"jnp.unstack(w, axis={axis})[{which}]"


def layer(d: Draft):
    """One of a stack, by a static or by a dynamic index."""
    if len(d.shape) < 3:
        reject()
    i = d.integer(0, d.shape[0] - 1)
    return d.one([f"w[{i}]", f"w[jnp.int32({i})]", f"w[{i - d.shape[0]}]"])


# Scales and casts.


def scale(d: Draft):
    return d.one(["2.0 * w", "-w", "w / 4.0", "w * jnp.asarray(0.5, w.dtype)"])


def traced_scale(d: Draft):
    x = d.input(())
    return d.one([f"w * {x}", f"{x} * w", f"w / (2.0 + {x} * {x})"])


def scale_along(d: Draft):
    """A scale for each index of some axes: of rows, or columns, or batch."""
    axes = d.some(range(len(d.shape)), 1, len(d.shape) - 1)
    shape = tuple(n if i in axes else 1 for i, n in enumerate(d.shape))
    x = d.input(shape)
    return d.one([f"w * {x}", f"{x} * w"])


def cast(d: Draft):
    dtype = d.one(["float32", "float64", "bfloat16", "float16"])
    d.casts.append(dtype)
    return f"w.astype(jnp.{dtype})"


def there_and_back(d: Draft):
    return "w.astype(jnp.float64).astype(w.dtype)"


def untouched(d: Draft):
    return d.one(
        [
            "jnp.copy(w)",
            "checkpoint_name(w, 'w')",
            "lax.optimization_barrier(w)",
            "lax.stop_gradient(w)",
            "jax.device_put(w, jax.devices()[0])",
        ]
    )


# Joins.


def _partner(d: Draft) -> str:
    """Something of the shape of `w`: a weight, or an input."""
    kind = d.one(["itself", "weight", "input"])
    if kind == "weight":
        return d.second_weight()
    if kind == "input":
        return d.input(d.shape)
    return d.one(["w", "-w", "lax.rev(w, (0,))"])


def add(d: Draft):
    v = _partner(d)
    return d.one([f"w + {v}", f"w - {v}", f"{v} - w"])


def add_scalar(d: Draft):
    return d.one(["w + 1.0", "2.0 - w"])


def concatenate(d: Draft):
    parts = d.order(["w", _partner(d)])
    return f"jnp.concatenate([{', '.join(parts)}], {d.axis(d.shape)})"


def stack(d: Draft):
    if len(d.shape) > 3:
        reject()
    parts = d.order(["w", _partner(d)])
    return f"jnp.stack([{', '.join(parts)}], {d.integer(0, len(d.shape))})"


def select(d: Draft):
    x, v = d.input(()), _partner(d)
    return d.one(
        [
            f"jnp.where({x} > 0, w, {v})",
            f"lax.select_n({x} > 0, {v}, w)",
            f"lax.select_n(jnp.int32({d.integer(0, 2)}), w, {v}, -w)",
        ]
    )


# Control flow from a weight to a weight.


def call(d: Draft):
    inner = d.one(["0.5 * w", "lax.rev(w, (0,))", "jnp.swapaxes(w, 0, -1)", "-w"])
    return d.one(
        [
            f"jax.jit(lambda w: {inner})(w)",
            f"jax.checkpoint(lambda w: {inner})(w)",
            f"jax.vmap(lambda w: {inner})(w)" if len(d.shape) > 2 else f"{inner}",
            f"quax.quaxify(lambda w: {inner})(w)",
        ]
    )


def branch(d: Draft):
    x = d.input(())
    other = d.one(["2.0 * w", "-w", "w", "lax.rev(w, (0,))", "jnp.ones_like(w)"])
    return d.one(
        [
            f"lax.cond({x} > 0, lambda w: w, lambda w: {other}, w)",
            f"lax.cond({x} > 0, lambda: {other}, lambda: w)",
            f"lax.switch(jnp.int32({d.integer(-1, 3)}), "
            f"[lambda w: w, lambda w: {other}, lambda w: -w], w)",
        ]
    )


def loop(d: Draft):
    body = d.one(["0.5 * w", "-w", "lax.rev(w, (0,))", "w"])
    return d.one(
        [
            f"lax.fori_loop(0, 2, lambda i, w: {body}, w)",
            f"lax.scan(lambda w, _: ({body}, None), w, None, length=2)[0]",
        ]
    )


def loop_over(d: Draft):
    """A slice of the first axis in each step. A row is an activation, and dense."""
    d.looked_up = max(d.looked_up, math.prod(d.shape))
    body = d.one(["0.5 * w", "-w", "lax.rev(w, (0,))", "w"])
    return f"lax.scan(lambda c, w: (c, {body}), 0.0, w)[1]"


LAYOUTS = (
    transpose,
    split_axis,
    merge_axes,
    squeeze,
    expand_dims,
    broadcast,
    slice_,
    index,
    dynamic_slice,
    rev,
    roll,
    tile,
    repeat,
    pad,
    split,
    unstack,
    layer,
)
SCALES = (scale, traced_scale, scale_along, cast, there_and_back, untouched)
JOINS = (add, add_scalar, concatenate, stack, select)
FLOW = (call, branch, loop, loop_over)


def step(d: Draft):
    table = d.one([LAYOUTS, LAYOUTS, LAYOUTS, SCALES, JOINS, FLOW])
    before = d.shape
    d.let("w", d.one(table)(d))
    # What has lost an axis may be one row of each matrix, and dense; so is what becomes
    # of a row, which may be larger again.
    lost = len(d.shape) < len(before) and math.prod(d.shape) < math.prod(before)
    if lost or d.looked_up:
        d.looked_up = max(d.looked_up, math.prod(d.shape))
