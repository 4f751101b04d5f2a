"""Which leaves train, and what training leaves alone."""

import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
import quax

from lora_quax import FullArray, LoraArray, LowRankArray
from lora_quax._model.loraify import loraify
from lora_quax._model.training import (
    filter_grad,
    filter_value_and_grad,
    labels,
    partition,
    trainable,
)


normal = jax.nn.initializers.normal(0.5)
X = jr.normal(jr.key(5), (8, 4))
Y = jr.normal(jr.key(6), (8, 5))


def build():
    model = eqx.nn.MLP(4, 5, 6, 1, key=jr.key(0))
    # Bits that a careless update would change.
    model = eqx.tree_at(
        lambda m: m.layers[0].weight, model, replace_fn=lambda w: w.at[0, 0].set(-0.0)
    )
    targets = {eqx.nn.Linear: 2, "layers.1.bias": "full"}
    return loraify(model, 2, jr.key(1), init_b=normal, targets=targets)


def loss(model, x, y):
    run = quax.quaxify(lambda model, x: jax.vmap(model)(x))
    return jnp.mean((run(model, x) - y) ** 2)


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree) if eqx.is_array(x)]


def bases(model):
    return bits([layer.weight.base for layer in model.layers])


def test_labels():
    tree = labels(build())
    first, last = tree.layers
    delta = first.weight.delta
    assert (first.weight.base, delta.a, delta.b) == ("frozen", "a", "b")
    assert first.bias == "frozen" and tree.activation == "frozen"
    assert (last.bias.base, last.bias.value) == ("frozen", "full")


def test_trainable():
    model = build()
    spec = trainable(model)
    assert jax.tree.structure(spec) == jax.tree.structure(model)
    weight, bias = spec.layers[1].weight, spec.layers[1].bias
    assert (weight.base, weight.delta.a, weight.delta.b) == (False, True, True)
    assert (bias.base, bias.value) == (False, True)
    assert spec.layers[0].bias is False and spec.activation is False


def test_a_base_that_trains():
    base = jnp.ones((4, 4))
    inner = LoraArray(base, rank=1, key=jr.key(0))

    def of(base, stop_gradient):
        x = LoraArray(base, rank=1, key=jr.key(0), stop_gradient=stop_gradient)
        return jax.tree.leaves(trainable(x))

    assert of(base, False) == [True] * 3
    assert of(inner, False) == [False] + [True] * 4
    assert of(inner, True) == [False] * 3 + [True] * 2


def test_low_rank_arrays_alone_train():
    weight = LowRankArray.init((4, 4), rank=1, key=jr.key(0))
    spec = trainable({"w": weight, "x": jnp.ones(2)})
    assert jax.tree.leaves(spec) == [True, True, False]


def test_abstract_and_partitioned_trees():
    model = build()
    spec = trainable(model)
    shapes = eqx.filter_eval_shape(lambda: model)
    assert jax.tree.leaves(trainable(shapes)) == jax.tree.leaves(spec)
    params, frozen = partition(model)
    for part, is_params in ((params, True), (frozen, False)):
        got = trainable(part)
        assert jax.tree.structure(got) == jax.tree.structure(part)
        assert set(jax.tree.leaves(got)) == {is_params}
    assert "frozen" not in jax.tree.leaves(labels(params))


def test_partition():
    model = build()
    params, frozen = partition(model)
    assert len(jax.tree.leaves(params)) == 5
    assert eqx.tree_equal(eqx.combine(params, frozen), model)
    assert params.layers[0].weight.base is None
    assert frozen.layers[0].weight.delta.a is None


