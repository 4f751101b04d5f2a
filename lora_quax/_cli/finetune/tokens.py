"""From texts and chats to tokens and back, as a model's own files have it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..._disk.files import AdapterError, read_json
from .chat import render
from .extra import needs
from .gguf import Fields, gguf_fields


Spans = list[tuple[int, int]]
_EOS = "eos_token_id"


class Encoder(NamedTuple):
    """A tokenizer, and what else a model's files say of texts."""

    source: Path
    tokenizer: Any  # Of the package tokenizers.
    ends: tuple[int, ...]  # The tokens that end a text; the first is that of training.
    template: str | None  # Of chats, in Jinja.
    special: dict[str, str]  # What a template may call them: bos_token, eos_token, ...

    def text(self, text: str) -> np.ndarray:
        """The tokens of a text, and that it ends."""
        ids = self.tokenizer.encode(text).ids
        if self.ends and ids[-1:] != [self.ends[0]]:
            ids = [*ids, self.ends[0]]
        return np.array(ids, np.int32)

    def prompt(self, text: str) -> np.ndarray:
        """The tokens of a text that goes on."""
        ids = self.tokenizer.encode(text).ids
        # What ends a text may have been added by the tokenizer.
        while ids and ids[-1] in self.ends:
            ids = ids[:-1]
        return np.array(ids, np.int32)

    def with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of a text that has its special tokens written out, and where in it
        each begins and ends."""
        found = self.tokenizer.encode(text, add_special_tokens=False)
        return np.array(found.ids, np.int32), np.array(found.offsets).reshape(-1, 2)

    def chat(self, messages: Sequence[dict[str, str]]) -> tuple[str, Spans]:
        """A chat as the model has it, and where in it the assistant speaks.

        **Raises:** `ValueError` if the template does not take it, or writes it so that
        what the assistant says does not follow on what was there before.
        """
        whole, spans = self.render(messages, False), []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.render(messages[:i], True)
            after = self.render(messages[: i + 1], False)
            if not (after.startswith(before) and whole.startswith(after)):
                raise ValueError(
                    f"the chat template of {self.source} writes message {i + 1} "
                    "otherwise at the end of a chat than within one; a chat of which "
                    "the assistant has the last word alone can be learnt from"
                )
            spans.append((len(before), len(after)))
        return whole, spans

    def render(self, messages: Sequence[dict[str, str]], asks: bool) -> str:
        """**Arguments:**

        - `asks`: whether it is the assistant's turn.

        **Raises:** `ValueError` if there is no template, or it does not take them.
        """
        if self.template is None:
            raise ValueError(
                f"{self.source} has no chat template, which chats need: put a file "
                "chat_template.jinja beside tokenizer.json"
            )
        return render(self.template, messages, asks, self.special)

    def check(self, vocabulary: int) -> None:
        """**Raises:** `AdapterError` if the tokens are not those of a model with an
        embedding of so many rows."""
        ids = self.tokenizer.get_vocab(with_added_tokens=True).values()
        most = max([*ids, *self.ends], default=-1)
        if most >= vocabulary:
            raise AdapterError(
                f"The tokenizer of {self.source} does not fit the model: it has tokens "
                f"up to {most:,}, and the model has embeddings for {vocabulary:,}, the "
                f"last of which is that of token {vocabulary - 1:,}."
            )


def read_encoder(path: Path) -> Encoder:
    """That of a folder or of a file `tokenizer.json`, or of a file of llama.cpp.

    **Raises:** `FileNotFoundError`; `AdapterError` if it is none; `ImportError`.
    """
    if path.suffix.lower() == ".gguf":
        return _of_gguf(path, gguf_fields(path))
    folder = path if path.is_dir() else path.parent
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"There is no file {file}. Name another by `tokenizer` in [model]."
        )
    tokenizers = needs("tokenizers")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as e:  # The package has no error of its own.
        raise AdapterError(f"{file} is no tokenizer: {e}.") from e
    tokenizer.no_padding()
    tokenizer.no_truncation()
    config = _json(folder / "tokenizer_config.json")
    special = {key: _content(x) for key, x in config.items() if key.endswith("_token")}
    special = {key: x for key, x in special.items() if x is not None}
    return Encoder(
        path,
        tokenizer,
        _ends(folder, tokenizer, special),
        _template(folder, config),
        special,
    )


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _content(x: Any) -> str | None:
    x = x.get("content") if isinstance(x, dict) else x
    return x if isinstance(x, str) else None


def _ends(folder: Path, tokenizer, special: dict[str, str]) -> tuple[int, ...]:
    """The token that the tokenizer ends a text with, and those that a model may."""
    found = [tokenizer.token_to_id(special.get("eos_token", ""))]
    for name in ("generation_config.json", "config.json"):
        ids = _json(folder / name).get(_EOS)
        found += ids if isinstance(ids, list) else [ids]
    return tuple(dict.fromkeys(i for i in found if type(i) is int and i >= 0))


def _template(folder: Path, config: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text()
        except UnicodeDecodeError as e:
            raise AdapterError(f"{file} is not UTF-8.") from e
    found = config.get("chat_template")
    if isinstance(found, list):  # Of several, by name.
        named = [x for x in found if isinstance(x, dict)]
        found = next(
            (x.get("template") for x in named if x.get("name") == "default"), None
        )
    return found if isinstance(found, str) else None


# llama.cpp.

_PRE = ("gpt-2", "smollm")  # What is done before pairs are merged.
_CONTROL = (3, 4)  # Types of tokens that stand for no text.


def _of_gguf(path: Path, fields: Fields) -> Encoder:
    """**Raises:** `AdapterError` for a kind of tokenizer that is not known here."""

    def field(name: str, default: Any = None) -> Any:
        return fields.get(f"tokenizer.ggml.{name}", default)

    if field("model") != "gpt2" or field("pre") not in _PRE:
        raise AdapterError(
            f"{path} has a tokenizer of the kind {field('model')!r:.40}, "
            f"{field('pre')!r:.40}; the kind 'gpt2' is known here, of "
            f"{' or '.join(map(repr, _PRE))}. Name the tokenizer.json of the model by "
            "`tokenizer` in [model]."
        )
    words, kinds = field("tokens", []), field("token_type", [])
    tokenizer = _pairs(path, words, field("merges", []), field("pre") == "smollm")
    tokenizer.add_special_tokens([w for w, k in zip(words, kinds) if k in _CONTROL])
    ids = {"eos_token": field(_EOS), "bos_token": field("bos_token_id")}
    ids = {k: i for k, i in ids.items() if type(i) is int and 0 <= i < len(words)}
    special = {name: words[i] for name, i in ids.items()}
    ends = (ids["eos_token"],) if "eos_token" in ids else ()
    template = fields.get("tokenizer.chat_template")
    return Encoder(path, tokenizer, ends, template, special)


def _pairs(path: Path, words: list[str], merges: list[str], digits: bool) -> Any:
    """A tokenizer that merges pairs of bytes.

    **Arguments:**

    - `digits`: whether each digit is a token.
    """
    out = needs("tokenizers")
    vocabulary = {word: i for i, word in enumerate(words)}
    try:
        pairs = [tuple(pair.split(" ")) for pair in merges]
        tokenizer = out.Tokenizer(out.models.BPE(vocabulary, pairs))
    except Exception as e:  # As above.
        raise AdapterError(f"{path} has no tokenizer that can be read: {e}.") from e
    before = out.pre_tokenizers
    level = before.ByteLevel(add_prefix_space=False)
    first = [before.Digits(individual_digits=True)] if digits else []
    tokenizer.pre_tokenizer = before.Sequence([*first, level])
    tokenizer.decoder = out.decoders.ByteLevel()
    return tokenizer
