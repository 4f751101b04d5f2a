"""What trains of a weight lies on a mesh as the weight does."""

import functools as ft
import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import pytest
import quax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import lora_quax
from lora_quax import Adapt, loraify
from lora_quax._arrays.base import base_of, is_adapted


WHOLE = P()
MESHES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


def mesh_of(kind: str = "auto"):
    return jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(MESHES[kind],) * 2)


def sharded(model, mesh, spec=P("fsdp", "tp")):
    """Its weights by `spec`; biases are on every device."""

    def put(x):
        is_bias = x.ndim < max(2, len(spec)) or 1 in x.shape
        return jax.device_put(x, NamedSharding(mesh, WHOLE if is_bias else spec))

    arrays, static = eqx.partition(model, eqx.is_array)
    return eqx.combine(jax.tree.map(put, arrays), static)


def mlp():
    return eqx.nn.MLP(16, 32, 64, 1, key=jr.key(0))


def conv():
    return eqx.nn.Conv2d(2, 8, 3, key=jr.key(0))


def embedding():
    return eqx.nn.Embedding(16, 4, key=jr.key(0))


def stacked():
    return eqx.filter_vmap(lambda i: eqx.nn.Linear(4, 8, key=jr.key(i)))(jnp.arange(4))


A, B = P(None, "tp"), P("fsdp", None)
# What is adapted, how its weight is sharded, what with; how what trains of it lies.
PLACED = {
    "linear": (mlp, P("fsdp", "tp"), {}, [A, B]),
    "replicated": (mlp, WHOLE, {}, [P(None, None)] * 2),
    "two axes on one": (
        mlp,
        P(("fsdp", "tp"), None),
        {},
        [P(None, None), P(("fsdp", "tp"), None)],
    ),
    "convolution": (
        conv,
        P("fsdp", "tp"),
        {},
        [P(None, "tp", None, None), P("fsdp", None)],
    ),
    "embedding": (
        embedding,
        P("fsdp", "tp"),
        dict(targets=eqx.nn.Embedding),
        [A, B],
    ),
    "stacked": (
        stacked,
        P("fsdp", None, "tp"),
        {},
        [P("fsdp", None, "tp"), P("fsdp", None, None)],
    ),
    "DoRA": (mlp, P("fsdp", "tp"), dict(use_dora=True), [A, B, WHOLE]),
    "LoHa": (mlp, P("fsdp", "tp"), dict(update=lora_quax.LoHa), [A, B] * 2),
    "LoKr": (mlp, P("fsdp", "tp"), dict(update=lora_quax.LoKr), [WHOLE] * 3),
    "VeRA": (mlp, P("fsdp", "tp"), dict(update=lora_quax.VeRA), [WHOLE] * 2),
    "IA3": (mlp, P("fsdp", "tp"), dict(update=lora_quax.IA3, rank=None), [B]),
    "a spec of its own": (
        mlp,
        P("fsdp", "tp"),
        dict(targets={eqx.nn.Linear: Adapt(spec=P(None, "fsdp"))}),
        [P(None, "fsdp"), P(None, None)],
    ),
}


def first(model):
    return model.layers[0] if hasattr(model, "layers") else model


@pytest.mark.parametrize("kind", MESHES)
@pytest.mark.parametrize("name", PLACED)
def test_factors_are_born_where_their_base_lies(name, kind):
    make, spec, options, expected = PLACED[name]
    mesh = mesh_of(kind)
    expected = [NamedSharding(mesh, x) for x in expected]
    model = sharded(make(), mesh, spec)
    adapt = ft.partial(loraify, **{"rank": 2, "key": jr.key(1), **options})
    adapted = adapt(model)
    params, _ = lora_quax.partition(adapted)

    def lies(tree):
        leaves = jax.tree.leaves(first(tree))
        return all(
            x.sharding.is_equivalent_to(y, x.ndim)
            for x, y in zip(leaves, expected, strict=True)
        )

    assert lies(params)
    state: Any = optax.adam(1e-3).init(params)
    assert lies(state[0].mu)
    assert eqx.tree_equal(lora_quax.unload(adapted), model)
    # Of an abstract model, the same.
    assert lies(lora_quax.partition(adapt(on_paper(model)))[0])
    # And the same numbers as off the mesh.
    if "targets" in options and make is mlp:
        return
    plain = lora_quax.partition(adapt(make()))[0]
    for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(plain), strict=True):
        assert jnp.allclose(jax.device_get(x), y, atol=1e-6)


