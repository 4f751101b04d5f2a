"""First updates that are taken from the weights, or from data."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import quax
from helpers import assert_close, dense, drawn, lora
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import lora_quax
from lora_quax import initialise, loftq, LoraArray, Moments, rebase


METHODS = ["pissa", "randomised pissa", "olora", "orthogonal"]
FROM_MOMENTS: list[Any] = ["eva", "corda ipm", "corda kpm"]
ALL = [*METHODS, *FROM_MOMENTS, "lora-ga"]
KEEP_THE_BASE = ["orthogonal", "eva"]


class Net(eqx.Module):
    linear: eqx.nn.Linear
    conv: eqx.nn.Conv2d
    stack: eqx.nn.Linear
    small: eqx.nn.Linear
    plain: eqx.nn.LayerNorm

    def __init__(self, key, dtype=jnp.float32):
        k = jr.split(key, 4)
        self.linear = eqx.nn.Linear(24, 40, key=k[0], dtype=dtype)
        self.conv = eqx.nn.Conv2d(4, 12, 3, key=k[1], dtype=dtype)
        make = lambda key: eqx.nn.Linear(16, 16, key=key, dtype=dtype)
        self.stack = eqx.filter_vmap(make)(jr.split(k[2], 3))
        self.small = eqx.nn.Linear(3, 2, key=k[3], dtype=dtype)
        self.plain = eqx.nn.LayerNorm(4)


def _weights(model):
    is_leaf = lambda x: isinstance(x, LoraArray)
    return [x for x in jax.tree.leaves(model, is_leaf=is_leaf) if is_leaf(x)]


def _vectors(n, count=64, seed=0):
    """Not of mean zero, and not all directions alike."""
    x = np.random.default_rng(seed).normal(0.3, 1, (count, n))
    return x * np.linspace(0.2, 2, n)


def _moments(*batch, n, seed=0):
    x = [_vectors(n, seed=seed + i) for i in range(int(np.prod(batch)))]
    parts = [(float(len(y)), y.sum(0), y.T @ y) for y in x]
    parts = [jnp.asarray(np.stack(y), jnp.float32) for y in zip(*parts)]
    return Moments(*(y.reshape(*batch, *y.shape[1:]) for y in parts))


def _data(method, model) -> dict[str, Any]:
    """What a method needs beside the model."""
    is_leaf = lambda x: isinstance(x, LoraArray)
    made = {
        **dict.fromkeys(
            FROM_MOMENTS,
            lambda w: _moments(*w.shape[: w.n_batch], n=int(np.prod(_cols(w)))),
        ),
        "lora-ga": lambda w: jnp.asarray(drawn(w.shape, 9, np.float32)),
    }
    if method not in made:
        return dict(key=jr.key(2))
    of = lambda x: made[method](x) if is_leaf(x) else None
    name = "gradients" if method == "lora-ga" else "moments"
    return {name: jax.tree.map(of, model, is_leaf=is_leaf)}


def _cols(w):
    return w.shape[w.n_batch + w.delta.rows :]


@functools.cache
def _net(dtype=jnp.float32, rank=4, alpha=6.0):
    """Of which some are scaled by a number less than zero."""
    plain = Net(jr.key(0), dtype)
    targets = {eqx.nn.Linear: True, eqx.nn.Conv: lora_quax.Adapt(alpha=-alpha)}
    return plain, lora_quax.loraify(
        plain, rank, jr.key(1), alpha=alpha, targets=targets
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("method", ALL)
def test_the_weights_are_what_they_were(method, dtype):
    plain, model = _net(dtype)
    out = initialise(model, method, **_data(method, model))
    epsilon = float(jnp.finfo(dtype).eps)
    for w, new in zip(_weights(model), _weights(out), strict=True):
        # The gradient of the smallest has no more than two directions, all for `a`.
        none = method == "eva" or (method == "lora-ga" and w.shape == (2, 3))
        assert none != (jnp.abs(new.b).max() > 0) and jnp.abs(new.a).max() > 0
        assert (new.a.dtype, new.base.dtype) == (w.a.dtype, w.base.dtype)
        scale = float(abs(w.base).max() + abs(new.base).max())
        assert abs(new.dense() - w.base).max() <= 2 * epsilon * scale
        changed = method not in KEEP_THE_BASE and not none
        assert changed == bool((new.base != w.base).any())
    if dtype == jnp.float32:
        x = drawn((24,), 1, dtype)
        y = quax.quaxify(out.linear)(x)
        assert_close(y, plain.linear(x), rtol=1e-6, atol=1e-6)


def _matrices(w: LoraArray):
    """The base and its factors as matrices, for each index of the batch."""
    n, r = w.n_batch, w.rank
    batch = int(np.prod(w.shape[:n]))
    b = np.asarray(w.b).reshape(batch, -1, r)
    a = np.asarray(w.a).reshape(batch, r, -1)
    return np.asarray(w.base).reshape(batch, b.shape[1], a.shape[2]), b, a


@pytest.mark.parametrize("method", ["pissa", "randomised pissa"])
def test_pissa_is_the_best_of_its_rank(method):
    _, model = _net()
    for w, new in zip(
        _weights(model), _weights(initialise(model, method, key=jr.key(2)))
    ):
        for matrix, b, a in zip(_matrices(w)[0], *_matrices(new)[1:]):
            u, s, v = np.linalg.svd(matrix, full_matrices=False)
            best = (u[:, :4] * s[:4]) @ v[:4]
            np.testing.assert_allclose(b @ a * w.scaling, best, atol=2e-3 * s[0])
            if method == "pissa":
                np.testing.assert_allclose(b @ a * w.scaling, best, atol=1e-5)
                # Both factors have the same share of each value.
                lengths = [np.linalg.norm(x, axis=i) for x, i in ((b, 0), (a, 1))]
                np.testing.assert_allclose(*lengths, rtol=1e-4, atol=1e-6)


def test_olora_has_columns_of_length_one():
    _, model = _net()
    for w, new in zip(_weights(model), _weights(initialise(model, "olora"))):
        for matrix, b, a in zip(_matrices(w)[0], *_matrices(new)[1:]):
            q, r = np.linalg.qr(matrix)
            r, q = r[:4], q[:, :4]
            n = len(r)
            np.testing.assert_allclose(b[:, :n] @ a[:n], q @ r, atol=1e-5)
            np.testing.assert_allclose(b[:, :n].T @ b[:, :n], np.eye(n), atol=1e-5)
            assert not b[:, n:].any() and not a[n:].any()


def test_orthogonal_factors():
    _, model = _net()
    for new in _weights(initialise(model, "orthogonal", key=jr.key(2))):
        for b, a in zip(*_matrices(new)[1:]):
            np.testing.assert_allclose(b @ a, np.zeros((len(b), a.shape[1])), atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_key_and_a_path_decide(method):
    _, model = _net()
    give = lambda seed: initialise(model, method, key=jr.key(seed))
    assert eqx.tree_equal(give(2), give(2))
    assert eqx.tree_equal(give(2), give(3)) == (method in ("pissa", "olora"))


@pytest.mark.parametrize("method", ALL)
def test_abstract(method):
    _, model = _net()
    data = _data(method, model)
    types = eqx.filter_eval_shape(lambda m: m, model)
    inside = eqx.filter_eval_shape(
        lambda m, data: initialise(m, method, **data), model, data
    )
    assert eqx.tree_equal(inside, types)
    assert eqx.tree_equal(initialise(types, method, **data), types)


@pytest.mark.parametrize("method", ALL)
def test_sharded(method):
    # On axes that are explicit; on others JAX sees to it. One of these is tested.
    kind = AxisType.Auto if method == "corda kpm" else AxisType.Explicit
    sharding = NamedSharding(jax.make_mesh((2,), ("i",), axis_types=(kind,)), P("i"))
    model = {"w": lora((6, 5), seed=3, dtype=jnp.float32)}
    placed = eqx.tree_at(
        lambda m: (m["w"].base, m["w"].b),
        model,
        replace_fn=lambda x: jax.device_put(x, sharding),
    )
    data = _data(method, model)
    expected, out = (initialise(m, method, **data)["w"] for m in (model, placed))
    for x in out.base, out.b:
        assert x.sharding.is_equivalent_to(sharding, 2)
    assert_close(np.asarray(out.base), expected.base, rtol=1e-4, atol=1e-4)
    assert_close(np.asarray(out.dense()), expected.dense(), rtol=1e-5, atol=1e-5)


TAKEN_OUT = [method for method in ALL if method not in KEEP_THE_BASE]


AS = {
    "alone": dict(),
    "dora": dict(use_dora=True),
    "beside others": dict(
        targets={
            **dict.fromkeys([eqx.nn.Linear, eqx.nn.Conv], True),
            "small": lora_quax.Adapt(update=lora_quax.IA3),
            "plain": "full",
        }
    ),
}


@pytest.mark.parametrize(
    "method, adapted",
    [
        *((method, "alone") for method in TAKEN_OUT),
        ("randomised pissa", "dora"),
        ("olora", "beside others"),
    ],
)
def test_rebase(method, adapted, tmp_path):
    plain, _ = _net()
    model = lora_quax.loraify(plain, 4, jr.key(1), alpha=6.0, **AS[adapted])
    initial = initialise(model, method, **_data(method, model))
    trained = jax.tree.map(
        lambda x, t: x + 0.1 * jnp.sin(x) if t else x,
        initial,
        lora_quax.trainable(initial),
    )
    back = rebase(trained, initial, plain)
    assert eqx.tree_equal(lora_quax.unload(back), plain)
    for w, new in zip(_weights(trained), _weights(back), strict=True):
        assert new.rank == 2 * w.rank and new.scaling == w.scaling
        assert abs(new.dense() - w.dense()).max() < 3e-6
    path = tmp_path / "adapter.safetensors"
    lora_quax.save_adapter(path, back, base=plain)
    assert eqx.tree_equal(lora_quax.load_adapter(path, plain), back)


def test_rebase_of_the_model_of_a_step():
    plain = eqx.nn.Linear(6, 5, key=jr.key(0))
    model = lora_quax.loraify(plain, 2, jr.key(1), dropout=0.5)
    initial = initialise(model, "pissa")
    step = lora_quax.with_dropout_key(initial, jr.key(2))
    expected = rebase(initial, initial, plain)
    assert eqx.tree_equal(rebase(step, initial, plain), expected)


def test_eva_is_the_principal_components():
    _, model = _net()
    moments = _data("eva", model)["moments"]
    out = initialise(model, "eva", moments=moments)
    for w, new in zip(_weights(model), _weights(out), strict=True):
        for i, a in enumerate(_matrices(new)[2]):
            x = _vectors(a.shape[1], seed=i)
            n = min(w.rank, x.shape[1])
            best = np.linalg.svd(x - x.mean(0), full_matrices=False)[2][:n]
            assert_close(a[:n].T @ a[:n], best.T @ best, rtol=1e-4, atol=1e-4)
            assert not a[n:].any()


def _of_variances(*values):
    """Of data about zero, whose components have these parts of the variance."""
    second = jnp.stack([jnp.diag(jnp.array(x)) for x in values])
    out = Moments(jnp.ones(len(second)), jnp.zeros(second.shape[:-1]), second)
    return out if len(values) > 1 else jax.tree.map(lambda x: x[0], out)


def test_ranks_are_shared_out():
    shapes = {"one": (8, 6), "many": (8, 6), "some": (8, 6), "stack": (2, 8, 6)}
    model = {name: lora(x, rank=3, dtype=jnp.float32) for name, x in shapes.items()}
    moments = {
        "one": _of_variances([0.9, 0.02, 0.02, 0.02, 0.02, 0.02]),
        "many": _of_variances([0.2, 0.16, 0.16, 0.16, 0.16, 0.16]),
        "some": _of_variances([0.3, 0.29, 0.28, 0.07, 0.06, 0.0]),
        "stack": _of_variances(
            [0.5, 0.5, 0.0, 0.0, 0.0, 0.0], [0.4, 0.24, 0.24, 0.07, 0.05, 0.0]
        ),
    }
    # Of 3 + 3 + 3 + 2 · 3 ranks, at most 4 for each, or 6. The stack's, for both, are
    # .45, .37 and .12; the last are .12 and .07, or .07 alone where one rank is left.
    ranks = {1.0: (3, 3, 3, 3), 4 / 3: (1, 4, 4, 3), 2.0: (1, 6, 4, 2)}
    for rho, expected in ranks.items():
        out = initialise(model, "eva", moments=moments, rho=rho)
        assert tuple(out[name].rank for name in shapes) == expected
        for name, w in out.items():
            assert w.scaling == pytest.approx(model[name].scaling)
            assert w.shape == model[name].shape
            assert lora_quax.LoraArray.from_parts(w.base, w.delta).rank == w.rank


def test_without_a_rank_a_weight_is_plain_again():
    model: list[Any] = [lora((4, 3), rank=1, dtype=jnp.float32) for _ in range(2)]
    moments = [_of_variances([0.5, 0.5, 0.0]), _of_variances([0.4, 0.3, 0.3])]
    out = initialise(model, "eva", moments=moments, rho=2.0)
    assert out[0].rank == 2 and out[1] is model[1].base
    # What is around an update cannot do without it.
    model[1] = lora_quax.DoRA(model[1])
    moments[1] = eqx.tree_at(lambda m: m.lora, model[1], moments[1])
    with pytest.raises(
        ValueError, match="No rank is left for the update inside of a D"
    ):
        initialise(model, "eva", moments=moments, rho=2.0)


@pytest.mark.parametrize("method", FROM_MOMENTS)
def test_a_weight_kept_as_in_out(method):
    """Is given what its transpose is given, transposed."""
    w = lora((2, 8, 6), rank=3, dtype=jnp.float32)
    turn = lambda x: jnp.swapaxes(x, -1, -2)
    delta = lora_quax.LowRankArray(turn(w.b), turn(w.a), alpha=w.alpha)
    turned = LoraArray.from_parts(turn(w.base), delta)
    moments = _moments(2, n=6)
    one = initialise([w], method, moments=[moments])[0]
    moments = Moments(moments.count, moments.first, moments.second, in_out=True)
    other = initialise([turned], method, moments=[moments])[0]
    assert other.shape == (2, 6, 8) and other.scaling == one.scaling
    pairs = (one.a, other.b), (one.b, other.a), (one.base, other.base)
    for x, y in pairs:
        assert_close(turn(x), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["corda ipm", "corda kpm"])
def test_corda_is_the_part_of_some_singular_values(method):
    _, model = _net()
    out = initialise(model, method, **_data(method, model))
    for w, new in zip(_weights(model), _weights(out), strict=True):
        factors = zip(_matrices(w)[0], *_matrices(new)[1:])
        for i, (matrix, b, a) in enumerate(factors):
            x = _vectors(matrix.shape[1], seed=i)
            c = x.T @ x / len(x)
            c += 0.01 * np.trace(c) / len(c) * np.eye(len(c))
            u, s, v = np.linalg.svd(matrix @ c, full_matrices=False)
            which = slice(-w.rank, None) if method == "corda kpm" else slice(w.rank)
            part = (u[:, which] * s[which]) @ v[which] @ np.linalg.inv(c)
            scale = np.abs(matrix).max()
            assert_close(w.scaling * b @ a, part, rtol=1e-3, atol=1e-3 * scale)


def test_lora_ga_is_singular_vectors_of_the_gradient():
    _, model = _net()
    data = _data("lora-ga", model)
    out = initialise(model, "lora-ga", **data)
    gradients = jax.tree.leaves(data["gradients"])
    for g, new in zip(gradients, _weights(out), strict=True):
        matrix, b, a = _matrices(new)
        for g, b, a in zip(np.asarray(g).reshape(matrix.shape), b, a):
            u, s, v = np.linalg.svd(g, full_matrices=False)
            length = len(g) ** 0.25 / 4
            n = min(4, len(s))
            assert_close(np.abs(a[:n] @ v[:n].T), length * np.eye(n), atol=1e-4)
            n = max(min(8, len(s)) - 4, 0)
            assert_close(np.abs(b.T[:n] @ u[:, 4:8]), length * np.eye(n), atol=1e-4)


def test_eva_leaves_a_quantised_base():
    pytest.importorskip("qwix")
    plain = eqx.nn.Linear(64, 8, key=jr.key(0))
    model = lora_quax.loraify(lora_quax.quantise(plain), 4, jr.key(1))
    data = _data("eva", model)
    out = initialise(model, "eva", **data)
    assert out.weight.base is model.weight.base
    with pytest.raises(ValueError, match="a QuantisedArray, and 'corda ipm' takes"):
        initialise(model, "corda ipm", **data)


def test_the_data_of_one_weight_in_two_places_are_added_up():
    _, model = _net()
    data = [_moments(n=24, seed=i) for i in range(2)]
    pair = [model.linear.weight] * 2
    out = initialise(pair, "eva", moments=data)
    assert out[0] is out[1]
    total = jax.tree.map(jnp.add, *data)
    alone = initialise(pair[:1], "eva", moments=[total])
    assert eqx.tree_equal(out[0], alone[0])


def test_an_expert_without_data():
    model = {"experts": lora((2, 8, 6), dtype=jnp.float32)}
    moments = {"experts": _moments(2, n=6)}
    moments = jax.tree.map(lambda x: x.at[1].set(0), moments)
    for method in FROM_MOMENTS:
        out = initialise(model, method, moments=moments)["experts"]
        assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(out))
        assert jnp.abs(out.a[1]).max() > 0


@pytest.mark.parametrize("kind", ["nf4", "int4", "int8"])
def test_loftq_is_nearer_than_quantising(kind):
    pytest.importorskip("qwix")
    plain = eqx.nn.MLP(64, 32, 64, 1, key=jr.key(0))
    model = lora_quax.loraify(plain, 8, jr.key(1), alpha=4.0)
    error = lambda w, x: float(jnp.linalg.norm(dense(w) - x))
    alone = lora_quax.quantise(plain, kind, tile=32)
    once, often = (loftq(model, kind, tile=32, steps=n) for n in (1, 5))
    for layer, new, best, origin in zip(
        alone.layers, once.layers, often.layers, plain.layers
    ):
        start = error(layer.weight, origin.weight)
        assert error(new.weight, origin.weight) < 0.9 * start
        assert error(best.weight, origin.weight) < 0.9 * start
        if kind != "int8":  # Which is so near that further steps wander about.
            assert error(best.weight, origin.weight) < error(new.weight, origin.weight)
        assert isinstance(new.weight.base, lora_quax.QuantisedArray)
    # It trains as any other does.
    loss = lambda model, x: jnp.sum(quax.quaxify(model)(x) ** 2)
    grads = lora_quax.filter_grad(loss)(once, drawn((64,), 0, jnp.float32))
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_a_weight_in_two_places_stays_one():
    _, model = _net()
    model = eqx.tree_at(lambda m: m.small, model, model.linear)
    out = initialise(model, "pissa")
    assert out.small.weight is out.linear.weight


def _nested():
    return LoraArray(lora((2, 3)), rank=1, key=jr.key(0))


def _with(weight):
    _, model = _net()
    return eqx.tree_at(lambda m: m.small.weight, model, weight)


def _one(method, **data):
    return initialise([lora((2, 3))], method, **data)


WRONG = {
    "no key": (lambda: initialise(_net()[1], "orthogonal"), "'orthogonal' draws numb"),
    "an odd rank": (
        lambda: initialise(_net(rank=3)[1], "orthogonal", key=jr.key(0)),
        r"`linear.weight` has rank 3; for orthogonal factors it must be even",
    ),
    "a plain model": (lambda: initialise(_net()[0], "pissa"), "is a `LoraArray`. Call"),
    "a nested base": (
        lambda: initialise(
            _with(LoraArray(lora((2, 3)), rank=1, key=jr.key(0))), "olora"
        ),
        "has a base that is a LoraArray, and 'olora' takes the update out",
    ),
    "no moments": (
        lambda: initialise(_net()[1], "eva"),
        "'eva' starts from data: give",
    ),
    "no gradients": (
        lambda: initialise(_net()[1], "lora-ga"),
        "starts from a gradient",
    ),
    "no use for moments": (
        lambda: initialise(_net()[1], "pissa", moments={}),
        "'pissa' has no use for `moments`",
    ),
    "rho without eva": (
        lambda: initialise(_net()[1], "pissa", rho=2.0),
        "`rho` is for 'eva' alone, and `method` is 'pissa'",
    ),
    "a small rho": (
        lambda: initialise(_net()[1], "eva", moments={}, rho=0.5),
        "`rho` must be at least 1, got 0.5",
    ),
    "moments of another model": (
        lambda: initialise(_net()[1], "eva", moments={}),
        "`moments` must be a tree as the model is",
    ),
    "moments of another weight": (
        lambda: _one("eva", moments=[_moments(n=5)]),
        r"`Moments` with arrays of shapes \(\), \(3,\), \(3, 3\) for `0`",
    ),
    "moments with another sum": (
        lambda: _one(
            "eva", moments=[eqx.tree_at(lambda x: x.first, _moments(n=3), jnp.ones(2))]
        ),
        "`Moments` with arrays of shapes",
    ),
    "moments of no data": (
        lambda: _one("eva", moments=[jax.tree.map(jnp.zeros_like, _moments(n=3))]),
        "`moments` has no vector for `0`: no data were multiplied with it on the side",
    ),
    "moments that are not finite": (
        lambda: _one("eva", moments=[jax.tree.map(lambda x: x / 0, _moments(n=3))]),
        "`moments` has numbers that are not finite for `0`",
    ),
    "gradients of another shape": (
        lambda: _one("lora-ga", gradients=[jnp.ones((3, 2))]),
        r"must have a floating-point array of shape \(2, 3\) for `0`",
    ),
    "gradients of the adapted model": (
        lambda: _one("lora-ga", gradients=eqx.filter([lora((2, 3))], False)),
        r"for `0`; got LoraArray.*gradient with respect to the plain model",
    ),
    "gradients that are integers": (
        lambda: _one("lora-ga", gradients=[jnp.ones((2, 3), int)]),
        r"must have a floating-point array of shape \(2, 3\) for `0`",
    ),
    "gradients of nothing": (
        lambda: _one("lora-ga", gradients=[jnp.zeros((2, 3))]),
        "`gradients` has only zeros for `0`: the loss does not depend on it",
    ),
    "ranks that are not known": (
        lambda: jax.jit(lambda x: _one("eva", moments=[x], rho=2.0))(_moments(n=3)),
        "With `rho` more than 1 the ranks, and so the shapes, depend on the data",
    ),
    "steps": (lambda: loftq(_net()[1], steps=0), "`steps` must be a positive"),
    "a part of a model": (
        lambda: initialise(lora_quax.partition(_net()[1])[0], "pissa"),
        "has None for its `base`: the model has been partitioned",
    ),
    "the other part of a model": (
        lambda: loftq(lora_quax.partition(_net()[1])[1]),
        "has None for its `delta.a`: the model has been partitioned",
    ),
    "a part of what was trained": (
        lambda: rebase(lora_quax.partition(_net()[1])[0], _net()[1], _net()[0]),
        "has None for its `base`: the model has been partitioned",
    ),
    "another base": (
        lambda: rebase(_net()[1], initialise(_net()[1], "pissa"), _net()[0]),
        "`linear.weight` has another base in `initial`",
    ),
    "what was not taken out": (
        lambda: rebase(_net()[1], _net()[1], Net(jr.key(5))),
        "do not come to what",
    ),
    "another model": (
        lambda: rebase(_net()[1], _net()[1], eqx.nn.Linear(2, 2, key=jr.key(0))),
        "`plain` is another model",
    ),
    "another rank": (
        lambda: rebase(_net()[1], _net(rank=2)[1], _net()[0]),
        "has another update in `initial`",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(name):
    run, match = WRONG[name]
    with pytest.raises(ValueError, match=match):
        run()
