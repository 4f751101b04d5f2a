"""The primitive means what `lax.dot_general` means, under every transformation."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import quax
from helpers import adapted, assert_close, densify, equations, lora
from jax import lax
from jax.experimental.jet import jet

import lora_quax
from benchmarks._compiled import products
from lora_quax._arrays.thin_dot import contract, thin_dot_general
from lora_quax._compat import HOLDS_BATCHES


pytestmark = pytest.mark.usefixtures("x64")


# name: (shape of u, shape of v, dimension numbers)
CASES = {
    "x aᵀ": ((6, 5, 4), (2, 4), (((2,), (1,)), ((), ()))),
    "g b": ((6, 5), (5, 2), (((1,), (0,)), ((), ()))),
    "zᵀ g": ((6, 2), (6, 5), (((0,), (0,)), ((), ()))),
    "gᵀ z, across": ((6, 5), (6, 2), (((0,), (0,)), ((), ()))),
    "a xᵀ, across": ((2, 4), (6, 4), (((1,), (1,)), ((), ()))),
    "batched": ((3, 6, 4), (3, 4, 2), (((2,), (1,)), ((0,), (0,)))),
    "batched behind": ((6, 4, 3), (2, 3, 4), (((1,), (2,)), ((2,), (1,)))),
    "two contracted": ((6, 5, 4), (4, 5, 2), (((2, 1), (0, 1)), ((), ()))),
    "outer": ((6, 2), (3,), (((), ()), ((), ()))),
}


def _operands(case):
    u, v, numbers = CASES[case]
    u, v = jr.normal(jr.key(0), u), jr.normal(jr.key(1), v)
    return u, v, numbers


def _cubes(f):
    return lambda u, v: (f(u, v) ** 3).sum()


TRANSFORMS = {
    "value": lambda f: f,
    "jit": jax.jit,
    "grad": lambda f: jax.grad(_cubes(f), (0, 1)),
    "hessian": lambda f: jax.hessian(_cubes(f), (0, 1)),
    "jacrev of grad": lambda f: jax.jacrev(jax.grad(_cubes(f)), 1),
    "jacfwd of jacfwd": lambda f: jax.jacfwd(jax.jacfwd(_cubes(f), 1), 0),
    "jacfwd of jacrev": lambda f: jax.jacfwd(jax.jacrev(f, 1), 0),
    "linearize": lambda f: lambda u, v: jax.linearize(f, u, v)[1](v.sum() * u, v),
    "checkpoint": lambda f: jax.grad(_cubes(jax.checkpoint(f)), (0, 1)),
    "jet": lambda f: lambda u, v: jet(f, (u, v), ([v.sum() * u, u], [u.sum() * v, v])),
    "scan": lambda f: (
        lambda u, v: lax.scan(lambda c, _: (0.5 * c, f(c, v)), u, None, 3)
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("case", CASES)
def test_transforms(case, transform):
    u, v, numbers = _operands(case)
    transform = TRANSFORMS[transform]
    ours = transform(lambda u, v: thin_dot_general(u, v, numbers))
    plain = transform(lambda u, v: lax.dot_general(u, v, numbers))
    assert_close(jax.jit(ours)(u, v), jax.jit(plain)(u, v))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_batching_along_every_axis(case):
    u, v, numbers = _operands(case)
    axes = itertools.product([None, *range(u.ndim + 1)], [None, *range(v.ndim + 1)])
    for u_axis, v_axis in axes:
        if u_axis is v_axis is None:
            continue
        us = u if u_axis is None else jnp.stack([u, 2 * u, -u], u_axis)
        vs = v if v_axis is None else jnp.stack([v, -v, 3 * v], v_axis)
        in_axes = (u_axis, v_axis)
        ours = jax.vmap(lambda u, v: thin_dot_general(u, v, numbers), in_axes)
        plain = jax.vmap(lambda u, v: lax.dot_general(u, v, numbers), in_axes)
        assert_close(ours(us, vs), plain(us, vs))


# Compiled: XLA simplifies products after they are lowered.

RANK, WIDTH, TOKENS = 3, 8, 32


def _square(x):
    return jnp.sum(x**2)


def _linear(w, x):
    return _square(jax.vmap(lambda x: w @ x)(x))


def _recurrent(w, x):
    step = lambda h, x: (jnp.tanh(w @ h + x), None)
    return _square(lax.scan(jax.vmap(step), x, jnp.stack([x, -x]))[0])


def _tied(w, x):
    x = x + w[jnp.arange(TOKENS) % WIDTH]
    return jnp.sum(jax.nn.log_softmax(x @ w.T)[:, 0])


def _convolution(w, x):
    x = x.reshape(2, -1, WIDTH).swapaxes(1, 2)  # (batch, features, length)
    return _square(lax.conv_general_dilated(x, w, (1,), "SAME"))


def _ensemble(w, x):
    return _square(jnp.einsum("eoi,bi->ebo", w, x))


# A mixture of experts is not among them: XLA's own expansion of `ragged_dot`, which
# copies the tokens for every expert, chooses the order there.
# name: (a program of a weight and of tokens, the shape of the weight, its columns)
PROGRAMS = {
    "linear": (_linear, (WIDTH, WIDTH), 1),
    "recurrent": (_recurrent, (WIDTH, WIDTH), 1),
    "tied embedding": (_tied, (WIDTH, WIDTH), 1),
    "convolution": (_convolution, (WIDTH, WIDTH, 5), 2),
}
if HOLDS_BATCHES:
    PROGRAMS["ensemble"] = (_ensemble, (2, WIDTH, WIDTH), 1)


def thin_products(program, w, x):
    """Those that the rank takes part in, in the compiled value and gradient."""
    params, base = eqx.partition(w, lora_quax.trainable(w))
    f = lambda params, base, x: program(eqx.combine(params, base), x)
    compiled = jax.jit(jax.value_and_grad(f, (0, 2))).lower(params, base, x).compile()
    return [p for p in products(compiled) if p.thinnest == RANK]


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_wide_operand_is_read_across(name):
    program, shape, cols = PROGRAMS[name]
    w = lora(shape, rank=RANK, cols=cols, dtype=jnp.float32)
    x = jnp.ones((TOKENS, WIDTH), jnp.float32)
    found = thin_products(quax.quaxify(program), w, x)
    assert found
    assert not [p for p in found if p.reads_across]


def test_autodiff_of_a_dot_general_reads_across():
    """As the gradient of `b` does: what the test above is able to see."""
    x, a, b = (
        jnp.ones((TOKENS, WIDTH)),
        jnp.ones((RANK, WIDTH)),
        jnp.ones((WIDTH, RANK)),
    )
    f = lambda a, b, x: _square(x @ a.T @ b.T)
    compiled = jax.jit(jax.grad(f, (0, 1, 2))).lower(a, b, x).compile()
    assert [p for p in products(compiled) if p.reads_across]


def test_the_wide_operand_moves_to_the_left():
    a, x = jnp.ones((4, 64)), jnp.ones((512, 64))
    dot = lambda a, x: thin_dot_general(a, x, (((1,), (1,)), ((), ())))
    text = jax.jit(dot).lower(a, x).as_text()
    assert "(tensor<512x64xf64>, tensor<4x64xf64>) -> tensor<512x4xf64>" in text
    assert dot(a, x).shape == (4, 512)


def test_mixed_precision_of_operands():
    u, v = jnp.ones((6, 4), jnp.bfloat16), jnp.ones((2, 4), jnp.bfloat16)
    numbers = (((1,), (1,)), ((), ()))
    dot = lambda u, v: thin_dot_general(u, v, numbers, preferred_element_type="float32")
    assert dot(u, v).dtype == jnp.float32
    du, dv = jax.grad(lambda u, v: dot(u, v).sum(), (0, 1))(u, v)
    assert du.dtype == dv.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(dv, np.float32), 6.0)


def test_contract_by_labels():
    u, v = jr.normal(jr.key(0), (2, 3, 4)), jr.normal(jr.key(1), (4, 2, 5))
    out, labels = contract(u, "bij", v, "jbk", keep="bik")
    assert labels == ["b", "i", "k"]
    assert_close(out, jnp.einsum("bij,jbk->bik", u, v))
    assert {
        str(e.primitive)
        for e in equations(
            jax.make_jaxpr(lambda u, v: contract(u, "bij", v, "jbk", keep="bik")[0])(
                u, v
            )
        )
    } == {"thin_dot_general"}


def test_taylor_mode_of_a_model():
    """In its input and in its factors. The base is constant: it is frozen."""
    mlp = eqx.nn.MLP(3, 2, 4, 2, activation=jnp.tanh, dtype=jnp.float64, key=jr.key(0))
    model = adapted(mlp)
    params, frozen = lora_quax.partition(model)
    leaves, structure = jax.tree.flatten((params, jnp.arange(3.0)))
    series = [[jnp.sin(x + 1), jnp.cos(x)] for x in leaves]

    def taylor(wrap):
        def f(*leaves):
            params, x = structure.unflatten(leaves)
            return wrap(eqx.combine(params, frozen))(x)

        return jet(f, leaves, series)

    assert_close(taylor(quax.quaxify), taylor(densify))
