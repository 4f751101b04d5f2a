"""The table of what was adapted."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

from lora_quax import LoraArray, LowRankArray
from lora_quax._model.loraify import loraify
from lora_quax._model.repeats import group
from lora_quax._model.summary import summary
from lora_quax._model.targets import Adapt
from lora_quax._model.training import partition


def build(**options):
    model = eqx.nn.MLP(4, 5, 16, 2, key=jr.key(0))
    targets = {
        eqx.nn.Linear: True,
        "layers.2": Adapt(rank=8, alpha=4),
        "layers.0.bias": "full",
    }
    return model, loraify(model, 2, jr.key(1), targets=targets, **options)


def size(tree):
    return sum(x.size for x in jax.tree.leaves(eqx.filter(tree, eqx.is_array)))


def test_rows_and_totals():
    model, lora = build()
    table = summary(lora)
    rows = {row.path: row for row in table.rows}
    assert list(rows) == [
        "layers.0.weight",
        "layers.0.bias",
        "layers.1.weight",
        "layers.2.weight",
    ]
    assert rows["layers.0.weight"][1:] == ((16, 4), 2, 1.0, 2 * 20, 64, 4, None)
    assert rows["layers.0.bias"][1:] == ((16,), None, None, 16, 0, None, None)
    assert rows["layers.2.weight"][1:] == ((5, 16), 8, 0.5, 8 * 21, 80, 5, None)
    assert [row.rank_in_excess for row in table.rows] == [False, False, False, True]
    assert table.trainable == size(partition(lora)[0])
    assert table.frozen == size(model) - 16
    assert table.share == table.trainable / (table.trainable + table.frozen)


def test_text():
    _, lora = build()
    text = str(summary(lora))
    assert text == repr(summary(lora))
    lines = text.splitlines()
    assert lines[0].split() == "path shape rank scaling trainable frozen".split()
    assert lines[2].split() == ["layers.0.weight", "(16,", "4)", "2", "1", "40", "64"]
    assert lines[3].split() == ["layers.0.bias", "(16,)", "full", "16", "0"]
    assert "8 > 5 *" in lines[5] and "0.5" in lines[5]
    assert lines[6].split() == ["everything", "else", "0", "21"]
    assert lines[8].split()[0] == "total"
    table = summary(lora)
    assert f"{table.trainable} ({table.share:.3%})" in lines[8]
    assert "above the largest rank" in lines[9]


def test_no_footnote_without_need():
    model = eqx.nn.Linear(8, 8, key=jr.key(0))
    assert "*" not in str(summary(loraify(model, 8, jr.key(1))))
    assert "*" in str(summary(loraify(model, 9, jr.key(1))))


def test_html():
    _, lora = build()
    html = summary(lora)._repr_html_()
    assert html.startswith("<pre") and "layers.2.weight" in html


def test_nothing_is_shown_before_its_time(monkeypatch, capsys):
    """In a notebook, where rich shows whatever is printed."""
    _, lora = build()
    want = str(summary(lora)), summary(lora)._repr_html_()
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert (str(summary(lora)), summary(lora)._repr_html_()) == want
    assert capsys.readouterr() == ("", "")


def test_long_paths_are_whole():
    model, name = eqx.nn.Linear(4, 4, key=jr.key(0)), "x" * 300
    text = str(summary(loraify({name: model}, 2, jr.key(1))))
    assert f"{name}.weight" in text


def test_a_trained_base_counts_as_trainable():
    model, lora = build(stop_gradient=False)
    weights = sum(layer.weight.size for layer in model.layers)
    assert summary(lora).frozen == size(model) - weights - 16
    assert summary(lora).trainable == size(partition(lora)[0])


def test_other_arrays():
    weight = LowRankArray.init((4, 6), rank=2, key=jr.key(0))
    row = summary({"w": weight, "ids": jnp.arange(3), "f": jnp.ones(3)})
    assert row.rows[0][1:] == ((4, 6), 2, 1.0, 20, 0, 4, None)
    assert (row.trainable, row.frozen) == (20, 3)


def test_an_adapter_on_an_adapter():
    inner = LoraArray(jnp.ones((4, 6)), rank=1, key=jr.key(0))
    outer = LoraArray(inner, rank=2, key=jr.key(1))
    table = summary(outer)
    assert (table.trainable, table.frozen) == (20, 24 + 10)
    outer = LoraArray(inner, rank=2, key=jr.key(1), stop_gradient=False)
    table = summary(outer)
    assert (table.trainable, table.frozen) == (30, 24)


def test_plain_and_abstract_models():
    model, lora = build()
    assert summary(model).rows == () and summary(model).share == 0
    assert summary(None).share == 0
    abstract = summary(eqx.filter_eval_shape(lambda: lora))
    assert abstract == summary(lora)._replace(bytes=None)


def test_a_plain_model_says_that_nothing_is_adapted():
    model, lora = build()
    said = "Nothing is adapted: `loraify` returns the adapted model."
    assert str(summary(model)).splitlines()[-1].strip() == said
    assert said not in str(summary(lora))


class Block(eqx.Module):
    q: eqx.nn.Linear
    experts: list[eqx.nn.Linear]

    def __init__(self, key):
        self.q = eqx.nn.Linear(8, 8, key=key)
        self.experts = [eqx.nn.Linear(8, 4, key=key) for _ in range(3)]


def test_what_repeats_is_one_line():
    model = {"blocks": [Block(jr.key(i)) for i in range(32)], "head": Block(jr.key(0))}
    targets = {eqx.nn.Linear: True, "blocks.7.q": 4, "blocks.9.experts.1": "freeze"}
    lora = loraify(model, 2, jr.key(1), targets=targets)
    table = summary(lora)
    lines = str(table).splitlines()
    paths = [line.split()[0] for line in lines[2:-3]]
    assert paths == [
        "blocks.{0..6,8..31}.q.weight",
        "blocks.{0..8,10..31}.experts.{0..2}.weight",
        "blocks.7.q.weight",
        "blocks.9.experts.{0,2}.weight",
        "head.q.weight",
        "head.experts.{0..2}.weight",
    ]
    assert lines[2].split() == [paths[0], "(8,", "8)", "2", "1", "992", "1,984"]
    counts = [line.replace(",", "").split()[-2:] for line in lines[2:-2]]
    columns = [sum(map(int, column)) for column in zip(*counts)]
    assert columns == [table.trainable, table.frozen]

    every = summary(lora, grouped=False)
    assert every.rows == table.rows and len(every.rows) == 33 * 4 - 1
    assert len(str(every).splitlines()) == len(every.rows) + 5


def test_grouping():
    paths = "a.0.b a.1.b a.3.b 0 1 a.2.b.0 a.2.b.1 a.5.b.1 a.00.b x.y x.y".split()
    assert [g.path for g in group((path, None) for path in paths)] == [
        "a.{0,1,3}.b",
        "{0,1}",
        "a.2.b.{0,1}",
        "a.5.b.1",
        "a.00.b",
        "x.y",
    ]
    assert group([("a.0", 1), ("a.1", 2)]) == [("a.0", (0,)), ("a.1", (1,))]


def test_batches():
    keys = jr.split(jr.key(0), 3)
    model = eqx.filter_vmap(lambda k: eqx.nn.Linear(4, 6, key=k))(keys)
    (row,) = summary(loraify(model, 5, jr.key(1))).rows
    assert row.max_rank == 4 and row.rank_in_excess and row.trainable == 3 * 5 * 10


def test_missing_leaves():
    _, lora = build()
    with pytest.raises(ValueError, match="`layers.0.weight` has None for its `base`"):
        summary(partition(lora)[0])
