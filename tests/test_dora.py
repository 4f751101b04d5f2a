"""DoRA: what its entries in the tables of kinds and of PEFT do not say."""

import functools as ft
import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jaxtyping
import numpy as np
import pytest
import quax
from files import bits
from forms import dora
from helpers import (
    assert_close,
    check,
    check_derivative,
    dense,
    DERIVATIVES,
    equations,
    formed,
    KINDS,
    lora,
    quantised,
    TRANSFORMS,
    x,
)
from jax.sharding import AxisType, PartitionSpec as P
from test_rules import PROGRAMS

import lora_quax
from lora_quax import (
    Adapt,
    DoRA,
    FullArray,
    LoraArray,
    loraify,
    LowRankArray,
    merge,
    partition,
    QuantisedArray,
    ScaledArray,
    unload,
)
from lora_quax._arrays.base import lower, replace


MESH = jax.make_mesh((2,), ("i",), axis_types=(AxisType.Auto,))


def uneven(w: LoraArray, per: Any = "rows", detached=True) -> DoRA:
    out = DoRA(w, per=per, detached=detached)
    change = 0.3 * jnp.cos(jnp.arange(out.magnitude.size)).reshape(out.magnitude.shape)
    return replace(out, magnitude=out.magnitude + change.astype(out.magnitude.dtype))


# What a fresh one computes.


LAYERS = {
    "linear": (lambda key: eqx.nn.Linear(48, 33, key=key), (48,)),
    "conv 1d": (lambda key: eqx.nn.Conv1d(3, 5, 3, key=key), (3, 9)),
    "conv 2d": (lambda key: eqx.nn.Conv2d(3, 5, (3, 2), key=key), (3, 9, 8)),
    "conv 3d": (lambda key: eqx.nn.Conv3d(3, 5, 2, key=key), (3, 4, 5, 4)),
    "groups": (lambda key: eqx.nn.Conv2d(4, 6, 3, groups=2, key=key), (4, 9, 8)),
    "transposed": (lambda key: eqx.nn.ConvTranspose2d(3, 5, 3, key=key), (3, 6, 5)),
    "embedding": (lambda key: eqx.nn.Embedding(50, 7, key=key), None),
}


def _bfloat16(layer):
    return jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if eqx.is_inexact_array(x) else x, layer
    )


def _int4(layer):
    w = layer.weight
    codes = jnp.asarray(np.random.default_rng(0).integers(-8, 8, w.shape))
    scale = jnp.full((*w.shape[:1], *(1 for _ in w.shape[1:])), 0.01)
    return eqx.tree_at(
        lambda l: l.weight, layer, QuantisedArray(codes, scale, kind="int4")
    )


BASES = {"float32": lambda layer: layer, "bfloat16": _bfloat16, "int4": _int4}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_fresh_one_is_the_identity(layer, base):
    make, shape = LAYERS[layer]
    plain = BASES[base](make(jr.key(0)))
    targets = [eqx.nn.Linear, eqx.nn.Conv, eqx.nn.ConvTranspose, eqx.nn.Embedding]
    targets = [kind for kind in targets if isinstance(plain, kind)]
    model = loraify(plain, 4, jr.key(1), targets=targets, use_dora=True)
    assert isinstance(model.weight, DoRA)
    assert model.weight.per == ("columns" if layer == "embedding" else "rows")
    assert model.weight.magnitude.dtype == jnp.float32
    np.testing.assert_array_equal(eqx.filter_jit(lower)(model.weight).scale, 1.0)
    inputs = jnp.array(3) if shape is None else x(*shape).astype(model.weight.dtype)
    run = eqx.filter_jit(lambda model: quax.quaxify(model)(inputs))
    lora = loraify(plain, 4, jr.key(1), targets=targets)
    np.testing.assert_array_equal(run(model), run(lora))
    if base == "int4":
        plain = lora_quax.dequantise(plain)
    assert bits(merge(model)) == bits(plain)


@pytest.mark.parametrize("shape", [(33, 48), (3, 33, 48), (2, 3, 5, 6)])
def test_it_starts_as_what_the_update_starts_as(shape):
    """With both factors drawn, and where layers or experts are stacked."""
    w = lora(shape, dtype=jnp.float32)
    scale = eqx.filter_jit(lower)(DoRA(w)).scale
    assert scale.shape == (*shape[:-1], 1)
    np.testing.assert_allclose(scale, 1, rtol=0, atol=5e-7)


