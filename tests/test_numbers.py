"""Numbers that are not harmless: infinities, 16 bits, complex ones, zero updates."""

import operator

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import quax
from helpers import assert_close, densify, lora, x
from jax import lax

from lora_quax import LoraArray, MaterialiseError, merge
from lora_quax._arrays.base import replace


pytestmark = pytest.mark.usefixtures("x64")


# Gradients through `merge`.


def test_merge_trains_a_fresh_adapter():
    linear = eqx.nn.Linear(3, 5, key=jr.key(0))
    weight = LoraArray(linear.weight, rank=2, key=jr.key(1))
    linear = eqx.tree_at(lambda l: l.weight, linear, weight)

    def loss(model):
        return (model(jnp.arange(3.0)) ** 2).sum()

    merged = eqx.filter_grad(lambda m: loss(merge(m)))(linear)
    lazy = eqx.filter_grad(lambda m: loss(quax.quaxify(m)))(linear)
    assert jnp.any(merged.weight.b != 0)
    assert_close(merged, lazy)
    assert not jnp.any(merged.weight.base)


# What is not finite stays where it is.


def _spoilt(which, at, shape=(5, 3), **options):
    w = lora(shape, **options)
    factor = getattr(w.delta, which).at[at].set(jnp.inf)
    return replace(w, delta=replace(w.delta, **{which: factor}))


ONES = jnp.ones(3)
JOINS = {
    "where": lambda w, v: jnp.where(False, w, v) @ ONES,
    "where, of one kind": lambda w, v: jnp.where(True, 2 * v, w) @ ONES,
    "select_n": lambda w, v: lax.select_n(jnp.array(1), w, v) @ ONES,
    "cond": lambda w, v: lax.cond(v[0, 0] < 99, lambda: v, lambda: w) @ ONES,
    "concatenate rows": lambda w, v: (jnp.concatenate([w, v]) @ ONES)[5:],
    "concatenate twice": lambda w, v: (jnp.concatenate([w, v, w]) @ ONES)[5:10],
    "concatenate columns": lambda w, v: (jnp.ones(5) @ jnp.concatenate([v, w, v], 1))[
        jnp.array([0, 1, 2, 6, 7, 8])
    ],
    "stack": lambda w, v: jnp.einsum("eoi,i->eo", jnp.stack([w, v]), ONES)[1],
    "pad": lambda w, v: (jnp.pad(w, ((1, 2), (0, 0))) @ ONES)[jnp.array([0, 6, 7])],
    "pad columns": lambda w, v: (jnp.ones(5) @ jnp.pad(w, ((0, 0), (1, 1))))[
        jnp.array([0, 4])
    ],
    "take, out of bounds": lambda w, v: jnp.take(
        w, jnp.array([9]), 0, mode="fill", fill_value=2.0
    ),
    "write over": lambda w, v: (
        lax.dynamic_update_slice(w, jnp.ones((2, 3)), (1, 0)) @ ONES
    )[1:3],
}


@pytest.mark.parametrize("spoil", [("a", (0, 0)), ("b", (1, 0))], ids=["a", "b"])
@pytest.mark.parametrize("join", JOINS)
def test_a_spoilt_adapter_stays_out_of_its_neighbours(join, spoil):
    fn, v = JOINS[join], x(5, 3)
    out = quax.quaxify(fn)(_spoilt(*spoil), v)
    # In the dense program nothing of it is left there either.
    expected = fn(densify(lora((5, 3))), v)
    assert_close(out, expected)


@pytest.mark.parametrize("spoil", [("a", (0, 0)), ("b", (1, 0))], ids=["a", "b"])
def test_a_spoilt_adapter_stays_out_where_a_batch_becomes_rows(spoil):
    v = x(20, 30)
    fn = lambda w: (jnp.stack([w, v]).reshape(40, 30) @ jnp.ones(30))[20:]
    which, at = spoil
    out = quax.quaxify(fn)(_spoilt(which, at, (20, 30), rank=1))
    assert_close(out, v @ jnp.ones(30))


