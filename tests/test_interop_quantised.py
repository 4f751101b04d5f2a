"""An adapter on a quantised base has the logits of PEFT on the decoded one; and a model
that others wrote those of its twin in PyTorch."""
# pyright: reportMissingImports=false

import gc
import json
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import quax
from files import bits
from helpers import normal


_reason = "needs PyTorch and PEFT: pip install '.[interop]'"
torch: Any = pytest.importorskip("torch", reason=_reason)
transformers: Any = pytest.importorskip("transformers", reason=_reason)
peft: Any = pytest.importorskip("peft", reason=_reason)
pytest.importorskip("qwix")

import interop_twins as twins  # noqa: E402
from interop_logits import Apart, model_of, names_for  # noqa: E402

import lora_quax  # noqa: E402
from lora_quax import dequantise, loraify, quantise  # noqa: E402


pytestmark = pytest.mark.slow
TOKENS = np.array([3, 1, 4, 1, 5, 9])


def theirs(model, tokens) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model(torch.from_numpy(np.array(tokens))[None]).logits[0])


def small(x):
    """An update of the size that training gives it."""
    return loraify(x, 4, jr.key(1), alpha=6, init_b=lambda *y: 0.2 * normal(*y))


def assert_close(x, y, tolerance) -> None:
    assert np.abs(x - y).max() <= tolerance * np.abs(y).max()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_an_adapter_on_a_quantised_base(kind, tmp_path):
    torch_model = twins.llama()
    plain = model_of("llama", twins.twin_of(torch_model()), Apart)
    # The head is one array with the embedding.
    targets = [eqx.nn.Linear, ("head", "freeze")]
    base = quantise(plain, kind, tile=8, targets=targets)
    names = names_for("llama", base)
    model = small(base)
    ours = np.asarray(eqx.filter_jit(quax.quaxify(model))(jnp.asarray(TOKENS)))

    lora_quax.save_model(tmp_path / "base.safetensors", dequantise(base), names=names)
    weights = transformers.modeling_utils.load_state_dict(
        str(tmp_path / "base.safetensors")
    )
    decoded = torch_model()
    decoded.load_state_dict(weights)
    lora_quax.peft.save(tmp_path / "x", model, names=names, ensure_weight_tying=False)
    adapted = peft.PeftModel.from_pretrained(decoded, tmp_path / "x").eval()
    assert_close(ours, theirs(adapted, TOKENS), 1e-5)

    again = lora_quax.peft.load(tmp_path / "x", base, names=names)
    assert bits(again) == bits(model)


def test_smollm2_goes_to_pytorch_and_back(tmp_path):
    """Its weights as Hugging Face has them, and an adapter of ours."""
    language = pytest.importorskip("zoo.language")
    zoo = pytest.importorskip("eqx_zoo")
    blocks, tokens = language.quantised_smollm2()
    base = dequantise(blocks)
    model = small(base)
    run = eqx.filter_jit(quax.quaxify(lambda model, tokens: model(tokens)[0]))
    ours = np.asarray(run(model, tokens))
    assert_close(np.asarray(run(small(blocks), tokens)), ours, 1e-4)

    folder = tmp_path / "base"
    lora_quax.save_model(folder, base)
    config = {"model_type": "llama", **language.smollm2_config()}
    (folder / "config.json").write_text(json.dumps(config))
    lora_quax.peft.save(tmp_path / "x", model, base_model_name_or_path=str(folder))
    torch_model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    adapted = peft.PeftModel.from_pretrained(torch_model, tmp_path / "x").eval()
    assert_close(ours, theirs(adapted, tokens), 1e-4)

    # And back: what PEFT has merged, and the adapter.
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    del adapted, torch_model
    gc.collect()
    merged = zoo.CausalLM.from_pretrained(tmp_path / "merged")
    assert_close(np.asarray(run(merged, tokens)), ours, 1e-4)
    again = lora_quax.peft.load(tmp_path / "x", base)
    assert bits(again) == bits(jax.block_until_ready(model))
