"""An update beside a module that is opaque, or by itself."""

import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import quax
from helpers import adapted, dense, drawn, normal

import lora_quax
from lora_quax import LoraBranch


pytestmark = pytest.mark.usefixtures("x64")


def opaque(x, power=2):
    return jnp.cumsum(jnp.sin(x) ** power, -1)[..., :3]


MODULES = {
    "a function": lambda: opaque,
    "a layer": lambda: eqx.nn.Linear(4, 3, key=jr.key(0), dtype=float),
    "an adapted layer": lambda: adapted(MODULES["a layer"]()),
    "none": lambda: None,
}


def _branch(module, **kwargs):
    given: Any = {"alpha": 3.0, "init_b": normal, "dtype": float, **kwargs}
    return LoraBranch(module, 4, 3, 2, jr.key(1), **given)


def _plain(module, x):
    return 0.0 if module is None else module(x)


@pytest.mark.parametrize("quaxified", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_it_is_the_sum(name, quaxified):
    module, x = MODULES[name](), drawn((4,), 1)
    branch = _branch(module)
    run = quax.quaxify(branch) if quaxified or name == "an adapted layer" else branch

    def expected(a, b, x):
        w = jnp.einsum("or,ri->oi", b, a) * 1.5
        plain = _plain(lora_quax.merge(module) if module is not None else None, x)
        return plain + w @ x

    factors = branch.weight.a, branch.weight.b
    np.testing.assert_allclose(run(x), expected(*factors, x), rtol=1e-12)
    batched = jax.jit(jax.vmap(run))(jnp.stack([x, 2 * x]))
    np.testing.assert_allclose(batched[1], expected(*factors, 2 * x), rtol=1e-12)

    def total(a, b, x):
        there = eqx.tree_at(lambda m: (m.weight.a, m.weight.b), branch, (a, b))
        return jnp.sum(jnp.sin(quax.quaxify(there)(x)))

    sines = lambda a, b, x: jnp.sum(jnp.sin(expected(a, b, x)))
    for of in range(3):
        np.testing.assert_allclose(
            jax.grad(total, of)(*factors, x),
            jax.grad(sines, of)(*factors, x),
            rtol=1e-10,
        )


def test_a_batch_and_other_arguments():
    branch, x = _branch(opaque), drawn((5, 6, 4), 1)
    w = dense(branch.weight)
    for args, kwargs in [((3,), {}), ((), {"power": 3})]:
        out = jax.jit(lambda x: branch(x, *args, **kwargs))(x)
        np.testing.assert_allclose(out, opaque(x, 3) + x @ w.T, rtol=1e-12)


def test_a_fresh_one_changes_nothing():
    x = drawn((4,), 1).astype(jnp.bfloat16)
    branch = LoraBranch(opaque, 4, 3, 2, jr.key(1))
    out = branch(x)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, opaque(x))


def test_what_trains_is_the_update(tmp_path):
    branch = _branch(MODULES["a layer"]())
    trains, _ = lora_quax.partition(branch)
    assert [leaf.shape for leaf in jax.tree.leaves(trains)] == [(2, 4), (3, 2)]
    merged = lora_quax.merge(branch)
    x = drawn((4,), 1)
    np.testing.assert_allclose(merged(x), branch(x), rtol=1e-12)
    path = tmp_path / "adapter.safetensors"
    lora_quax.save_adapter(path, branch)
    fresh = _branch(MODULES["a layer"](), init_b=lora_quax.init.zeros)
    assert eqx.tree_equal(lora_quax.load_adapter(path, fresh), branch)


WRONG = {
    "features": (dict(in_features=0), "`in_features` must be a positive"),
    "a negative count": (
        dict(out_features=-1),
        "`out_features` must be a pos",
    ),
    "a rank": (dict(rank=0), "`rank` must be a positive integer"),
}


CALLS: dict[str, Any] = {
    "other features": (opaque, 5, "of 4 features was given an array of shape (5,)"),
    "one feature": (lambda x: x[:1], 4, "must give an array of shape (3,); it gave"),
    "two arrays": (lambda x: (x, x), 4, "must give an array of shape (3,); it gave"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_call_is_named(name):
    module, features, match = CALLS[name]
    with pytest.raises(ValueError, match=re.escape(match)):
        _branch(module)(jnp.ones(features))


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(name):
    wrong, match = WRONG[name]
    given = dict(module=opaque, in_features=4, out_features=3, rank=2, key=jr.key(0))
    with pytest.raises(ValueError, match=match):
        eqx.filter_eval_shape(lambda: LoraBranch(**{**given, **wrong}))
