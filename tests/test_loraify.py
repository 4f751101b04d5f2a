"""From a model to an adapted model."""

import math
import time
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import paramax
import pytest
import quax

from lora_quax import FullArray, IA3, init, LoraArray, LowRankArray
from lora_quax._arrays.base import is_adapted
from lora_quax._model.loraify import loraify
from lora_quax._model.merge import merge, unload
from lora_quax._model.paths import dotted
from lora_quax._model.summary import summary
from lora_quax._model.targets import Adapt


normal = jax.nn.initializers.normal(0.5)


def adapted(model):
    """The adapted weights of a model, by path."""
    leaves = jtu.tree_flatten_with_path(model, is_leaf=is_adapted)[0]
    return {dotted(keys): x for keys, x in leaves if is_adapted(x)}


def mlp(key=0, width=8, depth=2):
    return eqx.nn.MLP(4, 5, width, depth, key=jr.key(key))


def stacked():
    return eqx.filter_vmap(mlp)(jnp.arange(3))


def lookup():
    return eqx.nn.Embedding(7, 4, key=jr.key(0))


def conv():
    return eqx.nn.Conv2d(4, 6, 3, groups=2, key=jr.key(0))


def upconv():
    return eqx.nn.ConvTranspose1d(4, 6, 3, key=jr.key(0))


def lstm():
    return eqx.nn.LSTMCell(4, 5, key=jr.key(0))


def half():
    return jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if eqx.is_inexact_array(x) else x, mlp()
    )


