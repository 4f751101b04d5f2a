"""Code written for `quax.examples.lora` runs after a change of import."""

import inspect
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
import quax
import quax.examples.lora as theirs

import lora_quax as lora


def test_readme():
    """Quax's README, with the import changed."""
    key1, key2, key3 = jr.split(jr.PRNGKey(0), 3)
    linear = eqx.nn.Linear(10, 12, key=key1)
    vector = jr.normal(key2, (10,))

    def run(model, x):
        return model(x)

    before = run(linear, vector)

    lora_weight = lora.LoraArray(linear.weight, rank=2, key=key3)
    lora_linear = eqx.tree_at(lambda m: m.weight, linear, lora_weight)
    assert jnp.allclose(quax.quaxify(run)(lora_linear, vector), before, atol=1e-6)

    lora_linear = lora.loraify(linear, rank=2, key=key3)
    assert jnp.allclose(quax.quaxify(run)(lora_linear, vector), before, atol=1e-6)


def test_docstring():
    """The example in the docstring of their `loraify`."""
    key = jr.PRNGKey(0)
    mlp = eqx.nn.MLP(2, 2, 4, 1, key=key)
    some_input = jnp.ones(2)
    before = mlp(some_input)
    mlp = lora.loraify(mlp, rank=2, key=key)
    assert jnp.allclose(quax.quaxify(mlp)(some_input), before, atol=1e-6)


def arguments(function):
    return {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in ("self", "scale")
    }


@pytest.mark.parametrize(
    "ours, theirs",
    [(lora.LoraArray, theirs.LoraArray), (lora.loraify, theirs.loraify)],
    ids=["LoraArray", "loraify"],
)
def test_arguments(ours, theirs):
    """Theirs are all here, with the same defaults; but `scale`, which is 0.01 there."""
    ours_ = arguments(ours)
    for name, default in arguments(theirs).items():
        assert ours_[name] == default
    assert "scale" in inspect.signature(ours).parameters


@pytest.mark.parametrize("stop_gradient", [True, False])
@pytest.mark.parametrize("allow_materialise", [True, False])
@pytest.mark.parametrize("through", ["LoraArray", "loraify"])
def test_options(through, allow_materialise, stop_gradient):
    linear = eqx.nn.Linear(64, 32, key=jr.key(0))
    options: dict[str, Any] = dict(
        rank=4,
        scale=0.1,
        allow_materialise=allow_materialise,
        stop_gradient=stop_gradient,
        key=jr.key(1),
    )
    if through == "loraify":
        model = lora.loraify(linear, **options)
    else:
        weight = lora.LoraArray(linear.weight, **options)
        model = eqx.tree_at(lambda m: m.weight, linear, weight)
    weight = model.weight
    assert isinstance(weight, lora.LoraArray)
    assert 0.08 < jnp.std(weight.a) < 0.12 and jnp.all(weight.b == 0)

    grads = eqx.filter_grad(lambda m: quax.quaxify(m)(jnp.ones(64)).sum())(model)
    assert jnp.all(grads.weight.base == 0) == stop_gradient
    assert jnp.any(grads.weight.b != 0)

    if allow_materialise:
        assert jnp.all(weight.materialise() == linear.weight)
        jax.block_until_ready(quax.quaxify(jnp.linalg.norm)(weight))
    else:
        # Their error is a `RuntimeError` too.
        with pytest.raises(RuntimeError, match="allow_materialise=False"):
            weight.materialise()


def test_batches():
    """Their arrays take leading batch axes."""
    weight = lora.LoraArray(jnp.ones((3, 4, 5)), rank=2, key=jr.key(0))
    out = quax.quaxify(jax.vmap(lambda w, x: w @ x))(weight, jnp.ones((3, 5)))
    assert jnp.allclose(out, 5)
