"""`finetune` and what it is made of, as far as it needs no package with models."""

import dataclasses
import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tomllib
import typing
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from files import bits, contents, listing
from finetuned import config, MOMENTS, sets, stand, texts

import lora_quax
from lora_quax import AdapterError, peft
from lora_quax.__main__ import main
from lora_quax._cli.finetune import checkpoint, run as runs
from lora_quax._cli.finetune.batches import batches, Order, padded_length
from lora_quax._cli.finetune.config import Config, Lora, read_config, Train
from lora_quax._cli.finetune.data import encode, Example, read_examples, Tokens
from lora_quax._cli.finetune.extra import needs
from lora_quax._cli.finetune.loss import Loss
from lora_quax._cli.finetune.report import report
from lora_quax._cli.finetune.run import Run, train
from lora_quax._cli.finetune.step import schedule, Stepper
from lora_quax._cli.finetune.tokens import Encoder
from lora_quax._disk.whole import held


ROOT = Path(__file__).parents[1]


# The configuration.

GOOD = """\
[model]
path = "model"

[data]
train = "train.jsonl"

[output]
folder = "run"
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model.gguf").touch()
    (tmp_path / "train.jsonl").write_text('{"text": "abc"}\n')
    return tmp_path


def written(folder: Path, text: str) -> Path:
    path = folder / "config.toml"
    path.write_text(text)
    return path


def test_defaults_and_paths(folder):
    found = read_config(written(folder, GOOD))
    assert found.model.path == folder / "model" and found.data.valid is None
    assert (found.lora.rank, found.lora.targets) == (8, ("all-linear",))
    assert found.train == Train()
    assert found.output.folder == folder / "run"


def test_what_the_example_says(tmp_path):
    folder = shutil.copytree(ROOT / "examples", tmp_path / "examples")
    (folder / "tiny").mkdir(exist_ok=True)
    found = read_config(folder / "tiny.toml")
    assert (found.lora.alpha, found.train.learning_rate) == (16.0, 1e-2)
    examples = read_examples(found.data.train)
    assert len(examples) == 16 and {x.text is None for x in examples} == {True, False}


BAD = {
    "a key of no such name": (
        GOOD + "[train]\nlearnig_rate = 1e-3\n",
        r"line 10: \[train\] has no key `learnig_rate`; `learning_rate` is meant\?",
    ),
    "a key of no name at all like it": (
        GOOD + "[lora]\nx = 1\n",
        r"line 10: \[lora\] has no key `x`; there are rank, alpha, targets, dropout",
    ),
    "a table of no such name": (
        GOOD + "[trian]\nsteps = 1\n",
        r"line 9: there is no table trian; `train` is meant\?",
    ),
    "a key of no table": ("x = 1\n" + GOOD, "line 1: there is no table x"),
    "a value of no table": (
        "train = 3\n" + GOOD,
        r"line 1: `train` has to be a table, \[train\]",
    ),
    "nothing": ("", r"at the end: \[model\] needs `path`"),
    "no path": (
        GOOD.replace('path = "model"', ""),
        r"line 1: \[model\] needs `path`",
    ),
    "a text for a number": (
        GOOD + '[lora]\nrank = "8"\n',
        r"line 10: `rank` of \[lora\] has to be an integer of at least 1, and is '8'",
    ),
    "a fraction for an integer": (
        GOOD + "[lora]\nrank = 8.0\n",
        "has to be an integer of at least 1, and is 8.0",
    ),
    "true for an integer": (GOOD + "[lora]\nrank = true\n", "and is True"),
    "too small": (GOOD + "[lora]\nrank = 0\n", "of at least 1, and is 0"),
    "what is no end of a line": (
        GOOD + "# \u2028 \x85\n[lora]\nrank = 0\n",
        "line 11: `rank` of",
    ),
    "no float": (
        GOOD + f"[lora]\nalpha = {10**400}\n",
        "`alpha` of .* has to be a number above 0, and is 1000",
    ),
    "no integer at all": (
        GOOD + f"[lora]\nalpha = 1{5000 * '0'}\n",
        "is no TOML: Exceeds the limit",
    ),
    "too large": (GOOD + f"[lora]\nrank = {2**63}\n", "of at least 1, and is 92"),
    "none above zero": (
        GOOD + "[train]\nlearning_rate = -1\n",
        "line 10: `learning_rate` of .* has to be a number above 0, and is -1",
    ),
    "not a number": (
        GOOD + "[train]\nweight_decay = nan\n",
        "has to be a number of at least 0, and is nan",
    ),
    "none of the names": (
        GOOD + '[train]\nschedule = "sine"\n',
        "has to be one of 'cosine', 'linear', 'constant', and is 'sine'",
    ),
    "a list of something else": (
        GOOD + "[lora]\ntargets = [\n  1,\n  2,\n]\n",
        r"line 10: `targets` .* has to be a list of names, and is \[1, 2\]",
    ),
    "an empty list": (GOOD + "[lora]\ntargets = []\n", "a list of names, and is"),
    "an empty path": (
        GOOD.replace('"model"', '""'),
        "line 2: `path` .* has to be a path, and is ''",
    ),
    "no such folder": (
        GOOD.replace('"model"', '"other"'),
        r"line 2: there is no folder .*other, and it is no \*.gguf",
    ),
    "no such file": (
        GOOD.replace('"model"', '"other.gguf"'),
        r"line 2: there is no file .*other\.gguf",
    ),
    "no such data": (
        GOOD.replace("train.jsonl", "t.jsonl"),
        r"line 5: there is no file .*t\.jsonl",
    ),
    "no such tokenizer": (
        GOOD.replace("[data]", 'tokenizer = "x"\n[data]'),
        "line 4: there is nothing at .*x",
    ),
    "quantised twice": (
        GOOD.replace('"model"', '"model.gguf"\nquantise = "nf4"'),
        "line 3: a GGUF file is quantised as it is; leave `quantise` out",
    ),
    "both lengths": (
        GOOD + "[train]\nsteps = 3\nepochs = 2\n",
        "line 11: give `steps` or `epochs`, and not both",
    ),
    "neither true nor false": (
        GOOD + "[lora]\nuse_dora = 1\n",
        "line 10: `use_dora` of .* has to be true or false, and is 1",
    ),
    "all of it dropped": (
        GOOD + "[lora]\ndropout = 1\n",
        "line 10: `dropout` has to be below 1: 1.0",
    ),
    "what is of LoRA": (
        GOOD + '[lora]\nupdate = "loha"\nuse_dora = true\ndropout = 0.1\n',
        "line 11: DoRA is of LoRA, and `update` is 'loha'\n  - line 12: PEFT has it of",
    ),
    "what VeRA has not": (
        GOOD + '[lora]\nupdate = "vera"\nalpha = 2\n',
        "line 11: `update` is 'vera', which has no alpha; leave it out",
    ),
    "a long warm-up": (
        GOOD + "[train]\nsteps = 3\nwarmup = 3\n",
        "line 11: `warmup` has to be less than the 3 steps, and is 3",
    ),
    "no TOML": (GOOD + "steps 3\n", r"is no TOML: .* \(at line 9, column 7\)"),
    "a key twice": (GOOD + 'folder = "x"\n', r"is no TOML: .* \(at line 9"),
    "too many lines": (GOOD + 2000 * "\n", "it has more than 64,000 bytes or 1,000"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_with_a_configuration_is_named(case, folder, capsys):
    text, message = BAD[case]
    path = written(folder, text)
    before = listing(folder)
    with pytest.raises(AdapterError, match=message) as e:
        read_config(path)
    assert str(e.value).startswith(str(path))
    # And so it is on the command line, at once.
    assert main(["finetune", str(path)]) == 2
    assert capsys.readouterr().err == f"lora_quax: error: {e.value}\n"
    assert listing(folder) == before


def test_what_editors_and_shells_are_used_to(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    path = written(folder, "\ufeff" + GOOD.replace('"run"', '"~/run"'))
    assert read_config(path).output.folder == folder / "run"
    (folder / "train.jsonl").write_text('\ufeff{"text": "abc"}\r\n')
    assert [x.text for x in read_examples(folder / "train.jsonl")] == ["abc"]


def test_all_that_is_wrong_is_named_in_order(folder):
    text = GOOD + "[train]\nbatch = 0\n[lora]\nrank = 0\nalpha = 0\n[x]\n"
    with pytest.raises(AdapterError, match="cannot be used") as e:
        read_config(written(folder, text))
    lines = str(e.value).splitlines()
    assert [x.split(":")[0] for x in lines[1:]] == [
        f"  - line {n}" for n in (10, 12, 13, 14)
    ]


def test_a_file_that_is_none(folder):
    with pytest.raises(FileNotFoundError, match="no file .* to read a configuration"):
        read_config(folder / "x.toml")
    (folder / "config.toml").write_bytes(b"[model]\n\xff")
    with pytest.raises(AdapterError, match="line 2 is not UTF-8"):
        read_config(folder / "config.toml")


@pytest.mark.parametrize("package", ["optax", "eqx_zoo", "jinja2.sandbox"])
def test_a_package_that_is_not_there_is_named(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package.split(".")[0], None)
    monkeypatch.delitem(sys.modules, "jinja2.sandbox", raising=False)
    with pytest.raises(ImportError, match=r"install 'lora_quax\[finetune\]'"):
        needs(package)


def test_the_page_has_every_key():
    text = (ROOT / "docs" / "guide" / "finetune.md").read_text()
    rows = [x.split(" | ") for x in text.splitlines() if x.startswith("| `")]
    shown = {row[0][3:-1]: row[1] for row in rows}
    for table in dataclasses.fields(Config):
        kind = typing.get_type_hints(Config)[table.name]
        for field in dataclasses.fields(kind):
            said = shown.pop(f"{table.name}.{field.name}")
            if said.startswith("`"):
                value = tomllib.loads(f"x = {said[1:-1]}")["x"]
                default = field.default
                assert value == (list(default) if type(default) is tuple else default)
            else:
                assert field.default in (None, dataclasses.MISSING)
    assert not shown


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


# Steps.


@pytest.mark.parametrize("name, last", [("cosine", 0), ("linear", 0), ("constant", 1)])
def test_schedule(name, last):
    pytest.importorskip("optax")
    rate = schedule(Train(learning_rate=1.0, warmup=3, schedule=name), 13)
    found = [float(rate(i)) for i in range(14)]
    np.testing.assert_allclose(found[:4], [0.25, 0.5, 0.75, 1], rtol=1e-6)
    assert found[3:] == sorted(found[3:], reverse=True)
    np.testing.assert_allclose(found[-1], last, atol=1e-6)


def nonzero(model):
    """A model of which no factor is zero."""
    trains, rest = lora_quax.partition(model)
    return eqx.combine(jax.tree.map(lambda x: x + 0.1, trains), rest)


def trained(folder, base=None, **fields) -> Run:
    """A run of steps in memory, by the loop that the command has."""
    out = Run(config(folder, **fields), sets(), base or stand())
    while out.state.step < out.steps:
        out.state, *_ = out.step()
    return out


def test_the_loss_falls(tmp_path):
    out = Run(config(tmp_path, steps=30, learning_rate=0.03), sets(), stand())
    before = out.valid()
    while out.state.step < out.steps:
        out.state, loss, n = out.step()
        assert np.isfinite(loss) and n > 0
    after = out.valid()
    assert after < 0.5 * before
    # What is frozen is as it was.
    assert eqx.tree_equal(lora_quax.unload(out.state.model), stand().model)


def test_a_sum_of_batches_is_the_larger_batch(tmp_path):
    """The mean is over tokens, and not over batches of more and of fewer."""
    one = trained(tmp_path, batch=8).state
    for rows, n in ((4, 2), (1, 8)):
        other = trained(tmp_path, batch=rows, accumulate=n).state
        for x, y in zip(jax.tree.leaves(one.model), jax.tree.leaves(other.model)):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_what_fills_up_has_no_part(tmp_path):
    """A row beside others is what it is alone, and rows one by one are rows at once."""
    out = Run(config(tmp_path), sets(), stand())
    examples = out.sets.train.examples[:3]
    apart = [batches([x], 1, 64)[0] for x in examples]
    together = batches(examples, 4, 64)
    steppers = [Stepper(None), Stepper(None, Loss(one_by_one=True))]
    losses = [
        stepper.loss(out.state.model, parts)
        for stepper, parts in itertools.product(steppers, (apart, together))
    ]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-6)
    # By the book.
    logits = jax.vmap(stand().model)(
        jnp.stack([jnp.asarray(x.ids[:5]) for x in examples])
    )
    p = jax.nn.log_softmax(logits[0])
    expected = -np.mean(
        [p[i, j, x.ids[j + 1]] for i, x in enumerate(examples) for j in range(4)]
    )
    cut = [Tokens(x.ids[:5], x.learnt[:5]) for x in examples]
    found = steppers[0].loss(out.state.model, batches(cut, 3, 64))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("most", [1, 32 * 50])
def test_a_loss_in_parts_is_the_loss(most, tmp_path):
    """However many tokens a part has; gradients as well."""
    model = Run(config(tmp_path), sets(), stand()).state.model
    model = nonzero(model)
    (batch,) = batches(texts(3).examples, 3, 64)

    def of(loss):
        f = lora_quax.filter_value_and_grad(loss)
        return jax.jit(f)(model, batch)

    expected, found = of(Loss()), of(Loss(most_scores=most))
    for x, y in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(y, x, rtol=1e-5, atol=1e-5)


def test_what_is_dropped_is_of_the_seed_and_the_step(tmp_path):
    lora = Lora(rank=4, targets=("up", "lm_head"), dropout=0.5)
    settings = dataclasses.replace(config(tmp_path), lora=lora)
    out = Run(settings, sets(), stand())
    out.state = out.state._replace(model=nonzero(out.state.model))
    parts = batches(out.sets.train.examples[:4], 2, 64)
    loss = lambda step, parts=parts: out.stepper.step(
        out.state._replace(step=step), parts
    )[1]
    assert loss(0) == loss(0) and len({loss(0), loss(1), loss(2)}) == 3
    # A batch of a step drops otherwise than the next one, and no evaluation does.
    assert loss(0, [parts[0]] * 2) != loss(0, [parts[0]])
    assert out.stepper.loss(out.state.model, parts) == Stepper(None).loss(
        out.state.model, parts
    )


UPDATES = {
    "loha": dict(update="loha"),
    "vera": dict(update="vera"),
    "dora": dict(use_dora=True, use_rslora=True, dropout=0.1, alpha=8.0),
}


@pytest.mark.parametrize("name", UPDATES)
def test_other_updates(name, tmp_path):
    """They are resumed, and written as PEFT has them."""
    pytest.importorskip("optax")
    lora = Lora(rank=4, targets=("up", "lm_head"), **UPDATES[name])
    settings = config(tmp_path, steps=3, warmup=0)
    settings = dataclasses.replace(settings, lora=lora)
    train(settings, sets(), stand(), resume=False)
    folder = tmp_path / "run"
    ours = folder / "checkpoints" / "step-00000003"
    (batch,) = batches(texts(3).examples, 3, 64)
    losses = [
        Stepper(None).loss(model, [batch])
        for model in (
            peft.load(folder / "adapter", stand().model),
            lora_quax.load_adapter(ours / "adapter.safetensors", stand().model),
        )
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)
    if settings.lora.dropout:  # What is dropped is the same again.
        before = listing(folder)
        shutil.rmtree(ours)
        train(settings, sets(), stand(), resume=True)
        assert listing(folder) == before


# Runs on disk.


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing stopped."""
    pytest.importorskip("optax")
    folder = tmp_path_factory.mktemp("whole")
    train(config(folder), sets(), stand(), resume=False)
    return folder / "run"


