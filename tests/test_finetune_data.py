"""What `finetune` learns: lines of a file, chats, batches."""

from pathlib import Path

import numpy as np
import pytest

from lora_quax import AdapterError
from lora_quax._cli.finetune.batches import batches, Order, padded_length
from lora_quax._cli.finetune.data import encode, Example, read_examples, Tokens
from lora_quax._cli.finetune.tokens import Encoder


# The data.

LINES = {
    "no JSON": ("{", r"it is not JSON: .* \(column 2\)"),
    "no object": ("[1]", r"it is no JSON object: \[1\]"),
    "a key twice": ('{"text": "a", "text": "b"}', "it has 'text' twice"),
    "neither": ('{"txt": "a"}', "it has `txt`, and neither .*; `text` is meant"),
    "nothing": ("{}", "it has nothing, and neither `text` nor `messages`"),
    "both": ('{"text": "a", "messages": []}', "it has both"),
    "no text": ('{"text": 3}', "`text` has to be a text that is not empty: 3"),
    "an empty text": ('{"text": " "}', "`text` has to be a text that is not empty: "),
    "half a character": (r'{"text": "a\ud800"}', "character 2 of a text is half"),
    "no messages": ('{"messages": []}', "`messages` has to be a list of messages"),
    "no message": ('{"messages": [3]}', "message 1 has no texts `role` and `content`"),
    "no content": (
        '{"messages": [{"role": "user"}]}',
        "message 1 has no texts `role` and `content`",
    ),
    "another role": (
        '{"messages": [{"role": "bot", "content": "a"}]}',
        "message 1 has the role 'bot', of system, user, assistant",
    ),
    "no answer": (
        '{"messages": [{"role": "assistant", "content": " "}]}',
        "message 1 is of the assistant, and says nothing",
    ),
    "calls": (
        '{"messages": [{"role": "assistant", "content": null, "tool_calls": [1]}]}',
        "message 1 has `tool_calls`, which are not learnt from here",
    ),
    "tools": ('{"messages": [], "tools": [1]}', "it has `tools`, which are not"),
    "a prompt": (
        '{"prompt": "a", "completion": "b"}',
        "it has `prompt` and `completion`; give them as `messages`, of the roles user",
    ),
    "no assistant": (
        '{"messages": [{"role": "user", "content": "a"}]}',
        "no message is of the role assistant",
    ),
    "long": (
        '{"text": "' + 10**7 * "a" + '"}',
        "it has 10,000,013 bytes, and may have 10,000,000: divide its text",
    ),
    "deep": (1000 * "[" + 1000 * "]", "it is n.*"),
}


@pytest.mark.parametrize("case", LINES)
def test_a_line_that_is_none_is_named(case, tmp_path):
    line, message = LINES[case]
    path = tmp_path / "x.jsonl"
    path.write_text(f'{{"text": "a"}}\n\n{line}\n{{"text": "b"}}\n')
    with pytest.raises(
        AdapterError, match=f"x.jsonl is no file .*\n  - line 3: {message}"
    ):
        read_examples(path)


def test_all_lines_are_named_in_order(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"3\n" * 2 + b'{"text": "\xff"}\n' + b"4\n" * 9)
    with pytest.raises(AdapterError, match="line 3: it is not UTF-8") as e:
        read_examples(path)
    lines = str(e.value).splitlines()[1:]
    assert [int(x.split()[2][:-1]) for x in lines] == [*range(1, 13)]
    path.write_text("\n")
    with pytest.raises(AdapterError, match="it has no line"):
        read_examples(path)


class Letters:
    """A tokenizer of the package `tokenizers`, in little: each character a token."""

    def encode(self, text, add_special_tokens=True):
        del add_special_tokens
        ids = [ord(c) for c in text]
        return type(
            "", (), dict(ids=ids, offsets=[(i, i + 1) for i in range(len(ids))])
        )

    def get_vocab(self, with_added_tokens):
        del with_added_tokens
        return {"a": 97, "z": 122}


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def letters(template: str | None = TEMPLATE) -> Encoder:
    return Encoder(Path("here"), Letters(), (33,), template, {"eos_token": "!"})


def text_of(ids) -> str:
    return "".join(map(chr, ids))


