"""eqx-zoo's own Llama, as it is, split over eight devices by the rules of the guide."""

import functools as ft
import re
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.random as jr
import pytest
from jax.sharding import PartitionSpec as P
from splits import adapted, bytes_of, laid_out, loss_of, step_of, traffic
from zoo.language import causal

import lora_quax


pytestmark = pytest.mark.slow
GUIDE = (Path(__file__).parents[1] / "docs/guide/sharding.md").read_text()
(_block,) = re.findall(r"^(llama = \{\n.*?^\})$", GUIDE, re.M | re.S)
_said: dict[str, Any] = {"P": P}
exec(_block, _said)
RULES = _said["llama"]

WORDS, BATCH, TOKENS = 96, 8, 16
SIZES = dict(
    vocab_size=WORDS,
    hidden_size=64,
    intermediate_size=128,
    num_attention_heads=8,
    num_key_value_heads=4,
    num_hidden_layers=2,
)
SPLITS = {  # The rules name `fsdp` and `tp`, and a mesh has both of them.
    "dp": dict(dp=8, fsdp=1, tp=1),
    "fsdp": dict(fsdp=8, tp=1),
    "tp": dict(fsdp=1, tp=4),
    "fsdp, tp": dict(fsdp=4, tp=2),
    "dp, fsdp, tp": dict(dp=2, fsdp=2, tp=2),
}


def made(base: str):
    if base == "nf4":
        pytest.importorskip("qwix")
    model = causal("LlamaForCausalLM", **SIZES)().model
    return lora_quax.quantise(model, base, tile=4) if base == "nf4" else model


def loss_fn(model, tokens):
    return loss_of(jax.vmap(lambda row: model(row)[0])(tokens), tokens)


def data():
    return jr.randint(jr.key(1), (BATCH, TOKENS), 0, WORDS)


@ft.cache
def alone(base: str):
    """The loss and the gradients on one device."""
    run, args = step_of(loss_fn, adapted(made(base), eqx.nn.Linear), data())
    return jax.device_get(run(*args))


@pytest.mark.parametrize("base", ["float32", "nf4"])
@pytest.mark.parametrize("name", SPLITS)
def test_as_on_one_device(name, base):
    axes = SPLITS[name]
    split, tokens = laid_out(made(base), data(), axes, RULES)
    run, args = step_of(loss_fn, adapted(split, eqx.nn.Linear), tokens)
    got, wanted = jax.device_get(run(*args)), alone(base)
    for x, y in zip(*map(jax.tree.leaves, (got, wanted)), strict=True):
        assert abs(x - y).max() <= 1e-5 * max(1.0, abs(y).max())

    # No more is gathered than a step of the dense model gathers, nor more sent in all.
    ours, theirs = traffic(run), dense_traffic(name)
    assert ours.get("all-gather", 0) <= theirs.get("all-gather", 0)
    assert sum(ours.values()) <= sum(theirs.values())
    if name == "dp":  # The gradients of the factors, and the loss.
        assert ours == {"all-reduce": bytes_of(args[0]) + 4}


@ft.cache
def dense_traffic(name: str) -> dict[str, int]:
    """Of the model in float32, all of which trains."""
    split, tokens = laid_out(made("float32"), data(), SPLITS[name], RULES)
    return traffic(step_of(loss_fn, split, tokens, is_lora=False)[0])
