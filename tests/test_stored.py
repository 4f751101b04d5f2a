"""The identity, under every transformation; a barrier where one was seen to pay."""

import jax
import jax.numpy as jnp
import pytest
from helpers import assert_close, lora
from jax.experimental.jet import jet

from lora_quax._arrays.stored import SMALL, stored


pytestmark = pytest.mark.usefixtures("x64")

TRANSFORMS = {
    "value": lambda f: f,
    "jit": jax.jit,
    "vmap": lambda f: jax.vmap(f, in_axes=1, out_axes=1),
    "grad": lambda f: jax.grad(lambda x: jnp.sum(jnp.sin(f(x)) ** 2)),
    "hessian": lambda f: jax.hessian(lambda x: jnp.sum(jnp.sin(f(x)) ** 2)),
    "jvp": lambda f: lambda x: jax.jvp(f, (x,), (2 * x,)),
    "transpose": lambda f: lambda x: jax.linear_transpose(f, x)(x),
    "jet": lambda f: lambda x: jet(f, (x,), ([2 * x, x],)),
    "checkpoint": lambda f: jax.grad(lambda x: jax.checkpoint(f)(x).sum()),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_is_the_identity(transform):
    transform = TRANSFORMS[transform]
    x = jnp.arange(6.0).reshape(2, 3)
    assert_close(transform(stored)(x), transform(lambda x: x)(x))


def test_of_a_value_is_that_of_its_leaves():
    w = lora((3, 2))
    assert jax.tree.structure(stored(w)) == jax.tree.structure(w)
    assert_close(stored(w), w)


@pytest.mark.parametrize(
    "platform, size, barriers",
    [("cpu", SMALL, 2), ("cpu", SMALL - 1, 0), ("cuda", SMALL, 0), ("tpu", SMALL, 0)],
)
def test_a_barrier_on_the_cpu_alone(platform, size, barriers):
    # One for the value, and one for its cotangent.
    f = jax.jit(jax.value_and_grad(lambda x: jnp.sum(jnp.sin(stored(2 * x)))))
    lowered = f.trace(jnp.ones(size)).lower(lowering_platforms=(platform,))
    assert lowered.as_text().count("optimization_barrier") == barriers