MODELS = {
    mlp: None,
    stacked: None,
    half: None,
    lookup: eqx.nn.Embedding,
    conv: None,
    upconv: None,
    lstm: eqx.nn.LSTMCell,
}
OPTIONS = {
    "plain": {},
    "own": dict(alpha=16, scale=0.01, dtype=jnp.float16),
    "nonzero": dict(init_b=normal, stop_gradient=False, allow_materialise=True),
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("build", MODELS)
def test_models(build, options):
    model, options = build(), OPTIONS[options]
    before = jax.tree.map(lambda x: np.array(x) if eqx.is_array(x) else x, model)
    lora = loraify(model, 3, jr.key(1), targets=MODELS[build], **options)
    weights = adapted(lora)
    assert weights
    for x in weights.values():
        assert isinstance(x, LoraArray)
        assert x.rank == 3
        assert x.scaling == options.get("alpha", 3) / 3
        assert x.delta.aval().shape == x.base.shape == x.aval().shape
        wide = jnp.promote_types(x.base.dtype, jnp.float32)
        assert x.a.dtype == x.b.dtype == options.get("dtype", wide)
        assert x.stop_gradient == options.get("stop_gradient", True)
        assert x.allow_materialise == options.get("allow_materialise", False)
        assert x.delta.allow_materialise == x.allow_materialise
        assert np.all(np.asarray(x.a) != 0)
        assert np.all(np.asarray(x.b) == 0) == ("init_b" not in options)
    assert eqx.tree_equal(unload(lora), model, typematch=True)
    assert eqx.tree_equal(model, before)  # Never changed in place.
    if "init_b" not in options:
        assert eqx.tree_equal(merge(lora), model, typematch=True)


def test_the_arrays_are_those_of_the_constructor():
    """`loraify` draws what `LoraArray` would from the same key."""
    lora = loraify(conv(), 2, jr.key(1), alpha=4)
    x = lora.weight
    assert isinstance(x, LoraArray)
    assert (x.delta.rows, x.delta.cols) == (1, 3)
    assert x.a.shape == (2, 2, 3, 3) and x.b.shape == (6, 2)
    bound = 1 / math.sqrt(2 * 3 * 3)
    assert 0.7 * bound < jnp.abs(x.a).max() <= bound
    direct = LoraArray(conv().weight, rank=2, key=jr.key(3), alpha=4.0, cols=3)
    assert jax.tree.structure(direct) == jax.tree.structure(x)


def test_by_position_and_by_name():
    model = mlp()
    lora = loraify(model, 2, jr.key(1))
    assert eqx.tree_equal(lora, loraify(key=jr.key(1), rank=2, model=model))


def test_embeddings_are_drawn_as_in_peft():
    model = eqx.nn.Embedding(50, 400, key=jr.key(0))
    lora = loraify(model, 4, jr.key(1), targets=eqx.nn.Embedding)
    assert lora.weight.a.shape == (4, 400)
    assert abs(jnp.std(lora.weight.a) - 1) < 0.1
    own = loraify(model, 4, jr.key(1), targets=eqx.nn.Embedding, scale=0.01)
    assert jnp.std(own.weight.a) < 0.02


def test_keys_depend_on_the_path_alone():
    model = mlp(depth=4)
    key = jr.key(1)
    everything = adapted(loraify(model, 2, key))
    assert len({float(x.a.sum()) for x in everything.values()}) == len(everything)
    for targets in ("layers.1", ["layers.2", "layers.1"], r"layers\.[1-3]"):
        for path, x in adapted(loraify(model, 2, key, targets=targets)).items():
            assert eqx.tree_equal(x, everything[path])
    other = adapted(loraify(model, 2, jr.key(2)))
    for path, x in other.items():
        assert jnp.all(x.a != everything[path].a)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_kinds_of_keys(impl):
    model, key = mlp(depth=3), jr.key(1, impl=impl)
    lora = loraify(model, 2, key)
    part = loraify(model, 2, key, targets="layers.2")
    assert eqx.tree_equal(part.layers[2], lora.layers[2])
    if impl == "threefry2x32":
        assert eqx.tree_equal(lora, loraify(model, 2, jr.PRNGKey(1)))


def test_specs_per_weight():
    targets = {
        eqx.nn.Linear: True,
        "layers.0": 4,
        "layers.1": Adapt(rank=3, alpha=9.0, init_b=normal, dtype=jnp.float16),
        "layers.3": "full",
        "layers.4": "freeze",
    }
    model = mlp(depth=5)
    for alpha in (None, 6):
        lora = loraify(model, 2, jr.key(1), alpha=alpha, targets=targets)
        x = [layer.weight for layer in lora.layers]
        assert [y.rank for y in x[:3]] == [4, 3, 2]
        # A given alpha stays; otherwise it is the weight's own rank.
        assert [y.alpha for y in x[:3]] == ([4, 9, 2] if alpha is None else [6, 9, 6])
        assert x[1].a.dtype == jnp.float16 and jnp.all(x[1].b != 0)
        assert isinstance(x[3], FullArray) and eqx.is_array(x[4])
        assert isinstance(lora.layers[3].bias, FullArray)
        assert isinstance(x[5], LoraArray)
        assert eqx.tree_equal(unload(lora), model, typematch=True)


def test_full_arrays():
    model = mlp()
    lora = loraify(model, 2, jr.key(1), targets={eqx.nn.Linear: 2, "bias": "full"})
    bias = lora.layers[0].bias
    assert isinstance(bias, FullArray) and repr(bias) == "FullArray(f32[8])"
    assert bias.value.unsafe_buffer_pointer() != bias.base.unsafe_buffer_pointer()
    x = jr.normal(jr.key(2), (4,))
    assert jnp.allclose(quax.quaxify(lora)(x), model(x), atol=1e-6)
    moved = eqx.tree_at(
        lambda m: m.layers[0].bias.value, lora, replace_fn=lambda b: b + 1
    )
    dense = eqx.tree_at(lambda m: m.layers[0].bias, model, replace_fn=lambda b: b + 1)
    assert jnp.allclose(quax.quaxify(moved)(x), dense(x), atol=1e-6)
    assert eqx.tree_equal(merge(moved), dense)


def test_full_refuses_a_quantised_weight():
    weight = LowRankArray.init((4, 4), rank=2, key=jr.key(0))
    with pytest.raises(TypeError, match="LowRankArray cannot be trained in full"):
        FullArray(weight)


def test_outputs_with_nonzero_factors():
    model = mlp()
    lora = loraify(model, 2, jr.key(1), init_b=normal, alpha=3)
    x = jr.normal(jr.key(2), (4,))
    w = [y.base + 1.5 * y.b @ y.a for y in adapted(lora).values()]
    dense = eqx.tree_at(lambda m: [y.weight for y in m.layers], model, w)
    assert jnp.allclose(quax.quaxify(lora)(x), dense(x), atol=1e-5)
    assert jnp.allclose(merge(lora)(x), dense(x), atol=1e-5)


def test_shared_stays_shared():
    class Tied(eqx.Module):
        shared: eqx.nn.Shared

        def __init__(self, key):
            embed = eqx.nn.Embedding(7, 4, key=key)
            head = eqx.nn.Linear(4, 7, use_bias=False, key=key)
            where, get = lambda p: p[1].weight, lambda p: p[0].weight
            self.shared = eqx.nn.Shared((embed, head), where, get)

        def __call__(self, i):
            embed, head = self.shared()
            return head(embed(i))

    model = Tied(jr.key(0))
    lora = loraify(model, 2, jr.key(1), targets=eqx.nn.Embedding, init_b=normal)
    assert list(adapted(lora)) == ["shared.pytree.0.weight"]
    embed, head = lora.shared()
    assert embed.weight.b is head.weight.b
    merged = merge(lora)
    assert merged.shared()[0].weight is merged.shared()[1].weight
    out = quax.quaxify(lambda model, i: model(i))(lora, jnp.array(2))
    assert jnp.allclose(out, merged(jnp.array(2)), atol=1e-4)


def test_wrapped_weights():
    model = eqx.nn.Linear(4, 4, key=jr.key(0))
    mask = jnp.tril(jnp.ones((4, 4), bool))
    wrapped = eqx.tree_at(
        lambda m: m.weight,
        model,
        paramax.Parameterize(jnp.where, mask, model.weight, 0),
    )
    lora = loraify(wrapped, 2, jr.key(1), init_b=normal)
    assert isinstance(lora.weight.args[1], LoraArray)
    assert eqx.tree_equal(unload(lora), wrapped)
    with pytest.warns(UserWarning, match="`weight.tree` was .*NonTrainable.*`weight`"):
        loraify(paramax.non_trainable(model), 2, jr.key(1))


def test_abstract_models():
    model = mlp()
    targets = {eqx.nn.Linear: 3, "layers.2": "full"}
    options: dict[str, Any] = dict(targets=targets, alpha=2)
    lora = loraify(model, 2, jr.key(1), **options)
    shapes = eqx.filter_eval_shape(lambda: lora)
    # A model of shapes, with a key that is real or a shape; and inside the transform.
    abstract = eqx.filter_eval_shape(mlp)
    for key in (jr.key(1), eqx.filter_eval_shape(jr.key, 1)):
        assert eqx.tree_equal(loraify(abstract, 2, key, **options), shapes)
    inside = eqx.filter_eval_shape(lambda m, k: loraify(m, 2, k, **options), model, key)
    assert eqx.tree_equal(inside, shapes)
    assert eqx.tree_equal(merge(shapes), eqx.filter_eval_shape(lambda: merge(lora)))
    assert eqx.tree_equal(unload(shapes), abstract)
    assert summary(shapes) == summary(lora)._replace(bytes=None)


def test_under_jit():
    model, key = mlp(), jr.key(1)
    lora = loraify(model, 2, key)
    jitted = eqx.filter_jit(lambda m, k: loraify(m, 2, k))(model, key)
    same = jax.tree.map(
        lambda x, y: bool(jnp.allclose(x, y)) if eqx.is_array(x) else True, lora, jitted
    )
    assert all(jax.tree.leaves(same))


def test_numpy_weights():
    model = jax.tree.map(lambda x: np.asarray(x) if eqx.is_array(x) else x, mlp())
    lora = loraify(model, 2, jr.key(1))
    assert eqx.tree_equal(lora, loraify(mlp(), 2, jr.key(1)), typematch=False)


def test_a_hundred_billion_parameters():
    def layer(key):
        keys = jr.split(key, 7)
        n = 8192
        sizes = [(n, n)] * 4 + [(n, 4 * n)] * 2 + [(4 * n, n)]
        return [eqx.nn.Linear(*size, key=k) for size, k in zip(sizes, keys)]

    model = eqx.filter_eval_shape(lambda: [layer(jr.key(0)) for _ in range(96)])
    start = time.perf_counter()
    lora = loraify(model, 16, jr.key(1))
    total = summary(lora)
    assert time.perf_counter() - start < 20
    assert total.frozen > 1e11 and len(total.rows) == 7 * 96


def test_a_second_call_compiles_nothing():
    traces = []

    def init(key, shape, dtype):
        traces.append(shape)
        return jr.normal(key, shape, dtype)

    model = mlp(depth=6)
    loraify(model, 2, jr.key(1), init_a=init)
    assert len(traces) == 3  # One for each shape of weight, not for each weight.
    loraify(model, 2, jr.key(2), init_a=init)
    assert len(traces) == 3


BAD = [
    (dict(rank=0), ValueError, "`rank` must be a positive integer, got 0"),
    (dict(rank=True), ValueError, "`rank` must be a positive integer, got True"),
    (dict(rank=2.0), (ValueError, TypeError), "rank"),
    (dict(key=jr.split(jr.key(0))), TypeError, "key"),
    (dict(key=jnp.zeros(2)), TypeError, "key"),
    (dict(alpha=math.inf), ValueError, "`alpha` must be finite"),
    (dict(init_a=normal, scale=1.0), ValueError, "either `init_a` or `scale`"),
    (dict(init_a=lambda k, s, d: jnp.zeros(3)), ValueError, "asked for shape"),
    (
        dict(dtype=jnp.int8),
        TypeError,
        "`dtype` must be a floating-point type",
    ),
    (dict(dtype="bf16"), TypeError, "`dtype` must be a floating.*, got 'bf16'"),
    (
        dict(dtype=jnp.float8_e4m3fn),
        TypeError,
        "must be of 16 bits or more, got float8_e4m3fn",
    ),
    (dict(alpha=10**400), ValueError, "`alpha` must be finite"),
    (dict(alpha=0), ValueError, "`alpha` is 0, .* nothing would train"),
    (dict(alpha=np.array([1.0])), TypeError, "`alpha` must be a number"),
    (
        dict(key=jax.eval_shape(lambda: jr.key(0))),
        TypeError,
        r"`key` is abstract, and the model is not.*`layers\.0\.weight`",
    ),
    (dict(targets="nope"), ValueError, "'nope' of `targets` matched nothing"),
    (dict(model=[]), ValueError, "has no floating-point array"),
    (dict(model=eqx.nn.LayerNorm(3)), ValueError, "default targets .*matched nothing"),
]


@pytest.mark.parametrize("bad, error, match", BAD)
def test_errors(bad, error, match):
    good = dict(model=mlp(), rank=2, key=jr.key(0))
    with pytest.raises(error, match=match):
        loraify(**{**good, **bad})


def test_twice_is_an_error():
    lora = loraify(mlp(), 2, jr.key(0))
    with pytest.raises(ValueError, match="`layers.0.weight`.*already adapted"):
        loraify(lora, 2, jr.key(0))


def test_missing_leaves():
    model = mlp()
    weights, _ = eqx.partition(model, lambda x: eqx.is_array(x) and x.shape == (8, 8))
    with pytest.raises(ValueError, match="`layers.0.weight`.*is missing"):
        loraify(weights, 2, jr.key(0))


def test_default_initialiser_is_ours():
    lora = loraify(mlp(), 2, jr.key(1), init_a=init.uniform)
    assert eqx.tree_equal(lora, loraify(mlp(), 2, jr.key(1)))


def test_weights_of_one_dotted_path():
    """A key may have a dot in it. Each weight has factors of its own all the same."""
    model = {"a.b": {"c": jnp.ones((5, 6))}, "a": {"b.c": jnp.ones((1, 6))}}
    out = loraify(model, 2, jr.key(0), targets=r"a\.b\.c", init_b=normal)
    one, other = out["a.b"]["c"], out["a"]["b.c"]
    assert (one.delta.shape, other.delta.shape) == ((5, 6), (1, 6))
    assert not jnp.any(one.a == other.a)
    rows = {row.shape for row in summary(out).rows}
    assert rows == {(5, 6), (1, 6)}
    for before, after in zip(*map(jax.tree.leaves, (model, unload(out)))):
        assert before is after
    for before, after in zip(*map(jax.tree.leaves, (model, merge(out)))):
        assert before.shape == after.shape


@pytest.mark.parametrize(
    "kind", [np.float32, np.int64, np.asarray, jnp.asarray, jnp.bfloat16]
)
def test_numbers_of_other_libraries(kind):
    model = {"w": jnp.ones((4, 3))}
    with_ = lambda alpha, scale: loraify(
        model, 2, jr.key(0), targets="w", alpha=alpha, scale=scale
    )["w"]
    wanted, got = with_(4, 3.0), with_(kind(4), kind(3))
    assert type(got.alpha) is float
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    assert jnp.all(got.a == wanted.a)


@pytest.mark.parametrize("of", [dict(use_dora=True), dict(update=IA3, rank=None)])
def test_a_scaled_base_of_8_bits(of):
    base = jr.normal(jr.key(0), (4, 3)).astype(jnp.float8_e4m3fn)
    given = {"rank": 2, "key": jr.key(1), "targets": "w", **of}
    weight = loraify({"w": base}, **given)["w"]
    assert jnp.array_equal(merge(weight), base)
    product = quax.quaxify(lambda w, x: w.astype(jnp.float32) @ x)
    assert jnp.allclose(product(weight, jnp.ones(3)), base.astype(jnp.float32).sum(1))


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_a_base_of_8_bits(dtype):
    base = (jr.normal(jr.key(0), (4, 3))).astype(dtype)
    weight = loraify({"w": base}, 2, jr.key(1), targets="w", init_b=normal)["w"]
    assert weight.dtype == dtype and weight.a.dtype == jnp.float32
    want = (base.astype(jnp.float32) + weight.b @ weight.a).astype(dtype)
    got = merge(weight)
    assert got.dtype == dtype
    one_step = float(jnp.finfo(dtype).eps)
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    assert jnp.allclose(got, want, rtol=one_step)


def test_kernels_of_other_libraries(x64):
    """A convolution's (height, width, in, out), of which three axes are rows."""
    keys = jr.split(jr.key(0), 3)
    model = {
        "conv": {"kernel": jr.normal(keys[0], (3, 3, 2, 5))},
        "dense": {"kernel": jr.normal(keys[1], (5, 4))},
    }
    targets = {"conv.kernel": Adapt(rows=3, cols=1), "dense.kernel": True}
    model = loraify(model, 2, keys[2], targets=targets, init_b=normal)
    kernel = model["conv"]["kernel"]
    assert (kernel.b.shape, kernel.a.shape) == ((3, 3, 2, 2), (2, 5))
    by_default = loraify(unload(model), 2, keys[2], targets="conv.kernel")
    assert by_default["conv"]["kernel"].a.shape == (3, 3, 2, 5)  # One for each tap.

    def loss(kernels, x):
        y = jax.lax.conv_general_dilated(
            x,
            kernels[0],
            window_strides=(1, 1),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return jnp.sum((jnp.tanh(y).mean((1, 2)) @ kernels[1]) ** 2)

    def dense(factors, x):
        (b, a), (b2, a2) = factors
        first = kernel.base + jnp.einsum("hwir,ro->hwio", b, a)
        return loss((first, model["dense"]["kernel"].base + b2 @ a2), x)

    x = jr.normal(jr.key(3), (2, 6, 6, 2))
    kernels = kernel, model["dense"]["kernel"]
    factors = tuple((w.b, w.a) for w in kernels)
    got, grads = eqx.filter_value_and_grad(quax.quaxify(loss))(kernels, x)
    want, wanted = jax.value_and_grad(dense)(factors, x)
    assert jnp.allclose(got, want)
    for w, (b, a) in zip(grads, wanted):
        assert jnp.allclose(w.delta.b, b) and jnp.allclose(w.delta.a, a)


HABITS = [
    (dict(r=8), "`r` is `rank` here"),
    (dict(lora_alpha=16), "`lora_alpha` is `alpha` here"),
    (dict(target_modules=["layers"]), "`target_modules` is `targets` here"),
    (dict(lora_dropout=0.1), "`lora_dropout` is `dropout` here"),
    (dict(modules_to_save=["head"]), r'"lm_head": "full"'),
    (dict(r=8, lora_alpha=16), r"(?s)`r` is `rank`.*\n`lora_alpha` is `alpha`"),
    (dict(task_type="CAUSAL_LM"), "`task_type` has no meaning here"),
]


@pytest.mark.parametrize("given, match", HABITS)
def test_arguments_of_peft_are_answered(given, match):
    with pytest.raises(TypeError, match=match):
        loraify(mlp(), key=jr.key(0), **given)  # pyright: ignore
    with pytest.raises(TypeError, match=match):
        Adapt(**given)


def test_other_arguments_are_unexpected():
    with pytest.raises(TypeError, match="unexpected keyword argument 'alhpa'"):
        loraify(mlp(), 2, jr.key(0), alhpa=1)  # pyright: ignore
    with pytest.raises(TypeError, match="unexpected keyword argument 'alhpa'"):
        Adapt(alhpa=1)  # pyright: ignore
