"""What is asked for by a word: "attention", "mlp", `bias`, `use_rslora`."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

import lora_quax
from lora_quax import Adapt, FullArray, loraify
from lora_quax._arrays.base import is_adapted
from lora_quax._model.paths import dotted


def adapted(model, kind: type = lora_quax.LoraArray):
    """The weights of a kind, by path."""
    leaves = jax.tree_util.tree_flatten_with_path(model, is_leaf=is_adapted)[0]
    return {dotted(path): x for path, x in leaves if isinstance(x, kind)}


def mlp():
    return eqx.nn.MLP(4, 5, 8, 2, key=jr.key(0))


def conv():
    return eqx.nn.Conv2d(4, 6, 3, key=jr.key(0))


def linear(n: int = 4) -> eqx.nn.Linear:
    return eqx.nn.Linear(n, n, key=jr.key(0))


class Attention(eqx.Module):
    q: eqx.nn.Linear
    norm: eqx.nn.LayerNorm

    def __init__(self):
        self.q, self.norm = linear(), eqx.nn.LayerNorm(4)


class SwiGLU(eqx.Module):
    up: eqx.nn.Linear

    def __init__(self):
        self.up = linear()


class Fields(eqx.Module):
    """Said by fields, as Llama has it."""

    self_attn: SwiGLU
    mlp: SwiGLU

    def __init__(self):
        self.self_attn, self.mlp = SwiGLU(), SwiGLU()


class Positions(eqx.Module):
    """With a convolution for positions beside an MLP that is one by name."""

    position: eqx.nn.Conv1d
    attn: Attention
    mlp: SwiGLU

    def __init__(self):
        self.position = eqx.nn.Conv1d(4, 4, 3, key=jr.key(0))
        self.attn, self.mlp = Attention(), SwiGLU()


class AttentionBlock(eqx.Module):
    """Said by types; the block has a name like that of its attention."""

    mixer: Attention
    fc1: eqx.nn.Linear
    fc2: eqx.nn.Conv1d

    def __init__(self):
        self.mixer, self.fc1 = Attention(), linear()
        self.fc2 = eqx.nn.Conv1d(4, 4, 1, key=jr.key(0))


class BertAttention(eqx.Module):
    """An attention inside what is called so: the output belongs to it."""

    self: Attention
    output: eqx.nn.Linear


class BertLayer(eqx.Module):
    attention: BertAttention
    intermediate: eqx.nn.Linear

    def __init__(self):
        self.attention = BertAttention(Attention(), linear())
        self.intermediate = linear()


def multihead():
    attention = eqx.nn.MultiheadAttention(2, 4, key=jr.key(0))
    return {"attention": attention, "ff": mlp()}


_PROJECTIONS = [f"{x}_proj" for x in ("query", "key", "value", "output")]
BLOCKS = {  # name: a block, its attention, its MLP
    "fields": (Fields, ["self_attn.up"], ["mlp.up"]),
    "one by name": (Positions, ["attn.q"], ["mlp.up"]),
    "types": (AttentionBlock, ["mixer.q"], ["fc1", "fc2"]),
    "nested": (
        BertLayer,
        ["attention.self.q", "attention.output"],
        ["intermediate"],
    ),
    "equinox": (
        multihead,
        [f"attention.{x}" for x in _PROJECTIONS],
        [f"ff.layers.{i}" for i in range(3)],
    ),
}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("preset", ["attention", "mlp"])
def test_presets(name, preset):
    block, *layers = BLOCKS[name]
    embedding = eqx.nn.Embedding(8, 4, key=jr.key(0))
    model = {"embed": embedding, "blocks": [block(), block()], "head": linear()}
    found = adapted(loraify(model, 2, jr.key(1), targets=preset))
    want = layers[preset == "mlp"]
    assert set(found) == {f"blocks.{i}.{x}.weight" for i in (0, 1) for x in want}


def test_presets_with_specs():
    model = [Fields(), AttentionBlock()]
    targets = {"all-linear": True, "attention": 1, "mlp": "freeze"}
    found = adapted(loraify(model, 2, jr.key(1), targets=targets))
    assert {path: w.rank for path, w in found.items()} == {
        "0.self_attn.up.weight": 1,
        "1.mixer.q.weight": 1,
    }
    full = loraify(model, 2, jr.key(1), targets={"attention": "full"})
    assert isinstance(full[1].mixer.norm.weight, FullArray)
    assert not isinstance(full[1].fc1.weight, FullArray)


def blocks():
    return {"blocks": [Attention(), Attention()], "head": linear()}


def stack():
    make = lambda _: Attention()
    return {"blocks": eqx.filter_vmap(make)(jnp.arange(2)), "head": linear()}


MEANING_NOTHING = [
    ("attention", mlp),
    ("mlp", conv),
    ("mlp", blocks),
    ("mlp", stack),
]


@pytest.mark.parametrize("preset, model", MEANING_NOTHING)
def test_presets_that_mean_nothing(preset, model):
    match = f"'{preset}' of `targets` matched nothing. The model has the arrays"
    with pytest.raises(ValueError, match=match):
        loraify(model(), 2, jr.key(1), targets=preset)


def test_all_linear():
    model = {"conv": conv(), "mlp": mlp()}
    want = loraify(model, 2, jr.key(1), targets=eqx.nn.Linear)
    for targets in ("all-linear", ["all-linear"], {"all-linear": 2}):
        assert eqx.tree_equal(loraify(model, 2, jr.key(1), targets=targets), want)
    but = ["all-linear", ("layers.2", "freeze")]
    assert list(adapted(loraify(mlp(), 2, jr.key(1), targets=but))) == [
        "layers.0.weight",
        "layers.1.weight",
    ]
    with pytest.raises(ValueError, match="'all-linear' of `targets` matched nothing"):
        loraify(conv(), 2, jr.key(1), targets="all-linear")


class Cell(eqx.Module):
    gru: eqx.nn.GRUCell
    head: eqx.nn.Linear
    norm: eqx.nn.LayerNorm

    def __init__(self):
        self.gru = eqx.nn.GRUCell(4, 4, key=jr.key(0))
        self.head, self.norm = linear(), eqx.nn.LayerNorm(4)


def of_flax():
    """Parameters as Flax keeps them, one layer in a list."""
    dense = lambda: {"kernel": jnp.ones((4, 4)), "bias": jnp.zeros(4)}
    return {"one": dense(), "two": [dense(), dense()]}


_GRU = ["gru.bias", "gru.bias_n"]
BIASES = [
    (Cell, "none", eqx.nn.Linear, []),
    (Cell, "all", eqx.nn.Linear, [*_GRU, "head.bias", "norm.bias"]),
    (Cell, "lora_only", eqx.nn.Linear, ["head.bias"]),
    (Cell, "lora_only", "weight_ih", _GRU),
    (Cell, "all", ["all-linear", ("bias", "freeze")], ["gru.bias_n"]),
    (of_flax, "lora_only", "one.kernel", ["one.bias"]),
    (of_flax, "lora_only", "two.1.kernel", ["two.1.bias"]),
    (of_flax, "all", "one.kernel", ["one.bias", "two.0.bias", "two.1.bias"]),
]


@pytest.mark.parametrize("make, bias, targets, trained", BIASES)
def test_biases(make, bias, targets, trained):
    model = loraify(make(), 2, jr.key(1), targets=targets, bias=bias)
    assert list(adapted(model, FullArray)) == trained


def test_biases_of_another_name():
    with pytest.raises(ValueError, match="`bias` must be 'none', 'all' or 'lora_only'"):
        loraify(mlp(), 2, jr.key(1), bias="full")  # pyright: ignore


def test_rank_stabilised_scaling():
    targets = {
        eqx.nn.Linear: True,
        "layers.1": Adapt(rank=9),
        "layers.2": Adapt(use_rslora=False, update=lora_quax.LoHa),
    }
    model = loraify(mlp(), 4, jr.key(1), targets=targets, alpha=6, use_rslora=True)
    scalings = [layer.weight.delta.scaling for layer in model.layers[:2]]
    assert scalings == [6 / 2, 6 / 3]
    assert model.layers[2].weight.delta.w1.scaling == 6 / 4
    targets = {eqx.nn.Linear: True, "layers.1": Adapt(rank=9, use_rslora=True)}
    model = loraify(mlp(), 4, jr.key(1), targets=targets, alpha=6)
    assert [x.weight.delta.scaling for x in model.layers] == [6 / 4, 6 / 3, 6 / 4]
    plain = loraify(mlp(), 4, jr.key(1), alpha=6, use_rslora=True)
    as_alpha = loraify(mlp(), 4, jr.key(1), alpha=6 * 4**0.5)
    assert eqx.tree_equal(plain, as_alpha)
    ia3 = ft.partial(loraify, mlp(), None, jr.key(1), update=lora_quax.IA3)
    assert jnp.all(ia3().layers[0].weight.scale == 1)
    with pytest.raises(ValueError, match=r"layers\.0\.weight.*IA3 has not both"):
        ia3(use_rslora=True)
