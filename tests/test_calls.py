"""Calls, branches and loops: what they ask of an array, and of its leaves."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import pytest
import quax
from helpers import assert_close, check, densify, lora, normal, TRANSFORMS, x
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxtyping import Array

from lora_quax import FullArray, LoraArray, MaterialiseError


pytestmark = pytest.mark.usefixtures("x64")


def full(*shape):
    return FullArray(jr.normal(jr.key(3), shape))


class Quantised(quax.ArrayValue):
    """A base of two leaves, one of them a scalar."""

    array: Array
    scale: Array

    def aval(self):
        return jax.typeof(self.array)

    def materialise(self):
        return self.array * self.scale


@quax.register(lax.dot_general_p)
def _(u: Array, w: Quantised, **params):
    return lax.dot_general_p.bind(u, w.array, **params) * w.scale.sum()


@quax.register(lax.dot_general_p)
def _(w: Quantised, u: Array, **params):
    return lax.dot_general_p.bind(w.array, u, **params) * w.scale.sum()


class Codebook(Quantised):
    """One with a leaf that has axes of its own."""


def on(base, **kwargs) -> LoraArray:
    kwargs = {"rank": 2, "alpha": 3.0, "init_b": normal, **kwargs}
    return LoraArray(base, key=jr.key(1), **kwargs)


def quantised(*shape, kind=Quantised, scale: Any = 0.7):
    return kind(jr.normal(jr.key(0), shape), jnp.asarray(scale))


# Arrays that are scanned over.


def _scanned(w, x):
    return lax.scan(lambda c, layer: (c + layer @ x, layer @ x), jnp.zeros(3), w)


_stack = lambda: jr.normal(jr.key(0), (4, 3, 5))
SCANNED = {
    "batch in rows": lambda: on(on(_stack()), rows=2),
    "rows in batch": lambda: on(on(_stack(), rows=2)),
    "a base with a scalar leaf": lambda: on(quantised(4, 3, 5)),
    "a base with a leaf that does not vary": lambda: on(
        quantised(4, 3, 5, scale=jnp.full((1, 1, 1), 0.7))
    ),
}


@pytest.mark.parametrize("nesting", ["Q(f)", "Q(jit f)"])
@pytest.mark.parametrize("kind", SCANNED)
def test_scan_over(kind, nesting):
    w = SCANNED[kind]()
    check(TRANSFORMS[nesting].ours(_scanned), _scanned, (w, x(5)))


# Arrays of different kinds that become one.


def _cond(w, x):
    return lax.cond(x[0] > 0, lambda: w[0], lambda: w[1]) @ x


def _other_cond(w, x):
    return lax.cond(x[0] < 0, lambda: w[0], lambda: w[1]) @ x


def _exchanged(w, x):
    step = lambda c, _: ((c[1], c[0]), c[0] @ x)
    return lax.scan(step, w, None, length=3)[1]


def _replaced(w, x):
    return lax.scan(lambda c, _: (w[1], c @ x), w[0], None, length=3)[1]


def _in_float32(w):
    return jtu.tree_map(lambda leaf: leaf.astype(jnp.float32), w)


def _mixed(w):
    delta = _in_float32(w.delta)
    return eqx.tree_at(lambda w: (w.delta.a, w.delta.b), w, (delta.a, delta.b))


PAIRS = {
    "an update and a full array": lambda: (lora((9, 9)), full(9, 9)),
    "ranks": lambda: (lora((9, 9)), lora((9, 9), rank=3, seed=9)),
    "dtypes of factors": lambda: (lora((9, 9)), _mixed(lora((9, 9), seed=9))),
    "an update and a plain array": lambda: (lora((9, 9)), jnp.ones((9, 9))),
    "with a base and without": lambda: (lora((9, 9)), lora((9, 9), seed=9).delta),
    "rows": lambda: (
        lora((8, 2, 9), rows=2),
        lora((8, 2, 9), cols=2, rank=3, seed=9),
    ),
}


@pytest.mark.parametrize("program", [_cond, _other_cond, _exchanged, _replaced])
@pytest.mark.parametrize("pair", PAIRS)
def test_become_one_kind(pair, program):
    tolerance = 1e-5 if pair == "dtypes of factors" else 1e-9
    args = (PAIRS[pair](), x(9))
    check(quax.quaxify(program), program, args, rtol=tolerance, atol=tolerance)


def test_a_carry_that_grows_is_refused():
    f = lambda w, x: lax.scan(lambda c, _: (c + w, c @ x), w, None, length=3)[1]
    with pytest.raises(MaterialiseError, match="a carry must be of one kind"):
        quax.quaxify(f)(lora((40, 40)), x(40))
    check(quax.quaxify(f), f, (lora((40, 40), allow_materialise=True), x(40)))


def test_optimization_barrier_of_both_kinds():
    def f(w, x):
        u, v, x = lax.optimization_barrier((*w, x))
        return u @ x + v @ x

    check(quax.quaxify(f), f, ((lora((3, 3)), full(3, 3)), x(3)))


# References.


def _fori_loop(body, w, x):
    return lax.fori_loop(0, 3, lambda _, c: body(c), x)


def _scan(body, w, x):
    return lax.scan(lambda c, _: (body(c), None), x, None, length=3)[0]


def _while_loop(body, w, x):
    step = lambda c: (c[0] + 1, body(c[1]))
    return lax.while_loop(lambda c: c[0] < 3, step, (0, x))[1]


def _cond_with_reference(body, w, x):
    return lax.cond(x[0] > 0, lambda: body(x), lambda: body(2 * x))


def _jit(body, w, x):
    return jax.jit(body)(x)


@pytest.mark.parametrize("nesting", ["Q(f)", "Q(jit f)", "jit(Q f)"])
@pytest.mark.parametrize(
    "loop", [_fori_loop, _scan, _while_loop, _cond_with_reference, _jit]
)
def test_a_weight_and_a_reference(loop, nesting):
    def f(w, x):
        total = jax.new_ref(jnp.zeros(3))

        def body(c):
            total[...] += w @ c
            return jnp.tanh(w @ c)

        return loop(body, w, x), total[...]

    ours = {
        "Q(f)": quax.quaxify(f),
        "Q(jit f)": quax.quaxify(jax.jit(f)),
        "jit(Q f)": eqx.filter_jit(quax.quaxify(f)),
    }
    w = lora((3, 3))
    assert_close(ours[nesting](w, x(3)), f(densify(w), x(3)))


def test_no_program_poisons_the_next():
    """A tracer of a reference has the type of one of an array, by which Quax remembers
    that it has found no rule."""

    def with_reference(w, x):
        total = jax.new_ref(jnp.zeros(3))
        jax.jit(lambda x: total.__setitem__(..., total[...] + w @ x))(x)
        return total[...]

    innocent = lambda w, x: jax.jit(lambda y, w, x: y * (w @ x))(2 * x, w, x)
    for program in (with_reference, innocent):
        w = lora((3, 3))
        out = eqx.filter_jit(quax.quaxify(program))(w, x(3))
        assert_close(out, program(densify(w), x(3)))


# Shardings.


def _mesh():
    return jax.make_mesh((2,), ("i",), axis_types=(AxisType.Auto,))


def test_shardings_of_an_inner_jit():
    mesh = _mesh()
    by = lambda *spec: NamedSharding(mesh, P(*spec))
    f = jax.jit(
        lambda w, x: (w @ x, -w),
        in_shardings=(by("i", None), None),
        out_shardings=(by("i"), by(None, "i")),
    )
    w = lora((4, 6))
    y, v = quax.quaxify(f)(w, x(6))
    assert_close((y, v), f(densify(w), x(6)))
    assert y.sharding.spec == P("i")
    specs = [leaf.sharding.spec for leaf in (v.base, v.a, v.b)]
    assert specs == [P(None, "i"), P(None, "i"), P(None, None)]


def test_donation_of_an_inner_jit():
    w = lora((4, 6))
    expected = -densify(w)
    assert_close(quax.quaxify(jax.jit(lambda w: -w, donate_argnums=0))(w), expected)
    assert all(leaf.is_deleted() for leaf in jtu.tree_leaves(w))


def _map(f, in_specs, out_specs, **kwargs):
    specs = dict(in_specs=in_specs, out_specs=out_specs)
    return jax.shard_map(f, mesh=_mesh(), **specs, **kwargs)


SPECS = [P("i", None), P(None, "i"), P(None, None)]


@pytest.mark.parametrize("spec", SPECS)
def test_shard_map_of_a_base_of_several_leaves(spec):
    columns = spec[1]

    def local(w, x):
        y = x @ w.T
        return lax.psum(y, "i") if columns else y

    f = _map(local, (spec, P(None, columns)), P(None, spec[0]))
    check(quax.quaxify(f), f, (on(quantised(4, 6)), x(8, 6)))


def test_a_leaf_that_cannot_be_partitioned_is_named():
    w = on(quantised(4, 6, kind=Codebook, scale=jnp.ones(16)))
    f = _map(lambda w: (w.T @ jnp.ones(2)).sum()[None], P("i", None), P("i"))
    with pytest.raises(TypeError, match=r"A Codebook.*leaf of shape \(16,\)"):
        quax.quaxify(f)(w)


@pytest.mark.parametrize("make", [lora, full])
@pytest.mark.parametrize("spec", SPECS)
def test_a_weight_returned_from_shard_map(spec, make):
    w = make((4, 6)) if make is lora else make(4, 6)
    f = lambda w, x: _map(lambda w: -w, spec, spec)(w) @ x
    check(quax.quaxify(f), f, (w, x(6)))


@pytest.mark.parametrize("check_vma", [True, False])
def test_a_factor_that_differs_between_devices_is_not_returned(check_vma):
    spec = P(None, "i")
    local = lambda w: w * lax.axis_index("i")
    f = lambda w, x: _map(local, spec, spec, check_vma=check_vma)(w) @ x
    with pytest.raises(MaterialiseError, match="nothing says that a factor"):
        quax.quaxify(f)(lora((4, 6)), x(6))
    check(quax.quaxify(f), f, (lora((4, 6), allow_materialise=True), x(6)))


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("spec", SPECS[:2])
def test_psum_of_a_weight(spec, check_vma):
    def local(w, x):
        return lax.psum(w, "i") @ x

    f = _map(local, (spec, P()), P(), check_vma=check_vma)
    w = lora((4, 6))
    n = 6 if spec[0] else 3
    assert_close(quax.quaxify(f)(w, x(n)), f(densify(w), x(n)))


@pytest.mark.parametrize("pairs", [[(0, 1), (1, 0)], [(0, 1)]])
@pytest.mark.parametrize("spec", SPECS[:2])
def test_ppermute_of_a_weight(spec, pairs):
    f = lambda w, x: _map(lambda w: lax.ppermute(w, "i", pairs), spec, spec)(w) @ x
    check(quax.quaxify(f), f, (lora((4, 6)), x(6)))
