"""Forms of adaptation, those of lora_quax and those that it has never heard of, in all
that it does: rules, whole programs, transformations, and what becomes of models,
optimisers, files and meshes.

That they pass `test_rules.test_kinds`, they have from their entries in `helpers.KINDS`.
"""

import inspect
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
import quax
from files import bits
from forms import FORMS, OneOfSeveral, SCALED, ScaledRows
from helpers import (
    adapted,
    assert_close,
    check,
    check_all,
    dense,
    densify,
    DERIVATIVES,
    equations,
    filled,
    KINDS,
    lora,
    low_rank,
    scalar,
    some_of,
    TRANSFORMS,
    x,
)
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from test_programs import FACTORED, LAYERS, MATERIALISED, ONLY_FORWARD
from test_rules import PROGRAMS, SINGLE

from lora_quax import (
    AbstractDelta,
    filter_grad,
    labels,
    load_adapter,
    LoraArray,
    LowRankArray,
    MaterialiseError,
    merge,
    partition,
    role,
    save_adapter,
    summary,
    trainable,
    unload,
)
from lora_quax._arrays.base import is_adapted


pytestmark = pytest.mark.usefixtures("x64")


def make(form, shape, **kwargs):
    return KINDS[form](shape, **kwargs)


def of_form(model, form):
    """A model of `loraify` with its updates in another form."""
    is_lora = lambda x: isinstance(x, LoraArray)
    return jax.tree.map(
        lambda x: FORMS[form](x) if is_lora(x) else x, model, is_leaf=is_lora
    )


@pytest.mark.parametrize("form", [OneOfSeveral, ScaledRows])
def test_a_form_is_a_few_lines(form):
    assert len(inspect.getsource(form).splitlines()) <= 30


# Programs.


def _args(form, program, allow_materialise=False):
    fn, weight, other = PROGRAMS[program]
    weight = dict(weight, allow_materialise=allow_materialise)
    return fn, [make(form, weight.pop("shape"), **weight), x(*other)]


REPRESENTATIVE = [
    "many tokens",
    "ensemble",
    "heads in",
    "conv, feature groups",
    "w[ids]",
    "tied head",
    "pad",
    "concatenate [w, x]",
]
# `jit` and `checkpoint` bring the rules nothing new.
NESTINGS = [t for t in TRANSFORMS if "vmap" in t or "grad" in t]

# Where a transform, inside `quaxify`, does to the weight what has no low rank; with a
# reason that the error gives.
_SCALE = "the scale of a kernel varies along more than outputs, or inputs"
_BRANCHES = "the branches return different kinds of array in this place"
_CARRY = "a carry must be of one kind from step to step"
_SCALE_OUT = "a scale is multiplied out before its derivative"
REFUSED = {
    kind: {
        ("Q(grad f)", "conv, feature groups"): _SCALE,
        ("Q(f)", "cond, one branch dense"): _BRANCHES,
        ("Q(f)", "scan, carry plus input"): _CARRY,
        ("Q(f)", "custom_vjp of a weight"): _SCALE_OUT,
        ("Q(f)", "filter_custom_vjp of a weight"): _SCALE_OUT,
        ("Q(f)", "error_if of a weight"): _SCALE_OUT,
    }
    for kind in SCALED
}


# A join is a new array of the program's own, in which a scale is multiplied out.
MULTIPLIED_OUT = {("ia3", p) for p in ("mask", "tril", "ravel", "switched weight")}


def _reason(form, program, transform="Q(f)"):
    return REFUSED.get(form, {}).get((transform, program))


@pytest.mark.slow
@pytest.mark.parametrize("form, program", some_of(FORMS, REPRESENTATIVE, quick=0))
def test_transforms(form, program):
    cases = {}
    for name in NESTINGS:
        reason, t = _reason(form, program, name), TRANSFORMS[name]
        fn, args = _args(form, program, reason is not None)
        cases[name] = t.ours(fn), t.plain(fn), t.arguments(args)
        if reason is not None:
            fn, args = _args(form, program)
            with pytest.raises(MaterialiseError, match=reason):
                t.ours(fn)(*t.arguments(args))
    check_all(cases, **SINGLE.get(program, {}))