# Accuracy.


def test_the_scale_is_accurate_near_one():
    """`scale - 1` has the digits of the update, and not those of the norm."""
    w, a, b = (
        np.random.default_rng(i).normal(size=s)
        for i, s in enumerate([(64, 256), (4, 256), (64, 4)])
    )
    w, a = (jnp.asarray(y, jnp.float32) for y in (w, a))
    for size in 1e-1, 1e-3, 1e-5:
        b32 = jnp.asarray(size * b, jnp.float32)
        before = DoRA(LoraArray.from_parts(w, LowRankArray(a, 0 * b32)))
        after = LowRankArray(a, b32)
        after = DoRA.from_parts(LoraArray.from_parts(w, after), before.magnitude)
        found = np.asarray(lower(after).scale, np.float64).ravel()
        w64, a64, b64 = (np.asarray(y).astype(np.float64) for y in (w, a, b32))
        norm = ft.partial(np.linalg.norm, axis=1)
        exact = norm(w64) / norm(w64 + b64 @ a64)
        # The type of the scale itself has a spacing of 1.2e-7 there, and so rounds by
        # half of that. `magnitude / norm` is wrong by 1e-7 and more.
        assert np.abs(found - exact).max() < 8e-8, size


def test_a_magnitude_moves_by_as_little_as_its_type_can_say():
    w = lora((16, 64), dtype=jnp.float32)
    w = LoraArray.from_parts(w.base, replace(w.delta, b=0 * w.b))
    start = DoRA(w)
    step = jnp.nextafter(start.magnitude, jnp.inf)
    moved = lower(replace(start, magnitude=step)).scale.ravel()
    exact = np.float64(step) / np.float64(start.magnitude)
    np.testing.assert_allclose(moved, exact, rtol=0, atol=6.1e-8)


def test_on_bfloat16_the_norms_are_those_of_its_numbers():
    w = lora((24, 128), dtype=jnp.bfloat16)
    scale = eqx.filter_jit(lower)(uneven(w)).scale
    magnitude = np.asarray(uneven(w).magnitude, np.float64)
    base, a, b = (np.asarray(y).astype(np.float64) for y in (w.base, w.a, w.b))
    norm = np.linalg.norm(base + w.scaling * b @ a, axis=1)
    np.testing.assert_allclose(scale.ravel(), magnitude / norm, rtol=2e-6)


def test_rows_of_zeros():
    """As padding has: no NaN, neither forward nor backward, whatever is detached."""
    w = lora((4, 3), dtype=jnp.float32)
    zero = replace(w, base=w.base.at[1].set(0.0))
    zero = replace(zero, delta=replace(w.delta, b=w.b.at[1].set(0.0)))
    for detached in True, False:
        fresh = DoRA(zero, detached=detached)
        assert fresh.magnitude[1] == 0 and lower(fresh).scale[1, 0] == 1
        f = lambda w: jnp.sum(quax.quaxify(jnp.matmul)(w, jnp.ones(3)) ** 2)
        grads = jax.tree.leaves(lora_quax.filter_grad(f)(fresh))
        assert all(np.isfinite(g).all() for g in grads)


def test_an_update_that_takes_the_base_away_has_no_negative_square():
    w = lora((6, 2), dtype=jnp.float32)
    delta = LowRankArray(jnp.eye(2), -w.base * (1 + 1e-6))
    scale = lower(DoRA.from_parts(LoraArray.from_parts(w.base, delta), jnp.ones(6)))
    assert np.isfinite(scale.scale).all()


# Programs, of those that the table of kinds has not: columns, and what is not detached.

FORMS = {
    "columns": ft.partial(uneven, per="columns"),
    "not detached": ft.partial(uneven, detached=False),
    "columns, not detached": ft.partial(uneven, per="columns", detached=False),
}
SOME = ["many tokens", "ensemble", "w[ids]", "tied head", "concatenate [w, x]"]


def _case(program, make):
    fn, weight, other = PROGRAMS[program]
    weight = dict(weight)
    return fn, [make(lora(weight.pop("shape"), **weight)), x(*other)]


@pytest.mark.parametrize("program", SOME)
@pytest.mark.parametrize("form", FORMS)
def test_programs(form, program, x64):
    fn, args = _case(program, FORMS[form])
    check(quax.quaxify(fn), fn, args)


