"""What JAX and Quax may do next is switched on by `LORA_QUAX_CANARY`: see `conftest`.

All tests of programs are run under it. These say that it is on, and have the programs
that are most likely to be wrong then.
"""

import jax
import jax.numpy as jnp
import pytest
import quax
from helpers import CANARY, check, equations, lora, Scaled, TRANSFORMS, x
from jax import lax

from lora_quax import MaterialiseError


pytestmark = pytest.mark.usefixtures("x64")


def _names(f, x):
    """Of primitives that are objects, as JAX's next ones are."""
    jaxpr = jax.make_jaxpr(f)(x)
    return {type(e.params.get("_prim")).__name__ for e in equations(jaxpr)}


@pytest.mark.skipif("jax_remat3" not in CANARY, reason="the canary is not on")
def test_remat3_is_on():
    assert "RematTraced" in _names(jax.checkpoint(jnp.sin), 1.0)


@pytest.mark.skipif("jax_scan3" not in CANARY, reason="the canary is not on")
def test_scan3_is_on():
    assert "Scan3" in _names(lambda x: lax.map(jnp.sin, x), jnp.ones(3))


@pytest.mark.skipif("leafwise_custom_vjp" not in CANARY, reason="the canary is not on")
def test_custom_vjp_is_leafwise():
    # Nothing of ours is in it, so Quax does it: 0.4.6 alone raises NotImplementedError.
    value = Scaled(jnp.ones(3), jnp.array(2.0))
    assert isinstance(quax.quaxify(_reversed)(value), Scaled)


@jax.custom_vjp
def _reversed(x):
    """A gradient reversal: linear, and of the wrong sign if done leaf by leaf."""
    return x


_reversed.defvjp(lambda x: (x, None), lambda _, g: (-g,))


@jax.custom_vjp
def _clipped(x, bound):
    return x


_clipped.defvjp(
    lambda x, bound: (x, bound),
    lambda bound, g: (jnp.clip(g, -bound, bound), jnp.zeros_like(bound)),
)


PROGRAMS = {
    "checkpoint": lambda w, x: jax.checkpoint(lambda w, x: jnp.tanh(w @ x))(w, x),
    "checkpoint of a closure": lambda w, x: jax.checkpoint(lambda x: jnp.sin(w @ x))(x),
    "scan": lambda w, x: lax.scan(lambda c, s: (jnp.sin(w @ c), c * s), x, x),
    "scan, weight as carry": lambda w, x: lax.scan(
        lambda c, s: (0.5 * c, (c @ x) * s), w, x
    )[1],
    "scan over rows": lambda w, x: lax.scan(lambda c, r: (c + r @ x, r * c), 0.0, w),
    "map": lambda w, x: lax.map(lambda s: w @ (x * s), x),
    "fori_loop": lambda w, x: lax.fori_loop(0, 3, lambda _, c: jnp.sin(w @ c), x),
    "checkpoint in scan": lambda w, x: lax.scan(
        jax.checkpoint(lambda c, _: (jnp.sin(w @ c), None)), x, None, length=3
    )[0],
    "reversal of an activation": lambda w, x: _reversed(jnp.sin(w @ x)),
    "clipping of an activation": lambda w, x: _clipped(w @ x, jnp.float64(0.1)) ** 2,
}
OF_WEIGHTS = {
    "reversal of a weight": lambda w, x: _reversed(w) @ x,
    "clipping of a weight": lambda w, x: _clipped(w, jnp.float64(0.1)) @ x,
}


@pytest.mark.parametrize("nesting", ["Q(f)", "Q(vmap f)", "vmap(Q f)", "Q(grad f)"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_programs(program, nesting):
    f, transform = PROGRAMS[program], TRANSFORMS[nesting]
    args = transform.arguments([lora((3, 3)), x(3)])
    check(transform.ours(f), transform.plain(f), args)


@pytest.mark.parametrize("nesting", ["Q(f)", "Q(vmap f)", "vmap(Q f)"])
@pytest.mark.parametrize("program", OF_WEIGHTS)
def test_custom_vjp_of_a_weight(program, nesting):
    """By leave it is right; without, it is right or is refused."""
    f, transform = OF_WEIGHTS[program], TRANSFORMS[nesting]
    args = transform.arguments([lora((3, 3), allow_materialise=True), x(3)])
    check(transform.ours(f), transform.plain(f), args)
    args = transform.arguments([lora((3, 3)), x(3)])
    try:
        check(transform.ours(f), transform.plain(f), args)
    except MaterialiseError as error:
        assert "needs the dense weight" in str(error)
