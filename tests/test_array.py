"""Construction, initialisers, the policy, and what is refused at the door."""

import copy
import pickle

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jaxtyping
import numpy as np
import pytest
import quax
from helpers import assert_close, dense, lora, low_rank, normal, Scaled

from lora_quax import init, LoraArray, loraify, LowRankArray, MaterialiseError, merge
from lora_quax._arrays.check import check_flag


WEIGHTS = {
    "matrix": ((5, 3), {}),
    "wide": ((3, 50), {}),
    "one row": ((1, 3), {}),
    "batch": ((4, 5, 3), {}),
    "two batch axes": ((2, 4, 5, 3), {}),
    "conv 1d": ((6, 2, 3), dict(cols=2)),
    "conv 2d": ((6, 2, 3, 3), dict(cols=3)),
    "conv 3d": ((6, 2, 3, 3, 3), dict(cols=4)),
    "stacked conv": ((4, 6, 2, 3, 3), dict(cols=3)),
    "heads": ((2, 4, 8), dict(rows=2)),
}


@pytest.mark.parametrize("weight", WEIGHTS)
def test_shapes_and_fields(weight, getkey):
    shape, options = WEIGHTS[weight]
    w = jr.normal(getkey(), shape)
    lora = LoraArray(w, rank=4, alpha=8, key=getkey(), **options)
    n = len(shape) - options.get("rows", 1) - options.get("cols", 1)
    split = n + options.get("rows", 1)
    assert lora.a.shape == (*shape[:n], 4, *shape[split:])
    assert lora.b.shape == (*shape[:split], 4)
    assert (lora.rank, lora.alpha, lora.scaling) == (4, 8.0, 2.0)
    assert (lora.stop_gradient, lora.allow_materialise) == (True, False)
    assert (lora.shape, lora.dtype, lora.ndim) == (w.shape, w.dtype, w.ndim)
    assert LoraArray(w, rank=4, key=getkey(), **options).scaling == 1.0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_a_fresh_adapter_changes_no_bit(weight, dtype, getkey):
    shape, options = WEIGHTS[weight]
    w = jr.normal(getkey(), shape).astype(dtype).at[(0,) * len(shape)].set(-0.0)
    lora = LoraArray(w, rank=4, key=getkey(), allow_materialise=True, **options)
    assert merge(lora).dtype == lora.materialise().dtype == dtype
    assert np.asarray(merge(lora)).tobytes() == np.asarray(w).tobytes()
    np.testing.assert_array_equal(lora.materialise(), w)


