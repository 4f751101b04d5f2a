"""Weights that are in several places: which are, and what of them leaves and enters."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import safetensors.numpy
from files import bits, listing
from helpers import adapted

from lora_quax import AdapterError, peft
from lora_quax._model.ties import ties_of


EMBED = {"ends.pytree.embed": "embed_tokens", "ends.pytree.head": "lm_head"}


def shared(where=lambda x: x["head"].weight, get=lambda x: x["embed"].weight):
    ends = {"embed": eqx.nn.Embedding(7, 4, key=jr.key(0)), "head": linear()}
    return {"ends": eqx.nn.Shared(ends, where, get), "q": linear(4)}


def linear(out=7):
    return eqx.nn.Linear(4, out, use_bias=False, key=jr.key(1))


def pair(n: int):
    return [eqx.nn.Linear(3, 3, key=jr.key(i)) for i in range(n)]


ENDS = "weight", "bias"
TIES = {
    "a weight": (
        shared(),
        {"ends.pytree.head.weight": "ends.pytree.embed.weight"},
    ),
    "a layer": (
        {"a": eqx.nn.Shared(pair(2), lambda x: x[1], lambda x: x[0])},
        {f"a.pytree.1.{end}": f"a.pytree.0.{end}" for end in ("weight", "bias")},
    ),
    "several": (
        eqx.nn.Shared(
            pair(3), lambda x: [x[1].bias, x[2].bias], lambda x: [x[0].bias] * 2
        ),
        {f"pytree.{i}.bias": "pytree.0.bias" for i in (1, 2)},
    ),
    "one in another": (
        eqx.nn.Shared(
            [eqx.nn.Shared(pair(2), lambda x: x[1], lambda x: x[0]), *pair(2)],
            lambda x: x[2].bias,
            lambda x: x[1].bias,
        ),
        {"pytree.2.bias": "pytree.1.bias"}
        | {
            f"pytree.0.pytree.1.{x}": f"pytree.0.pytree.0.{x}"
            for x in ("weight", "bias")
        },
    ),
    "none": (pair(2), {}),
}


@pytest.mark.parametrize("case", TIES.values(), ids=TIES)
def test_what_is_tied_is_seen(case):
    model, ties = case
    assert ties_of(model) == ties
    assert ties_of(eqx.filter_eval_shape(lambda: model)) == ties
    assert ties_of(adapted(model, targets={eqx.nn.Linear: True})) == ties


def test_what_is_made_of_an_array_is_not_tied_to_it():
    get = lambda x: jnp.flip(x["embed"].weight)
    model = adapted(shared(get=get), targets={"q": True})
    with pytest.raises(ValueError, match="`ends.pytree` is of an `equinox.nn.Sh"):
        peft.save("nowhere", model)


def exported(folder, model, names=EMBED, **kwargs):
    peft.save(folder, model, names=names, **kwargs)
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    start = "base_model.model."
    return config, {key.removeprefix(start): x for key, x in tensors.items()}


@pytest.mark.parametrize("tying", [None, True, False])
def test_a_tied_embedding(tmp_path, tying):
    model = adapted(shared(), targets={"embed": 2, "q": 3})
    config, tensors = exported(tmp_path, model, ensure_weight_tying=tying)
    assert config.get("ensure_weight_tying", False) is (tying is not False)
    assert set(config["target_modules"]) == {"embed_tokens", "lm_head", "q"}
    turned = {"lora_embedding_A": "lora_B", "lora_embedding_B": "lora_A"}
    for one, other in turned.items():
        x, y = tensors[f"embed_tokens.{one}"], tensors[f"lm_head.{other}.weight"]
        assert np.array_equal(x, y.T)
    assert bits(peft.load(tmp_path, shared(), names=EMBED)) == bits(model)


@pytest.mark.parametrize("tying", [None, False])
def test_a_tied_embedding_trained_in_full(tmp_path, tying):
    model = adapted(shared(), targets={"embed": "full", "q": 3})
    config, tensors = exported(tmp_path, model, ensure_weight_tying=tying)
    assert config["modules_to_save"] == ["embed_tokens", "lm_head"]
    assert np.array_equal(tensors["embed_tokens.weight"], tensors["lm_head.weight"])
    assert bits(peft.load(tmp_path, shared(), names=EMBED)) == bits(model)


def test_a_head_whose_embedding_is_tied_to_it(tmp_path):
    where, get = lambda x: x["embed"].weight, lambda x: x["head"].weight
    model = adapted(shared(where, get), targets={"head": 2, "q": 3})
    _, tensors = exported(tmp_path, model)
    x, y = tensors["embed_tokens.lora_embedding_A"], tensors["lm_head.lora_B.weight"]
    assert np.array_equal(x, y.T)
    got = peft.load(tmp_path, shared(where, get), names=EMBED)
    assert bits(got) == bits(model)


def one_array():
    head = linear()
    embed = eqx.nn.Embedding(weight=head.weight)
    return {"embed_tokens": embed, "lm_head": head, "q": linear(4)}


def plain():
    return {"embed_tokens": eqx.nn.Embedding(7, 4, key=jr.key(0)), "q": linear(4)}


REFUSED = {
    "one array in two places": (
        lambda: adapted(one_array(), targets={"embed_tokens": 2}),
        {},
        "`embed_tokens.weight` and `lm_head.weight` are one array",
    ),
    "one array in two places, said to be tied": (
        lambda: adapted(one_array(), targets={"embed_tokens": 2}),
        {"ensure_weight_tying": True},
        "are one array",
    ),
    "a head of its own": (
        lambda: adapted(plain() | {"lm_head": linear()}, targets={"embed_tokens": 2}),
        {"ensure_weight_tying": True},
        "`lm_head.weight` is an array of its own",
    ),
    "no embedding adapted": (
        lambda: adapted(plain(), targets={"q": 2}),
        {"ensure_weight_tying": True},
        "with one embedding that is adapted; this one has 0",
    ),
    "no name that PEFT knows": (
        lambda: adapted(shared(), targets={"embed": 2}),
        {},
        "PEFT ties an adapter where one of the modules is called",
    ),
    "two linear layers": (
        lambda: adapted(
            {"lm_head": eqx.nn.Shared(pair(2), lambda x: x[1], lambda x: x[0])},
            targets={"0.weight": 2},
        ),
        {"names": {"lm_head.pytree.0": "a.lm_head", "lm_head.pytree.1": "b.lm_head"}},
        "PEFT ties an embedding and a linear layer, and no others",
    ),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_peft_would_compute_otherwise_is_not_written(tmp_path, case):
    make, kwargs, message = case
    with pytest.raises(ValueError, match=message):
        peft.save(tmp_path, make(), **kwargs)
    assert not listing(tmp_path)


@pytest.mark.parametrize(
    "model,tying",
    [
        (one_array, False),
        (one_array, None),
        (plain, None),
        (plain, False),
        (plain, True),
    ],
)
def test_what_is_written_without_ties(tmp_path, model, tying):
    targets = {"q": 3} if (model, tying) == (one_array, None) else {"embed_tokens": 2}
    config, tensors = exported(
        tmp_path, adapted(model(), targets=targets), None, ensure_weight_tying=tying
    )
    assert config.get("ensure_weight_tying", False) is bool(tying)
    assert any("lm_head" in name for name in tensors) is bool(tying)


def _edit(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _without_head(folder, change=lambda key, x: None):
    path = folder / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    tensors = {
        key: x if "lm_head" not in key else change(key, x) for key, x in tensors.items()
    }
    safetensors.numpy.save_file(
        {k: x for k, x in tensors.items() if x is not None}, path
    )


UNREADABLE = {
    "the embedding alone": (
        lambda folder: (
            _without_head(folder),
            _edit(folder, ensure_weight_tying=False),
        ),
        shared,
        "which the adapter leaves as it is",
    ),
    "two updates": (
        lambda folder: _without_head(folder, lambda key, x: 2 * x),
        shared,
        "has another update for each",
    ),
    "two ranks": (
        lambda folder: _edit(folder, alpha_pattern={"lm_head": 77}),
        shared,
        "are tied, and differ in rank or alpha",
    ),
    "a head of its own": (
        _without_head,
        lambda: plain() | {"lm_head": linear()},
        "PEFT would give it the adapter of the embedding",
    ),
}


@pytest.mark.parametrize("case", UNREADABLE.values(), ids=UNREADABLE)
def test_what_the_model_cannot_have_is_not_read(tmp_path, case):
    change, model, message = case
    peft.save(tmp_path, adapted(shared(), targets={"embed": 2}), names=EMBED)
    change(tmp_path)
    names = EMBED if "ends" in model() else None
    with pytest.raises(AdapterError, match=message):
        peft.load(tmp_path, model(), names=names)


def test_two_values_for_one_array(tmp_path):
    model = adapted(shared(), targets={"embed": "full", "q": 2})
    peft.save(tmp_path, model, names=EMBED)
    _without_head(tmp_path, lambda key, x: 2 * x)
    with pytest.raises(AdapterError, match="has another value for each"):
        peft.load(tmp_path, shared(), names=EMBED)


def test_a_program_that_uses_the_embedding_as_its_head(tmp_path):
    model = adapted(plain(), targets={"embed_tokens": 2})
    peft.save(tmp_path, model, ensure_weight_tying=True)
    assert bits(peft.load(tmp_path, plain())) == bits(model)
    _without_head(tmp_path)
    assert bits(peft.load(tmp_path, plain())) == bits(model)
    assert jax.tree.structure(peft.load(tmp_path, plain())) == jax.tree.structure(model)
