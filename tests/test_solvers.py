"""Solvers inside a model, `quaxify` outermost: nothing is formed, and the gradients are
those of the dense program."""

import diffrax
import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import optimistix as optx
import pytest
import quax
from helpers import adapted, check, formed, lora, TRANSFORMS, x
from jax import lax

from lora_quax import MaterialiseError


pytestmark = pytest.mark.usefixtures("x64")
_N = 3


def _definite(w):
    return lambda v: 4 * v + 0.3 * (w.T @ (w @ v))


def _step(w, x):
    return lambda y, *_: jnp.tanh(0.2 * (w @ y) + x)


def _linear_solve(operator, x, *args):
    return lx.linear_solve(operator, x, *args).value


def _structure(x):
    return jax.eval_shape(lambda: x)


def _custom_root(w, x):
    f = lambda y: y - _step(w, x)(y)
    solve = lambda f, y: lax.while_loop(
        lambda c: c[0] < 60, lambda c: (c[0] + 1, c[1] - f(c[1])), (0, y)
    )[1]
    tangent_solve = lambda g, y: jnp.linalg.solve(jax.jacobian(g)(y), y)
    return lax.custom_root(f, jnp.zeros(_N), solve, tangent_solve)


def _fixed_point(w, x):
    solver = optx.FixedPointIteration(1e-12, 1e-12)
    f = lambda y, args: _step(*args)(y)
    return optx.fixed_point(f, solver, jnp.zeros(_N), (w, x)).value


def _closed_fixed_point(w, x):
    solver = optx.FixedPointIteration(1e-12, 1e-12)
    return optx.fixed_point(_step(w, x), solver, jnp.zeros(_N)).value


def _root_find(w, x, **kwargs):
    f = lambda y, w: y - _step(w, x)(y)
    return optx.root_find(
        f, optx.Newton(1e-12, 1e-12), jnp.zeros(_N), w, **kwargs
    ).value


def _while_loop(kind):
    def f(w, x):
        step = lambda c: (c[0] + 1, jnp.tanh(w @ c[1]))
        condition = lambda c: c[0] < 4
        return eqxi.while_loop(condition, step, (0, x), max_steps=8, kind=kind)[1]

    return f


def _checkpointed_scan(w, x):
    step = lambda c, s: (jnp.tanh(w @ c) * s, c)
    return eqxi.scan(step, x, jnp.arange(1.0, 5.0), kind="checkpointed")[1]


def _ode(w, x, **kwargs):
    term = diffrax.ODETerm(lambda t, y, w: jnp.tanh(w @ y))
    return diffrax.diffeqsolve(
        term, diffrax.Tsit5(), 0.0, 1.0, 0.1, x, args=w, max_steps=32, **kwargs
    ).ys


def _error_if_both(w, x):
    w, x = eqx.error_if((w, x), x[0] > 99, "no")
    return w @ x