def test_a_quantised_base():
    pytest.importorskip("qwix")
    mesh = mesh_of()
    model = sharded(lora_quax.quantise(mlp(), "int8", tile=8), mesh, P("fsdp", None))
    weight = loraify(model, 2, jr.key(1)).layers[0].weight
    assert weight.b.sharding.spec == P("fsdp", None)
    assert weight.a.sharding.spec == P(None, None)
    match = r"part of `layers\.0\.weight`.*QuantisedArray.*4 parts do not divide 2"
    with pytest.raises(ValueError, match=match):
        lora_quax.shard(model, mesh, {"layers.0": P(None, "fsdp")})
    with pytest.raises(ValueError, match=match):
        lora_quax.quantise(sharded(mlp(), mesh, P(None, "fsdp")), "int8", tile=8)


_AUTO = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
_ON_DEVICES = ft.partial(jax.shard_map, mesh=_AUTO)
IN_SHARD_MAP = {
    "rows": _ON_DEVICES(lambda w, x: w @ x, in_specs=(P("d"), P()), out_specs=P("d")),
    "columns": _ON_DEVICES(
        lambda w, x: jax.lax.psum(w @ x, "d"),
        in_specs=(P(None, "d"), P("d")),
        out_specs=P(),
    ),
    "gathered": _ON_DEVICES(
        lambda w, x: jax.lax.psum(jax.lax.all_gather(w, "d", tiled=True) @ x, "d"),
        in_specs=(P("d"), P()),
        out_specs=P(),
    ),
}


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("name", IN_SHARD_MAP)
def test_a_quantised_base_in_shard_map(name, kind):
    pytest.importorskip("qwix")
    f = IN_SHARD_MAP[name]
    layer = lora_quax.quantise(eqx.nn.Linear(16, 64, key=jr.key(0)), kind, tile=4)
    normal = jax.nn.initializers.normal()
    weight = loraify(layer, 2, jr.key(1), init_b=normal).weight
    x = jr.normal(jr.key(2), (16,))

    @lora_quax.filter_value_and_grad
    def loss(weight):
        return jnp.sum(quax.quaxify(f)(weight, x) ** 2)

    @jax.value_and_grad
    def dense(factors):
        a, b = factors
        return jnp.sum(f(weight.base.materialise() + b @ a, x) ** 2)

    (value, grads), (wanted, of_factors) = loss(weight), dense((weight.a, weight.b))
    assert jnp.allclose(value, wanted, rtol=1e-5)
    for got, want in zip((grads.delta.a, grads.delta.b), of_factors):
        assert jnp.allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", [P("fsdp"), P(None, "tp"), P("fsdp", "tp")])
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantised_base_on_explicit_axes(kind, spec):
    pytest.importorskip("qwix")
    mesh = mesh_of("explicit")
    layer = lora_quax.quantise(eqx.nn.Linear(16, 64, key=jr.key(0)), kind, tile=4)
    on_mesh = lora_quax.shard(layer, mesh, {"weight": spec})
    normal = jax.nn.initializers.normal()
    x = jr.normal(jr.key(2), (16,))

    @eqx.filter_jit
    def run(weight, x):
        product = ft.partial(jnp.einsum, "oi,i->o", out_sharding=P())
        return quax.quaxify(product)(weight, x)

    alone = loraify(layer, 2, jr.key(1), init_b=normal).weight
    y = quax.quaxify(jnp.matmul)(alone, x)
    with jax.set_mesh(mesh):
        weight = loraify(on_mesh, 2, jr.key(1), init_b=normal).weight
        assert jnp.allclose(jax.device_get(run(weight, x)), y, atol=1e-5)