def test_a_fresh_adapter_trains_where_it_is_materialised(getkey):
    w = LoraArray(
        jr.normal(getkey(), (5, 3)), rank=2, key=getkey(), allow_materialise=True
    )
    loss = lambda w: quax.quaxify(lambda w: jnp.tanh(w).sum())(w)
    expected = jax.grad(lambda w: jnp.tanh(w).sum())(w.base) @ w.a.T
    assert_close(eqx.filter_grad(loss)(w).b, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_materialise(weight):
    with jax.enable_x64(True):
        shape, options = WEIGHTS[weight]
        for w in (lora(shape, **options), low_rank(shape, **options)):
            assert_close(w.dense(), dense(w))


def test_the_default_initialiser_is_pefts(getkey):
    w = LoraArray(jnp.zeros((64, 9, 3, 3)), rank=50, cols=3, key=getkey())
    bound = 1 / np.sqrt(9 * 3 * 3)
    a = np.asarray(w.a)
    assert np.abs(a).max() <= bound and np.abs(a).max() > 0.99 * bound
    assert abs(a.mean()) < 0.05 * bound and abs(a.std() - bound / np.sqrt(3)) < 0.02
    assert not np.asarray(w.b).any()


@pytest.mark.parametrize(
    ("options", "stddev"),
    [
        (dict(init_a=init.gaussian(0.02)), 0.02),
        (dict(scale=0.5), 0.5),
        (dict(init_a=jax.nn.initializers.he_normal()), np.sqrt(2 / 400)),
        (dict(init_a=jax.nn.initializers.lecun_normal()), np.sqrt(1 / 400)),
    ],
)
def test_initialisers_see_columns_as_fan_in(options, stddev, getkey):
    w = LoraArray(jnp.zeros((30, 400)), rank=100, key=getkey(), **options)
    assert abs(np.asarray(w.a).std() / stddev - 1) < 0.05


def test_initialisers_of_jax_for_both(getkey):
    w = LoraArray(
        jnp.zeros((4, 30, 40)),
        rank=8,
        key=getkey(),
        init_a=jax.nn.initializers.orthogonal(),
        init_b=jax.nn.initializers.orthogonal(),
    )
    eye = np.broadcast_to(np.eye(8), (4, 8, 8))
    np.testing.assert_allclose(w.a @ w.a.mT, eye, atol=1e-5)
    np.testing.assert_allclose(w.b.mT @ w.b, eye, atol=1e-5)
    assert np.abs(w.a[0] - w.a[1]).max() > 0.01  # Each batch index is drawn apart.


@pytest.mark.parametrize(
    ("base", "given", "factors"),
    [
        (jnp.float32, None, jnp.float32),
        (jnp.bfloat16, None, jnp.float32),
        (jnp.float16, None, jnp.float32),
        (jnp.bfloat16, jnp.bfloat16, jnp.bfloat16),
        (jnp.float32, jnp.float16, jnp.float16),
    ],
)
def test_dtypes(base, given, factors, getkey):
    w = LoraArray(jnp.ones((5, 3), base), rank=2, key=getkey(), dtype=given)
    assert (w.dtype, w.a.dtype, w.b.dtype) == (base, factors, factors)
    out = quax.quaxify(lambda w, x: w @ x)(w, jnp.ones(3, base))
    assert out.dtype == base
    assert merge(w).dtype == base


def test_a_low_rank_array_is_the_weight_of_a_layer(getkey):
    linear = eqx.nn.Linear(3, 5, key=getkey())
    weight = LowRankArray.init((5, 3), rank=2, key=getkey(), init_b=normal)
    linear = eqx.tree_at(lambda l: l.weight, linear, weight)
    x = jr.normal(getkey(), (3,))
    out = jax.jit(quax.quaxify(lambda l, x: l(x)))(linear, x)
    assert_close(out, weight.b @ (weight.a @ x) + linear.bias, rtol=1e-5, atol=1e-5)


def test_a_base_of_another_type(getkey):
    base = Scaled(jr.normal(getkey(), (5, 3)), jnp.asarray(0.5))
    w = LoraArray(base, rank=2, key=getkey(), init_b=normal)
    x = jr.normal(getkey(), (3,))
    out = quax.quaxify(lambda w, x: w @ x)(w, x)
    assert_close(out, dense(w) @ x, rtol=1e-5, atol=1e-5)
    # Dispatched to its own rule: the base was never materialised.
    jaxpr = str(jax.make_jaxpr(quax.quaxify(lambda w, x: w @ x))(w, x))
    assert "mul" in jaxpr and "f32[5,3] = mul" not in jaxpr


def test_the_gradient_stops_at_the_base():
    with jax.enable_x64(True):
        x = jnp.arange(3.0)
        loss = lambda w: (quax.quaxify(lambda w: w @ x)(w) ** 2).sum()
        frozen, free = lora((5, 3)), lora((5, 3), stop_gradient=False)
        assert not eqx.filter_grad(loss)(frozen).base.any()
        expected = jax.grad(lambda w: ((w @ x) ** 2).sum())(dense(free))
        assert_close(eqx.filter_grad(loss)(free).base, expected)


def test_rank_above_what_the_weight_can_use(getkey):
    w = LoraArray(jnp.ones((5, 3)), rank=8, key=getkey(), init_b=normal)
    out = quax.quaxify(lambda w, x: x @ w.T)(w, jnp.ones((2, 3)))
    assert_close(out, jnp.ones((2, 3)) @ dense(w).T, rtol=1e-5, atol=1e-5)


def test_repr(getkey):
    w = LoraArray(jnp.ones((5, 3), jnp.bfloat16), rank=2, alpha=4, key=getkey())
    assert repr(w) == "LoraArray(bf16[5,3], rank=2, alpha=4, factors=float32)"
    assert repr(w.delta) == "LowRankArray(f32[5,3], rank=2, alpha=4)"
    is_wide = lambda x: x.dtype == jnp.bfloat16
    frozen, _ = eqx.partition(w, is_wide)
    assert repr(frozen) == "LoraArray(rank=2, alpha=4)"
    abstract = eqx.filter_eval_shape(lambda w: w, w)
    assert repr(abstract) == repr(w)
    assert "LoraArray(f32[5,3], rank=2" in repr(
        loraify(eqx.nn.Linear(3, 5, key=getkey()), 2, getkey())
    )


def test_copies(getkey):
    w = LoraArray(jnp.ones((5, 3)), rank=2, key=getkey(), init_b=normal)
    for other in (copy.deepcopy(w), pickle.loads(pickle.dumps(w))):
        assert eqx.tree_equal(w, other)


BAD = {
    "rank zero": (dict(rank=0), ValueError, "`rank` must be a positive integer, got 0"),
    "rank negative": (dict(rank=-1), ValueError, "got -1"),
    "rank float": (dict(rank=2.0), ValueError, r"got 2\.0"),
    "rank bool": (dict(rank=True), ValueError, "got True"),
    "alpha string": (dict(alpha="8"), TypeError, "`alpha` must be a number"),
    "alpha too large": (dict(alpha=10**400), ValueError, "`alpha` must be finite"),
    "alpha zero": (dict(alpha=0.0), ValueError, "`alpha` is 0, .* would train"),
    "alpha complex": (dict(alpha=1j), TypeError, "`alpha` must be a number"),
    "ranks": (dict(rank=np.array([1, 2])), ValueError, "`rank` must be a positive"),
    "factors of 8 bits": (
        dict(dtype=jnp.float8_e5m2),
        TypeError,
        "of 16 bits or more, got float8_e5m2",
    ),
    "alpha nan": (dict(alpha=float("nan")), ValueError, "`alpha` must be finite"),
    "key missing": (dict(key=None), TypeError, "`key` must be one key"),
    "key integer": (dict(key=3), TypeError, "`key` must be one key"),
    "keys": (dict(key=jr.split(jr.key(0))), TypeError, "`key` must be one key"),
    "rows": (dict(rows=2, cols=1), ValueError, "cannot have 2 axes of rows"),
    "vector": (dict(weight=jnp.ones(3)), ValueError, r"\(3,\) cannot have 1 axes"),
    "integers": (
        dict(weight=jnp.ones((5, 3), int)),
        TypeError,
        r"must be a floating-point array, got int32\[5,3\]",
    ),
    "complex": (dict(weight=jnp.ones((5, 3), complex)), TypeError, "floating-point"),
    "not an array": (dict(weight="w"), TypeError, "must be an array, got 'w'"),
    "two initialisers": (
        dict(scale=0.1, init_a=normal),
        ValueError,
        "either `init_a` or `scale`",
    ),
    "initialiser of another shape": (
        dict(init_a=lambda key, shape, dtype: jnp.zeros((2, 2), dtype)),
        ValueError,
        r"asked for shape \(3, 2\)",
    ),
}


@pytest.fixture
def _unchecked():
    """Without the type checker of the tests, which users do not have."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("bad", BAD)
def test_bad_input(bad, _unchecked):
    changes, error, match = BAD[bad]
    good = dict(weight=jnp.ones((5, 3)), rank=2, key=jr.key(0))
    arguments = {**good, **changes}
    with pytest.raises(error, match=match):
        LoraArray(arguments.pop("weight"), **arguments)


def test_factors_that_do_not_fit():
    match = r"got a of shape \(2, 3\) and b of shape \(5, 3\)"
    with pytest.raises(ValueError, match=match):
        LowRankArray(jnp.ones((2, 3)), jnp.ones((5, 3)))


def test_refusal_names_what_and_why():
    w = LoraArray(jnp.ones((5, 3)), rank=2, key=jr.key(0))
    with pytest.raises(MaterialiseError) as info:
        quax.quaxify(lambda w: jnp.exp(w))(w)
    message = str(info.value)
    for part in (
        "`exp` needs the dense weight",
        "LoraArray float32[5,3] of rank 2",
        "no low-rank rule",
        "allow_materialise=True",
        "lora_quax.merge(model)",
        "targets",
    ):
        assert part in message
    with pytest.raises(MaterialiseError, match=r"reshaping \(5, 3\) to \(15,\)"):
        quax.quaxify(lambda w: w.ravel())(w)
    with pytest.raises(MaterialiseError, match="was called"):
        w.materialise()


# Arrays from their parts.


def test_from_parts(getkey):
    base = jr.normal(getkey(), (5, 3))
    b, a = jr.normal(getkey(), (5, 2)), jr.normal(getkey(), (2, 3))
    delta = LowRankArray(a, b, alpha=4, allow_materialise=True)
    weight = LoraArray.from_parts(base, delta)
    assert jnp.allclose(weight.materialise(), base + 2 * b @ a, atol=1e-6)
    assert weight.base is base and weight.delta is delta and weight.stop_gradient
    assert weight.allow_materialise
    assert not LoraArray.from_parts(base, delta, stop_gradient=False).stop_gradient
    # As the constructor makes it.
    like = LoraArray(base, rank=2, key=getkey(), alpha=4, allow_materialise=True)
    assert jax.tree.structure(weight) == jax.tree.structure(like)


PARTS = {
    "another shape": (jnp.ones((5, 4)), None, ValueError, "does not fit a weight of"),
    "a shape that broadcasts": (jnp.ones((1, 3)), None, ValueError, "does not fit"),
    "integers": (jnp.ones((5, 3), int), None, TypeError, "must be a floating-point"),
    "no array": ("w", None, TypeError, "must be an array, got 'w'"),
    "no update": (jnp.ones((5, 3)), jnp.ones((5, 3)), TypeError, "`AbstractDelta`"),
}


@pytest.mark.parametrize("parts", PARTS)
def test_parts_that_do_not_fit(parts, _unchecked):
    base, delta, error, match = PARTS[parts]
    delta = LowRankArray.init((5, 3), rank=2, key=jr.key(0)) if delta is None else delta
    with pytest.raises(error, match=match):
        LoraArray.from_parts(base, delta)


def test_nothing_replaces_fields_unchecked():
    assert not any(hasattr(cls, "replace") for cls in (LoraArray, LowRankArray))


@pytest.mark.parametrize(
    "factor, shape", [("a", (2, 1)), ("a", (1, 3)), ("b", (1, 2)), ("b", (5, 1))]
)
def test_a_factor_of_a_shape_that_would_broadcast(factor, shape):
    weight = LoraArray(jnp.ones((5, 3)), rank=2, key=jr.key(0), init_b=normal)
    where = lambda w: getattr(w.delta, factor)
    weight = eqx.tree_at(where, weight, jnp.ones(shape))
    for run in merge, lambda w: quax.quaxify(lambda w, x: w @ x)(w, jnp.ones(3)):
        with pytest.raises((TypeError, ValueError), match="shape"):
            run(weight)


def test_an_update_that_is_known_may_be_switched_off():
    factors = jnp.ones((2, 3)), jnp.ones((5, 2))
    w = LoraArray.from_parts(jnp.ones((5, 3)), LowRankArray(*factors, alpha=0))
    assert w.scaling == 0 and jnp.array_equal(w.dense(), w.base)


@pytest.mark.parametrize("flag", ["no", 0, None])
def test_what_is_neither_true_nor_false(flag):
    """As the constructors and `loraify` check it. A text is true whatever it says."""
    with pytest.raises(TypeError, match="`stop_gradient` must be True or False, got"):
        check_flag("stop_gradient", flag)