def _check_derivative(derivative, f, args):
    ours = eqx.filter_jit(DERIVATIVES[derivative](quax.quaxify(f)))
    plain = eqx.filter_jit(DERIVATIVES[derivative](lambda *args: f(*densify(args))))
    assert_close(ours(*args), plain(*args), rtol=1e-8, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.parametrize("program", ["many tokens", "conv 2d", "w[ids]", "w + x"])
@pytest.mark.parametrize("form", FORMS)
def test_derivatives(form, program, derivative):
    _check_derivative(derivative, *_args(form, program))


@pytest.mark.parametrize("form, program", some_of(FORMS, FACTORED | MATERIALISED))
def test_functions(form, program):
    f = (FACTORED | MATERIALISED)[program]
    reason = _reason(form, program)
    if program in MATERIALISED:
        reason = "needs the dense weight"
    args = make(form, (3, 3), allow_materialise=reason is not None), x(3)
    check(quax.quaxify(f), f, args)
    if reason is not None and (form, program) not in MULTIPLIED_OUT:
        with pytest.raises(MaterialiseError, match=reason):
            quax.quaxify(f)(make(form, (3, 3)), x(3))


@pytest.mark.parametrize("form, program", some_of(FORMS, ONLY_FORWARD))
def test_while_loops(form, program):
    f, args = ONLY_FORWARD[program], (make(form, (3, 3)), x(3))
    ours = eqx.filter_jit(quax.quaxify(f))
    assert_close(ours(*args), f(*densify(args)))


@pytest.mark.parametrize("form, layer", some_of(FORMS, LAYERS))
def test_layers(form, layer):
    make, shape, options, call = LAYERS[layer]
    model = filled(lambda key: adapted(make(key), **options), jr.key(0))
    model = of_form(model, form)
    params, static = eqx.partition(model, eqx.is_array)
    program = lambda params, x: call(eqx.combine(params, static), x)
    check(quax.quaxify(program), program, (params, x(*shape)))


# Models.


class _Net(eqx.Module):
    """Layers stacked and scanned, a convolution, and what is not adapted."""

    conv: eqx.nn.Conv1d
    layers: eqx.nn.Linear
    norm: eqx.nn.LayerNorm

    def __init__(self, key):
        self.conv = eqx.nn.Conv1d(2, 4, 3, padding=1, key=key)
        layer = lambda key: eqx.nn.Linear(6, 6, key=key)
        self.layers = eqx.filter_vmap(layer)(jr.split(key, 3))
        self.norm = eqx.nn.LayerNorm(6)

    def __call__(self, x):
        arrays, static = eqx.partition(self.layers, eqx.is_array)

        def step(x, layer):
            return jnp.tanh(jax.vmap(eqx.combine(layer, static))(x)), None

        return jax.vmap(self.norm)(lax.scan(step, self.conv(x), arrays)[0])


@pytest.fixture(params=FORMS)
def form(request):
    return request.param


@pytest.fixture
def model(form):
    return of_form(adapted(_Net(jr.key(0))), form)


TRAINS = {
    "vera": {"lambda_b", "lambda_d"},
    "loha": {"a", "b"},
    "lokr": {"w1", "w2"},
    "rows": {"values"},
    "chosen": {"a", "b"},
    "ia3": {"scale"},
    "scaled rows": {"a", "b", "scale"},
    "dora": {"a", "b", "magnitude"},
}


def test_labels_are_the_roles(form, model):
    said = labels(model)
    assert jax.tree.structure(said) == jax.tree.structure(model)
    assert {*jax.tree.leaves(said)} == TRAINS[form] | {"frozen"}
    assert {*jax.tree.leaves(said.conv.weight)} == TRAINS[form] | {"frozen"}
    assert said.conv.bias == "frozen"
    assert trainable(model) == jax.tree.map(lambda name: name != "frozen", said)
    abstract = eqx.filter_eval_shape(lambda: model)
    assert labels(abstract) == said
    params, rest = partition(model)
    assert labels(params).conv.weight == eqx.filter(said, trainable(model)).conv.weight
    assert bits(eqx.combine(params, rest)) == bits(model)


def _loss(model, x):
    return (model(x) ** 2 * jnp.arange(6)).sum()


def test_gradients_are_those_of_the_dense_weights(model):
    inputs = x(2, 6)
    grads = filter_grad(quax.quaxify(_loss))(model, inputs)
    plain = eqx.filter_grad(lambda model: _loss(densify(model), inputs))(model)
    assert_close(
        jax.tree.leaves(grads), jax.tree.leaves(eqx.filter(plain, trainable(model)))
    )
    assert all(jnp.any(g != 0) for g in jax.tree.leaves(grads))


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["ours", "unmodified"])
def test_optimisers(form, model, loop):
    names = TRAINS[form] | {"frozen"}
    steps = {name: optax.adamw(0.1) for name in names - {"frozen"}}
    optim = optax.multi_transform({**steps, "frozen": optax.set_to_zero()}, labels)
    if loop == "ours":
        of, grad = (lambda model: partition(model)[0]), filter_grad
    else:
        of, grad = (lambda m: eqx.filter(m, eqx.is_inexact_array)), eqx.filter_grad
    updates, _ = optim.update(
        grad(quax.quaxify(_loss))(model, x(2, 6)), optim.init(of(model)), of(model)
    )
    after = eqx.apply_updates(model, updates)
    (new, rest), (old, old_rest) = partition(after), partition(model)
    assert bits(rest) == bits(old_rest)
    assert all(map(jnp.any, jax.tree.leaves(jax.tree.map(jnp.not_equal, new, old))))


