"""Lines of JSON as tokens, and which of them are to be learnt."""

import difflib
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..._disk.files import parse_json, refuse
from .tokens import Encoder


_ROLES = ("system", "user", "assistant", "tool")
_KEYS = ("text", "messages")
_CALLS = ("tools", "tool_calls")  # What they say is no text.
_MOST_BYTES = 10_000_000  # Of a line: its text is tokens before it is cut.
_MARK = b"\xef\xbb\xbf"  # Which some editors put at the beginning.


class Example(NamedTuple):
    """What a line says: a text, or the messages of a chat."""

    line: int
    text: str | None
    messages: list[dict[str, str]]


class Tokens(NamedTuple):
    ids: np.ndarray  # (length,)
    learnt: np.ndarray  # (length,); whether the loss has this one, given those before


class Encoded(NamedTuple):
    examples: list[Tokens]
    n_cut: int  # How many were longer than they may be.

    def digest(self) -> str:
        """Tells these tokens from others."""
        out = hashlib.sha256()
        for ids, learnt in self.examples:
            out.update(len(ids).to_bytes(8, "little"))
            out.update(ids.tobytes() + learnt.tobytes())
        return out.hexdigest()


def read_examples(path: Path) -> list[Example]:
    """**Raises:** `AdapterError`, which lists the lines that are none, and why;
    `OSError`."""
    out, problems = [], []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(_MARK)
            if not line.strip():
                continue
            try:
                out.append(_example(number, line))
            except ValueError as e:
                problems.append(f"line {number}: {e}")
    if not out and not problems:
        problems.append("it has no line")
    refuse(f"{path} is no file of texts or chats", problems, in_order=True)
    return out


def _example(number: int, line: bytes) -> Example:
    """**Raises:** `ValueError`, which says what is wrong."""
    if len(line) > _MOST_BYTES:
        raise ValueError(
            f"it has {len(line):,} bytes, and may have {_MOST_BYTES:,}: divide its text"
        )
    try:
        found = parse_json(line.decode().rstrip())
    except UnicodeDecodeError as e:
        raise ValueError("it is not UTF-8") from e
    except json.JSONDecodeError as e:
        raise ValueError(f"it is not JSON: {e.msg} (column {e.colno})") from e
    if not isinstance(found, dict):
        raise ValueError(f"it is no JSON object: {found!r:.60}")
    kinds = [key for key in _KEYS if key in found]
    if len(kinds) != 1:
        raise ValueError(_not_one(found))
    if kinds == ["messages"]:
        _refuse_calls(found, "it")
        return Example(number, None, [*_messages(found["messages"])])
    text = found["text"]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"`text` has to be a text that is not empty: {text!r:.60}")
    _refuse_surrogates(text)
    return Example(number, text, [])


def _not_one(found: dict[str, Any]) -> str:
    if all(key in found for key in _KEYS):
        return "it has both `text` and `messages`; one is wanted"
    if {"prompt", "completion"} <= found.keys():
        return (
            "it has `prompt` and `completion`; give them as `messages`, of the roles "
            "user and assistant"
        )
    near = [x for key in found for x in difflib.get_close_matches(key, _KEYS, 1)]
    hint = f"; `{near[0]}` is meant?" if near else ""
    keys = ", ".join(f"`{key}`" for key in found) or "nothing"
    return f"it has {keys:.120}, and neither `text` nor `messages`{hint}"


def _messages(found: Any) -> Iterator[dict[str, str]]:
    if not isinstance(found, list) or not found:
        raise ValueError(f"`messages` has to be a list of messages: {found!r:.60}")
    for i, x in enumerate(found, 1):
        if isinstance(x, dict):
            _refuse_calls(x, f"message {i}")
        is_message = isinstance(x, dict) and all(
            isinstance(x.get(key), str) for key in ("role", "content")
        )
        if not is_message:
            raise ValueError(
                f"message {i} has no texts `role` and `content`: {x!r:.60}"
            )
        if x["role"] not in _ROLES:
            known = ", ".join(_ROLES)
            raise ValueError(f"message {i} has the role {x['role']!r:.40}, of {known}")
        _refuse_surrogates(x["content"])
        if x["role"] == "assistant" and not x["content"].strip():
            raise ValueError(f"message {i} is of the assistant, and says nothing")
        yield {"role": x["role"], "content": x["content"]}
    if all(x["role"] != "assistant" for x in found):
        raise ValueError("no message is of the role assistant, of which is learnt")


def _refuse_calls(found: dict[str, Any], what: str) -> None:
    """A chat without them would be another one."""
    for key in _CALLS:
        if found.get(key):
            raise ValueError(f"{what} has `{key}`, which are not learnt from here")


def _refuse_surrogates(text: str) -> None:
    """JSON can say half of a character of UTF-16, which is no text."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"character {e.start + 1} of a text is half of one") from e


def encode(
    path: Path, examples: Sequence[Example], encoder: Encoder, max_length: int
) -> Encoded:
    """The tokens of a file's examples, no more than `max_length` of each.

    Of a text all are learnt, and that it ends. Of a chat it is what the assistant says.

    **Raises:** `AdapterError`, which lists the lines of which nothing is learnt, or
    that the chat template does not take.
    """
    out, problems, n_cut = [], [], 0
    for example in examples:
        try:
            tokens = _encode(example, encoder)
            n_cut += len(tokens.ids) > max_length
            tokens = Tokens(*(x[:max_length] for x in tokens))
            if not tokens.learnt[1:].any():
                raise ValueError(
                    f"nothing of its first {max_length} tokens is learnt; `max_length` "
                    "has to be more"
                )
            out.append(tokens)
        except ValueError as e:
            problems.append(f"line {example.line}: {e}")
    refuse(f"{path} cannot be learnt from", problems, in_order=True)
    return Encoded(out, n_cut)


def _encode(example: Example, encoder: Encoder) -> Tokens:
    if example.text is not None:
        ids = encoder.text(example.text)
        return Tokens(ids, np.ones(len(ids), bool))
    text, spans = encoder.chat(example.messages)
    ids, offsets = encoder.with_offsets(text)
    learnt = np.zeros(len(ids), bool)
    for begin, end in spans:
        learnt |= (offsets[:, 1] > begin) & (offsets[:, 0] < end)
    return Tokens(ids, learnt)