@pytest.mark.slow
@pytest.mark.parametrize("program", ["many tokens", "w[ids]", "conv 2d"])
@pytest.mark.parametrize("nesting", [t for t in TRANSFORMS if "vmap" in t])
@pytest.mark.parametrize("form", ["not detached", "columns, not detached"])
def test_transforms(form, nesting, program, x64):
    if "columns" in form and "conv" in program:
        return  # It would be scaled by inputs and kernel at once.
    fn, args = _case(program, FORMS[form])
    transform = TRANSFORMS[nesting]
    check(transform.ours(fn), transform.plain(fn), transform.arguments(args))


@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.parametrize("form", ["not detached", "columns"])
def test_derivatives(form, derivative, x64):
    fn, args = _case("many tokens", FORMS[form])
    check_derivative(DERIVATIVES[derivative], fn, args)


def test_a_hessian(x64):
    fn, (w, inputs) = _case("many tokens", FORMS["not detached"])
    params, rest = partition(w)

    def loss(run):
        return lambda params: jnp.sum(run(fn)(eqx.combine(params, rest), inputs) ** 2)

    ours = jax.hessian(loss(quax.quaxify))(params)
    plain = jax.hessian(loss(lambda f: lambda w, x: f(dense(w), x)))(params)
    ours, plain = jax.tree.leaves(ours), jax.tree.leaves(plain)
    assert len(ours) == 9
    assert_close(ours, plain, rtol=1e-8, atol=1e-8)


ON = {
    "nested": lambda w: replace(w, base=lora(w.shape, seed=3)),
    "full": lambda w: replace(w, base=FullArray(w.base)),
    "quantised": lambda w: replace(w, base=quantised(w.shape)),
    "scaled": lambda w: replace(
        w, base=ScaledArray(w.base, jnp.cos(jnp.arange(w.shape[0]))[:, None])
    ),
    "dora": lambda w: replace(w, base=dora(lora(w.shape, seed=3))),
    "a low-rank array": lambda w: replace(w, base=lora(w.shape, seed=3).delta),
    "another update": lambda w: KINDS["loha"](w.shape),
    "a base that trains": lambda w: replace(w, stop_gradient=False),
}


@pytest.mark.parametrize("detached", [True, False])
@pytest.mark.parametrize("on", ON)
def test_bases_and_updates(on, detached, x64):
    w = uneven(ON[on](lora((4, 6))), detached=detached)
    fn = lambda w, x: jnp.tanh(w @ x)
    check(quax.quaxify(fn), fn, (w, x(6)))
    assert_close(eqx.filter_jit(merge)(w), dense(w), rtol=1e-12, atol=1e-12)


def test_norms_of_a_base_that_is_scaled_the_other_way_are_refused():
    w = lora((4, 6), dtype=jnp.float32)
    w = replace(w, base=ScaledArray(w.base, jnp.ones((1, 6))))
    with pytest.raises(lora_quax.MaterialiseError, match="not those of the scaled"):
        DoRA(w)


# What is computed, and how often.


def _step(w, x):
    params, rest = partition(w)

    def loss(params):
        w = eqx.combine(params, rest)
        return jnp.sum(jnp.tanh(jax.vmap(quax.quaxify(jnp.matmul), (None, 0))(w, x)))

    return jax.value_and_grad(loss)(params)


@pytest.mark.parametrize("detached", [True, False])
@pytest.mark.parametrize("per", ["rows", "columns"])
def test_the_update_is_not_formed(per, detached):
    w = uneven(lora((96, 112), rank=4, dtype=jnp.float32), per, detached)
    inputs = x(5, 112).astype(jnp.float32)
    products = [
        eqn
        for eqn in equations(jax.make_jaxpr(_step)(w, inputs))
        if "dot_general" in str(eqn.primitive)
    ]
    assert products
    assert all({96, 112} != {*eqn.outvars[0].aval.shape} for eqn in products)
    assert not formed(quax.quaxify(jnp.matmul), (w, inputs[0]))
    compiled: Any = jax.jit(_step).lower(w, inputs).compile()
    shapes = r"= f32\[(96,112|112,96)\]\S* (\w[\w-]*)\("
    made = {op for _, op in re.findall(shapes, compiled.as_text())}
    # The square of the base, whose sum is the norm, and the base turned.
    assert made <= {"parameter", "multiply", "transpose", "copy", "bitcast"}
    if detached:  # Nor is anything else of its size held.
        assert compiled.memory_analysis().temp_size_in_bytes < 4 * 96 * 112


