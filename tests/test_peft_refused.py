"""Models that have no counterpart in PEFT are refused."""

import functools as ft
import json

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import pytest
from files import bits, Int8, listing, numbers
from peft_models import (
    abstract,
    adapted,
    array,
    embedding,
    linear,
    numbers_of,
    only,
    stacked,
)

from lora_quax import (
    Adapt,
    DoRA,
    FullArray,
    LoraArray,
    loraify,
    LowRankArray,
    partition,
    peft,
)


def by_hand(**options):
    """A weight that is adapted otherwise than `loraify` does it."""
    weight = LoraArray(jnp.ones((3, 4, 5)), rank=2, key=jr.key(0), **options)
    return {"m": {"weight": weight}}


def lone():
    layer = numbers({"q": linear(), **adapted({"v": linear()})})[0]
    low_rank = LowRankArray.init((4, 3), rank=2, key=jr.key(0))
    return eqx.tree_at(lambda m: m["q"].weight, layer, low_rank)


def twice():
    outer = LoraArray(
        LoraArray(jnp.ones((4, 3)), rank=2, key=jr.key(0)), rank=2, key=jr.key(0)
    )
    return {"m": {"weight": outer}}


def quantised():
    base = Int8(jnp.ones((4, 3), jnp.int8))
    weight = LoraArray(base, rank=2, key=jr.key(0))
    return {"m": {"weight": weight, "other": FullArray(jnp.ones(3))}}


def grouped():
    return abstract(eqx.nn.Conv1d, 4, 4, 2, groups=2)


def transposed_conv():
    return abstract(eqx.nn.ConvTranspose1d, 3, 4, 2)


class _WithState(eqx.Module):
    q: eqx.nn.Linear
    norm: eqx.nn.BatchNorm

    def __init__(self, key):
        self.q = eqx.nn.Linear(3, 4, key=key)
        self.norm = eqx.nn.BatchNorm(4, "batch", mode="ema")


def with_state():
    return eqx.nn.make_with_state(_WithState)(jr.key(0))[0]


def _tied():
    pair = {"embed_tokens": embedding(5, 4), "lm_head": linear(4, 5, False)}
    where, get = lambda m: m["lm_head"].weight, lambda m: m["embed_tokens"].weight
    return {"m": eqx.nn.Shared(pair, where, get)}


_per_column = ft.partial(DoRA, per="columns")


_in_full = lambda name: {"q": True, name: "full"}


