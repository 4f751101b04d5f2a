"""Tokens of a language model that others wrote, with its cache: adapted, merged, and
from quantised blocks."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import quax
from helpers import normal
from zoo.language import causal, quantised_smollm2

import lora_quax
from lora_quax import dequantise, loraify, merge, quantise


eqx_zoo = pytest.importorskip("eqx_zoo")
PROMPT = jnp.array([3, 1, 41, 59, 26])
NEW = 12


@pytest.fixture(scope="module")
def llama():
    return causal("LlamaForCausalLM")().model


def adapted(model):
    return loraify(model, 4, jr.key(1), init_b=normal)


def without_cache(model, prompt, n):
    """The likeliest token each time, of all the tokens before it."""
    tokens = prompt
    for _ in range(n):
        logits = eqx.filter_jit(model)(tokens)[0]
        tokens = jnp.append(tokens, jnp.argmax(logits[-1]))
    return tokens[len(prompt) :]


BASES = {
    "float32": lambda model: model,
    "nf4": lambda model: quantise(model, "nf4", tile=8),
    "int8": lambda model: quantise(model, "int8", tile=16),
}


@pytest.mark.parametrize("base", BASES)
def test_the_same_tokens_adapted_and_merged(base, llama):
    model = adapted(BASES[base](llama))
    ours = quax.quaxify(eqx_zoo.generate)(model, PROMPT, NEW)
    plain = dequantise(merge(model))
    np.testing.assert_array_equal(ours, eqx_zoo.generate(plain, PROMPT, NEW))
    np.testing.assert_array_equal(ours, without_cache(plain, PROMPT, NEW))
    # The update says something: the base alone says something else.
    assert (ours != eqx_zoo.generate(llama, PROMPT, NEW)).any()


def test_a_step_with_the_cache_is_compiled_once(llama):
    model, traces = adapted(llama), 0

    @eqx.filter_jit
    def step(model, tokens, cache):
        nonlocal traces
        traces += 1
        logits, cache = quax.quaxify(model)(tokens, cache)
        return jnp.argmax(logits[-1]).astype(jnp.int32), cache

    token, cache = step(model, PROMPT, llama.init_cache(len(PROMPT) + NEW))
    tokens = [token]
    for _ in range(NEW - 1):
        token, cache = step(model, token[None], cache)
        tokens.append(token)
    assert traces == 2  # For the prompt, and for all tokens after it.
    expected = eqx_zoo.generate(merge(model), PROMPT, NEW)
    np.testing.assert_array_equal(jnp.stack(tokens), expected)


@pytest.mark.slow
def test_smollm2_from_its_blocks():
    """The blocks stay as they are in the file, and the logits are those of the decoded
    weights. It knows the capital of France."""
    model, tokens = quantised_smollm2()
    summary = lora_quax.summary(loraify(model, 2, jr.key(0)))
    held = lora_quax.summary(model).bytes
    assert held is not None and held <= 0.75 * summary.frozen
    logits = eqx.filter_jit(quax.quaxify(lambda m, x: m(x)[0]))
    found, expected = logits(model, tokens), logits(dequantise(model), tokens)
    assert jnp.abs(found - expected).max() <= 1e-4 * jnp.abs(expected).max()
    assert int(found[-1].argmax()) == 7042  # " Paris"

    trained = loraify(model, 2, jr.key(0), init_b=lambda *x: 0.02 * normal(*x))
    dense = eqx.tree_at(lambda m: m, trained, replace_fn=dequantise)
    loss = lora_quax.filter_grad(lambda m: jnp.mean(jnp.sin(logits(m, tokens))))
    ours, theirs = (jax.tree.leaves(loss(m)) for m in (trained, dense))
    for x, y in zip(ours, theirs, strict=True):
        assert jnp.abs(x - y).max() <= 1e-4 * jnp.abs(y).max()