@pytest.mark.parametrize("nesting", ["vmap(Q f)", "Q(vmap f)"])
def test_the_norms_are_those_of_the_weight_and_not_of_each_example(nesting, x64):
    w, inputs = uneven(lora((7, 11))), x(13, 11)
    f = TRANSFORMS[nesting].ours(lambda w, x: jnp.tanh(w @ x))
    roots = [
        eqn.outvars[0].aval.shape
        for eqn in equations(jax.make_jaxpr(f)(w, inputs))
        if str(eqn.primitive) == "sqrt"
    ]
    assert roots == [(7,)] * 2  # Of the base, and of the sum.


@pytest.mark.parametrize("loop", ["scan", "while"])
def test_what_a_loop_reads_in_each_step_is_lowered_before_it(loop, x64):
    def scanned(w, x):
        return jax.lax.scan(lambda h, x: (jnp.tanh(w @ h + x), None), x[0], x)[0]

    def counted(w, x):
        step = lambda c: (c[0] + 1, jnp.tanh(w @ c[1]))
        return jax.lax.while_loop(lambda c: c[0] < 3, step, (0, x[0]))[1]

    fn = scanned if loop == "scan" else counted
    args = uneven(lora((5, 5))), x(4, 5)
    assert_close(quax.quaxify(fn)(*args), fn(dense(args[0]), args[1]))
    jaxpr = jax.make_jaxpr(quax.quaxify(fn))(*args)
    loops = [eqn for eqn in equations(jaxpr) if str(eqn.primitive) == loop]
    assert loops and not any(
        str(inner.primitive) == "sqrt"
        for eqn in loops
        for body in eqn.params.values()
        if hasattr(body, "jaxpr")
        for inner in equations(body)
    )


@pytest.mark.parametrize("axis", ["rows", "columns", "columns, gathered"])
@pytest.mark.parametrize("per", ["rows", "columns"])
def test_inside_a_shard_map_norms_are_of_all_or_refused(per, axis, x64):
    """Of its leaves each device has a part, of whole rows or of whole columns."""
    w = uneven(lora((4, 6)), per)
    spec = P("i", None) if axis == "rows" else P(None, "i")
    specs = replace(w, magnitude=P("i" if per == axis.split(",")[0] else None))
    of_a, of_b = P(None, spec[1]), P(spec[0], None)
    delta = replace(w.lora.delta, a=of_a, b=of_b)
    specs = replace(specs, lora=replace(w.lora, base=spec, delta=delta))

    def gathered(w):
        gather = ft.partial(jax.lax.all_gather, axis_name="i", tiled=True)
        b = jax.lax.pcast(w.lora.b, ("i",), to="varying")
        delta = replace(w.lora.delta, a=gather(w.lora.a, axis=1), b=b)
        lora = replace(w.lora, base=gather(w.lora.base, axis=1), delta=delta)
        kept = w.magnitude if per == "rows" else gather(w.magnitude)
        return replace(w, lora=lora, magnitude=kept)

    def local(w, x):
        w = gathered(w) if "gathered" in axis else w
        y = quax.quaxify(jnp.matmul)(w, x)
        return jax.lax.psum(y, "i") if axis == "columns" else y

    of_x, of_y = {
        "rows": (P(), P("i")),
        "columns": (P("i"), P()),
        "columns, gathered": (P(None, "i"), P(None, "i")),
    }[axis]
    f = jax.shard_map(local, mesh=MESH, in_specs=(specs, of_x), out_specs=of_y)
    inputs = x(6, 2) if "gathered" in axis else x(6)
    if axis in ("rows", "columns") and axis != per:
        match = f"norms of the {per} of a DoRA were asked for inside a `shard_map`, wh"
        with pytest.raises(ValueError, match=match):
            f(w, inputs)
    else:
        assert_close(jax.jit(f)(w, inputs), dense(w) @ inputs)


# How it is asked for, and what is refused.


class _Model(eqx.Module):
    line: eqx.nn.Linear
    table: eqx.nn.Embedding
    kernel: jax.Array  # (in, out)

    def __init__(self):
        self.line = eqx.nn.Linear(6, 5, key=jr.key(0))
        self.table = eqx.nn.Embedding(9, 6, key=jr.key(1))
        self.kernel = jr.normal(jr.key(2), (6, 5))