REFUSED = {
    "a plain model": (lambda: numbers_of(linear()), "has no low-rank update"),
    "a grouped convolution": (
        lambda: adapted({"c": grouped()}),
        "`c.weight` .* convolution of 2 groups.* dense A and a grouped B",
    ),
    "a transposed convolution": (
        lambda: adapted({"c": transposed_conv()}),
        "`c.weight` .* transposed convolution, of which PEFT has no LoRA",
    ),
    "a transposed convolution in full": (
        lambda: adapted({"q": linear(), "c": transposed_conv()}, _in_full("c")),
        "`c.weight` is trained in full .* transposed convolution otherwise",
    ),
    "an adapter on an adapter": (
        twice,
        "`m.weight` .* adapter on an adapter; merge one of them first",
    ),
    "a low-rank array alone": (lone, "`q.weight` .* there is no `LoraArray`"),
    "rows that are not PEFT's": (
        lambda: by_hand(rows=2),
        "`m.weight` .* 2 axes of rows and 1 of columns; PEFT has 1 and 1",
    ),
    "columns that are not PEFT's": (
        lambda: by_hand(cols=2),
        "`m.weight` .* 1 axes of rows and 2 of columns; PEFT has 1 and 1",
    ),
    "a norm that has a state": (
        lambda: adapted(with_state(), _in_full("norm")),
        "`norm.weight` is trained in full .* running statistics",
    ),
    "an array in full that is in no module": (
        lambda: adapted({"q": linear(), "x": array(3)}, _in_full("x")),
        "`x` is trained in full .* it is no part of a module",
    ),
    "a layer alone": (
        lambda: adapted(linear()),
        "`weight` .* cannot be adapted.*`names={'': 'layer'}`",
    ),
    "stacked layers without a name for each": (
        lambda: adapted({"h": stacked(linear())}),
        r"`h.weight` .* has 3 axes, and 2 are wanted.* `names={'blocks'",
    ),
    "a module in full with an adapter in it": (
        lambda: adapted(
            {"m": {"q": linear(), "weight": array(3, 3)}}, _in_full("m.weight")
        ),
        "save the module `m` whole.* but `m.q` is adapted",
    ),
    "an expert whose name is the end of another": (
        lambda: adapted(
            {"up": array(3, 4, 5), "m": {"up": array(3, 4, 5)}}, only("up")
        ),
        "`up` cannot be exchanged",
    ),
    "a module whose name is there twice": (
        lambda: adapted({"a.b": linear(), "a": {"b": linear()}}),
        "the path `a.b.weight`",
    ),
    "a base that is no plain array": (
        lambda: in_full_beside_int8(),
        "`m.table` would have to be written whole, and is no plain array but a Int8",
    ),
    "a module and a parameter of it": (
        lambda: adapted(
            {"m": {"weight": array(4, 4), "u": array(4, 4)}}, ["m.weight", "m.u"]
        ),
        "`m.weight` is adapted, and so is another parameter of its module",
    ),
    "parameters of one shape in a dictionary": (
        lambda: adapted({"m": {"z": array(4, 4), "u": array(4, 4)}}, ["m.z", "m.u"]),
        "m.u, m.z are of one shape, and PEFT tells them apart by their order alone",
    ),
    "DoRA beside LoRA": (
        lambda: adapted(
            {"q": linear(), "v": linear()}, {"q": Adapt(use_dora=True), "v": True}
        ),
        "`q.weight` is adapted by DoRA and `v.weight` is not, which PEFT has for all",
    ),
    "DoRA of experts": (
        lambda: adapted({"m": {"up": array(3, 4, 5)}}, {"up": Adapt(use_dora=True)}),
        "`m.up` .* PEFT has no DoRA of experts",
    ),
    "DoRA of a parameter": (
        lambda: adapted({"m": {"u": array(4, 5)}}, {"m.u": Adapt(use_dora=True)}),
        "PEFT has no DoRA of `m.u`, a single parameter",
    ),
    "DoRA of columns": (
        lambda: adapted({"q": linear()}, {"q": Adapt(use_dora=_per_column)}),
        "`q.weight` .* a magnitude for each of its columns; PEFT .* its rows",
    ),
    "DoRA of what is tied": (
        lambda: adapted(_tied(), {"embed_tokens": Adapt(use_dora=True)}),
        "is adapted by DoRA: PEFT gives the embedding a magnitude for each feature",
    ),
    "what trains alone": (
        lambda: partition(adapted({"m": {"weight": array(3, 3)}}, ["m.weight"]))[0],
        "`m.weight` has None for its `base`",
    ),
}


def in_full_beside_int8():
    model = adapted({"q": linear(), "m": {"x": array(3)}}, _in_full("m.x"))
    model["m"]["table"] = Int8(jnp.ones((4, 3), jnp.int8))
    return model


@pytest.mark.parametrize("name", REFUSED)
def test_what_peft_cannot_have(name, tmp_path):
    make, match = REFUSED[name]
    with pytest.raises(ValueError, match=match):
        peft.save(tmp_path / "x", make())
    assert not listing(tmp_path)


def test_abstract_models_are_refused(tmp_path):
    with pytest.raises(TypeError, match="`q.weight` is abstract"):
        peft.save(tmp_path / "x", loraify({"q": linear()}, 2, jr.key(0)))
    assert not listing(tmp_path)


@pytest.mark.parametrize("option", [{"lora_dropout": 0.1}, {"fan_in_fan_out": True}])
def test_parameters_have_no_dropout_and_no_conv1d(option, tmp_path):
    model = adapted({"m": {"up": array(3, 4, 5)}}, ["m.up"])
    with pytest.raises(ValueError, match="`m.up`, a single parameter, with neither"):
        peft.save(tmp_path / "x", model, **option)
    assert not listing(tmp_path)


@pytest.mark.parametrize("use_dora", [False, True])
def test_the_dropout_of_updates_is_written(use_dora, tmp_path):
    layer = eqx.nn.Linear(3, 4, key=jr.key(0))
    model = loraify(layer, 2, jr.key(1), dropout=0.25, use_dora=use_dora)
    peft.save(tmp_path / "a", {"q": model})
    about = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert about["lora_dropout"] == 0.25


def test_known_layers_are_not_transposed(tmp_path):
    with pytest.raises(ValueError, match="`q.weight` is of a known layer, and not"):
        peft.save(tmp_path / "x", adapted({"q": linear()}), transposed=["q.weight"])


def test_a_model_that_is_an_array(tmp_path):
    model = LoraArray(jnp.ones((3, 4, 5)), rank=2, key=jr.key(0))
    names = {"": "m.up"}
    peft.save(tmp_path, model, names=names)
    assert bits(peft.load(tmp_path, model.base, names=names)) == bits(model)