SOLVERS = {
    "cg": lambda w, x: jax.scipy.sparse.linalg.cg(_definite(w), x, tol=1e-12)[0],
    "gmres": lambda w, x: jax.scipy.sparse.linalg.gmres(
        lambda v: 5 * v + 0.3 * (w @ v), x, tol=1e-12
    )[0],
    "custom_root": _custom_root,
    "lineax, a function": lambda w, x: _linear_solve(
        lx.FunctionLinearOperator(
            _definite(w), _structure(x), lx.positive_semidefinite_tag
        ),
        x,
        lx.CG(1e-12, 1e-12),
    ),
    "lineax, a Jacobian": lambda w, x: _linear_solve(
        lx.JacobianLinearOperator(lambda y, w: 5 * y + jnp.tanh(0.3 * (w @ y)), x, w), x
    ),
    "lineax, a matrix": lambda w, x: _linear_solve(
        lx.MatrixLinearOperator(w) + 5 * lx.IdentityLinearOperator(_structure(x)),
        x,
        lx.GMRES(1e-12, 1e-12),
    ),
    "fixed_point": _fixed_point,
    "fixed_point, closed over": _closed_fixed_point,
    "root_find": _root_find,
    "root_find, checkpointed": lambda w, x: _root_find(
        w, x, adjoint=optx.RecursiveCheckpointAdjoint()
    ),
    "checkpointed while_loop": _while_loop("checkpointed"),
    "bounded while_loop": _while_loop("bounded"),
    "checkpointed scan": _checkpointed_scan,
    "diffrax": _ode,
    "diffrax, backsolve": lambda w, x: _ode(w, x, adjoint=diffrax.BacksolveAdjoint()),
    "noinline": lambda w, x: eqxi.noinline(lambda w, x: jnp.tanh(w @ x))(w, x),
    "nondifferentiable_backward": lambda w, x: (
        lax.stop_gradient(eqxi.nondifferentiable_backward(w) @ x) + w @ x
    ),
    "error_if of a weight": lambda w, x: eqx.error_if(w, x[0] > 99, "no") @ x,
    "error_if of both": _error_if_both,
}
# They form a Jacobian, as the dense program does, which depends on both factors and, of
# a linear function, on nothing else.
_JACOBIAN = {"lineax, a Jacobian", "root_find", "root_find, checkpointed"}
NESTINGS = [
    pytest.param(t, marks=[] if t == "Q(f)" else pytest.mark.slow)
    for t in ("Q(f)", "Q(jit f)", "Q(vmap f)", "vmap(Q f)")
]


@pytest.mark.parametrize("nesting", NESTINGS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers(solver, nesting):
    transform, f = TRANSFORMS[nesting], SOLVERS[solver]
    args = transform.arguments([lora((_N, _N)), x(_N)])
    check(transform.ours(f), transform.plain(f), args, rtol=1e-6, atol=1e-6)
    if solver not in _JACOBIAN:
        assert formed(transform.ours(f), args) == []


class _Equilibrium(eqx.Module):
    """A deep-equilibrium model: its output is a fixed point of a layer."""

    layer: eqx.nn.Linear
    inject: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jr.split(key, 3)
        self.layer = eqx.nn.Linear(4, 4, key=keys[0])
        self.inject = eqx.nn.Linear(3, 4, key=keys[1])
        self.head = eqx.nn.Linear(4, 2, key=keys[2])

    def __call__(self, x):
        f = lambda y, args: jnp.tanh(0.2 * self.layer(y) + self.inject(x))
        solver = optx.FixedPointIteration(1e-12, 1e-12)
        return self.head(optx.fixed_point(f, solver, jnp.zeros(4)).value)


def test_a_deep_equilibrium_model():
    model = adapted(_Equilibrium(jr.key(0)))
    call = lambda model, x: model(x)
    check(quax.quaxify(call), call, (model, x(3)), rtol=1e-6, atol=1e-6)


def test_error_if_still_raises():
    f = eqx.filter_jit(quax.quaxify(lambda w, x: eqx.error_if(w, x[0] < 99, "no") @ x))
    with pytest.raises(RuntimeError, match="no"):
        f(lora((_N, _N)), x(_N))


# What a derivative of its own says of a whole weight.


@jax.custom_vjp
def _reversed(w):
    return w * 1.0


_reversed.defvjp(lambda w: (w * 1.0, None), lambda _, c: (-c,))


@jax.custom_jvp
def _halved(w):
    return w


@_halved.defjvp
def _(primals, tangents):
    return primals[0], 0.5 * tangents[0]


@pytest.mark.parametrize("rule", [_reversed, _halved])
def test_a_rule_for_the_whole_is_refused_or_right(rule):
    f = lambda w, x: jnp.tanh(rule(w) @ x)
    with pytest.raises(MaterialiseError, match="it says of the whole"):
        jax.grad(lambda x, w: quax.quaxify(f)(w, x).sum(), 1)(x(3), lora((3, 3)))
    check(quax.quaxify(f), f, (lora((3, 3), allow_materialise=True), x(3)))
