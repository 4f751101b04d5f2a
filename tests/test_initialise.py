"""First updates that are taken from the weights."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import quax
from helpers import assert_close, dense, drawn, lora

import lora_quax
from lora_quax import initialise, loftq, LoraArray, rebase


METHODS = ["pissa", "randomised pissa", "olora", "orthogonal"]


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


def _net(dtype=jnp.float32, rank=4, alpha=6.0, **kwargs):
    plain = Net(jr.key(0), dtype)
    return plain, lora_quax.loraify(plain, rank, jr.key(1), alpha=alpha, **kwargs)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_the_weights_are_what_they_were(method, dtype):
    _, model = _net(dtype)
    out = initialise(model, method, key=jr.key(2))
    epsilon = float(jnp.finfo(dtype).eps)
    for w, new in zip(_weights(model), _weights(out), strict=True):
        assert jnp.abs(new.b).max() > 0 and jnp.abs(new.a).max() > 0
        assert (new.a.dtype, new.base.dtype) == (w.a.dtype, w.base.dtype)
        scale = float(abs(w.base).max() + abs(new.base).max())
        assert abs(new.dense() - w.base).max() <= 2 * epsilon * scale
        changed = method != "orthogonal"
        assert changed == bool((new.base != w.base).any())


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
    abstract = eqx.filter_eval_shape(give, 2)
    types = eqx.filter_eval_shape(lambda m: m, model)
    assert eqx.tree_equal(abstract, types)
    abstractly = initialise(types, method, key=jr.key(2))
    assert eqx.tree_equal(abstractly, types)


ALL = [eqx.nn.Linear, eqx.nn.Conv]
AS = {
    "alone": dict(),
    "dora": dict(use_dora=True),
    "beside others": dict(
        targets={
            **dict.fromkeys(ALL, True),
            "small": lora_quax.Adapt(update=lora_quax.IA3),
            "plain": "full",
        }
    ),
}


@pytest.mark.parametrize(
    "method, adapted",
    [
        ("pissa", "alone"),
        ("randomised pissa", "dora"),
        ("olora", "beside others"),
    ],
)
def test_rebase(method, adapted, tmp_path):
    plain, model = _net(**AS[adapted])
    initial = initialise(model, method, key=jr.key(2))
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
    "steps": (lambda: loftq(_net()[1], steps=0), "`steps` must be a positive"),
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


def test_the_program_is_what_it_was(getkey):
    plain, model = _net()
    x = drawn((24,), 1, jnp.float32)
    out = quax.quaxify(initialise(model, "pissa").linear)(x)
    assert_close(out, plain.linear(x), rtol=1e-6, atol=1e-6)
