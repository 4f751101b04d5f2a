"""What a file of llama.cpp says beside its weights."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

from ..._disk.files import AdapterError
from .extra import needs


Fields: TypeAlias = dict[str, Any]
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
# What a Llama of Hugging Face has, by its names in the file.
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    **{f"model.layers.{{}}.{y}": f"blk.{{}}.{x}" for x, y in _LLAMA.items()},
}
HEAD = {"lm_head": "output"}


def gguf_fields(path: Path) -> Fields:
    """**Raises:** `FileNotFoundError`; `AdapterError` if it is no such file;
    `ImportError`."""
    return _read(path)[0]


def llama_config(path: Path) -> dict[str, Any]:
    """What Hugging Face's `config.json` of a Llama would say.

    **Raises:** as `gguf_fields`; `AdapterError` if it is no Llama.
    """
    fields, shapes = _read(path)
    if (kind := fields.get("general.architecture")) != "llama":
        raise AdapterError(f"{path} is of the architecture {kind!r:.40}, not 'llama'.")
    if fields.get("llama.rope.scaling.type", "none") != "none":
        raise AdapterError(
            f"{path} scales RoPE, which is not known here of such files."
        )

    def field(name: str, of: type = int, default: Any = None) -> Any:
        x = fields.get(f"llama.{name}", default)
        if not isinstance(x, of) or isinstance(x, bool) or x <= 0:
            raise AdapterError(f"{path} has {x!r:.40} for `llama.{name}`.")
        return x

    embedding = shapes.get("token_embd.weight", ())
    if len(embedding) != 2:
        raise AdapterError(f"{path} has no matrix `token_embd.weight`.")
    layers = field("block_count")
    refuse_layers(path, layers, shapes, "blk.")
    width, heads = field("embedding_length"), field("attention.head_count")
    return dict(
        architectures=["LlamaForCausalLM"],
        hidden_size=width,
        intermediate_size=field("feed_forward_length"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=field("attention.head_count_kv", int, heads),
        head_dim=field("attention.key_length", int, width // heads),
        rms_norm_eps=field("attention.layer_norm_rms_epsilon", float),
        rope_theta=field("rope.freq_base", float, 10_000.0),
        tie_word_embeddings="output.weight" not in shapes,
        vocab_size=embedding[0],
        max_position_embeddings=fields.get("llama.context_length"),
    )


def refuse_layers(path: Path, said: int, tensors: Iterable[str], begin: str) -> None:
    """A model of another number of layers is not even begun.

    **Raises:** `AdapterError`.
    """
    found = {
        x.removeprefix(begin).split(".")[0] for x in tensors if x.startswith(begin)
    }
    if len(found) != said:
        raise AdapterError(
            f"{path} is to have {said:,} layers, and there are weights of "
            f"{len(found):,}."
        )


def _read(path: Path) -> tuple[Fields, dict[str, tuple[int, ...]]]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    gguf = needs("gguf")
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as e:
        raise AdapterError(f"{path} is no sound GGUF file: {e}.") from e
    shapes = {x.name: tuple(int(n) for n in reversed(x.shape)) for x in reader.tensors}
    return fields, shapes
