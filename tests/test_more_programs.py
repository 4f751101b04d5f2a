"""Programs that do not fit the tables: state, meshes, compilation, memory, diffrax."""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
import quax
from forms import dora
from helpers import (
    adapted,
    assert_close,
    check,
    densify,
    equations,
    KINDS,
    lora,
    value_and_grads,
    x,
)
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from lora_quax import filter_value_and_grad, loraify, merge, partition
from lora_quax._arrays.base import replace


pytestmark = pytest.mark.usefixtures("x64")


# Layers with state.


class _Normalised(eqx.Module):
    conv: eqx.nn.Conv2d
    norm: eqx.nn.BatchNorm
    linear: eqx.nn.Linear

    def __init__(self, key):
        self.conv = eqx.nn.Conv2d(2, 4, 3, key=key)
        self.norm = eqx.nn.BatchNorm(4, axis_name="batch", mode="batch")
        self.linear = eqx.nn.Linear(4, 3, key=key)

    def __call__(self, x, state):
        x, state = self.norm(self.conv(x), state)
        return self.linear(jax.nn.relu(x).mean((1, 2))), state


class _Spectral(eqx.Module):
    layer: eqx.nn.SpectralNorm

    def __init__(self, key):
        linear = eqx.nn.Linear(3, 4, key=key)
        self.layer = eqx.nn.SpectralNorm(linear, "weight", key=key)

    def __call__(self, x, state):
        return self.layer(x, state)


@pytest.mark.parametrize("nesting", ["Q(vmap f)", "vmap(Q f)"])
@pytest.mark.parametrize("make", [_Normalised, _Spectral])
def test_layers_with_state(make, nesting):
    model, state = eqx.nn.make_with_state(make)(jr.key(0))
    model = adapted(model, allow_materialise=make is _Spectral)
    call = lambda model, x, state: model(x, state)
    axes: dict[str, Any] = dict(
        axis_name="batch", in_axes=(None, 0, None), out_axes=(0, None)
    )
    if nesting == "Q(vmap f)":
        ours = quax.quaxify(eqx.filter_vmap(call, **axes))
    else:
        ours = eqx.filter_vmap(quax.quaxify(call), **axes)
    args = (model, x(5, 2, 6, 6) if make is _Normalised else x(5, 3), state)
    check(ours, eqx.filter_vmap(call, **axes), args)


# Meshes.


def _mesh(kind):
    return jax.make_mesh((2,), ("i",), axis_types=(kind,))


SPECS = {
    "data": (P(), P("i"), P("i"), False),
    "rows": (P("i", None), P(), P(None, "i"), False),
    "columns": (P(None, "i"), P(None, "i"), P(), True),
}


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("spec", SPECS)
def test_shard_map(spec, inside):
    w_spec, x_spec, out_spec, summed = SPECS[spec]

    def local(w, x):
        y = x @ w.T
        return jnp.tanh(lax.psum(y, "i") if summed else y)

    specs: dict[str, Any] = dict(in_specs=(w_spec, x_spec), out_specs=out_spec)
    mapped = jax.shard_map(local, mesh=_mesh(AxisType.Auto), **specs)
    args = (lora((4, 6)), x(8, 6))
    check(quax.quaxify(mapped), mapped, args)
    if inside and spec == "data":
        # quaxify inside: the weight crosses into the map as its leaves.
        inner = jax.shard_map(quax.quaxify(local), mesh=_mesh(AxisType.Auto), **specs)
        check(inner, mapped, args)


@pytest.mark.parametrize("axis", [0, 1])
def test_all_gather(axis):
    """Weights sharded at rest, and gathered where they are used."""

    def local(w, x):
        return jnp.tanh(x @ lax.all_gather(w, "i", axis=axis, tiled=True).T)

    w_spec = P("i", None) if axis == 0 else P(None, "i")
    mesh = _mesh(AxisType.Auto)
    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=(w_spec, P("i")), out_specs=P("i")
    )
    check(quax.quaxify(mapped), mapped, (lora((4, 6)), x(8, 6)))


