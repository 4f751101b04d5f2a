"""Whole programs that never heard of LoRA, against the same programs on merged weights.

Layers of Equinox, control flow, functions with derivatives of their own, and meshes;
each in every nesting of `quaxify`, `vmap`, `grad`, `jit` and `checkpoint` that makes
sense.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
import quax
from helpers import (
    adapted,
    assert_close,
    check,
    check_all,
    check_derivative,
    densify,
    DERIVATIVES,
    filled,
    lora,
    scalar,
    TRANSFORMS,
    x,
)
from jax import lax

from lora_quax import MaterialiseError


pytestmark = pytest.mark.usefixtures("x64")


def _call(model, x):
    return model(x)


# Layers: name: (make the layer, its input, options of loraify, how to call it).


def _attention(model, x):
    return model(x, x, x)


def _lstm(cell, xs):
    def step(state, x):
        state = cell(x, state)
        return state, state[0]

    zeros = jnp.zeros(cell.hidden_size)
    return lax.scan(step, (zeros, zeros), xs)[1]


def _gru(cell, xs):
    def step(state, x):
        state = cell(x, state)
        return state, state

    return lax.scan(step, jnp.zeros(cell.hidden_size), xs)[1]


def _embedding(model, x):
    ids = jnp.argsort(x)[:4]
    return jax.vmap(model)(ids) * x.sum()


def _dropout(model, x):
    return model(x, key=jr.key(3))


class _Tied(eqx.Module):
    """An embedding and an output head that share one matrix."""

    shared: eqx.nn.Shared

    def __init__(self, key):
        embedding = eqx.nn.Embedding(7, 3, key=key)
        head = eqx.nn.Linear(3, 7, use_bias=False, key=key)
        self.shared = eqx.nn.Shared(
            (embedding, head), lambda t: t[1].weight, lambda t: t[0].weight
        )

    def __call__(self, x):
        embedding, head = self.shared()
        return head(embedding(jnp.argmax(x)) * x)


class _Stacked(eqx.Module):
    """Layers stacked along a leading axis and run by `lax.scan`."""

    layers: eqx.nn.Linear

    def __init__(self, key):
        make = lambda key: eqx.nn.Linear(3, 3, key=key)
        self.layers = eqx.filter_vmap(make)(jr.split(key, 4))

    def __call__(self, x):
        dynamic, static = eqx.partition(self.layers, eqx.is_array)

        def step(x, layer):
            return jnp.tanh(eqx.combine(layer, static)(x)), None

        return lax.scan(step, x, dynamic)[0]


class _Ensemble(eqx.Module):
    """Members stacked along a leading axis and run by `filter_vmap`."""

    members: eqx.Module

    def __init__(self, make, key):
        self.members = eqx.filter_vmap(make)(jr.split(key, 3))

    def __call__(self, x):
        run = eqx.filter_vmap(_call, in_axes=(eqx.if_array(0), None))
        return run(self.members, x)


class _Experts(eqx.Module):
    """A mixture of experts of shape (experts, in, out)."""

    weight: jax.Array

    def __init__(self, key):
        self.weight = jr.normal(key, (3, 4, 5))

    def __call__(self, x):
        sizes = jnp.array([2, 1, 3])
        return lax.ragged_dot(x, self.weight, sizes)


class _ExpertsOutIn(_Experts):
    def __call__(self, x):
        numbers = lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), [0], [0])
        return lax.ragged_dot_general(x, self.weight, jnp.array([2, 1, 3]), numbers)


_MATERIALISE = dict(allow_materialise=True)
_nn = eqx.nn
LAYERS = {
    "Linear": (lambda k: _nn.Linear(3, 5, key=k), (3,), {}, _call),
    "Linear from scalar": (
        lambda k: _nn.Linear("scalar", 5, key=k),
        (),
        {},
        _call,
    ),
    "Linear to scalar": (lambda k: _nn.Linear(3, "scalar", key=k), (3,), {}, _call),
    "MLP": (lambda k: _nn.MLP(3, 2, 4, 2, key=k), (3,), {}, _call),
    "MLP, smooth": (
        lambda k: _nn.MLP(3, 2, 4, 2, jax.nn.gelu, key=k),
        (3,),
        {},
        _call,
    ),
    "MLP, scan": (lambda k: _nn.MLP(3, 2, 4, 3, scan=True, key=k), (3,), {}, _call),
    "Conv1d": (lambda k: _nn.Conv1d(2, 4, 3, key=k), (2, 6), {}, _call),
    "Conv2d, groups": (
        lambda k: _nn.Conv2d(6, 16, 3, stride=2, groups=2, key=k),
        (6, 7, 6),
        dict(rank=1),
        _call,
    ),
    "Conv2d, circular": (
        lambda k: _nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular", key=k),
        (2, 5, 6),
        {},
        _call,
    ),
    "Conv3d, dilated": (
        lambda k: _nn.Conv3d(2, 3, 2, dilation=2, padding="SAME", key=k),
        (2, 4, 4, 4),
        {},
        _call,
    ),
    "ConvTranspose1d": (
        lambda k: _nn.ConvTranspose1d(2, 4, 3, stride=2, key=k),
        (2, 6),
        {},
        _call,
    ),
    "ConvTranspose2d, groups": (
        lambda k: _nn.ConvTranspose2d(6, 16, 3, stride=2, groups=2, padding=1, key=k),
        (6, 4, 5),
        dict(rank=1),
        _call,
    ),
    "ConvTranspose3d": (
        lambda k: _nn.ConvTranspose3d(2, 3, 2, output_padding=1, stride=2, key=k),
        (2, 3, 3, 3),
        {},
        _call,
    ),
    "Embedding": (
        lambda k: _nn.Embedding(7, 3, key=k),
        (7,),
        dict(targets=_nn.Embedding),
        _embedding,
    ),
    "MultiheadAttention": (
        lambda k: _nn.MultiheadAttention(2, 4, use_query_bias=True, key=k),
        (5, 4),
        {},
        _attention,
    ),
    "LSTMCell": (
        lambda k: _nn.LSTMCell(3, 4, key=k),
        (5, 3),
        dict(targets=["weight_ih", "weight_hh"]),
        _lstm,
    ),
    "GRUCell": (
        lambda k: _nn.GRUCell(3, 4, key=k),
        (5, 3),
        dict(targets=["weight_ih", "weight_hh"]),
        _gru,
    ),
    "WeightNorm": (
        lambda k: _nn.WeightNorm(_nn.Linear(3, 5, key=k)),
        (3,),
        _MATERIALISE,
        _call,
    ),
    "WeightNorm of Conv2d": (
        lambda k: _nn.WeightNorm(_nn.Conv2d(2, 4, 3, key=k)),
        (2, 5, 5),
        _MATERIALISE,
        _call,
    ),
    "Sequential": (
        lambda k: _nn.Sequential(
            [_nn.Linear(3, 4, key=k), _nn.Lambda(jax.nn.relu), _nn.LayerNorm(4)]
        ),
        (3,),
        {},
        _call,
    ),
    "Sequential, Dropout": (
        lambda k: _nn.Sequential([_nn.Linear(3, 4, key=k), _nn.Dropout(0.3)]),
        (3,),
        {},
        _dropout,
    ),
    "tied": (_Tied, (3,), dict(targets=_nn.Embedding), _call),
    "stacked": (_Stacked, (3,), {}, _call),
    "ensemble": (
        lambda k: _Ensemble(lambda k: _nn.MLP(3, 2, 4, 1, key=k), k),
        (3,),
        {},
        _call,
    ),
    "ensemble of Conv2d": (
        lambda k: _Ensemble(lambda k: _nn.Conv2d(2, 4, 3, key=k), k),
        (2, 5, 5),
        dict(rank=1),
        _call,
    ),
    "experts": (_Experts, (6, 4), dict(targets="weight"), _call),
    "experts, (out, in)": (_ExpertsOutIn, (6, 5), dict(targets="weight"), _call),
    "two ranks": (
        lambda k: _nn.MLP(3, 3, 3, 2, key=k),
        (3,),
        dict(targets={_nn.Linear: 2, "layers.1": 3}),
        _call,
    ),
    "trained in full": (
        lambda k: _nn.MLP(3, 3, 3, 1, jax.nn.gelu, key=k),
        (3,),
        dict(targets={_nn.Linear: 2, "layers.1": "full", "bias": "full"}),
        _call,
    ),
}
_QUICK = ["Q(f)", "vmap(Q f)"]
_OTHER = [t for t in TRANSFORMS if "weights" not in t and t not in _QUICK]


@pytest.mark.parametrize(
    "nestings",
    [
        pytest.param(_QUICK, id="quick"),
        pytest.param(_OTHER, id="other", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("layer", LAYERS)
def test_layers(layer, nestings):
    make, shape, options, call = LAYERS[layer]
    model = filled(lambda key: adapted(make(key), **options), jr.key(0))
    params, static = eqx.partition(model, eqx.is_array)
    program = lambda params, x: call(eqx.combine(params, static), x)
    cases = {}
    for nesting in nestings:
        transform = TRANSFORMS[nesting]
        args = transform.arguments([params, x(*shape)])
        if "experts" in layer and "vmap" in nesting:
            # Nor can JAX, up to 0.12; this says when it can.
            with pytest.raises(NotImplementedError, match="ragged_dot vmap"):
                transform.plain(program)(*densify(args))
        else:
            cases[nesting] = transform.ours(program), transform.plain(program), args
    check_all(cases)


@pytest.mark.slow
@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.parametrize("layer", [n for n in LAYERS if n not in ("MLP", "Sequential")])
def test_derivatives_of_layers(layer, derivative):
    make, shape, options, call = LAYERS[layer]
    model = filled(lambda key: adapted(make(key), **options), jr.key(0))
    check_derivative(DERIVATIVES[derivative], call, (model, x(*shape)))


# Functions of a weight and an input: control flow, and derivatives of their own.


@jax.custom_vjp
def _scaled_sine(x, s):
    return jnp.sin(x) * s.sum()


def _sine_fwd(x, s):
    return _scaled_sine(x, s), (x, s)


def _sine_bwd(residuals, g):
    x, s = residuals
    return g * jnp.cos(x) * s.sum(), jnp.full(s.shape, (g * jnp.sin(x)).sum())


_scaled_sine.defvjp(_sine_fwd, _sine_bwd)


@eqx.filter_custom_vjp
def _product(wx):
    w, x = wx
    return w @ x


@_product.def_fwd
def _(perturbed, wx):
    del perturbed
    return wx[0] @ wx[1], None


@_product.def_bwd
def _(residuals, g, perturbed, wx):
    del residuals, perturbed
    return jnp.outer(g, wx[1]), g @ wx[0]


@jax.custom_jvp
def _cube(x):
    return x**3


@_cube.defjvp
def _(primals, tangents):
    (x,), (dx,) = primals, tangents
    return x**3, 3 * x**2 * dx


def _closed_over(w, x):
    """A function with `custom_vjp` that closes over the weight."""

    @jax.custom_vjp
    def f(x):
        return jnp.tanh(lax.stop_gradient(w) @ x)

    f.defvjp(lambda x: (f(x), x), lambda x, g: (g * jnp.cos(x),))
    return f(x)


def _both_in_one_body(w, x):
    v = lora((3, 3), rank=3, seed=20)
    inner = lambda v, w, x: lax.scan(
        lambda c, _: (jnp.tanh(v @ (w @ c)), None), x, None, length=3
    )[0]
    return quax.quaxify(inner)(v, w, x)


def _while(w, x):
    step = lambda carry: (carry[0] + 1, jnp.tanh(w @ carry[1]))
    return lax.while_loop(lambda carry: carry[0] < 3, step, (0, x))[1]


def _while_with_weight(w, x):
    step = lambda c: (c[0] + 1, 0.5 * c[1], c[2] + c[1] @ x)
    return lax.while_loop(lambda c: c[0] < 3, step, (0, w, x))[2]


def _policy(w, x):
    f = lambda w, x: jnp.tanh(w @ jnp.sin(w @ x))
    policy = jax.checkpoint_policies.dots_saveable
    return jax.checkpoint(f, policy=policy, prevent_cse=False)(w, x)


FACTORED = {
    "scan": lambda w, x: lax.scan(lambda c, _: (jnp.tanh(w @ c), c), x, None, length=3),
    "scan over rows": lambda w, x: lax.scan(lambda c, r: (c + r @ x, 2 * r), 0.0, w),
    "scan, weights out": lambda w, x: lax.scan(lambda c, s: (c, w * s), 0.0, x)[1] @ x,
    "scan, weight as carry": lambda w, x: lax.scan(
        lambda c, _: (0.9 * c, c @ x), w, None, length=3
    )[1],
    "scan, carry times input": lambda w, x: lax.scan(lambda c, s: (c * s, c @ x), w, x)[
        1
    ],
    "scan, carry plus input": lambda w, x: lax.scan(lambda c, s: (c + s, c @ x), w, x)[
        1
    ],
    "map": lambda w, x: lax.map(lambda s: w @ (x * s), x),
    "fori_loop": lambda w, x: lax.fori_loop(0, 3, lambda _, c: jnp.tanh(w @ c), x),
    "w * v[:, None]": lambda w, x: (w * x[:, None]) @ x,
    "cond": lambda w, x: lax.cond(x[0] > 0, lambda w: w @ x, lambda w: (2 * w) @ x, w),
    "cond, weight out": lambda w, x: (
        lax.cond(x[0] > 0, lambda w: w, lambda w: 2 * w, w) @ x
    ),
    "cond, one branch dense": lambda w, x: (
        lax.cond(x[0] > 0, lambda w: w, lambda w: jnp.ones((3, 3)), w) @ x
    ),
    "cond, closed over": lambda w, x: lax.cond(x[0] > 0, lambda: w @ x, lambda: x @ w),
    "switch": lambda w, x: lax.switch(
        jnp.argmax(x), [lambda w: w @ x, lambda w: x @ w, lambda w: x], w
    ),
    "checkpoint, policy": _policy,
    "filter_checkpoint": lambda w, x: eqx.filter_checkpoint(
        lambda w, x: jnp.tanh(w @ x)
    )(w, x),
    "custom_jvp of an activation": lambda w, x: _cube(jax.nn.softplus(w @ x)),
    "custom_vjp of an activation": lambda w, x: _scaled_sine(w @ x, x),
    "custom_vjp of a weight": lambda w, x: _scaled_sine(x, w),
    "filter_custom_vjp of a weight": lambda w, x: _product((w, x)),
    "two ranks in one body": _both_in_one_body,
    "error_if": lambda w, x: eqx.error_if(w @ x, x[0] > 99, "no"),
    "error_if of a weight": lambda w, x: eqx.error_if(w, x[0] > 99, "no") @ x,
    "nested quaxify": lambda w, x: quax.quaxify(lambda w, x: w @ x)(w, x),
    "jit inside": lambda w, x: jax.jit(lambda w, x: jnp.tanh(w @ x))(w, x),
    "closure_convert": lambda w, x: jax.closure_convert(lambda x: x * 2, x)[0](w @ x),
    "linearize": lambda w, x: jax.linearize(lambda x: jnp.tanh(w @ x), x)[1](x),
    "inner jvp": lambda w, x: jax.jvp(lambda x: jnp.tanh(w @ x), (x,), (x,)),
    "inner hessian": lambda w, x: jax.hessian(lambda x: jnp.tanh(w @ x).sum())(x),
    "inner jacfwd": lambda w, x: jax.jacfwd(lambda x: jnp.tanh(w @ x))(x),
}
MATERIALISED = {
    "softplus of a weight": lambda w, x: jax.nn.softplus(w) @ x,
    "relu of a weight": lambda w, x: jax.nn.relu(w) @ x,
    "custom_jvp of a weight": lambda w, x: _cube(w) @ x,
    "exp": lambda w, x: jnp.exp(w) @ x,
    "mask": lambda w, x: jnp.where(jnp.eye(3) > 0, w, 0.0) @ x,
    "tril": lambda w, x: jnp.tril(w) @ x,
    "w * w": lambda w, x: (w * w) @ x,
    "normalised": lambda w, x: (w / jnp.linalg.norm(w)) @ x,
    "ravel": lambda w, x: w.ravel()[:3] * x,
    "scan, carry sums weights": lambda w, x: lax.scan(
        lambda c, s: (c + w, c @ x), w, x
    )[1],
    "switched weight": lambda w, x: (
        jax.vmap(lambda s: lax.cond(s > 0, lambda: w, lambda: 2 * w))(x) @ x
    ),
}
ONLY_FORWARD = {"while_loop": _while, "while_loop, weight": _while_with_weight}


# What JAX does to the program, inside `quaxify`, is then not linear in the weight:
# `vmap` of a `cond` selects element by element; the gradient of a scale is
# `sum(w * cotangent)`.
DENSE = {
    "Q(vmap f)": {
        "cond",
        "cond, weight out",
        "cond, one branch dense",
        "cond, closed over",
        "switch",
    },
    "Q(grad f)": {"scan, weights out", "scan, carry times input", "w * v[:, None]"},
}


_NESTINGS = [
    pytest.param(t, marks=[] if t in _QUICK else pytest.mark.slow)
    for t in ("Q(f)", "Q(vmap f)", "vmap(Q f)", "Q(grad f)")
]


@pytest.mark.parametrize("nesting", _NESTINGS)
@pytest.mark.parametrize("program", FACTORED | MATERIALISED)
def test_functions(program, nesting):
    allow = program in MATERIALISED or program in DENSE.get(nesting, ())
    f = (FACTORED | MATERIALISED)[program]
    transform = TRANSFORMS[nesting]
    args = transform.arguments([lora((3, 3), allow_materialise=allow), x(3)])
    check(transform.ours(f), transform.plain(f), args)


@pytest.mark.parametrize("program", MATERIALISED)
def test_refused_without_leave(program):
    with pytest.raises(MaterialiseError, match="needs the dense weight"):
        quax.quaxify(MATERIALISED[program])(lora((3, 3)), x(3))


@pytest.mark.parametrize("nesting", ["Q(f)", "Q(vmap f)", "vmap(Q f)"])
def test_custom_vjp_that_closes_over_a_weight(nesting):
    # JAX differentiates such a function by its arguments alone.
    w, transform = lora((3, 3)), TRANSFORMS[nesting]
    f = lambda x, w=w: transform.ours(_closed_over)(w, x)
    plain = lambda x, w=densify(w): transform.plain(_closed_over)(w, x)
    _, x_ = transform.arguments([w, x(3)])
    assert_close(f(x_), plain(x_))
    assert_close(
        jax.grad(lambda x: scalar(f(x)))(x_), jax.grad(lambda x: scalar(plain(x)))(x_)
    )


@pytest.mark.parametrize("nesting", ["Q(f)", "Q(vmap f)", "vmap(Q f)", "Q(jit f)"])
@pytest.mark.parametrize("program", ONLY_FORWARD)
def test_while_loops(program, nesting):
    f, transform = ONLY_FORWARD[program], TRANSFORMS[nesting]
    args = transform.arguments([lora((3, 3)), x(3)])
    ours = eqx.filter_jit(transform.ours(f))
    plain = lambda *args: transform.plain(f)(*densify(args))
    assert_close(ours(*args), plain(*args))
    tangents = jax.tree.map(jnp.cos, args)
    assert_close(jax.jvp(ours, args, tangents)[1], jax.jvp(plain, args, tangents)[1])