def test_merge_and_unload(model):
    merged = merge(model)
    assert not any(
        map(is_adapted, jax.tree.leaves(merged, is_leaf=is_adapted))
    ) and jax.tree.structure(merged) == jax.tree.structure(unload(model))
    assert_close(merged, densify(model), rtol=1e-12, atol=1e-12)
    assert_close(eqx.filter_jit(merge)(model), merged, rtol=1e-12, atol=1e-12)
    assert bits(unload(model)) == bits(_Net(jr.key(0)))
    abstract = eqx.filter_eval_shape(lambda: model)
    shapes = lambda tree: [(y.shape, y.dtype) for y in jax.tree.leaves(tree)]
    assert shapes(merge(abstract)) == shapes(merged)
    assert bits(merge(model, donate=True)) == bits(merged)


RANKS = {
    "vera": 2,
    "loha": 4,
    "lokr": 4,
    "rows": 2,
    "chosen": 2,
    "ia3": None,
    "scaled rows": 2,
    "dora": 2,
}


def test_summary(form, model):
    said = summary(model)
    assert [row.path for row in said.rows] == ["conv.weight", "layers.weight"]
    assert [row.rank for row in said.rows] == [RANKS[form]] * 2
    params, rest = partition(model)
    count = lambda tree: sum(
        y.size for y in jax.tree.leaves(tree) if eqx.is_inexact_array(y)
    )
    assert said.trainable == count(params)
    # Of each stacked layer, and of the kernel.
    index = {"chosen": 3 + 1, "rows": 2 * (3 + 1)}.get(form, 0)
    assert said.frozen == count(rest) + index
    assert "full" not in str(said)
    assert str(summary(eqx.filter_eval_shape(lambda: model))) == str(said)


def test_save_and_load(model, tmp_path):
    path = tmp_path / "adapter.safetensors"
    base = _Net(jr.key(0))
    save_adapter(path, model, base=base)
    zeros = jax.tree.map(lambda y: 0 * y if eqx.is_array(y) else y, model)
    for onto in base, zeros:
        loaded = load_adapter(path, onto)
        assert jax.tree.structure(loaded) == jax.tree.structure(model)
        if onto is base:
            assert bits(loaded) == bits(model)
    abstract = load_adapter(path, eqx.filter_eval_shape(lambda: base))
    kinds = [type(y) for y in jax.tree.leaves(abstract.layers.weight)]
    assert kinds.count(jax.ShapeDtypeStruct) == 1  # The base alone.
    loaded = load_adapter(path, unload(model))
    save_adapter(tmp_path / "again", loaded)
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


# Meshes.


def _mesh():
    return jax.make_mesh((2,), ("i",), axis_types=(AxisType.Auto,))


SPECS = {
    "data": (P(), P("i"), P("i")),
    "rows": (P("i", None), P(), P(None, "i")),
    "columns": (P(None, "i"), P(None, "i"), P()),
}