@pytest.mark.parametrize("spec", [P("i", None), P(None, "i"), P(None, None)])
def test_sharding_constraint(spec):
    sharding = NamedSharding(_mesh(AxisType.Auto), spec)
    f = lambda w, x: lax.with_sharding_constraint(w, sharding) @ x
    check(quax.quaxify(f), f, (lora((4, 6)), x(6)))


@pytest.mark.parametrize("x_spec", [P("i", None), P(None, "i"), P(None, None)])
@pytest.mark.parametrize("w_spec", [P("i", None), P(None, "i"), P(None, None)])
@pytest.mark.parametrize("form", ["lora", "dora"])
def test_explicit_mesh(form, w_spec, x_spec):
    mesh = _mesh(AxisType.Explicit)
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
    with jax.set_mesh(mesh):
        w = lora((4, 6))
        w = replace(
            w,
            base=put(w.base, *w_spec),
            delta=replace(
                w.delta, a=put(w.a, None, w_spec[1]), b=put(w.b, w_spec[0], None)
            ),
        )
        w = w if form == "lora" else dora(w)
        out = P("i", None) if x_spec[0] else P(None, w_spec[0])
        f = lambda w, x: jnp.einsum("ti,oi->to", x, w, out_sharding=out).sum()
        g = lambda w, x: quax.quaxify(f)(w, x)
        grads = jax.jit(jax.grad(g, (0, 1)))(w, put(x(8, 6), *x_spec))
    plain = jax.grad(lambda w, x: jnp.einsum("ti,oi->to", x, densify(w)).sum(), (0, 1))
    assert_close(
        jax.device_get(jax.tree.leaves(grads)),
        jax.tree.leaves(plain(KINDS[form]((4, 6)), x(8, 6))),
    )


class _Unit(quax.ArrayValue):
    """Somebody else's value, whose structure an operation changes."""

    array: jax.Array
    unit: str = eqx.field(static=True)

    def aval(self):
        return jax.typeof(self.array)

    def materialise(self):
        return self.array


@quax.register(lax.mul_p)
def _(a: _Unit, b: _Unit, **params):
    return _Unit(lax.mul_p.bind(a.array, b.array, **params), a.unit + b.unit)


def test_other_values_keep_their_rules():
    unit = _Unit(jnp.ones(3), "m")
    loop = lambda u: lax.fori_loop(0, 2, lambda _, c: c * u, u)
    with pytest.raises(TypeError, match="carry changed structure"):
        quax.quaxify(loop)(unit)
    both = lambda u, w: lax.fori_loop(0, 2, lambda _, c: (c[0] * u, c[1]), (u, w))
    with pytest.raises(TypeError, match="A _Unit met `scan`"):
        quax.quaxify(both)(unit, lora((3, 3)))


# Compilation.


def _count(f):
    """`f`, and a list that grows whenever it is traced."""
    traces = []

    def counted(*args):
        traces.append(None)
        return f(*args)

    return counted, traces


_step = lambda w, x: jnp.tanh(w @ x)
COMPILED = {
    "jit(Q f)": lambda f: jax.jit(quax.quaxify(f)),
    "Q(jit f)": lambda f: quax.quaxify(jax.jit(f)),
    "jit(vmap(Q f))": lambda f: jax.jit(jax.vmap(quax.quaxify(f), (None, 1))),
    "jit(Q(vmap f))": lambda f: jax.jit(quax.quaxify(jax.vmap(f, (None, 1)))),
    "jit(grad(Q f))": lambda f: jax.jit(
        jax.grad(lambda w, x: quax.quaxify(f)(w, x).sum())
    ),
    "Q(vmap(jit f))": lambda f: quax.quaxify(jax.vmap(jax.jit(f), (None, 1))),
    "vmap(Q(jit f))": lambda f: jax.vmap(quax.quaxify(jax.jit(f)), (None, 1)),
    "grad(Q(jit f))": lambda f: jax.grad(
        lambda w, x, g=jax.jit(f): quax.quaxify(g)(w, x).sum()
    ),
    "jit(Q(checkpoint f))": lambda f: jax.jit(quax.quaxify(jax.checkpoint(f))),
    "jit(Q(scan f))": lambda f: jax.jit(quax.quaxify(_scanned(f))),
    "jit(scan(Q f))": lambda f: jax.jit(_scanned(quax.quaxify(f))),
    "jit(jvp(Q f))": lambda f: jax.jit(
        lambda w, x: jax.jvp(lambda x: quax.quaxify(f)(w, x), (x,), (x,))
    ),
    "jit(hessian(Q f))": lambda f: jax.jit(
        jax.hessian(lambda w, x: quax.quaxify(f)(w, x).sum(), 1)
    ),
}