ALL = [eqx.nn.Linear, eqx.nn.Embedding, "kernel"]
_per_column = ft.partial(DoRA, per="columns", detached=False)


def test_it_is_asked_for_by_target():
    plain = _Model()
    specs = {eqx.nn.Linear: True, eqx.nn.Embedding: Adapt(use_dora=False)}
    specs["kernel"] = Adapt(rank=2, use_dora=_per_column)
    model = loraify(plain, 3, jr.key(0), targets=specs, use_dora=True)
    assert isinstance(model.line.weight, DoRA) and model.line.weight.detached
    assert isinstance(model.table.weight, LoraArray)
    assert isinstance(model.kernel, DoRA)
    assert model.kernel.per == "columns" and not model.kernel.detached
    assert model.kernel.magnitude.shape == (5,) and model.kernel.rank == 2
    assert eqx.tree_equal(unload(model), plain)
    some = loraify(plain, 3, jr.key(0), targets={"line": Adapt(use_dora=True)})
    assert eqx.tree_equal(some.line, model.line)
    # The factors are those that it would have without.
    without = loraify(plain, 3, jr.key(0), targets=ALL)
    assert eqx.tree_equal(without.line.weight, model.line.weight.lora)


def test_an_abstract_model_and_a_traced_one():
    plain = _Model()
    make = ft.partial(loraify, rank=3, targets=ALL, use_dora=True)
    model = make(plain, key=jr.key(0))
    abstract = eqx.filter_eval_shape(lambda: plain)
    made = make(abstract, key=jax.eval_shape(lambda: jr.key(0)))
    assert jax.tree.structure(made) == jax.tree.structure(model)
    types = lambda tree: [(y.shape, y.dtype) for y in jax.tree.leaves(tree)]
    assert types(made) == types(model)
    traced = eqx.filter_jit(lambda plain: make(plain, key=jr.key(0)))(plain)
    assert_close(eqx.filter(traced, eqx.is_array), eqx.filter(model, eqx.is_array))
    said = str(lora_quax.summary(model))
    assert str(lora_quax.summary(made)) == said


def test_a_file_works_on_another_base(tmp_path):
    """The norms are those of the base that there is, and none are kept."""
    plain = _Model()
    model = loraify(plain, 3, jr.key(0), targets=ALL, use_dora=True)
    lora_quax.save_adapter(tmp_path / "a.safetensors", model, base=plain)
    other = jax.tree.map(lambda x: 1.5 * x if eqx.is_array(x) else x, plain)
    with pytest.warns(UserWarning, match="trained on another base"):
        loaded = lora_quax.load_adapter(tmp_path / "a.safetensors", other)
    # Half as large again, and of the norms that were trained.
    np.testing.assert_allclose(merge(loaded).line.weight, plain.line.weight, rtol=1e-6)


# So that a type checker lets them pass.
_dora: Any = DoRA
_loraify: Any = loraify
_adapt: Any = Adapt

WRONG: dict[str, Any] = {
    "per": (lambda w: _dora(w, per="outputs"), "`per` must be 'rows' or 'columns'"),
    "detached": (lambda w: _dora(w, detached=1), "`detached` must be True or False"),
    "no LoraArray": (lambda w: _dora(w.base), "DoRA is around a `LoraArray`"),
    "magnitudes": (
        lambda w: DoRA.from_parts(w, jnp.ones(6)),
        r"one for each of the rows, of shape \(5,\); got \(6,\)",
    ),
    "use_dora": (
        lambda w: _loraify(_Model(), 2, jr.key(0), use_dora="columns"),
        "`use_dora` must be True, False, or a function",
    ),
    "a function of something else": (
        lambda w: _loraify(_Model(), 2, jr.key(0), use_dora=lambda w: w),
        "`use_dora` must give a `DoRA`",
    ),
    "in a spec": (lambda w: _adapt(use_dora=3), "`use_dora` must be True, False"),
}


@pytest.fixture
def untyped():
    """As it is for users, whose types nobody checks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name, untyped):
    call, match = WRONG[name]
    with pytest.raises((TypeError, ValueError), match=match):
        call(lora((5, 6), dtype=jnp.float32))
