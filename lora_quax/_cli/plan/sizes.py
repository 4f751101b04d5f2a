"""The sizes of a Llama, as Hugging Face's config.json says them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ..._disk.files import AdapterError, read_json


FAMILY = ("llama", "mistral")
MOST = 2**31 - 1  # Of anything: indices are of 32 bits.


@dataclass(frozen=True)
class Sizes:
    layers: int
    width: int
    hidden: int  # Of the perceptron of a layer.
    heads: int
    kv_heads: int
    head: int
    words: int
    tied: bool  # Whether the embedding is the head.


def read_sizes(path: Path) -> Sizes:
    """**Raises:** `FileNotFoundError`; `AdapterError` if the file is not that of a
    Llama, or of sizes that no Llama has."""
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no file {path}. It is to be the config.json of a model, as on "
            "Hugging Face, or the folder of one."
        )
    return _Reader(path, read_json(path)).sizes()


class _Reader:
    def __init__(self, path: Path, config: dict[str, Any]):
        self.path, self.config = path, config

    def sizes(self) -> Sizes:
        kind = self.config.get("model_type")
        if kind not in FAMILY:
            self.refuse("model_type", kind, f"one of {', '.join(FAMILY)}")
        for name in ("attention_bias", "mlp_bias"):
            if self.config.get(name):
                self.refuse(name, self.config[name], "false: no biases are planned for")
        width, heads = self.count("hidden_size"), self.count("num_attention_heads")
        kv_heads = self.count("num_key_value_heads", heads)
        if heads % kv_heads:
            self.refuse("num_key_value_heads", kv_heads, f"a divisor of {heads} heads")
        if self.config.get("head_dim") is None and width % heads:
            self.refuse("num_attention_heads", heads, f"a divisor of {width} features")
        head = self.count("head_dim", width // heads)
        if head % 2:
            self.refuse("head_dim", head, "even, as its numbers are rotated in pairs")
        if heads * head > MOST:
            self.refuse(
                "head_dim", head, f"{MOST // heads} at most, with {heads} heads"
            )
        tied = self.config.get("tie_word_embeddings", False)
        if not isinstance(tied, bool):
            self.refuse("tie_word_embeddings", tied, "true or false")
        return Sizes(
            layers=self.count("num_hidden_layers"),
            width=width,
            hidden=self.count("intermediate_size"),
            heads=heads,
            kv_heads=kv_heads,
            head=head,
            words=self.count("vocab_size"),
            tied=tied,
        )

    def count(self, name: str, default: int | None = None) -> int:
        x = self.config.get(name)
        x = default if x is None else x
        if not isinstance(x, int) or isinstance(x, bool) or not 1 <= x <= MOST:
            self.refuse(name, x, f"a positive integer, of {MOST:,} at most")
        return x

    def refuse(self, name: str, found: Any, wanted: str) -> NoReturn:
        raise AdapterError(
            f"{self.path} is of no model that can be planned for: its {name} is "
            f"{found!r}, and is to be {wanted}."
        )
