"""Adapters for programs that know one rank and one alpha."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import safetensors.numpy
from files import bits, listing
from helpers import adapted

from lora_quax import Adapt, peft, unload


def net():
    keys = jr.split(jr.key(0), 4)
    return {
        "q": eqx.nn.Linear(4, 3, key=keys[0]),
        "k": eqx.nn.Linear(4, 4, key=keys[1]),
        "embed": eqx.nn.Embedding(6, 4, key=keys[2]),
        "lm_head": eqx.nn.Linear(4, 6, use_bias=False, key=keys[3]),
        "conv": eqx.nn.Conv1d(2, 2, 3, key=keys[3]),
        "moe": {"experts": jnp.ones((2, 3, 4))},
    }


DIFFERENT = {"q": Adapt(2, alpha=7), "k": Adapt(3, alpha=0.5)}


@pytest.mark.parametrize("consumer", ["vllm", "llama.cpp"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_one_rank_and_one_alpha(tmp_path, consumer, dtype):
    base = net()
    model = adapted(base, targets=DIFFERENT)
    cast = lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x
    model = jax.tree.map(cast, model)
    peft.save(tmp_path, model, consumer=consumer)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 3)
    assert not config["rank_pattern"] and not config["alpha_pattern"]
    assert not config["use_rslora"]
    tensors = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    for name in DIFFERENT:
        A, B = (tensors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        weight = model[name].weight
        assert A.shape[0] == B.shape[1] == 3 and B.dtype == np.float32
        want = _dense(weight)
        np.testing.assert_allclose(B @ A.astype(np.float32), want, atol=1e-6)
    peft.load(tmp_path, unload(model))


def _dense(weight):
    a, b = (np.asarray(x, np.float32) for x in (weight.a, weight.b))
    return weight.alpha / weight.rank * (b @ a)


@pytest.mark.parametrize("consumer", ["vllm", "llama.cpp"])
def test_what_is_alike_already_is_written_as_it_is(tmp_path, consumer):
    model = adapted(net(), targets={"q": 2, "k": 2})
    peft.save(tmp_path / "peft", model)
    peft.save(tmp_path / "other", model, consumer=consumer)
    contents = [[*listing(tmp_path / name).values()] for name in ("peft", "other")]
    assert contents[0] == contents[1]
    assert bits(peft.load(tmp_path / "other", net())) == bits(model)


REFUSED = {
    "vllm, a convolution": (
        "vllm",
        {"q": 1, "conv": 1},
        "`conv.weight` is adapted, conv",
    ),
    "vllm, experts": ("vllm", {"q": 1, "experts": 1}, "`moe.experts` is adapted"),
    "vllm, DoRA": (
        "vllm",
        {"q": Adapt(1, use_dora=True)},
        "`q.weight` is adapted by DoRA",
    ),
    "vllm, a bias": ("vllm", {"q": 1, "q.bias": "full"}, "biases are trained"),
    "vllm, a module": ("vllm", {"q": 1, "embed": "full"}, "`embed` is trained in full"),
    "llama.cpp, a head": (
        "llama.cpp",
        {"q": 1, "lm_head": "full"},
        "`lm_head` is trained in full",
    ),
    "llama.cpp, an embedding": (
        "llama.cpp",
        {"q": 1, "embed": 1},
        "`embed.weight` is adapted, embedding",
    ),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_a_consumer_does_not_take(tmp_path, case):
    consumer, targets, message = case
    model = adapted(net(), targets=targets)
    with pytest.raises(ValueError, match=f"(?s){consumer} does not take.*{message}"):
        peft.save(tmp_path, model, consumer=consumer)
    assert not listing(tmp_path)
    peft.save(tmp_path, model)


def test_vllm_takes_a_head(tmp_path):
    model = adapted(net(), targets={"q": 1, "lm_head": "full"})
    peft.save(tmp_path, model, consumer="vllm")


def test_no_such_consumer(tmp_path):
    model = adapted(net(), targets={"q": 1})
    with pytest.raises(ValueError, match="`consumer` must be 'peft' or 'vllm'"):
        peft.save(tmp_path, model, consumer="ollama")
    with pytest.raises(ValueError, match="`use_rslora` is not known to vllm"):
        peft.save(tmp_path, model, consumer="vllm", use_rslora=True)