@pytest.mark.parametrize("spec", SPECS)
def test_shard_map(form, spec):
    w_spec, x_spec, out_spec = SPECS[spec]

    def local(w, x):
        y = x @ w.T
        return jnp.tanh(lax.psum(y, "i") if spec == "columns" else y)

    specs: dict[str, Any] = dict(in_specs=(w_spec, x_spec), out_specs=out_spec)
    mapped = jax.shard_map(local, mesh=_mesh(), **specs)
    args = (make(form, (4, 6)), x(8, 6))
    check(quax.quaxify(mapped), mapped, args)
    if spec == "data":
        inner = jax.shard_map(quax.quaxify(local), mesh=_mesh(), **specs)
        check(inner, mapped, args)


@pytest.mark.parametrize("axis", [0, 1])
def test_all_gather(form, axis):
    def local(w, x):
        return jnp.tanh(x @ lax.all_gather(w, "i", axis=axis, tiled=True).T)

    w_spec = P("i", None) if axis == 0 else P(None, "i")
    specs: dict[str, Any] = dict(in_specs=(w_spec, P("i")), out_specs=P("i"))
    mapped = jax.shard_map(local, mesh=_mesh(), **specs)
    check(quax.quaxify(mapped), mapped, (make(form, (4, 6)), x(8, 6)))


@pytest.mark.parametrize("spec", [P("i", None), P(None, "i")])
def test_sharding_constraint(form, spec):
    sharding = NamedSharding(_mesh(), spec)
    f = lambda w, x: lax.with_sharding_constraint(w, sharding) @ x
    check(quax.quaxify(f), f, (make(form, (4, 6)), x(6)))


# Structures.


def _moved(w, stack, s):
    """What is still a weight afterwards, and `s` a scalar that may be traced."""
    return {
        "w * s": w * s,
        "2 * w": 2.0 * w,
        "w / s": w / s,
        "-w": -w,
        "w * rows": w * jnp.ones((24, 1)) * s,
        "w * columns": w * s * jnp.ones(20),
        "w.T": w.T,
        "stack[1]": stack[1],
        "stack[s]": stack[(0 * s).astype(int)],
        "stack[:, 1:]": stack[:, 1:],
        "reshape": stack.reshape(48, 20),
        "w[None]": w[None],
        "tile": jnp.tile(w, (2, 1)),
        "broadcast": jnp.broadcast_to(w, (2, 24, 20)),
        "w + w": w + w,
        "w - s * w": w - s * w,
        "w + x": w + s * jnp.ones((24, 20)),
        "concatenate": jnp.concatenate([w, w], 1),
        "stack": jnp.stack([w, 2 * w]),
        "pad": jnp.pad(w, 1, constant_values=1.0),
        "select": lax.select_n(s > 0, w, -w),
        "cast": w.astype(jnp.float32),
        "copy": jnp.copy(w),
        "stop_gradient": lax.stop_gradient(w),
        "barrier": lax.optimization_barrier((w, s))[0],
        "unstack": jnp.unstack(stack),
        "w": w,
    }


# A base of another type, without rules of its own, is dense wherever it is moved.
@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "on_scaled"])
def test_a_program_gives_the_same_structures_eager_and_compiled(kind):
    f = quax.quaxify(_moved)
    args = make(kind, (24, 20)), make(kind, (2, 24, 20)), jnp.array(1.5)
    eager, compiled = f(*args), jax.jit(f)(*args)
    abstract = jax.eval_shape(f, *args)
    assert jax.tree.structure(eager) == jax.tree.structure(compiled)
    assert jax.tree.structure(eager) == jax.tree.structure(abstract)
    types = lambda tree: [(y.shape, y.dtype) for y in jax.tree.leaves(tree)]
    assert types(eager) == types(compiled) == types(abstract)
    assert_close(eager, compiled)
    assert_close(compiled, _moved(*densify(args)), rtol=1e-6, atol=1e-6)
    assert trainable(eager) == trainable(compiled) == trainable(abstract)
    # What is frozen stays frozen. A base that trains is "full".
    trained = {*jax.tree.leaves(labels(args[:2]))}
    # What a form lowers to has factors, or a scale.
    known = trained | {"a", "b", "scale", "frozen"}
    assert {*jax.tree.leaves(labels(eager))} <= known


