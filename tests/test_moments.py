"""What a weight is given by data, seen through loops, maps and other programs."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import quax
from helpers import lora
from jax import lax

import lora_quax
from lora_quax import input_moments, LoraArray, Moments


def _x(*shape, seed=0):
    numbers = np.random.default_rng(seed).normal(0.5, 1, shape)
    return jnp.asarray(numbers, jnp.float32)


def _w(*shape, **kwargs):
    return lora(shape, dtype=jnp.float32, **kwargs)


X, GROUPS = _x(12, 6), jnp.array([5, 0, 4])
IMAGE = _x(3, 4, 7)


def _layers(w, h):
    """A stack of layers, and what each of them is given."""

    @jax.checkpoint
    def body(h, w):
        return jnp.tanh(w @ h), h

    return lax.scan(body, h, w)


def _patches(x, **params):
    out = lax.conv_general_dilated_patches(x, (3,), (1,), "SAME", **params)
    return jnp.swapaxes(out, 1, 2).reshape(-1, out.shape[1])


def _conv(w, x, groups=1):
    return lax.conv_general_dilated(x, w, (1,), "SAME", feature_group_count=groups)


def _grouped(x):
    return jnp.concatenate([_patches(x[:, :2]), _patches(x[:, 2:])])


def _given_layers(w):
    w = w.base
    return jnp.stack([jax.vmap(lambda x: _layers(w, x)[1][i])(X) for i in range(2)])


def _given_experts(_):
    ends = np.cumsum(GROUPS)
    return [X[end - n : end] for n, end in zip(GROUPS, ends)]


# A weight; a program of it; and the vectors that it is given, one array for each index.
PROGRAMS = {
    "a product": (_w(5, 6), lambda w: X @ w.T, lambda w: X),
    "turned": (_w(5, 6), lambda w: w @ X.T, lambda w: X),
    "mapped": (_w(5, 6), lambda w: jax.vmap(lambda x: w @ x)(X), lambda w: X),
    "twice": (
        _w(5, 6),
        lambda w: (X @ w.T, X[:3] @ w.T),
        lambda w: jnp.concatenate([X, X[:3]]),
    ),
    "zeros do not count": (
        _w(5, 6),
        lambda w: X.at[3:].set(0) @ w.T,
        lambda w: X[:3],
    ),
    "in parts": (
        _w(6, 6),
        lambda w: [X @ part.T for part in jnp.split(w, 3)],
        lambda w: jnp.concatenate([X] * 3),
    ),
    "reshaped": (
        _w(6, 6),
        lambda w: jnp.einsum("ti,hoi->tho", X, w.reshape(2, 3, 6)),
        lambda w: X,
    ),
    "layers": (
        _w(2, 6, 6),
        lambda w: jax.vmap(lambda x: _layers(w, x)[0])(X),
        _given_layers,
    ),
    "one by one": (
        _w(2, 6, 6),
        lambda w: jnp.tanh(X @ w[0].T) @ w[1].T,
        lambda w: [X, jnp.tanh(X @ w.base[0].T)],
    ),
    "a batch": (
        _w(3, 5, 4),
        lambda w: jnp.einsum("bti,boi->bto", X.reshape(3, 6, 4), w),
        lambda w: X.reshape(3, 6, 4),
    ),
    "experts": (
        _w(3, 5, 6),
        lambda w: lax.ragged_dot(X[:9], jnp.swapaxes(w, 1, 2), GROUPS),
        _given_experts,
    ),
    "a convolution": (
        _w(5, 4, 3, cols=2),
        lambda w: _conv(w, IMAGE),
        lambda w: _patches(IMAGE),
    ),
    "groups": (
        _w(6, 2, 3, cols=2),
        lambda w: _conv(w, IMAGE, groups=2),
        lambda w: _grouped(IMAGE),
    ),
    "in sixteen bits": (
        lora((5, 6), dtype=jnp.bfloat16),
        lambda w: X.astype(jnp.bfloat16) @ w.T,
        lambda w: X.astype(jnp.bfloat16),
    ),
}


# Of weights that are kept as `(in, out)`.
IN_OUT = {
    "a kernel": (_w(6, 5), lambda w: X @ w, lambda w: X),
    "kernels, mapped": (
        _w(6, 5),
        lambda w: jax.vmap(lambda x: x @ w)(X),
        lambda w: X,
    ),
    "kernels of experts": (
        _w(3, 6, 5),
        lambda w: lax.ragged_dot(X[:9], w, GROUPS),
        _given_experts,
    ),
    "a kernel of two axes": (
        _w(2, 3, 5, rows=2),
        lambda w: jnp.einsum("thi,hio->to", X.reshape(12, 2, 3), w),
        lambda w: X,
    ),
    "a kernel of a convolution": (
        _w(3, 4, 5, rows=2),
        lambda w: lax.conv_general_dilated(
            IMAGE, w, (1,), "SAME", dimension_numbers=("NCH", "HIO", "NCH")
        ),
        lambda w: _patches(IMAGE).reshape(-1, 4, 3).swapaxes(1, 2).reshape(-1, 12),
    ),
}
PROGRAMS |= IN_OUT


def _expected(given):
    x = np.asarray(given, np.float64)
    return len(x), x.sum(0), x.T @ x


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_a_weight_is_given(name):
    w, program, given = PROGRAMS[name]
    forward = lambda m: quax.quaxify(program)(m["w"])
    run = eqx.filter_jit(input_moments(forward, in_out="w" if name in IN_OUT else ()))
    found = run({"w": w, "other": 3.0})
    assert found["other"] is None
    found = found["w"]
    assert found.second.dtype == jnp.float32
    given = given(w)
    if w.n_batch:
        expected = [np.stack(x) for x in zip(*map(_expected, given))]
    else:
        expected = _expected(given)
    for x, y in zip((found.count, found.first, found.second), expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-4)


def test_the_mean_is_taken_away():
    x = np.asarray(X, np.float64)
    moments = Moments(*map(jnp.asarray, (12.0, x.sum(0), x.T @ x)))
    np.testing.assert_allclose(
        moments.covariance(), np.cov(x.T, bias=True), rtol=1e-4, atol=1e-4
    )


def test_joined_weights_are_told_apart():
    model = {"q": _w(4, 6), "k": _w(2, 6, seed=1)}
    program = lambda m: X @ jnp.concatenate([m["q"], m["k"]]).T
    found = input_moments(quax.quaxify(program))(model)
    for moments in found.values():
        np.testing.assert_allclose(moments.second, X.T @ X, rtol=1e-4, atol=1e-4)
        assert moments.count == 12


def test_batches_are_added_up():
    model = eqx.nn.MLP(6, 2, 8, 1, key=jr.key(0))
    model = lora_quax.loraify(model, 2, jr.key(1), use_dora=True)
    forward = lambda model, x: jax.vmap(quax.quaxify(model))(x)
    run = eqx.filter_jit(input_moments(forward))
    total = jax.tree.map(jnp.add, run(model, X[:6]), run(model, X[6:]))
    for x, y in zip(
        jax.tree.leaves(total), jax.tree.leaves(run(model, X)), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-4)
    out = lora_quax.initialise(model, "eva", moments=total)
    np.testing.assert_allclose(forward(out, X), forward(model, X), rtol=1e-5, atol=1e-6)


def test_dropout_is_away_meanwhile():
    forward = lambda model, x: quax.quaxify(lambda w, x: x @ w.T)(model["w"], x)
    w = LoraArray.from_parts(_w(5, 6).base, _w(5, 6).delta, dropout=0.5)
    found = input_moments(forward)(lora_quax.with_dropout_key({"w": w}, jr.key(0)), X)
    assert eqx.tree_equal(found, input_moments(forward)({"w": w}, X))


def test_of_an_abstract_model():
    run = input_moments(lambda m, x: quax.quaxify(lambda m, x: x @ m["w"].T)(m, x))
    model = {"w": _w(5, 6)}
    types = eqx.filter_eval_shape(lambda m: m, model)
    assert eqx.tree_equal(run(types, X), eqx.filter_eval_shape(run, model, X))


def test_what_nothing_reaches_has_none():
    program = lambda m: (m["w"].T @ X[:, :5].T, lax.stop_gradient(X @ m["w"].T))
    found = input_moments(quax.quaxify(program))({"w": _w(5, 6)})["w"]
    assert not any(x.any() for x in jax.tree.leaves(found))


def test_a_derivative_inside_is_refused():
    def program(m):
        return jax.vmap(jax.grad(lambda x: jnp.sum(quax.quaxify(jnp.matmul)(m, x))))(X)

    with pytest.raises(
        ValueError, match="takes a derivative of what a weight computes"
    ):
        input_moments(program)(_w(5, 6))


def test_no_function():
    # The second is what the annotation says.
    with pytest.raises(TypeError, match="takes a function of the model|parameter 'fn'"):
        input_moments({"w": _w(5, 6)})  # pyright: ignore


def test_a_name_of_nothing():
    with pytest.raises(ValueError, match="'v' of `in_out` is the name of no weight"):
        input_moments(lambda m: X @ m["w"], in_out=["w", "v"])({"w": _w(6, 5)})


@pytest.mark.parametrize("names", [3, None, [3], {"w": True}])
def test_no_names(names):
    # The second is what the annotation says.
    with pytest.raises(TypeError, match="must be names of weights|parameter 'in_out'"):
        input_moments(lambda m: X @ m["w"], in_out=names)


def test_nothing_to_observe():
    with pytest.raises(ValueError, match="Nothing in the model is a `LoraArray`"):
        input_moments(lambda m: m)(eqx.nn.Linear(2, 2, key=jr.key(0)))


def test_the_rest_of_the_derivative_is_not_computed():
    size, count = 64, 32
    w, x = _w(3, size, size), _x(count, size)
    layer = lambda h, w: (jnp.tanh(w @ h), None)
    program = lambda w: jax.vmap(lambda x: lax.scan(layer, x, w)[0])(x)
    run = jax.jit(input_moments(quax.quaxify(program)))
    # XLA counts the body of a loop once. With W, with the factors of the probe, and for
    # the moments: four products. The cotangents of a layer's input would be three more.
    product = 2 * count * size**2
    cost = run.lower(w).compile().cost_analysis()
    assert cost is not None and cost["flops"] < 5.5 * product