def test_gradients_are_those_of_the_dense_weights():
    with jax.enable_x64(True):
        model = jax.tree.map(
            lambda x: x.astype(jnp.float64) if eqx.is_inexact_array(x) else x, build()
        )
        x, y = X.astype(jnp.float64), Y.astype(jnp.float64)

        def dense_loss(params):
            def sum_of(w):
                if isinstance(w, LoraArray):
                    return jax.lax.stop_gradient(w.base) + w.b @ w.a
                return w.value if isinstance(w, FullArray) else w

            full = eqx.combine(params, partition(model)[1])
            is_ours = lambda w: isinstance(w, LoraArray | FullArray)
            dense = jax.tree.map(sum_of, full, is_leaf=is_ours)
            return jnp.mean((jax.vmap(dense)(x) - y) ** 2)

        value, grads = filter_value_and_grad(loss)(model, x, y)
        want_value, want = eqx.filter_value_and_grad(dense_loss)(partition(model)[0])
        assert jnp.allclose(value, want_value, rtol=1e-12)
        got, want = jax.tree.leaves(grads), jax.tree.leaves(want)
        assert len(got) == len(want) == 5
        for g, w in zip(got, want):
            assert jnp.allclose(g, w, rtol=1e-10) and jnp.any(g != 0)


def test_signatures():
    model = build()
    _, want = eqx.filter_value_and_grad(loss)(model, X, Y)
    want = eqx.filter(want, trainable(model))

    @filter_grad
    def plain(model, x, *, y):
        """Documented."""
        return loss(model, x, y)

    @filter_grad(has_aux=True)
    def aux(model, x, y):
        return loss(model, x, y), "aux"

    @filter_value_and_grad(has_aux=True)
    def both(model, x, y):
        return loss(model, x, y), "aux"

    assert plain.__doc__ == "Documented." and plain.__name__ == "plain"
    grads, said = aux(model, X, Y)
    (value, said_too), grads_too = both(model, X, y=Y)
    assert said == said_too == "aux" and value.shape == ()
    for got in (plain(model, X, y=Y), grads, grads_too):
        for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert jnp.allclose(g, w, atol=1e-6)
    assert eqx.filter_jit(plain)(model, X, y=Y).layers[0].weight.base is None


def test_no_gradient_of_a_frozen_weight_is_made():
    """No intermediate of the compiled gradient has the shape of the frozen weight."""
    model = eqx.nn.Linear(30, 40, key=jr.key(0))
    model = loraify(model, 2, jr.key(1), init_b=normal)
    x, y = jnp.ones((8, 30)), jnp.ones((8, 40))
    params, static = partition(model)
    arrays, static = eqx.partition(static, eqx.is_array)

    def step(params, arrays, x, y):
        return filter_grad(loss)(eqx.combine(params, arrays, static), x, y)

    outs = jax.eval_shape(step, params, arrays, x, y)
    sizes = {out.shape for out in jax.tree.leaves(outs)}
    assert sizes == {(2, 30), (40, 2)}
    state = optax.adam(1e-3).init(params)
    assert {s.shape for s in jax.tree.leaves(state)} <= sizes | {()}


def train(model, grad, optim, params_of, steps=5):
    state = optim.init(params_of(model))

    @eqx.filter_jit
    def step(model, state):
        value, grads = grad(loss)(model, X, Y)
        updates, state = optim.update(grads, state, params_of(model))
        return eqx.apply_updates(model, updates), state, value

    values = []
    for _ in range(steps):
        model, state, value = step(model, state)
        values.append(float(value))
    assert values[-1] < values[0]
    return model


def ours(model):
    return partition(model)[0]


def theirs(model):
    return eqx.filter(model, eqx.is_inexact_array)


LOOPS = {
    "ours": (filter_value_and_grad, ours),
    "unmodified": (eqx.filter_value_and_grad, theirs),
}
OPTIMISERS = {
    "sgd": optax.sgd(0.02),
    "momentum": optax.sgd(0.02, momentum=0.9),
    "adam": optax.adam(0.02),
    "adamw": optax.adamw(0.02, weight_decay=0.1, mask=trainable),
    "lora_plus": optax.multi_transform(
        {
            "a": optax.adam(0.01),
            "b": optax.adam(0.04),
            "full": optax.adam(0.01),
            "frozen": optax.set_to_zero(),
        },
        labels,
    ),
}


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("loop", LOOPS)
def test_bases_stay_to_the_bit(loop, optimiser):
    model = build()
    before = bases(model)
    after = train(model, LOOPS[loop][0], OPTIMISERS[optimiser], LOOPS[loop][1])
    assert bases(after) == before
    bias = after.layers[1].bias
    assert bits(bias.base) == bits(model.layers[1].bias.base)
    assert jnp.any(bias.value != bias.base)
    for x, y in zip(model.layers, after.layers):
        assert jnp.any(x.weight.a != y.weight.a) and jnp.any(x.weight.b != y.weight.b)
    if loop == "ours" or optimiser == "lora_plus":
        assert bits(partition(after)[1]) == bits(partition(model)[1])