def messages(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


CHAT = messages(
    ("user", "Hi"), ("assistant", "Yes"), ("user", "So"), ("assistant", "No")
)


def encoded(example, max_length=99, template: str | None = TEMPLATE):
    return encode(Path("x.jsonl"), [example], letters(template), max_length)


def test_of_a_text_all_is_learnt():
    (tokens,) = encoded(Example(1, "abc", [])).examples
    assert text_of(tokens.ids) == "abc!" and tokens.learnt.all()


def test_of_a_chat_what_the_assistant_says_is_learnt():
    pytest.importorskip("jinja2")
    (tokens,) = encoded(Example(1, None, CHAT)).examples
    assert text_of(tokens.ids) == "<user>Hi!<assistant>Yes!<user>So!<assistant>No!"
    assert text_of(tokens.ids[tokens.learnt]) == "Yes!No!"


def test_a_long_one_is_cut():
    found = encoded(Example(1, "abcdef", []), 3)
    assert found.n_cut == 1 and text_of(found.examples[0].ids) == "abc"


NOT_LEARNT = {
    "cut": (CHAT, 20, TEMPLATE, "line 7: nothing of its first 20 tokens is learnt"),
    "no template": (CHAT, 99, None, "line 7: here has no chat template, which chats"),
    "no program": (CHAT, 99, "{% if %}", "line 7: the chat template does not take it"),
    "refused": (
        CHAT,
        99,
        "{{ raise_exception('no turns, please') }}",
        "line 7: the chat template does not take it: no turns, please",
    ),
    "a fault": (CHAT, 99, "{{ 1 // 0 }}", ".* does not take it: ZeroDivisionError"),
    "a way out": (
        CHAT,
        99,
        "{{ [].__class__.__base__ }}",
        "line 7: the chat template does not take it: .*unsafe",
    ),
    "a long loop": (
        CHAT,
        99,
        "{% for i in range(10**9) %}{% endfor %}",
        ".* does not take it: OverflowError",
    ),
    "other turns": (
        CHAT,
        99,
        "{{ messages | length }}{{ messages[-1].content }}",
        "line 7: the chat template of here writes message 2 otherwise",
    ),
}


@pytest.mark.parametrize("case", NOT_LEARNT)
def test_a_chat_that_cannot_be_learnt_is_named(case):
    pytest.importorskip("jinja2")
    chat, max_length, template, message = NOT_LEARNT[case]
    with pytest.raises(AdapterError, match=f"x.jsonl cannot be .*\n  - {message}"):
        encoded(Example(7, None, chat), max_length, template)


def test_a_tokenizer_that_does_not_fit():
    letters().check(123)
    with pytest.raises(AdapterError, match="tokens up to 122, .* embeddings for 122,"):
        letters().check(122)


# Batches.


def test_each_example_once_in_an_epoch():
    order = Order([padded_length(n, 512) for n in range(1, 42)], 4, seed=3)
    assert order.steps_per_epoch == 11
    epochs = [[order(11 * e + i) for i in range(11)] for e in range(3)]
    flat = [tuple(map(int, np.concatenate(epoch))) for epoch in epochs]
    assert all(sorted(x) == [*range(41)] for x in flat) and len({*flat}) == 3
    # Of its number alone, whatever was asked before.
    again = Order([padded_length(n, 512) for n in range(1, 42)], 4, seed=3)
    for step in (30, 2, 17):
        np.testing.assert_array_equal(again(step), epochs[step // 11][step % 11])
    other = Order([padded_length(n, 512) for n in range(1, 42)], 4, seed=4)
    assert any(tuple(other(i)) != tuple(order(i)) for i in range(11))


def test_few_shapes():
    lengths = [padded_length(n, 700) for n in range(1, 701)]
    assert {*lengths} == {32, 64, 128, 256, 512, 700}
    assert all(a >= b for a, b in zip(lengths, range(1, 701)))


def test_rows_are_filled_up():
    examples = [Tokens(np.arange(n, dtype=np.int32), np.ones(n, bool)) for n in (3, 40)]
    one, other = batches(examples, 1, 512)
    assert one.ids.shape == other.ids.shape == (1, 64)
    assert (one.n_tokens, other.n_tokens) == (3, 40)
    assert (one.learnt.sum(), other.learnt.sum()) == (2, 39)  # None before the first.
    (both,) = batches(examples, 3, 512)
    assert both.ids.shape == (3, 64) and both.n_tokens == 43
    assert not both.learnt[2].any()