def test_what_a_run_leaves(whole):
    names = {x.relative_to(whole).as_posix() for x in whole.rglob("*")}
    files = ("adapter.safetensors", "optimiser.safetensors", "run.json")
    steps = [f"checkpoints/step-{n:08}" for n in (8, 9)]
    assert names == {
        "log.jsonl",
        "adapter",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "checkpoints",
        *steps,
        *(f"{step}/{file}" for step in steps for file in files),
    }
    log = [json.loads(x) for x in (whole / "log.jsonl").read_text().splitlines()]
    assert [x["step"] for x in log if "loss" in x] == [*range(1, 10)]
    assert [x["step"] for x in log if "valid_loss" in x] == [0, 4, 8, 9]


def test_the_adapter_is_that_of_peft(whole):
    ours = whole / "checkpoints" / "step-00000009" / "adapter.safetensors"
    model = lora_quax.load_adapter(ours, stand().model)
    assert bits(peft.load(whole / "adapter", stand().model)) == bits(model)


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_resumed_it_is_the_same_bit_for_bit(moment, whole, tmp_path):
    program = [sys.executable, str(ROOT / "tests" / "finetuned.py"), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*program, moment], env=environment, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    train(config(tmp_path), sets(), stand(), resume=True)
    assert contents(tmp_path / "run") == contents(whole)


