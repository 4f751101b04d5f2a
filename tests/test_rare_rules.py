"""What a program rarely does to a weight: of a sum, and of an update alone."""

import jax.numpy as jnp
import pytest
from helpers import check, KINDS, lora, TRANSFORMS, x
from jax import lax


pytestmark = pytest.mark.usefixtures("x64")


def _gather(indices, offset_dims, sizes):
    numbers = lax.GatherDimensionNumbers(offset_dims, (), (0,))
    return lambda w: lax.gather(w, jnp.array(indices), numbers, sizes, mode="clip")


# name: (program of a weight, its shape)
PROGRAMS = {
    "gather, all of the axes": (_gather([[1], [0]], (1, 2), (5, 3)), (5, 3)),
    "gather, part of an axis without an index": (_gather([3], (0, 1), (1, 1)), (5, 3)),
    "select by a literal": (lambda w: lax.select_n(jnp.array(1), w, -2.0 * w), (5, 3)),
    "running sums of rows": (lambda w: jnp.cumsum(w, 0), (5, 3)),
    "running sums of columns": (lambda w: jnp.cumsum(w, 1), (5, 3)),
    "sum over a batch": (lambda w: w.sum(0), (2, 5, 3)),
    "mean over all but columns": (lambda w: w.mean((0, 1)), (2, 5, 3)),
    "rows written over": (
        lambda w: lax.dynamic_update_slice(w, jnp.ones((2, 3)), (1, 0)),
        (5, 3),
    ),
    "columns written over": (
        lambda w: lax.dynamic_update_slice(w, jnp.ones((5, 1)), (0, 1)),
        (5, 3),
    ),
    "a row added to": (lambda w: w.at[0].add(jnp.arange(3.0)), (5, 3)),
}


@pytest.mark.parametrize("transform", ["Q(f)", "vmap(Q f)", "Q(jit f)"])
@pytest.mark.parametrize("kind", ["lora", "low_rank"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_programs(program, kind, transform):
    fn, shape = PROGRAMS[program]
    f = lambda w, s: fn(w) * s
    transform = TRANSFORMS[transform]
    args = transform.arguments([KINDS[kind](shape), x()])
    check(transform.ours(f), transform.plain(f), args)


SUMS = {
    "columns": dict(cols=2),
    "rows, and a batch": dict(rows=1),
}


@pytest.mark.parametrize("other", SUMS)
def test_a_sum_of_arrays_whose_rows_are_others(other):
    w, v = (
        lora((6, 5, 8), rows=2, rank=1),
        lora((6, 5, 8), rank=1, seed=5, **SUMS[other]),
    )
    f = lambda w, v, x: jnp.einsum("abc,c->ab", w + v, x)
    check(TRANSFORMS["Q(f)"].ours(f), f, (w, v, x(8)))
