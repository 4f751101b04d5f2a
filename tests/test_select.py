"""Which arrays `targets` means."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import paramax
import pytest
import quax
from jax.core import ShapedArray
from jaxtyping import PyTree

from lora_quax import FullArray, LoraArray
from lora_quax._model.paths import walk
from lora_quax._model.select import select
from lora_quax._model.targets import Adapt, read_targets


class Attention(eqx.Module):
    q_proj: eqx.nn.Linear
    v_proj: eqx.nn.Linear

    def __init__(self, key):
        q_key, v_key = jr.split(key)
        self.q_proj = eqx.nn.Linear(4, 4, key=q_key)
        self.v_proj = eqx.nn.Linear(4, 4, key=v_key)


class Block(eqx.Module):
    attn: Attention
    norm: eqx.nn.LayerNorm
    experts: jax.Array
    table: jax.Array  # of integers

    def __init__(self, key):
        self.attn = Attention(key)
        self.norm = eqx.nn.LayerNorm(4)
        self.experts = jr.normal(key, (3, 4, 5))
        self.table = jnp.arange(4)


class Model(eqx.Module):
    embed: eqx.nn.Embedding
    blocks: list[Block]
    conv: eqx.nn.Conv2d
    up: eqx.nn.ConvTranspose1d
    cells: dict[str, eqx.nn.LSTMCell]
    head: eqx.nn.Linear

    def __init__(self, key):
        self.embed = eqx.nn.Embedding(7, 4, key=key)
        self.blocks = [Block(key), Block(key)]
        self.conv = eqx.nn.Conv2d(2, 3, 3, key=key)
        self.up = eqx.nn.ConvTranspose1d(2, 3, 3, key=key)
        self.cells = {"lstm": eqx.nn.LSTMCell(4, 4, key=key)}
        self.head = eqx.nn.Linear(4, 5, key=key)


MODEL = Model(jr.key(0))
QV = {f"blocks.{i}.attn.{n}.weight" for i in range(2) for n in ("q_proj", "v_proj")}
DEFAULT = QV | {"conv.weight", "up.weight", "head.weight"}
EXPERTS = {"blocks.0.experts", "blocks.1.experts"}
LSTM = {"cells.lstm.weight_ih", "cells.lstm.weight_hh"}
Q = {path for path in QV if "q_proj" in path}


def chosen(targets, model: PyTree = MODEL):
    """The specs of what trains, by path."""
    return {
        leaf.path: choice.spec
        for leaf, choice in select(model, targets)
        if choice is not None and choice.spec != "freeze"
    }


@pytest.mark.parametrize(
    "targets, paths",
    [
        (None, DEFAULT),
        (eqx.nn.Linear, QV | {"head.weight"}),
        (eqx.nn.Conv, {"conv.weight"}),
        (eqx.nn.ConvTranspose, {"up.weight"}),
        ([eqx.nn.Conv2d, eqx.nn.Embedding], {"conv.weight", "embed.weight"}),
        (eqx.nn.LSTMCell, LSTM),
        (Attention, QV),
        (Block, QV | EXPERTS),
        ("q_proj", Q),
        ("attn.q_proj", Q),
        ("q_proj.weight", Q),
        ("blocks.1.attn.q_proj", {"blocks.1.attn.q_proj.weight"}),
        (["q_proj", "v_proj"], QV),
        (("q_proj", "v_proj"), QV),
        ({"q_proj", "v_proj"}, QV),
        ("experts", EXPERTS),
        ("weight_ih", {"cells.lstm.weight_ih"}),
        ("embed", {"embed.weight"}),
        (r"blocks\.0\..*", {p for p in QV | EXPERTS if ".0." in p}),
        (re.compile("head"), {"head.weight"}),
        (r".*proj", QV),
        (r".*", DEFAULT | EXPERTS | LSTM | {"embed.weight"}),
        (lambda path, x: path.startswith("head") and x.ndim == 2, {"head.weight"}),
        (lambda path, x: 4 if "exp" in path else None, EXPERTS),
        ([eqx.nn.Linear, (r"blocks\..*", "freeze")], {"head.weight"}),
        ([eqx.nn.Linear, (Block, False)], {"head.weight"}),
        ({eqx.nn.Linear: True, "attn": None}, {"head.weight"}),
        (
            [eqx.nn.Linear, lambda path, x: "freeze" if "attn" in path else None],
            {"head.weight"},
        ),
    ],
)
def test_which(targets, paths):
    assert set(chosen(targets)) == paths


def test_spec_per_weight():
    init = jax.nn.initializers.normal(1.0)
    own = Adapt(rank=2, alpha=3.0, init_a=init)
    specs = chosen({eqx.nn.Linear: 8, "q_proj": own, "head": "full", "v_proj": True})
    assert specs["blocks.0.attn.q_proj.weight"] == own
    assert specs["blocks.1.attn.v_proj.weight"] == Adapt()
    assert specs["head.weight"] == specs["head.bias"] == "full"
    # The later of two decides, in either order.
    assert chosen([("head", "full"), eqx.nn.Linear])["head.weight"] == Adapt()


def test_biases_and_vectors_train_in_full():
    vectors = lambda path, x: "full" if x.ndim < 2 else None
    by_name = chosen([eqx.nn.Linear, ("bias", "full")])
    assert by_name["head.bias"] == by_name["blocks.0.norm.bias"] == "full"
    by_function = chosen([eqx.nn.Linear, vectors])
    assert by_function["blocks.0.norm.weight"] == by_function["head.bias"] == "full"
    assert by_function["head.weight"] == Adapt()


def test_a_name_ends_at_a_segment():
    with pytest.raises(ValueError, match=r"'proj' of `targets` matched nothing"):
        select(MODEL, "proj")
    with pytest.raises(ValueError, match=r"matched nothing"):
        select(MODEL, "ttn.q_proj")


def test_stacked_biases_and_norms_are_left_alone():
    keys = jr.split(jr.key(0), 3)
    stacked = eqx.filter_vmap(Block)(keys)
    assert set(chosen(r".*", stacked)) == {
        "attn.q_proj.weight",
        "attn.v_proj.weight",
        "experts",
    }
    cells = eqx.filter_vmap(lambda key: eqx.nn.GRUCell(2, 2, key=key))(keys)
    assert set(chosen(eqx.nn.GRUCell, cells)) == {"weight_ih", "weight_hh"}


def test_axes():
    axes = {leaf.path: leaf.axes for leaf in walk(MODEL)}
    assert axes["head.weight"] == axes["embed.weight"] == (1, 1)
    assert axes["conv.weight"] == (1, 3)
    assert axes["up.weight"] == (1, 2)
    assert axes["blocks.0.experts"] == (1, 1)


def test_wrappers_are_looked_into():
    def wrap(weight):
        return paramax.Parameterize(jnp.where, weight > 0, weight, 0.0)

    mlp = eqx.nn.MLP(4, 4, 4, 1, key=jr.key(0))
    mlp = eqx.tree_at(lambda m: m.layers[0].weight, mlp, replace_fn=wrap)
    mlp = eqx.tree_at(
        lambda m: m.layers[1].weight, mlp, replace_fn=paramax.WeightNormalization
    )
    paths = {"layers.0.weight.args.1", "layers.1.weight.weight"}
    assert set(chosen(None, mlp)) == paths
    assert set(chosen(["layers.0", "layers.1.weight"], mlp)) == paths
    assert set(chosen(r"layers\.\d", mlp)) == paths


def test_shared_layers_are_met_once():
    embed = eqx.nn.Embedding(7, 4, key=jr.key(0))
    head = eqx.nn.Linear(4, 7, key=jr.key(1))
    where, get = lambda p: p[1].weight, lambda p: p[0].weight
    shared = eqx.nn.Shared((embed, head), where, get)
    assert set(chosen(eqx.nn.Embedding, shared)) == {"pytree.0.weight"}
    with pytest.raises(ValueError, match="Linear of `targets` matched nothing"):
        select(shared, eqx.nn.Linear)


class Int8(quax.ArrayValue):
    """A quantised array, in little."""

    q: jax.Array

    def aval(self):
        return ShapedArray(self.q.shape, jnp.float32)

    def materialise(self):
        return self.q.astype(jnp.float32)


def test_a_quantised_weight_is_an_array():
    weight = Int8(jnp.ones((4, 4), jnp.int8))
    linear = eqx.nn.Linear(4, 4, key=jr.key(0))
    linear = eqx.tree_at(lambda m: m.weight, linear, weight)
    assert set(chosen(None, linear)) == {"weight"}


@pytest.mark.parametrize(
    "targets, error, match",
    [
        ("k_proj", ValueError, r"'k_proj' .* matched nothing.*Near.*attn\.q_proj"),
        (["q_proj", "k_proj"], ValueError, "'k_proj' of `targets` matched nothing"),
        (["q_proj", r"x.*"], ValueError, "'x.*' of `targets` matched nothing"),
        ([eqx.nn.Linear, eqx.nn.Conv3d], ValueError, "Conv3d .* matched nothing"),
        ({"head": "freeze"}, ValueError, "leaves nothing to train"),
        (lambda path, x: None, ValueError, "leaves nothing to train"),
        ([], ValueError, "`targets` is empty"),
        ("", ValueError, "empty string"),
        ("(", ValueError, r"'\(' is not a regular expression"),
        ("bias", ValueError, r"`blocks.0.attn.q_proj.bias`, .*'bias'.*shape \(4,\)"),
        (r".*bias", ValueError, "only vectors.*'full'"),
        (lambda path, x: True, ValueError, "blocks.0.attn.q_proj.bias.*is a bias"),
        ("table", TypeError, r"`blocks.0.table`.*not a floating-point.*int32\[4\]"),
        ({"table": "full"}, TypeError, r"`blocks.0.table`.*not a floating-point"),
        (r".*table", ValueError, r"no floating-point array.*int32\[4\]"),
        (MODEL.head, TypeError, "(?s)got a layer itself: Linear.*`Linear` means all"),
        ({"q_proj", ("head", "full")}, TypeError, "Pairs .* stand inside a list"),
        ([5], TypeError, "A target must be a layer type.*got 5"),
        (["q_proj", ("head", "fulll")], TypeError, "spec of 'head'.*'fulll'"),
        ([("q_proj", 4, 5)], TypeError, r"a pair \(target, spec\)"),
        ([(lambda path, x: True, 4)], TypeError, "says the spec itself"),
        (lambda path, x: "al", TypeError, "spec of `embed.weight`.*'al'"),
        ({"q_proj": 0}, ValueError, "`rank` must be a positive integer, got 0"),
        ({"experts": Adapt(rows=2, cols=2)}, ValueError, "needs at least 4 axes"),
        (["q_proj", ("norm.weight", 2)], ValueError, "at least 2 axes.*'full'"),
        ("conv.bias", ValueError, "it is a bias.*'full'"),
    ],
)
def test_errors(targets, error, match):
    with pytest.raises(error, match=match):
        select(MODEL, targets)


@pytest.mark.parametrize(
    "fields, error, match",
    [
        (dict(rank=-1), ValueError, "`rank` must be a positive integer"),
        (dict(rank=True), ValueError, "`rank` must be a positive integer"),
        (dict(alpha=float("nan")), ValueError, "`alpha` must be finite"),
        (dict(scale=True), TypeError, "scale"),
        (
            dict(dtype=jnp.int32),
            TypeError,
            "`dtype` must be a floating-point type",
        ),
        (dict(dtype="bf16"), TypeError, "`dtype` must be .* 'bfloat16', got 'bf16'"),
        (
            dict(dtype=jnp.float8_e4m3fn),
            TypeError,
            "`dtype`, of the factors, must be of 16 bits or more, got float8_e4m3fn",
        ),
        (dict(rows=0), ValueError, "`rows` must be at least 1"),
        (dict(cols=True), TypeError, "`cols` must be an integer"),
        (dict(scale=0.1, init_a=jax.nn.initializers.zeros), ValueError, "not both"),
    ],
)
def test_bad_specs(fields, error, match):
    with pytest.raises(error, match=match):
        Adapt(**fields)


@pytest.mark.parametrize("adapted", ["lora", "full"])
def test_adapted_already(adapted):
    weight = MODEL.head.weight
    if adapted == "lora":
        weight = LoraArray(weight, rank=2, key=jr.key(0))
    else:
        weight = FullArray(weight)
    model = eqx.tree_at(lambda m: m.head.weight, MODEL, weight)
    for targets in (
        None,
        eqx.nn.Linear,
        "head",
        r".*",
        lambda p, x: p == "head.weight",
    ):
        with pytest.raises(ValueError, match="`head.weight`.*already adapted"):
            select(model, targets)
    # What is around it may be adapted, and it may be named to be left alone.
    assert set(chosen("q_proj", model)) == Q
    assert "head.weight" not in chosen([eqx.nn.Linear, ("head", "freeze")], model)


def test_missing_leaves():
    model = eqx.tree_at(lambda m: m.head.weight, MODEL, None)
    for targets in (None, "head", "head.weight"):
        with pytest.raises(ValueError, match="`head.weight`.*is missing"):
            select(model, targets)
    assert set(chosen("q_proj", model)) == Q


def test_entries_keep_their_order():
    shown = [entry.shown for entry in read_targets(["b", ("a", 2), eqx.nn.Linear])]
    assert shown == ["'b'", "'a'", "Linear"]


@pytest.mark.parametrize("targets", ["blocks", ["head", "blocks"], "attn"])
def test_a_module_that_holds_others(targets):
    """It is none that could be adapted itself; what would mean its inside is said."""
    with pytest.raises(ValueError, match="a module that holds others") as caught:
        select(MODEL, targets)
    inside = str(caught.value).split()[-1]
    found = [leaf.path for leaf, choice in select(MODEL, inside) if choice is not None]
    name = targets if isinstance(targets, str) else targets[-1]
    assert found and all(name in path.split(".") for path in found)
