"""Ranks add up only as far as the factors stay smaller than the weight."""

import jax
import jax.numpy as jnp
import pytest
import quax
from helpers import assert_close, densify, lora
from jax import lax

from lora_quax import MaterialiseError


pytestmark = pytest.mark.usefixtures("x64")

SHAPE, RANK = (24, 20), 2


def _doubled(w):
    for _ in range(8):
        w = w + w
    return w


def _rolled(w):
    for shift in (3, 5, 7):
        w = jnp.roll(jnp.roll(w, shift, 0), -shift, 1)
    return w


SHARED = {
    "w + w, eight times": _doubled,
    "w - 3 w": lambda w: w - 3 * w,
    "a column scale": lambda w: w + w * jnp.linspace(1, 2, 20),
    "a row scale": lambda w: w + w * jnp.linspace(1, 2, 24)[:, None],
    "rolls": _rolled,
    "rolls at once": lambda w: jnp.roll(w, (3, 5), (0, 1)),
    "halves exchanged": lambda w: jnp.concatenate([w[12:], w[:12]]),
    "columns exchanged": lambda w: jnp.concatenate([w[:, 8:], w[:, :8]], 1),
    "beside itself": lambda w: jnp.concatenate([w, w, w], 1),
    "above itself": lambda w: jnp.concatenate([w, 2 * w, w]),
    "tiled": lambda w: jnp.tile(w, (2, 3)),
    "a plain array between": lambda w: jnp.concatenate([w, jnp.ones((3, 20)), w]),
    "selected": lambda w: lax.select_n(jnp.array(1), w, 2 * w),
}


@pytest.mark.parametrize("nest", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("program", SHARED)
def test_what_shares_a_factor_keeps_its_rank(program, nest):
    fn, w = SHARED[program], lora(SHAPE, rank=RANK)
    out = nest(quax.quaxify(fn))(w)
    assert out.rank == RANK
    assert_close(out, fn(densify(w)))


def _concatenated(*ws):
    return jnp.concatenate(ws)


def _summed(*ws):
    return sum(ws[1:], ws[0])


@pytest.mark.parametrize("program", [_concatenated, _summed])
def test_what_would_outgrow_the_weight_follows_the_policy(program):
    few = [lora(SHAPE, rank=RANK, seed=i) for i in range(2)]
    out = quax.quaxify(program)(*few)
    assert out.rank == 2 * RANK
    assert_close(out, program(*densify(few)))

    many = [lora(SHAPE, rank=RANK, seed=i) for i in range(16)]
    with pytest.raises(MaterialiseError, match="takes a rank at which the factors"):
        quax.quaxify(program)(*many)
    many = [lora(SHAPE, rank=RANK, seed=i, allow_materialise=True) for i in range(16)]
    assert_close(quax.quaxify(program)(*many), program(*densify(many)))
