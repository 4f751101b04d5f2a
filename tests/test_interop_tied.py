"""Models whose head is their embedding have the logits of PEFT, both ways."""
# pyright: reportMissingImports=false

import shutil
import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import quax


_reason = "needs PyTorch and PEFT: pip install '.[interop]'"
torch: Any = pytest.importorskip("torch", reason=_reason)
pytest.importorskip("transformers", reason=_reason)
peft: Any = pytest.importorskip("peft", reason=_reason)

import interop_twins as twins  # noqa: E402
from interop_logits import (  # noqa: E402
    Apart,
    Causal,
    EMBEDDINGS,
    model_of,
    names_for,
    Twice,
)

import lora_quax  # noqa: E402
from lora_quax import loraify, partition  # noqa: E402


pytestmark = [
    pytest.mark.slow,
    # PEFT says of any tied model that this can lead to complications.
    *(
        pytest.mark.filterwarnings(f"ignore:{message}")
        for message in (
            "Model has `tie_word_embeddings=True`",
            "Setting `save_embedding_layers` to `True`",
            "fan_in_fan_out is set to True but the target module",
        )
    ),
]
MODELS = {"llama": twins.llama(tie_word_embeddings=True), "gpt2": twins.gpt2()}
TOKENS = np.array([3, 1, 4, 1, 5, 9])


def theirs(model) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model(torch.from_numpy(TOKENS)[None]).logits[0])


@eqx.filter_jit
def _ours(model, tokens):
    return quax.quaxify(model)(tokens)


def ours(model) -> np.ndarray:
    return np.asarray(_ours(model, jnp.asarray(TOKENS)))


def assert_close(x, y) -> None:
    scale = max(1.0, float(np.abs(y).max()))
    np.testing.assert_allclose(x, y, rtol=0, atol=2e-5 * scale)


def base_of(kind: str, make):
    return model_of(kind, twins.base_of(MODELS[kind]), make)


def trained(model):
    """With numbers in all that trains."""
    params, rest = partition(model)
    leaves, treedef = jax.tree.flatten(params)
    keys = jr.split(jr.key(2), len(leaves))
    draw = lambda x, key: 0.3 * jr.normal(key, x.shape, x.dtype)
    params = jax.tree.unflatten(treedef, [*map(draw, leaves, keys)])
    return eqx.combine(params, rest)


def loaded(kind: str, folder):
    with warnings.catch_warnings():
        # What is missing or too much is a warning of PEFT's.
        warnings.filterwarnings(
            "error", message=".*missing|.*[Uu]nexpected|.*adapter k"
        )
        return peft.PeftModel.from_pretrained(MODELS[kind](), folder).eval()


@pytest.mark.parametrize("make", [Causal, Apart, Twice], ids=lambda x: x.__name__)
@pytest.mark.parametrize("kind", MODELS)
def test_the_program_is_theirs(kind, make):
    assert_close(ours(base_of(kind, make)), theirs(MODELS[kind]()))


TARGETS = {
    "embedding": {"embedding": True},
    "embedding of another rank": {"embedding": 2, r".*(q_proj|c_attn)\.weight": True},
    "embedding and head": {r".*(embedding|head)\.weight": True},
    "embedding, whole": {"embedding": "full", r".*(q_proj|c_attn)\.weight": True},
    "none of them": {r".*(q_proj|c_attn)\.weight": True},
}


def adapted(kind: str, make, targets):
    base = base_of(kind, make)
    if make is not Apart and targets == "embedding and head":
        pytest.skip("it has one array")
    model = loraify(base, rank=4, alpha=6, targets=TARGETS[targets], key=jr.key(1))
    return base, trained(model)


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("apart", [None, False], ids=["tied", "each for itself"])
@pytest.mark.parametrize("make", [Causal, Apart, Twice], ids=lambda x: x.__name__)
@pytest.mark.parametrize("kind", MODELS)
def test_exported(tmp_path, kind, make, targets, apart):
    base, model = adapted(kind, make, targets)
    touches = targets != "none of them"
    options: dict[str, Any] = {"fan_in_fan_out": kind == "gpt2"}
    names = names_for(kind, base)
    if make is Twice and touches:
        if apart is False:
            pytest.skip("it has one array")
        options["ensure_weight_tying"] = True
    elif make is Apart and touches:
        options["ensure_weight_tying"] = False
    else:
        options["ensure_weight_tying"] = apart
    lora_quax.peft.save(tmp_path, model, names=names, **options)
    torch_model = loaded(kind, tmp_path)
    assert_close(theirs(torch_model), ours(model))
    assert_close(ours(lora_quax.merge(model)), ours(model))
    again = lora_quax.peft.load(tmp_path, base, names=names)
    assert_close(ours(again), ours(model))
    if "whole" in targets:
        assert_close(theirs(torch_model.merge_and_unload()), ours(model))


CONFIGS = {
    "embedding": dict(target_modules=["{}"]),
    "embedding, tied": dict(target_modules=["{}"], ensure_weight_tying=True),
    "both, tied": dict(target_modules=["{}", "lm_head"], ensure_weight_tying=True),
    "both": dict(target_modules=["{}", "lm_head"]),
    "head": dict(target_modules=["lm_head"]),
    "whole": dict(target_modules=["q_proj", "c_attn"], modules_to_save=["{}"]),
    "whole, tied": dict(
        target_modules=["q_proj", "c_attn"],
        modules_to_save=["{}"],
        ensure_weight_tying=True,
    ),
}
# PEFT knows embeddings that it is to tie by two names, of which "wte" is none.
UNTIED = {("gpt2", "embedding, tied"), ("gpt2", "whole, tied")}


def peft_model(kind: str, config: str, folder):
    fields = {
        key: [x.format(EMBEDDINGS[kind]) for x in value]
        if isinstance(value, list)
        else value
        for key, value in CONFIGS[config].items()
    }
    fan = kind == "gpt2" and "c_attn" in fields["target_modules"]
    config_ = peft.LoraConfig(r=4, lora_alpha=6, fan_in_fan_out=fan, **fields)
    model = peft.get_peft_model(MODELS[kind](), config_).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for x in model.parameters():
            if x.requires_grad:
                x.copy_(0.3 * torch.randn(x.shape))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("make", [Causal, Apart], ids=lambda x: x.__name__)
@pytest.mark.parametrize("kind", MODELS)
def test_imported(tmp_path, kind, make, config):
    """What PEFT computes is computed, or refused where the model cannot."""
    model = peft_model(kind, config, tmp_path)
    base = base_of(kind, make)
    names = names_for(kind, base)
    is_tied = config.endswith("tied") and (kind, config) not in UNTIED
    load = lambda: lora_quax.peft.load(tmp_path, base, names=names)
    if is_tied or make is Apart:
        assert_close(ours(load()), theirs(model))
        return
    with pytest.raises(lora_quax.AdapterError, match="in the model|no place"):
        load()


@pytest.mark.parametrize("tied", [True, False])
def test_a_base_model_that_says_it_is_tied(tmp_path, tied):
    MODELS["llama"]().save_pretrained(tmp_path / "base")
    base, model = adapted("llama", Twice, "embedding")
    names = names_for("llama", base)
    save = lambda **kwargs: lora_quax.peft.save(
        tmp_path / "out",
        model,
        names=names,
        base_model_name_or_path=str(tmp_path / "base"),
        **kwargs,
    )
    with pytest.raises(ValueError, match="ties its head to the embedding"):
        save()
    assert not (tmp_path / "out").exists()
    save(ensure_weight_tying=tied)
    shutil.rmtree(tmp_path / "base")
    save()