def test_a_spoilt_adapter_is_seen():
    out = quax.quaxify(lambda w: jnp.concatenate([w, x(5, 3)]) @ ONES)(
        _spoilt("a", (0, 0))
    )
    assert not jnp.isfinite(out[:5]).any()


# Scalars and the scaling in factors of 16 bits.

NARROW = [jnp.float16, jnp.bfloat16]


def _narrow(dtype, shape=(5, 3), **options):
    """A float32 weight with factors of 16 bits; and the same numbers in float64."""
    w = lora(shape, dtype=jnp.float32, **options)
    to = lambda tree, dtype: jax.tree.map(lambda leaf: leaf.astype(dtype), tree)
    w = replace(w, delta=to(w.delta, dtype))
    return w, to(w, jnp.float64)


SCALARS = {
    "large": lambda w: w * 1e6,
    "fine": lambda w: w * 1.001,
    "divided": lambda w: w / 1e6,
    "rows": lambda w: w * jnp.full((5, 1), 1e6, w.dtype),
    "columns": lambda w: w * jnp.full((1, 3), 1.001, w.dtype),
}


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("scalar", SCALARS)
def test_scalars_are_those_of_the_weight(scalar, dtype):
    w, wide = _narrow(dtype)
    fn = SCALARS[scalar]
    u = x(3).astype(jnp.float32)
    out = quax.quaxify(lambda w: fn(w) @ u)(w)
    expected = fn(densify(wide)) @ u.astype(float)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(
        out, expected, rtol=1e-5, atol=1e-5 * abs(expected).max()
    )


SCALED = {
    "w @ x": ((5, 3), {}, (3,), operator.matmul),
    "w[ids]": ((5, 3), {}, (), lambda w, u: w[jnp.array([1, 4])] * u),
    "merge": ((5, 3), {}, (), lambda w, u: w.astype(float) * u),
    "conv": (
        (4, 3, 2),
        dict(cols=2),
        (2, 3, 5),
        lambda w, u: lax.conv_general_dilated(u, w, (1,), "SAME"),
    ),
    "conv, inputs first": (
        (3, 4, 2),
        dict(cols=2),
        (2, 3, 5),
        lambda w, u: lax.conv_general_dilated(
            u, w, (1,), "SAME", dimension_numbers=("NCH", "IOH", "NCH")
        ),
    ),
    "experts": (
        (2, 3, 4),
        {},
        (5, 3),
        lambda w, u: lax.ragged_dot(u, w, jnp.array([2, 3])),
    ),
    "w + v": ((5, 3), {}, (3,), lambda w, u: (w + w * 2) @ u),
}


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("program", SCALED)
def test_the_scaling_overflows_in_no_factor(program, dtype):
    shape, options, other, fn = SCALED[program]
    w, wide = _narrow(dtype, shape, alpha=2e5, **options)
    u = x(*other).astype(jnp.float32)
    run = (lambda w, u: fn(merge(w), u)) if program == "merge" else quax.quaxify(fn)
    out = np.asarray(run(w, u), float)
    expected = np.asarray(fn(densify(wide), u.astype(float)))
    np.testing.assert_allclose(
        out, expected, rtol=2e-5, atol=2e-5 * abs(expected).max()
    )


@pytest.mark.parametrize("dtype", NARROW)
def test_a_scan_over_rows_of_an_update_has_its_type(dtype):
    delta = _narrow(dtype)[0].delta
    run = quax.quaxify(lambda w: lax.map(lambda row: 2 * row, w))
    assert run(delta).dtype == dtype
    expected = 2 * np.asarray(densify(delta), float)
    np.testing.assert_allclose(np.asarray(run(delta), float), expected, rtol=1e-2)


# Complex numbers.


def test_the_real_part_is_not_that_of_the_factors():
    fn = lambda w: (w * 1j * 1j).astype(float)
    with pytest.raises(MaterialiseError, match="the real part of a product"):
        quax.quaxify(fn)(lora((5, 3)))
    allowed = lora((5, 3), allow_materialise=True)
    with pytest.warns(DeprecationWarning, match="complex to real"):
        assert_close(quax.quaxify(fn)(allowed), fn(densify(allowed)))