@pytest.mark.parametrize("spec", [P("fsdp", "tp"), P(None, "fsdp"), P(("fsdp", "tp"))])
@pytest.mark.parametrize("codec", ["int8", "nf4"])
@pytest.mark.parametrize("kind", MESHES)
def test_a_weight_is_quantised_where_it_lies(kind, codec, spec):
    pytest.importorskip("qwix")
    layer = eqx.nn.Linear(64, 16, use_bias=False, key=jr.key(0))
    on_mesh = lora_quax.shard(layer, mesh_of(kind), {"weight": spec})
    run = lambda layer: lora_quax.quantise(layer, codec, tile=8)
    got, wanted = run(on_mesh), run(layer)
    assert eqx.tree_equal(jax.device_get(got), jax.device_get(wanted))
    for part in (got.weight.codes, got.weight.scale):
        assert part.sharding.is_equivalent_to(on_mesh.weight.sharding, 2)
    back = lora_quax.dequantise(got).weight
    assert back.sharding.is_equivalent_to(on_mesh.weight.sharding, 2)
    abstract = run(on_paper(on_mesh)).weight
    for x, y in zip(*map(jax.tree.leaves, (abstract, got.weight)), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert x.sharding.is_equivalent_to(y.sharding, 2)
    compiled = jax.jit(lambda x: jax.tree.leaves(run(x))).lower(on_mesh).compile()
    assert not gathered(compiled.as_text() or "")


def _rebased(model):
    first = lora_quax.initialise(model, "pissa")
    return lora_quax.rebase(first, first, lora_quax.unload(model))


LATER = {  # What the factors and bases of a model are exchanged for.
    "PiSSA": lambda model: lora_quax.initialise(model, "pissa"),
    "orthogonal": lambda model: lora_quax.initialise(
        model, "orthogonal", key=jr.key(0)
    ),
    "LoftQ": lambda model: lora_quax.loftq(model, "int8", tile=4, steps=2),
    "rebased": _rebased,
}


@pytest.mark.parametrize("kind", MESHES)
@pytest.mark.parametrize("name", LATER)
def test_what_is_found_later_lies_as_what_was_there(name, kind):
    if name == "LoftQ":
        pytest.importorskip("qwix")
    spec = P(None, "fsdp")
    targets = {eqx.nn.Linear: True, "layers.1": Adapt(spec=spec)}
    adapt = ft.partial(loraify, rank=2, key=jr.key(1), targets=targets)
    plain = lora_quax.shard(mlp(), mesh_of(kind), {"weight": P("fsdp", "tp")})
    models = [adapt(plain)]
    if name != "rebased":
        models.append(adapt(on_paper(plain)))
    for model in models:
        for before, after in zip(model.layers, LATER[name](model).layers):
            parts = before.weight, after.weight
            for x, y in zip(*((w.a, w.b, base_leaf(w)) for w in parts)):
                assert y.sharding.is_equivalent_to(x.sharding, 2)


def base_leaf(w):
    return jax.tree.leaves(w.base)[0]


ELSEWHERE: dict[str, Any] = {
    "by a spec": dict(targets={eqx.nn.Linear: Adapt(spec=P(None, "fsdp"))}),
    "everywhere": dict(update=lora_quax.LoKr),
}


@pytest.mark.parametrize("kind", MESHES)
@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_merged_weight_lies_as_its_base_does(name, kind):
    plain = lora_quax.shard(mlp(), mesh_of(kind), {"weight": P("fsdp", "tp")})
    for base in (plain, on_paper(plain)):
        merged = lora_quax.merge(loraify(base, 2, jr.key(1), **ELSEWHERE[name]))
        for layer, before in zip(merged.layers, plain.layers):
            x, y = layer.weight.sharding, before.weight.sharding
            assert x.is_equivalent_to(y, 2)


def on_paper(model):
    """Abstract, and laid out in the same way."""
    return jax.tree.map(
        lambda x: (
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            if eqx.is_array(x)
            else x
        ),
        model,
    )


def test_what_is_on_one_device_stays_there():
    model = loraify(mlp(), 2, jr.key(1))
    assert len(model.layers[0].weight.b.sharding.device_set) == 1
    device = jax.devices()[3]
    put = lambda x: jax.device_put(x, device) if eqx.is_array(x) else x
    model = loraify(jax.tree.map(put, mlp()), 2, jr.key(1), use_dora=True)
    params = lora_quax.partition(model)[0]
    assert {x.device for x in jax.tree.leaves(params)} == {device}
    with pytest.raises(ValueError, match=r"`layers\.0\.weight` lies on no mesh"):
        loraify(mlp(), 2, jr.key(1), targets={eqx.nn.Linear: Adapt(spec=P("x"))})


@pytest.mark.parametrize(
    "spec, match",
    [
        (P("fsdp", "sp"), r"64, 16\), cannot lie as.*the mesh has no axis 'sp'"),
        (P(None, None, "tp"), r"`layers\.0\.weight`.*: it has 2 axes"),
        (P(("fsdp", "tp"), "tp"), r"an axis of the mesh is there twice"),
        (P("three"), r"`layers\.0\.weight`.*: 3 parts do not divide 64"),
    ],
)
def test_specs_that_do_not_fit(spec, match):
    mesh = jax.make_mesh((1, 2, 3), ("fsdp", "tp", "three"))
    model = sharded(mlp(), mesh, P("fsdp", "tp"))
    with pytest.raises(ValueError, match=match):
        loraify(model, 2, jr.key(1), targets={eqx.nn.Linear: Adapt(spec=spec)})


RULES = {  # for an MLP: its arrays, by path
    "by layer": (
        {r"layers\.\d": P("fsdp", "tp"), "bias": P("tp")},
        {
            "layers.0.weight": P("fsdp", "tp"),
            "layers.1.weight": P("fsdp", "tp"),
            "layers.0.bias": P("tp"),
            "layers.1.bias": P("tp"),
        },
    ),
    "the last one decides": (
        {r".*weight": P("fsdp"), "layers.1": P(None, "tp")},
        {"layers.0.weight": P("fsdp"), "layers.1.weight": P(None, "tp")},
    ),
    "none": ({}, {}),
}
CHANGED = {  # What is laid out.
    "plain": lambda model: model,
    "adapted": lambda model: loraify(model, 2, jr.key(1)),
    "DoRA": lambda model: loraify(model, 2, jr.key(1), use_dora=True),
    "abstract": lambda model: eqx.filter_eval_shape(lambda: model),
}


@pytest.mark.parametrize("change", CHANGED)
@pytest.mark.parametrize("name", RULES)
def test_a_model_is_laid_out_by_rules(name, change):
    rules, expected = RULES[name]
    mesh = mesh_of()
    model = CHANGED[change](mlp())
    laid = lora_quax.shard(model, mesh, rules)
    if change != "abstract":
        assert eqx.tree_equal(laid, model)
    for i, layer in enumerate(laid.layers):
        for field in ("weight", "bias"):
            x = getattr(layer, field)
            spec = expected.get(f"layers.{i}.{field}", WHOLE)
            base = base_of(x) if is_adapted(x) else x
            to = NamedSharding(mesh, spec)
            assert base.sharding.is_equivalent_to(to, base.ndim)
    if change in ("adapted", "DoRA"):
        wanted = CHANGED[change](lora_quax.shard(mlp(), mesh, rules))
        arrays = eqx.filter((laid, wanted), eqx.is_array)
        for x, y in zip(*map(jax.tree.leaves, arrays), strict=True):
            assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


WRONG_RULES = [
    ({"layer.0": P("fsdp")}, r"'layer\.0' means no array\. Near it are"),
    ({"weight": P("sp")}, r"`layers\.0\.weight`, meant by.*no axis 'sp'"),
    ({"bias": P("fsdp", "tp")}, r"`layers\.0\.bias`.*it has 1 axes"),
    ({eqx.nn.Linear: P("fsdp")}, r"A rule is for a name .*, got <class '.*Linear'>"),
    ({"bias": ("fsdp",)}, r"'bias' must say a `.*PartitionSpec`, got \('fsdp',\)"),
]


@pytest.mark.parametrize("rules, match", WRONG_RULES)
def test_rules_that_do_not_fit(rules, match):
    with pytest.raises((ValueError, TypeError), match=match):
        lora_quax.shard(mlp(), mesh_of(), rules)


def test_an_abstract_mesh_is_for_abstract_models():
    mesh, rules = mesh_of().abstract_mesh, {"weight": P("fsdp", "tp")}
    laid = lora_quax.shard(eqx.filter_eval_shape(mlp), mesh, rules)
    assert laid.layers[0].weight.sharding == NamedSharding(mesh, P("fsdp", "tp"))
    with pytest.raises(TypeError, match=r"is abstract, and `layers\.0\.weight` is"):
        lora_quax.shard(mlp(), mesh, rules)


def test_what_is_tied_stays_one_array():
    w, other = jnp.ones((8, 4)), jnp.ones((8, 4))
    rules = {"(in|out)": P("fsdp")}
    laid = lora_quax.shard({"in": w, "out": w, "other": other}, mesh_of(), rules)
    assert laid["in"] is laid["out"]
    laid = lora_quax.shard({"in": w, "out": w}, mesh_of(), {"in": P("fsdp")})
    assert [laid[name].sharding.spec for name in ("in", "out")] == [P("fsdp"), P()]


def test_an_update_that_is_a_weight_is_laid_out():
    delta = loraify(mlp(), 2, jr.key(1)).layers[0].weight.delta
    laid = lora_quax.shard({"w": delta}, mesh_of(), {"w": P("fsdp", "tp")})["w"]
    assert laid.a.sharding.spec == A and laid.b.sharding.spec == B


@pytest.mark.parametrize("kind", MESHES)
def test_adapters_are_loaded_to_where_bases_lie(kind, tmp_path):
    plain = mlp()
    adapted = loraify(plain, 2, jr.key(1), init_b=jax.nn.initializers.normal())
    lora_quax.save_adapter(tmp_path / "a.safetensors", adapted)
    lora_quax.peft.save(tmp_path / "peft", adapted)
    on_mesh = lora_quax.shard(plain, mesh_of(kind), {"weight": P("fsdp", "tp")})
    for loaded in (
        lora_quax.load_adapter(tmp_path / "a.safetensors", on_mesh),
        lora_quax.peft.load(tmp_path / "peft", on_mesh),
    ):
        w = loaded.layers[0].weight
        assert w.a.sharding.spec == P(None, "tp")
        assert w.b.sharding.spec == P("fsdp", None)
        assert eqx.tree_equal(jax.device_get(loaded), jax.device_get(adapted))
        # Onto one that is adapted already, to where its factors lie.
        targets = {eqx.nn.Linear: Adapt(spec=WHOLE)}
        there = loraify(on_mesh, 2, jr.key(2), targets=targets)
        w = lora_quax.load_adapter(tmp_path / "a.safetensors", there).layers[0].weight
        assert w.a.sharding.is_fully_replicated and w.b.sharding.is_fully_replicated
        # It is written as off the mesh, with the fingerprint of the same base.
        lora_quax.save_adapter(tmp_path / "b.safetensors", loaded)
        written = [tmp_path / f"{name}.safetensors" for name in "ab"]
        assert written[0].read_bytes() == written[1].read_bytes()


def gathered(text: str) -> set[int]:
    """How many numbers each all-gather of a compiled program makes."""
    found = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather", text)
    return {eval("*".join(x.split(",")) or "1") for x in found}


@pytest.mark.parametrize("kind", MESHES)
def test_nothing_of_a_base_is_gathered(kind):
    """When a model is adapted inside `jit`, and when its optimiser is made."""
    mesh = mesh_of(kind)
    model = sharded(mlp(), mesh)
    arrays, static = eqx.partition(model, eqx.is_array)

    def start(arrays, key):
        adapted = loraify(eqx.combine(arrays, static), 2, key)
        params, rest = lora_quax.partition(adapted)
        state = optax.adam(1e-3).init(params)
        return eqx.filter((params, rest, state), eqx.is_array)

    of_model = loraify(model, 2, jr.key(1))
    params, rest = lora_quax.partition(of_model)
    wanted = params, rest, optax.adam(1e-3).init(params)
    shardings = jax.tree.map(
        lambda x: (
            x.sharding
            if isinstance(x.sharding, NamedSharding)
            else NamedSharding(mesh, WHOLE)
        ),
        eqx.filter(wanted, eqx.is_array),
    )
    with jax.set_mesh(mesh):
        start = jax.jit(start, out_shardings=shardings)
        compiled = start.lower(arrays, jr.key(1)).compile()
        out, *_ = start(arrays, jr.key(1))
    assert not gathered(compiled.as_text() or "")
    for x, y in zip(jax.tree.leaves(out), jax.tree.leaves(params), strict=True):
        assert jnp.allclose(jax.device_get(x), jax.device_get(y))
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


@pytest.mark.parametrize("kind", MESHES)
def test_inside_jit(kind):
    """A model that is laid out there, and one of outside that is adapted there."""
    mesh = mesh_of(kind)
    rules = {"weight": P("fsdp", "tp")}
    plain = lora_quax.shard(mlp(), mesh, rules)
    with jax.set_mesh(mesh):
        arrays, static = eqx.partition(mlp(), eqx.is_array)
        laid = jax.jit(
            lambda arrays: eqx.filter(
                lora_quax.shard(eqx.combine(arrays, static), mesh, rules), eqx.is_array
            )
        )(arrays)
        params = jax.jit(lambda key: lora_quax.partition(loraify(plain, 2, key))[0])(
            jr.key(1)
        )
    w = params.layers[0].weight
    got = laid.layers[0].weight, w.a, w.b
    for x, spec in zip(got, (P("fsdp", "tp"), A, B), strict=True):
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)