def _scanned(f):
    return lambda w, xs: lax.scan(lambda c, x: (c + f(w, x).sum(), None), 0.0, xs)[0]


@pytest.mark.parametrize("nesting", COMPILED)
def test_new_values_trace_nothing(nesting):
    counted, traces = _count(_step)
    run = COMPILED[nesting](counted)
    run(lora((3, 3)), x(3, 3))
    first = len(traces)
    run(lora((3, 3), seed=3), x(3, 3, seed=4))
    assert len(traces) == first > 0


@pytest.mark.parametrize("loop", ["scan", "while", "cond", "checkpoint"])
def test_eager_control_flow_is_compiled_once(loop):
    def f(w, x):
        if loop == "scan":
            return lax.scan(_scan_body, (w, x), None, length=3)[0][1]
        if loop == "while":
            return lax.while_loop(_while_condition, _while_body, (0, w, x))[2]
        if loop == "cond":
            return lax.cond(x[0] > 0, _step, _other_step, w, x)
        return _checkpointed(w, x)

    run = quax.quaxify(f)
    expected = f(densify(lora((3, 3))), x(3))
    assert_close(run(lora((3, 3)), x(3)), expected)
    with jax.log_compiles(), _no_compilation():
        run(lora((3, 3), seed=3), x(3, seed=4))


def test_adapters_of_another_rank_through_the_same_loop():
    run = quax.quaxify(lambda w, x: lax.scan(_scan_body, (w, x), None, length=3)[0][1])
    loop = quax.quaxify(
        lambda w, x: lax.while_loop(_while_condition, _while_body, (0, w, x))[2]
    )
    for rank in (2, 3, 1):
        for dtype in (jnp.float64, jnp.float32):
            w = lora((3, 3), rank=rank)
            w = replace(w, delta=jax.tree.map(lambda x: x.astype(dtype), w.delta))
            for f in (run, loop):
                assert_close(f(w, x(3)), f(densify(w), x(3)), rtol=1e-5, atol=1e-5)


def _scan_body(carry, _):
    w, x = carry
    return (w, jnp.tanh(w @ x)), None


def _while_condition(carry):
    return carry[0] < 3


def _while_body(carry):
    n, w, x = carry
    return n + 1, w, jnp.tanh(w @ x)


def _other_step(w, x):
    return jnp.sin(w @ x)


_checkpointed = jax.checkpoint(_step)


class _no_compilation:
    def __enter__(self):
        self.before = _compilations()

    def __exit__(self, *_):
        assert _compilations() == self.before


_events: list = []


def _listen(event: str, duration_secs: float, **_):
    del duration_secs
    if "backend_compile" in event:
        _events.append(event)


jax.monitoring.register_event_duration_secs_listener(_listen)


def _compilations() -> int:
    return len(_events)


def test_a_hundred_billion_parameters_abstractly():
    def make(key):
        layer = lambda key: eqx.nn.MLP(12288, 12288, 49152, 1, key=key)
        return eqx.filter_vmap(layer)(jr.split(key, 96))

    model = eqx.filter_eval_shape(make, jr.key(0))
    model = loraify(model, 8, jr.key(1))
    assert sum(x.size for x in jax.tree.leaves(eqx.filter(model, _is_struct))) > 1e11

    def run(model, x):
        dynamic, static = eqx.partition(model, eqx.is_array)
        step = lambda x, layer: (eqx.combine(layer, static)(x), None)
        return lax.scan(step, x, dynamic)[0]

    out = eqx.filter_eval_shape(quax.quaxify(run), model, jnp.zeros(12288))
    assert out.shape == (12288,)


def _is_struct(x):
    return isinstance(x, jax.ShapeDtypeStruct)


