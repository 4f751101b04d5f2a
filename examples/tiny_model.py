"""Writes a model folder as on Hugging Face: a Llama drawn at random, small enough to be
trained in a minute, and a tokenizer of the bytes of a text.

    python examples/tiny_model.py FOLDER
"""

import json
import sys
from pathlib import Path

import equinox as eqx
import jax.random as jr
from eqx_zoo import CausalLM, Config
from tokenizers import decoders, models, pre_tokenizers, Tokenizer

import lora_quax


SPECIAL = ["<|end|>", "<|start|>"]
TEMPLATE = """\
{% for message in messages %}<|start|>{{ message.role }}
{{ message.content }}<|end|>
{% endfor %}{% if add_generation_prompt %}<|start|>assistant
{% endif %}"""


def write(folder: Path, seed: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_tokenizer()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "eos_token_id": tokenizer.token_to_id(SPECIAL[0]),
    }
    model = CausalLM(Config.from_hf(config), key=jr.key(seed))
    # What a random head says is to be little, and easily unlearnt.
    small = 0.25 * model.model.embed_tokens.weight
    model = eqx.tree_at(lambda m: m.model.embed_tokens.weight, model, small)
    lora_quax.save_model(folder, model)
    about = {"eos_token": SPECIAL[0], "chat_template": TEMPLATE}
    texts = {"config.json": config, "tokenizer_config.json": about}
    for name, text in texts.items():
        (folder / name).write_text(json.dumps(text, indent=2) + "\n")
    tokenizer.save(str(folder / "tokenizer.json"))


def byte_tokenizer() -> Tokenizer:
    """Each byte a token, and two that stand for no text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


if __name__ == "__main__":
    write(Path(sys.argv[1]))
