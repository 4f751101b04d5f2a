"""Dropout: masks of the right rate, others where they should be, the same elsewhere.

A weight without a base, of which the update is all ones, shows its mask: the derivative
of any output by an input is `mask / (1 - rate)`.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import quax
from helpers import drawn
from jax import lax
from jax.sharding import AxisType, PartitionSpec as P

import lora_quax
from lora_quax import LoraArray, LowRankArray, QuantisedArray, with_dropout_key


pytestmark = pytest.mark.usefixtures("x64")
RATE = 0.3
N = 60
MESH = jax.make_mesh((1,), ("i",), axis_types=(AxisType.Auto,))


def weight(*shape, rows=1, cols=1, rate=RATE, key: int | None = 0, scale=0.0) -> Any:
    """Of a base of `scale`, and an update of ones; with a key, if there is one."""
    n = len(shape) - rows - cols
    a = jnp.ones((*shape[:n], 1, *shape[n + rows :]))
    b = jnp.ones((*shape[: n + rows], 1))
    base = scale * drawn(shape, 3)
    w = LoraArray.from_parts(
        base, LowRankArray(a, b, rows=rows, cols=cols), dropout=rate
    )
    return w if key is None else with_dropout_key(w, jr.key(key))


def product(w, x):
    return w @ x


def masks(use, w, *shape, out=0):
    """The mask that an input of this shape meets, in the derivative of one output."""
    f = lambda x: jnp.ravel(quax.quaxify(use)(w, x))[out]
    return np.asarray(jax.grad(f)(jnp.ones(shape)))


# What a weight is used for, its shape, its axes and that of the input, of which each
# number goes to the first output.
USES = {
    "w @ x": (lambda w, x: w @ x, (3, N), {}, (N,)),
    "x @ w": (lambda w, x: x @ w, (N, 3), {}, (N,)),
    "x @ w.T": (lambda w, x: x @ w.T, (3, N), {}, (N,)),
    "einsum": (lambda w, x: jnp.einsum("oi,bi->ob", w, x), (3, N), {}, (1, N)),
    "a slice": (lambda w, x: w[1:] @ x, (3, N), {}, (N,)),
    "a cast": (lambda w, x: w.astype(jnp.float32) @ x, (3, N), {}, (N,)),
    "scaled": (lambda w, x: (-w) @ -x, (3, N), {}, (N,)),
    "reshaped": (lambda w, x: w.reshape(3, N) @ x, (3, 6, 10), {"cols": 2}, (N,)),
    "jit": (lambda w, x: jax.jit(jnp.matmul)(w, x), (3, N), {}, (N,)),
    "checkpoint": (jax.checkpoint(lambda w, x: w @ x), (3, N), {}, (N,)),
    "cond": (
        lambda w, x: lax.cond(x[0] > 0, lambda: w @ x, lambda: 2 * (w @ x)),
        (3, N),
        {},
        (N,),
    ),
    "a loop": (
        lambda w, x: lax.scan(lambda c, _: (c, w @ c), x, None, length=2)[1],
        (3, N),
        {},
        (N,),
    ),
    "a layer of a stack": (lambda w, x: w[1] @ x, (2, 3, N), {}, (N,)),
    "a dynamic layer": (
        lambda w, x: lax.dynamic_index_in_dim(w, jnp.argmax(x), 0, False) @ x,
        (2, 3, N),
        {},
        (N,),
    ),
    "layers looked up": (
        lambda w, x: jnp.einsum("soi,si->so", w[jnp.array([1])], x),
        (2, 3, N),
        {},
        (1, N),
    ),
    "a scan over layers": (
        lambda w, x: lax.scan(lambda c, v: (c, v @ c), x, w)[1],
        (2, 3, N),
        {},
        (N,),
    ),
    "a stack": (lambda w, x: jnp.einsum("soi,si->so", w, x), (1, 3, N), {}, (1, N)),
    "one of two branches": (
        lambda w, x: lax.cond(x[0] > 0, lambda: w, lambda: 2 * w) @ x,
        (3, N),
        {},
        (N,),
    ),
    "a shard_map": (
        lambda w, x: jax.shard_map(
            lambda w, x: w @ x, mesh=MESH, in_specs=(P(), P()), out_specs=P()
        )(w, x),
        (3, N),
        {},
        (N,),
    ),
    "conv": (
        lambda w, x: lax.conv_general_dilated(x, w, (1,), "VALID"),
        (2, 3, N // 3),
        {"cols": 2},
        (1, 3, N // 3),
    ),
    "experts": (
        lambda w, x: lax.ragged_dot(x, w, jnp.array([1, 0])),
        (2, N, 3),
        {},
        (1, N),
    ),
}


@pytest.mark.parametrize("name", USES)
def test_masks(name):
    use, shape, axes, of_input = USES[name]
    f = jax.jit(lambda w: jnp.stack([masks_of(w, i) for i in range(2)]))
    masks_of = lambda w, i: jax.grad(lambda x: jnp.ravel(quax.quaxify(use)(w, x))[i])(
        jnp.ones(of_input)
    )
    all_masks = [np.asarray(f(weight(*shape, key=i, **axes))) for i in range(12)]
    values = {*np.unique(np.round(all_masks, 6))}
    assert values == {0.0, round(1 / (1 - RATE), 6)}
    # One mask for all outputs of a product; the two outputs are of one.
    for mask in all_masks:
        np.testing.assert_array_equal(*mask)
    firsts = np.stack([mask[0] for mask in all_masks])
    n = firsts.size
    assert abs((firsts == 0).mean() - RATE) < 5 * np.sqrt(RATE * (1 - RATE) / n)
    assert len({mask.tobytes() for mask in firsts}) == len(firsts)


@pytest.mark.parametrize("name", USES)
def test_an_activation_and_its_cotangent_meet_one_mask(name):
    """A linear program is its derivative, times what it is given."""
    use, shape, axes, of_input = USES[name]
    w = weight(*shape, scale=1.0, **axes)
    x = abs(drawn(of_input, 5)) + 0.1

    def total(x):
        return jnp.sum(quax.quaxify(use)(w, x))

    value, (gradient,) = jax.jit(lambda x: (total(x), (jax.grad(total)(x),)))(x)
    assert jnp.allclose(value, jnp.sum(gradient * x), rtol=1e-5)
    tangent = jax.jvp(total, (x,), (x,))[1]
    assert jnp.allclose(total(x), value) and jnp.allclose(tangent, value, rtol=1e-5)


@pytest.mark.parametrize("name", USES)
def test_without_a_key_nothing_is_dropped(name):
    use, shape, axes, of_input = USES[name]
    x = abs(drawn(of_input, 5)) + 0.1
    run = jax.jit(lambda w: quax.quaxify(use)(w, x))
    plain = run(weight(*shape, scale=1.0, key=None, rate=0.0, **axes))
    np.testing.assert_array_equal(
        run(weight(*shape, scale=1.0, key=None, **axes)), plain
    )


def test_the_expectation_is_the_product_without_dropout():
    w, x = weight(3, N, scale=1.0, key=None), drawn((N,), 5)
    dropping = lambda key: quax.quaxify(product)(with_dropout_key(w, key), x)
    samples = jax.jit(jax.vmap(dropping))(jr.split(jr.key(1), 4000))
    error = np.asarray(samples.std(0)) / np.sqrt(len(samples))
    expected = quax.quaxify(product)(w, x)
    assert (abs(samples.mean(0) - expected) < 5 * error).all()
    # The base is not dropped: what varies is the update alone.
    var = RATE / (1 - RATE) * jnp.sum(x**2)
    assert jnp.allclose(samples.var(0), var, rtol=0.15)


# Streams.


def _twice(w, x):
    return jnp.stack([w @ x[0], w @ x[1]])


STREAMS = {
    "uses": (_twice, (3, N), {}),
    "uses of what was moved": (
        lambda w, x: jnp.stack([w @ x[0], x[1] @ w.T]),
        (3, N),
        {},
    ),
    "uses of a layer of a stack": (
        lambda w, x: jnp.stack([w[0] @ x[0], w[0] @ x[1]]),
        (2, 3, N),
        {},
    ),
    "uses of what was reshaped": (
        lambda w, x: jnp.stack([lax.squeeze(w[None], [0]) @ y for y in x]),
        (3, N),
        {},
    ),
    "uses in a call": (
        lambda w, x: jnp.stack([jax.jit(jnp.dot)(w, x[i]) for i in range(2)]),
        (3, N),
        {},
    ),
    "examples": (lambda w, x: jax.vmap(lambda x: w @ x)(x), (3, N), {}),
    "tokens": (lambda w, x: (x[None] @ w.T)[0], (3, N), {}),
    "layers of a stack": (
        lambda w, x: jnp.stack([w[i] @ x[i] for i in range(2)]),
        (2, 3, N),
        {},
    ),
    "layers looked up": (
        lambda w, x: jax.vmap(lambda i, x: w[i] @ x)(jnp.array([1, 0]), x),
        (2, 3, N),
        {},
    ),
    "a scan over layers": (
        lambda w, x: lax.scan(lambda c, vx: (c, vx[0] @ vx[1]), 0.0, (w, x))[1],
        (2, 3, N),
        {},
    ),
    "a stack": (lambda w, x: jnp.einsum("soi,si->so", w, x), (2, 3, N), {}),
}


@pytest.mark.parametrize("name", STREAMS)
def test_each_has_a_mask_of_its_own(name):
    use, shape, axes = STREAMS[name]
    w = weight(*shape, **axes)
    gradient = np.asarray(
        jax.jit(jax.grad(lambda x: jnp.sum(quax.quaxify(use)(w, x)[:, 0])))(
            jnp.ones((2, N))
        )
    )
    assert (gradient == 0).any() and (gradient != 0).any()
    assert ((gradient[0] == 0) != (gradient[1] == 0)).any()


def test_a_scan_outside_of_quaxify():
    w = weight(2, 3, N)
    step = lambda x, v: (x, quax.quaxify(product)(v, x)[0])
    f = lambda x: lax.scan(step, x, w)[1]
    first, second = np.asarray(jax.jit(jax.jacobian(f))(jnp.ones(N)))
    assert ((first == 0) != (second == 0)).any()


@pytest.mark.parametrize("stacked", [True, False])
def test_a_stack_has_the_masks_of_its_weights(stacked):
    """Also where all of it is given the same: as in an ensemble of adapters."""
    w, x = weight(2, 3, N), jnp.ones((2, N) if stacked else N)
    axes = (0, 0 if stacked else None)
    inside = quax.quaxify(jax.vmap(product, axes))(w, x)
    outside = jax.vmap(quax.quaxify(product), axes)(w, x)
    np.testing.assert_array_equal(inside, outside)
    assert inside[0, 0] != inside[1, 0]
    none = jax.tree.map(lambda leaf: leaf[:0], w)
    assert quax.quaxify(jax.vmap(product, (0, None)))(none, jnp.ones(N)).shape == (0, 3)


def test_keys_for_each_example():
    w, x = weight(3, N, key=None), jnp.ones((4, N))

    def f(x, key):
        return quax.quaxify(product)(with_dropout_key(w, key), x)

    out = jax.jit(jax.vmap(f))(x, jr.split(jr.key(0), 4))
    one_by_one = [f(x[0], key) for key in jr.split(jr.key(0), 4)]
    assert jnp.allclose(out, jnp.stack(one_by_one))
    assert len({float(y) for y in out[:, 0]}) > 1


def test_weights_have_masks_of_their_own(getkey):
    model = eqx.nn.MLP(N, N, N, 1, key=getkey())
    model = lora_quax.loraify(model, 2, getkey(), dropout=0.5)
    keys = [layer.weight.key for layer in with_dropout_key(model, getkey()).layers]
    data = [tuple(np.ravel(jr.key_data(key))) for key in keys]
    assert len({*data}) == len(data) == 2


def test_no_step_is_traced_again(getkey):
    model = eqx.nn.MLP(4, 4, 8, 1, key=getkey())
    model = lora_quax.loraify(model, 2, getkey(), dropout=0.5)
    count = 0

    @eqx.filter_jit
    def step(model, x, key):
        nonlocal count
        count += 1

        @lora_quax.filter_value_and_grad
        def loss(model):
            dropping = with_dropout_key(model, key)
            return jnp.sum(jax.vmap(quax.quaxify(dropping))(x) ** 2)

        value, grads = loss(model)
        return value, eqx.apply_updates(model, jax.tree.map(lambda g: -0.01 * g, grads))

    values = []
    for key in jr.split(jr.key(0), 3):
        value, model = step(model, jnp.ones((2, 4)), key)
        values.append(float(value))
    assert count == 1 and len({*values}) == 3
    assert isinstance(model.layers[0].weight, LoraArray)


def test_no_tracer_is_kept(getkey):
    w = lora_quax.DoRA(weight(3, 4, key=None))

    @jax.jit
    def run(key):
        return quax.quaxify(_twice)(with_dropout_key(w, key), jnp.ones((2, 4)))

    with jax.checking_leaks():
        run(getkey())


def test_a_key_gives_the_same_run_again(getkey):
    w, x = weight(3, N, key=None), jnp.ones((2, N))
    run = lambda: quax.quaxify(_twice)(with_dropout_key(w, jr.key(7)), x)
    np.testing.assert_array_equal(run(), run())
    np.testing.assert_array_equal(run(), jax.jit(run)())
    raw = quax.quaxify(_twice)(with_dropout_key(w, jr.PRNGKey(7)), x)
    np.testing.assert_array_equal(run(), raw)


# What has none.


def test_a_lookup_has_none(getkey):
    embedding = eqx.nn.Embedding(5, 4, key=getkey())
    model = lora_quax.loraify(
        embedding, 2, getkey(), targets=eqx.nn.Embedding, dropout=0.5
    )
    x = jnp.array(2)
    dropping = quax.quaxify(with_dropout_key(model, getkey()))(x)
    np.testing.assert_array_equal(dropping, quax.quaxify(model)(x))


def test_a_product_of_two_weights_has_none():
    w, v = weight(3, N, scale=1.0), weight(N, 2, scale=1.0)
    f = quax.quaxify(lambda w, v, x: (w @ v) @ x)
    out = f(w, v, jnp.ones(2))
    assert jnp.allclose(out, w.w.dense() @ v.w.dense() @ jnp.ones(2))


def test_a_quantised_base():
    codes = jnp.asarray(np.random.default_rng(0).integers(-8, 8, (3, N)))
    base = QuantisedArray(codes, jnp.ones((3, 1)), kind="int8", dtype=jnp.float64)
    w = weight(3, N, key=None)
    w = LoraArray.from_parts(base, w.delta, dropout=RATE)
    mask = masks(lambda w, x: w @ x, with_dropout_key(w, jr.key(0)), N) - codes[0]
    assert {*np.unique(np.round(mask, 6))} == {0.0, round(1 / (1 - RATE), 6)}


def test_dora():
    w = lora_quax.DoRA(weight(3, N, key=None))
    mask = masks(lambda w, x: w @ x, with_dropout_key(w, jr.key(0)), N)
    assert {*np.unique(np.round(mask, 6))} == {0.0, round(1 / (1 - RATE), 6)}
    out = [quax.quaxify(product)(x, jnp.ones(N)) for x in (w, w.lora)]
    np.testing.assert_allclose(*out, rtol=1e-6)


# What is refused.


def test_derivatives_inside_of_quaxify():
    w, x = weight(3, N), jnp.ones(N)
    total = lambda w, x: jnp.sum(w @ x)
    for derive in (
        jax.grad(total, 1),
        lambda w, x: jax.jvp(lambda x: w @ x, (x,), (x,)),
    ):
        with pytest.raises(RuntimeError, match="differentiated inside of `quaxify`"):
            quax.quaxify(derive)(w, x)
    with pytest.raises(RuntimeError, match="differentiated inside of `quaxify`"):
        quax.quaxify(jax.grad(jax.jit(total), 1))(w, x)
    assert quax.quaxify(jax.grad(total, 1))(w.w, x).shape == x.shape


def test_functions_with_derivatives_of_their_own():
    @jax.custom_vjp
    def product(w, x):
        return w @ x

    product.defvjp(lambda w, x: (w @ x, (w, x)), lambda r, g: (None, r[0].T @ g))
    with pytest.raises(RuntimeError, match="met `custom_vjp`, which multiplies"):
        quax.quaxify(product)(weight(3, N), jnp.ones(N))


def test_a_linear_solve():
    def solve(w, x):
        matvec = lambda y: w @ y
        solver = lambda matvec, y: y
        return lax.custom_linear_solve(matvec, x, solver, symmetric=True)

    with pytest.raises(RuntimeError, match="met `custom_linear_solve`, which"):
        quax.quaxify(solve)(weight(N, N), jnp.ones(N))


@pytest.mark.parametrize("rate", [1.0, -0.1, 3, float("nan")])
def test_a_rate_that_is_none(rate, getkey):
    linear = eqx.nn.Linear(3, 2, key=getkey())
    with pytest.raises(ValueError, match="`dropout` must be"):
        lora_quax.loraify(linear, 1, getkey(), dropout=rate)
    with pytest.raises(ValueError, match="`dropout` must be"):
        lora_quax.Adapt(dropout=rate)


def test_a_model_without_dropout(getkey):
    model = lora_quax.loraify(eqx.nn.Linear(3, 2, key=getkey()), 1, getkey())
    with pytest.raises(ValueError, match="No weight of the model has dropout"):
        with_dropout_key(model, getkey())


# A model with rates.


def _model(getkey):
    model = eqx.nn.MLP(4, 3, 8, 1, key=getkey())
    targets = {eqx.nn.Linear: True, r"layers\.1\..*": lora_quax.Adapt(dropout=0.0)}
    return model, lora_quax.loraify(model, 2, getkey(), targets=targets, dropout=0.25)


def test_a_rate_for_each_target(getkey):
    _, model = _model(getkey)
    assert [layer.weight.dropout for layer in model.layers] == [0.25, 0.0]
    kinds = [type(x.weight).__name__ for x in with_dropout_key(model, getkey()).layers]
    assert kinds == ["DropoutArray", "LoraArray"]


def test_files(getkey, tmp_path):
    plain, model = _model(getkey)
    path = tmp_path / "adapter.safetensors"
    lora_quax.save_adapter(path, model)
    assert eqx.tree_equal(lora_quax.load_adapter(path, plain), model)
    lora_quax.peft.save(tmp_path / "peft", model)
    loaded = lora_quax.peft.load(tmp_path / "peft", plain)
    # PEFT knows one rate for all.
    assert [layer.weight.dropout for layer in loaded.layers] == [0.25, 0.25]


def test_the_model_of_a_step(getkey, tmp_path):
    """It partitions, merges and comes apart as the model does that it was made of."""
    plain, model = _model(getkey)
    dropping = with_dropout_key(model, getkey())
    trains = [lora_quax.partition(m)[0] for m in (dropping, model)]
    shapes = [[leaf.shape for leaf in jax.tree.leaves(x)] for x in trains]
    assert shapes[0] == shapes[1]
    assert eqx.tree_equal(lora_quax.unload(dropping), plain)
    assert eqx.tree_equal(lora_quax.merge(dropping), lora_quax.merge(model))
    again = with_dropout_key(dropping, jr.key(3))
    assert eqx.tree_equal(again, with_dropout_key(model, jr.key(3)))
    files = [tmp_path / "of the step", tmp_path / "of the model"]
    for path, saved in zip(files, (dropping, model)):
        lora_quax.save_adapter(path, saved)
        lora_quax.peft.save(f"{path}, peft", saved)
    assert files[0].read_bytes() == files[1].read_bytes()
