"""The primitive means what `lax.dot_general` means, under every transformation."""

import itertools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_close, equations
from jax import lax

from lora_quax._arrays.thin_dot import contract, thin_dot_general


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


def test_the_wide_operand_is_read_as_it_lies():
    """Of a step with 512 tokens, no compiled product contracts a wide left operand's
    leading axis, as autodiff of `lax.dot_general` does for the gradient of `b`."""
    x, a, b = jnp.ones((512, 64)), jnp.ones((4, 64)), jnp.ones((32, 4))
    last = (((1,), (1,)), ((), ()))

    def loss(dot, x, a, b):
        return (dot(dot(x, a, last), b, last) ** 2).sum()

    def across(dot):
        grad = jax.jit(jax.grad(loss, (1, 2, 3)), static_argnums=0)
        text = grad.lower(dot, x, a, b).as_text()
        shape = "tensor<512x32xf64>, tensor<512x4xf64>"
        lines = [line for line in text.splitlines() if "dot_general" in line]
        return [line for line in lines if shape in line and "[0] x [0]" in line]

    assert across(lax.dot_general)
    assert not across(thin_dot_general)


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