def test_donation():
    model = adapted(eqx.nn.MLP(3, 3, 8, 2, key=jr.key(0)))
    params, frozen = partition(model)

    @eqx.filter_jit(donate="all-except-first")
    def step(frozen, params):
        loss = lambda p: quax.quaxify(_call)(eqx.combine(p, frozen), jnp.ones(3)).sum()
        return eqx.apply_updates(params, eqx.filter_grad(loss)(params))

    new = step(frozen, params)
    assert all(x.is_deleted() for x in jax.tree.leaves(params))
    assert not any(x.is_deleted() for x in jax.tree.leaves(frozen) if eqx.is_array(x))
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(new))


def _call(model, x):
    return model(x)


def test_debug_print(capfd):
    f = lambda w, x: jax.debug.print("y = {y}", y=(w @ x).sum())
    jax.jit(quax.quaxify(f))(lora((3, 3)), x(3))
    jax.effects_barrier()
    assert "y = " in capfd.readouterr().out


def test_checkpoint_saves_what_hand_written_saves():
    """The backward pass recomputes the products of the factors, still factored."""
    w, u = lora((64, 64)), x(32, 64)
    f = lambda w, x: jnp.tanh(jnp.tanh(x @ w.T) @ w.T)
    loss = lambda wrap: lambda w, x: (quax.quaxify(wrap(f))(w, x) ** 2).sum()

    def residuals(wrap):
        params, frozen = partition(w)
        g = lambda p: loss(wrap)(eqx.combine(p, frozen), u)
        return sum(x.size for x in jax.tree.leaves(jax.vjp(g, params)[1]))

    assert residuals(jax.checkpoint) < residuals(lambda f: f)
    assert_close(
        value_and_grads(loss(jax.checkpoint), (w, u)),
        value_and_grads(loss(lambda f: f), (w, u)),
    )


# Other libraries.


@pytest.mark.slow
@pytest.mark.parametrize(
    "adjoint", [diffrax.RecursiveCheckpointAdjoint(), diffrax.DirectAdjoint()]
)
def test_diffrax(adjoint):
    mlp = adapted(eqx.nn.MLP(2, 2, 8, 1, jnp.tanh, key=jr.key(0)))

    def solve(wrap, mlp, y0):
        field = wrap(lambda t, y, mlp: mlp(y))
        return diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            diffrax.Heun(),
            t0=0.0,
            t1=1.0,
            dt0=0.1,
            y0=y0,
            args=mlp,
            adjoint=adjoint,
        ).ys

    ours = lambda mlp, y0: solve(quax.quaxify, mlp, y0)
    check(ours, lambda mlp, y0: solve(lambda f: f, mlp, y0), (mlp, x(2)))
    # The weights stay factored inside the solver.
    params, static = eqx.partition(mlp, eqx.is_array)
    run = lambda params, y0: ours(eqx.combine(params, static), y0)
    names = [str(e.primitive) for e in equations(jax.make_jaxpr(run)(params, x(2)))]
    assert names.count("thin_dot_general") >= 4


def test_a_training_loop_of_optax():
    model = adapted(eqx.nn.MLP(3, 1, 16, 1, key=jr.key(0)))
    inputs = x(32, 3)
    targets = jnp.sin(inputs.sum(1, keepdims=True))
    optim = optax.adam(1e-2)
    opt_state = optim.init(partition(model)[0])

    @filter_value_and_grad
    def loss(model, inputs, targets):
        out = jax.vmap(quax.quaxify(model))(inputs)
        return jnp.mean((out - targets) ** 2)

    @eqx.filter_jit
    def step(model, opt_state):
        value, grads = loss(model, inputs, targets)
        updates, opt_state = optim.update(grads, opt_state)
        return eqx.apply_updates(model, updates), opt_state, value

    first = model
    values = []
    for _ in range(50):
        model, opt_state, value = step(model, opt_state)
        values.append(float(value))
    assert values[-1] < 0.5 * values[0]
    for old, new in zip(first.layers, model.layers):
        np.testing.assert_array_equal(old.weight.base, new.weight.base)
    merged = merge(model)
    assert_close(
        jax.vmap(merged)(inputs), jax.vmap(quax.quaxify(model))(inputs), atol=1e-6
    )
    assert not eqx.tree_equal(merged, merge(first))
