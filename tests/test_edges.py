"""Edges: indices out of bounds, unknown sizes, no compiler, factors exchanged."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quax
from helpers import (
    assert_close,
    check,
    dense,
    densify,
    drawn,
    KINDS,
    lora,
    TRANSFORMS,
    value_and_grads,
    x,
)
from jax import lax

from lora_quax import (
    AbstractDelta,
    labels,
    LoraArray,
    LowRankArray,
    MaterialiseError,
    merge,
    partition,
    ScaledArray,
)


pytestmark = pytest.mark.usefixtures("x64")


# What is below zero once it has been counted from the end is out of bounds.

BOUNDS = {
    "a slice": lambda w, i: lax.dynamic_slice(w, (i, i), (2, 3)),
    "rows": lambda w, i: lax.dynamic_slice_in_dim(w, i, 2),
    "a row": lambda w, i: w[i],
    "a row, clipped": lambda w, i: jnp.take(w, i, axis=0, mode="clip"),
    "a column": lambda w, i: w[:, i],
    "rows by a list": lambda w, i: jnp.take(w, jnp.stack([i, i]), 0, mode="clip"),
    "rows, filled": lambda w, i: _filled(w, jnp.stack([i, 1 - i]), 0),
    "columns, filled": lambda w, i: _filled(w, jnp.stack([i, 1 - i]), 1),
}


def _filled(w, indices, axis):
    """With a number, that is not scaled."""
    return jnp.take(w, indices, axis, mode="fill", fill_value=2.0)


_KINDS = ["lora", "low_rank", "nested", "ia3", "scaled rows", "dora"]


@pytest.mark.parametrize("kind", _KINDS)
def test_indices_out_of_bounds(kind):
    def fn(w, i, s):
        return [program(w, i) * s for program in BOUNDS.values()]

    w, ours, plain = KINDS[kind]((5, 4)), quax.quaxify(fn), lambda *a: fn(*densify(a))
    for i in [-9, -6, -5, -1, 4, 9]:
        args = [w, jnp.int32(i), x()]
        assert_close(value_and_grads(ours, args), value_and_grads(plain, args))


@pytest.mark.parametrize("kind", _KINDS)
def test_a_lookup_along_one_axis_of_a_part_of_another(kind):
    """Of a square, so that the slices of a factor are as large as it is: by no index
    of its own XLA would have its gradient wrong."""
    numbers = lax.GatherDimensionNumbers((0,), (1,), (0,))
    ids = jnp.array([[1], [2]])
    fn = lambda w, s: lax.gather(w, ids, numbers, (1, 1), mode="clip") * s
    check(quax.quaxify(fn), fn, [KINDS[kind]((2, 2)), x()])


@pytest.mark.parametrize("i", [-9, -5, 9])
def test_an_update_out_of_bounds(i):
    fn = lambda w, i, x: lax.dynamic_update_slice(w, jnp.ones((1, 4)), (i, i)) @ x
    check(quax.quaxify(fn), fn, [lora((5, 4)), jnp.int32(i), x(4)])


@pytest.mark.parametrize("i", [-9, -4, -1])
def test_a_layer_out_of_bounds(i):
    fn = lambda w, i, x: lax.dynamic_index_in_dim(w, i, 0, False) @ x
    args = [lora((3, 5, 4)), jnp.full(2, i), x(2, 4)]
    for nesting in ("Q(vmap f)", "vmap(Q f)"):
        transform = TRANSFORMS[nesting]
        check(transform.ours(fn), transform.plain(fn), args)


# Without a compiler, and with sizes that are not known.


def test_nothing_compiled():
    args = lora((5, 4)), x(3, 4)
    f = lambda w, x: (x @ w.T).sum()
    with jax.disable_jit():
        value, grads = eqx.filter_value_and_grad(lambda args: quax.quaxify(f)(*args))(
            args
        )
    assert_close(value, f(*densify(args)))
    expected = eqx.filter_grad(lambda args: f(*densify(args)))(args)
    assert_close(grads, expected)


def test_sizes_that_are_symbols():
    w = lora((5, 4))
    f = lambda w, x: jnp.tanh(x @ w.T)
    leaves, treedef = jax.tree.flatten(w)
    run = lambda leaves, x: quax.quaxify(f)(jax.tree.unflatten(treedef, leaves), x)
    (n,) = jax.export.symbolic_shape("n")
    batch = jax.ShapeDtypeStruct((n, 4), float)
    exported = jax.export.export(jax.jit(run))(leaves, batch)
    assert_close(exported.call(leaves, x(3, 4)), f(dense(w), x(3, 4)))


# Factors that do not fit what is said of them, and updates that are none.


def test_factors_of_another_rank():
    w = lora((5, 4))
    other = eqx.tree_at(lambda w: (w.a, w.b), w, (drawn((3, 4), 1), drawn((5, 3), 2)))
    with pytest.raises(ValueError, match="of rank 2 has factors a of shape .3, 4."):
        quax.quaxify(lambda w: w[1:4, :3] @ x(3))(other)


class _Dense(AbstractDelta):
    w: LowRankArray

    def lower(self) -> Any:
        return self.w.dense()


def test_an_update_that_lowers_to_an_array():
    w = lora((5, 4))
    with pytest.raises(
        TypeError, match="`lower` of a _Dense must give a `LowRankArray"
    ):
        LoraArray.from_parts(w.base, _Dense(w.delta))


@pytest.mark.parametrize(
    "w",
    [
        KINDS["nested"]((5, 4)),
        ScaledArray(lora((5, 4)), jnp.ones((5, 1))),
        LoraArray.from_parts(
            ScaledArray(jnp.ones((5, 4)), jnp.ones((5, 1))), lora((5, 4)).delta
        ),
    ],
    ids=["nested", "scaled", "on scaled"],
)
def test_parts_of_it_are_printed(w):
    for tree in (w, partition(w)[0], labels(w), jax.tree.map(jnp.shape, w)):
        assert type(w).__name__ in repr(tree)


# Scales around updates.


def _scaled(shape, scale, **options):
    return ScaledArray(lora(shape, **options), drawn(scale, 9) + 2.0)


SCALED = {
    "summed over a batch": ((2, 8, 8), (1, 8, 1), lambda w, x: w.sum(0) @ x),
    "mean over a batch": ((2, 8, 8), (1, 1, 8), lambda w, x: w.mean(0) @ x),
    "rows scanned over": (
        (5, 8),
        (1, 8),
        lambda w, x: lax.scan(lambda c, r: (c + r @ x, 2 * r), 0.0, w),
    ),
    "mapped": ((5, 8), (5, 8), lambda w, x: lax.map(lambda r: r @ x, w)),
}


@pytest.mark.parametrize("program", SCALED)
def test_scaled_arrays(program):
    shape, scale, fn = SCALED[program]
    check(quax.quaxify(fn), fn, [_scaled(shape, scale, rank=1), x(8)])


JOINS = {
    "a sum": lambda w: w + jnp.ones((5, 4)),
    "a concatenation": lambda w: jnp.concatenate([w, jnp.ones((5, 4))]),
    "a pad": lambda w: jnp.pad(w, 1),
}


@pytest.mark.parametrize("join", JOINS)
def test_a_scaled_update_is_multiplied_out_by_leave(join):
    fn, w = JOINS[join], _scaled((5, 4), (5, 4))
    with pytest.raises(MaterialiseError, match="the scale of an update varies along"):
        quax.quaxify(fn)(w)
    allowed = ScaledArray(w.base, w.scale, allow_materialise=True)
    np.testing.assert_allclose(quax.quaxify(fn)(allowed), fn(dense(w)))


# A gradient inside `quaxify`, of a loop that is checkpointed.


@pytest.mark.parametrize("kind", ["lora", "low_rank", "ia3"])
def test_a_gradient_inside_of_a_checkpointed_loop(kind):
    def f(w, x, s):
        loop = lambda s: lax.scan(lambda c, r: (c + r @ x, None), s, 2.0 * w)[0]
        return jnp.tanh(jax.checkpoint(loop)(s))

    transform = TRANSFORMS["Q(grad f)"]
    args = [KINDS[kind]((5, 4)), x(4), x()]
    check(transform.ours(f), transform.plain(f), args)


# A program that promotes nothing by itself.


def _of_two_types(shape, **options):
    w = lora(shape, dtype=jnp.float32, **options)
    return eqx.tree_at(lambda w: w.base, w, w.base.astype(jnp.bfloat16))


STRICT = {
    "product": ((5, 4), {}, (4,), lambda w, x: w @ x),
    "lookup": ((5, 4), {}, (4,), lambda w, x: w[jnp.array([1, 3])] * x),
    "sum": ((5, 4), {}, (4,), lambda w, x: (w + 2.0 * w) @ x),
    "scan": ((5, 4), {}, (4,), lambda w, x: lax.map(lambda row: row @ x, w)),
    "convolution": (
        (5, 4, 2),
        dict(cols=2),
        (1, 4, 6),
        lambda w, x: lax.conv_general_dilated(x, w, (1,), "SAME"),
    ),
    "scaled": (
        (5, 4),
        {},
        (4,),
        lambda w, x: (w * jnp.full((5, 1), 3.0, w.dtype)) @ x,
    ),
}


@pytest.mark.parametrize("program", STRICT)
def test_strict_promotion(program):
    shape, options, other, fn = STRICT[program]
    args = _of_two_types(shape, **options), x(*other).astype(jnp.bfloat16)
    run = lambda: [quax.quaxify(fn)(*args), fn(merge(args[0]), args[1])]
    expected = run()
    with jax.numpy_dtype_promotion("strict"):
        for got, known in zip(run(), expected):
            assert got.dtype == known.dtype and jnp.array_equal(got, known)