def test_adamw_without_the_mask_decays():
    """Why the mask is there. If this fails, optax no longer decays what has no use."""
    model = build()
    after = train(model, eqx.filter_value_and_grad, optax.adamw(0.02), theirs)
    assert bases(after) != bases(model)


def test_lora_fa_leaves_a_alone():
    model = build()
    optim = optax.multi_transform(
        {"a": optax.set_to_zero(), "b": optax.adam(0.02), "full": optax.adam(0.02)},
        labels,
    )
    after = train(model, filter_value_and_grad, optim, ours)
    for x, y in zip(model.layers, after.layers):
        assert bits(x.weight.a) == bits(y.weight.a)
        assert jnp.any(x.weight.b != y.weight.b)


def test_one_trace_for_all_steps():
    traces = []

    def counted(model, x, y):
        traces.append(None)
        return loss(model, x, y)

    model, optim = build(), optax.sgd(0.02)
    state = optim.init(ours(model))

    @eqx.filter_jit(donate="all")
    def step(model, state):
        grads = filter_grad(counted)(model, X, Y)
        updates, state = optim.update(grads, state)
        return eqx.apply_updates(model, updates), state

    for _ in range(3):  # The model is donated: nothing in it is there twice.
        model, state = step(model, state)
    assert len(traces) == 1


@pytest.mark.parametrize("transform", [filter_grad, filter_value_and_grad])
def test_errors(transform):
    plain = eqx.nn.Linear(4, 5, key=jr.key(0))
    with pytest.raises(ValueError, match="Nothing in the model trains"):
        transform(loss)(plain, X, Y)
    with pytest.raises(ValueError, match="Nothing in the model trains"):
        partition(plain)
    with pytest.raises(TypeError, match="must be given by position"):
        transform(loss)(model=build(), x=X, y=Y)


@pytest.mark.parametrize("use", [filter_grad(loss), eqx.filter_grad(loss), loss])
def test_a_part_of_a_model_is_not_called(use):
    params, _ = partition(build())
    with pytest.raises(ValueError, match="partitioned.*`equinox.combine"):
        use(params, X, Y)


def _cast(tree, dtype=jnp.bfloat16):
    cast = lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x
    return jax.tree.map(cast, tree)


LOST = r"factors of `layers\.0\.weight` and 1 more are bfloat16, in which small steps"


@pytest.mark.parametrize(
    "use",
    [partition, filter_grad(loss), filter_value_and_grad(loss)],
    ids=["partition", "filter_grad", "filter_value_and_grad"],
)
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_factors_that_a_cast_has_rounded(use, jit):
    args = (_cast(build()),) + (() if use is partition else (X, Y))
    with pytest.warns(UserWarning, match=LOST) as caught:
        (eqx.filter_jit(use) if jit else use)(*args)
    assert len(caught) == 1


PRECISE = {
    "as it is": build,
    "cast before": lambda: loraify(
        _cast(eqx.nn.MLP(4, 5, 6, 1, key=jr.key(0))), 2, jr.key(1)
    ),
    "of a wide base": lambda: loraify(
        eqx.nn.MLP(4, 5, 6, 1, key=jr.key(0)), 2, jr.key(1), dtype=jnp.bfloat16
    ),
    "in full": lambda: loraify(
        _cast(eqx.nn.Linear(4, 5, key=jr.key(0))),
        2,
        jr.key(1),
        targets={"weight": "full"},
    ),
    "in part": lambda: partition(build())[0],
    "no base": lambda: LowRankArray(jnp.ones((2, 4)), jnp.ones((5, 2), jnp.bfloat16)),
}


@pytest.mark.parametrize("model", PRECISE)
def test_factors_that_are_as_they_were_made(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        partition(PRECISE[model]())