# Many adapters at once.


def test_an_index_for_each_example():
    """The base is multiplied once, for the whole batch, and never once for each."""
    n, shape = 4, (5, 3)
    base, updates = jr.normal(jr.key(0), shape), low_rank((n, *shape), seed=3)
    inputs, ids = x(6, 3), jnp.array([0, 3, 1, 1, 2, 0])

    def one(i, x, base, updates):
        w = LoraArray.from_parts(base, OneOfSeveral(updates, i))
        return quax.quaxify(lambda w, x: jnp.tanh(w @ x))(w, x)

    def batch(base, updates, inputs):
        return jax.vmap(one, (0, 0, None, None))(ids, inputs, base, updates)

    def oracle(base, updates, inputs):
        weights = base + dense(updates)[ids]
        return jnp.tanh(jnp.einsum("boi,bi->bo", weights, inputs))

    args = base, updates, inputs
    assert_close(batch(*args), oracle(*args), rtol=1e-12, atol=1e-12)
    grads = lambda f: jax.grad(lambda *args: scalar(f(*args)), (1, 2))(*args)
    assert_close(grads(batch), grads(oracle), rtol=1e-12, atol=1e-12)
    eqns = list(equations(jax.make_jaxpr(batch)(*args)))
    of_base = [
        e
        for e in eqns
        if "dot_general" in str(e.primitive)
        and shape in [v.aval.shape for v in e.invars]
    ]
    assert len(of_base) == 1
    assert {v.aval.shape for v in of_base[0].invars} == {(6, 3), shape}
    assert not any(v.aval.size >= 6 * 5 * 3 for e in eqns for v in e.outvars)


# Roles.


class _NoRole(AbstractDelta):
    w: LowRankArray
    gain: jax.Array

    def lower(self):
        return self.w


class _Frozen(AbstractDelta):
    w: LowRankArray = role("frozen")

    def lower(self):
        return self.w


def test_an_array_without_a_role_is_an_error():
    w = lora((5, 3))
    w = LoraArray.from_parts(w.base, _NoRole(w.delta, jnp.ones(())))
    for read in labels, trainable, partition, merge_roles:
        with pytest.raises(TypeError, match="`gain` of _NoRole holds an array and has"):
            read(w)


def merge_roles(w):
    return summary({"w": w})


def test_where_all_is_frozen_nothing_trains():
    w = lora((5, 3))
    w = LoraArray.from_parts(w.base, _Frozen(w.delta))
    assert not any(jax.tree.leaves(trainable(w)))
    with pytest.raises(ValueError, match="Nothing in the model trains"):
        partition(w)


@pytest.mark.parametrize("form", ["vera", "loha", "lokr", "rows", "chosen"])
def test_a_base_that_trains(form):
    w = FORMS[form](lora((6, 4), stop_gradient=False))
    assert labels(w).base == "full"
    check(quax.quaxify(jnp.matmul), jnp.matmul, (w, x(4)))


def test_a_frozen_adapter_below_another(form):
    """What adapted a weight before trains no more, and is still written to disk."""
    below = make(form, (6, 4))
    w = LoraArray(below, rank=2, key=jr.key(1), init_b=jax.nn.initializers.normal())
    assert {*jax.tree.leaves(labels(w).base)} == {"frozen"}
    assert {*jax.tree.leaves(labels(w).delta)} == {"a", "b"}
    frozen = jax.tree.map(lax.stop_gradient, below)
    plain = lambda w, x: (dense(frozen) + dense(w.delta)) @ x
    inputs = x(4)
    ours: Callable = quax.quaxify(jnp.matmul)
    assert_close(ours(w, inputs), plain(w, inputs))
    grads = filter_grad(lambda w: scalar(quax.quaxify(jnp.matmul)(w, inputs)))(w)
    expected = jax.grad(lambda w: scalar(plain(w, inputs)), allow_int=True)(w)
    assert_close((grads.a, grads.b), (expected.a, expected.b))
    np.testing.assert_array_equal(unload({"w": w})["w"], unload({"w": below})["w"])