def test_an_interrupt_leaves_a_checkpoint(whole, tmp_path, monkeypatch, capsys):
    before, calls = Stepper.step, 0

    def step(*args):
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt("in step 6")
        return before(*args)

    monkeypatch.setattr(Stepper, "step", step)
    with pytest.raises(KeyboardInterrupt, match="in step 6"):
        train(config(tmp_path), sets(), stand(), resume=False)
    said = capsys.readouterr().err
    assert "stopped after step 5; `--resume` goes on" in said and "\r" not in said
    folder = tmp_path / "run" / "checkpoints"
    assert [x.name for x in folder.iterdir()].count("step-00000005") == 1
    train(config(tmp_path), sets(), stand(), resume=True)
    assert "goes on after step 5" in capsys.readouterr().err
    found = peft.load(tmp_path / "run" / "adapter", stand().model)
    assert bits(found) == bits(peft.load(whole / "adapter", stand().model))
    assert (tmp_path / "run" / "log.jsonl").read_text() == (
        whole / "log.jsonl"
    ).read_text()


def other_base():
    return stand()._replace(model=jax.tree.map(lambda x: x + 1, stand().model))


def other_data():
    return sets()._replace(train=texts(22, seed=5))


DIFFERENT = {
    "a key": (
        dict(learning_rate=0.5),
        sets,
        stand,
        "learning_rate was 0.01, and is 0.5",
    ),
    "steps": (dict(steps=10), sets, stand, "steps was 9, and is 10"),
    "data": ({}, other_data, stand, "digest of data.train was '"),
    "base": ({}, sets, other_base, "was trained on another base"),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_a_checkpoint_of_another_run_is_refused(case, whole):
    fields, data, base, message = DIFFERENT[case]
    before = listing(whole)
    with pytest.raises(AdapterError, match=message):
        train(config(whole.parent, **fields), data(), base(), resume=True)
    assert listing(whole) == before


@pytest.mark.parametrize("said", [{}, {"FORCE_COLOR": "1"}, {"TERM": "dumb"}])
def test_a_log_has_lines_and_no_frames(said, monkeypatch, capsys):
    for key, value in said.items():
        monkeypatch.setenv(key, value)
    with report(40) as out:
        for step in range(1, 41):
            out.step(step, 2.0, 8)
        out.valid(40, 3.0)
    lines = capsys.readouterr().err.splitlines(keepends=True)
    assert len(lines) == 21 and not any("\r" in x or "\x1b" in x for x in lines)
    assert lines[0].startswith("step 2/40  loss 2.0000  ")
    assert lines[-1] == "step 40/40  valid loss 3.0000\n"


def test_a_damaged_checkpoint_is_named(whole, tmp_path):
    train(config(tmp_path, steps=2, warmup=0), sets(), stand(), resume=False)
    file = tmp_path / "run/checkpoints/step-00000002/optimiser.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(AdapterError, match="optimiser.safetensors is truncated"):
        train(config(tmp_path, steps=2, warmup=0), sets(), stand(), resume=True)
    (file.parent / "run.json").write_text("[")
    with pytest.raises(AdapterError, match="run.json is not JSON"):
        train(config(tmp_path, steps=2, warmup=0), sets(), stand(), resume=True)


def test_a_full_disk_loses_no_checkpoint(whole, tmp_path, monkeypatch):
    before, calls = checkpoint.write_tensors, iter(range(9))

    def full(*args):
        if next(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return before(*args)

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    message = "after step 6 cannot be written: .*No space.*`--resume` goes on"
    with pytest.raises(OSError, match=message):
        train(config(tmp_path), sets(), stand(), resume=False)
    steps = [x.name for x in sorted((tmp_path / "run" / "checkpoints").iterdir())]
    assert steps == ["step-00000002", "step-00000004"]
    train(config(tmp_path), sets(), stand(), resume=True)
    assert contents(tmp_path / "run") == contents(whole)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    before = Stepper.step
    nan = lambda self, state, parts: (before(self, state, parts)[0], float("nan"))
    monkeypatch.setattr(Stepper, "step", nan)
    with pytest.raises(ValueError, match="loss of step 1 is nan.* `learning_rate`"):
        train(config(tmp_path), sets(), stand(), resume=False)
    assert not (tmp_path / "run" / "adapter").exists()


def test_an_interrupt_of_an_evaluation_loses_none(whole, tmp_path, monkeypatch):
    """Each is in the log once, whenever it was stopped."""
    before = Stepper.loss
    for n in (1, 2, 3):  # Of those after steps 0, 4, 8 and 9 the next two.
        calls = iter(range(1, 9))

        def loss(*args):
            if next(calls) == (1 if n == 1 else 2):
                raise KeyboardInterrupt("in an evaluation")
            return before(*args)

        monkeypatch.setattr(Stepper, "loss", loss)
        with pytest.raises(KeyboardInterrupt, match="in an evaluation"):
            train(config(tmp_path), sets(), stand(), resume=True)
    monkeypatch.setattr(Stepper, "loss", before)
    train(config(tmp_path), sets(), stand(), resume=True)
    log = (tmp_path / "run" / "log.jsonl").read_text()
    assert log == (whole / "log.jsonl").read_text()


def test_more_rows_than_examples(tmp_path):
    """They are no rows that are filled up, and accumulate what there is."""
    one = Run(config(tmp_path, batch=2**40, accumulate=2**20), sets(), stand())
    other = Run(config(tmp_path, batch=22), sets(), stand())
    assert one.order.steps_per_epoch == 1
    assert one.valid() == other.valid()
    assert bits(one.step()[0]) == bits(other.step()[0])


def test_two_runs_do_not_share_a_folder(whole, folder, capsys):
    for run in (whole, folder / "run"):
        text = GOOD.replace('"run"', json.dumps(str(run)))
        before = listing(run) if run.exists() else None
        with held(run / "checkpoints") as mine:
            assert mine
            assert main(["finetune", str(written(folder, text)), "--resume"]) == 2
        assert "Another process trains in" in capsys.readouterr().err
        assert (listing(run) if run.exists() else None) == before


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_run_that_ends_at_once_leaves_nothing(moment, folder, monkeypatch):
    """And what a killed one has left is no run."""
    left = folder / "run" / "checkpoints"
    if moment == "after":
        left.mkdir(parents=True)
    monkeypatch.setattr(runs, "needs", lambda name: 1 / 0)
    before = listing(folder)
    with pytest.raises(ZeroDivisionError, match="division"):
        runs.finetune(written(folder, GOOD), resume=False)
    assert [x for x in listing(folder) if "config.toml" not in str(x)] == [*before]
    (folder / "run" / "mine").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="is not empty"):
        runs.finetune(written(folder, GOOD), resume=False)


def test_a_run_is_not_written_over(whole, folder, capsys):
    text = GOOD.replace('"run"', json.dumps(str(whole)))
    assert main(["finetune", str(written(folder, text))]) == 2
    assert "has a run in it. Go on with it by `--resume`" in capsys.readouterr().err
    (folder / "run").mkdir()
    (folder / "run" / "mine").touch()
    assert main(["finetune", str(written(folder, GOOD))]) == 2
    assert "is not empty, and is left alone" in capsys.readouterr().err


def test_a_warm_up_as_long_as_the_epochs(tmp_path):
    fields = dict(steps=None, epochs=1, warmup=6)
    with pytest.raises(ValueError, match="less than the 6 steps, and is 6"):
        runs.Run(config(tmp_path, **fields), sets(), stand())
