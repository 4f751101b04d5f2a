"""Files of version 0.1.0, with the first version of the format."""

from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
import safetensors.numpy
from adapters import named_leaves, refused, rewritten
from files import bits

from lora_quax import (
    AdapterError,
    FullArray,
    load_adapter,
    LoraArray,
    LowRankArray,
    save_adapter,
    unload,
)


OLD = Path(__file__).parent / "data" / "adapter-0.1.0.safetensors"


def _of_old(key):
    """The model that the file is an adapter of."""
    keys = jr.split(key, 8)
    stacked = jr.split(keys[3], 2)
    return {
        "linear": eqx.nn.Linear(3, 5, key=keys[0]),
        "conv": eqx.nn.Conv2d(2, 4, 3, key=keys[1]),
        "embedding": eqx.nn.Embedding(7, 3, key=keys[2]),
        "stacked": eqx.filter_vmap(lambda k: eqx.nn.Linear(3, 3, key=k))(stacked),
        "half": eqx.nn.Linear(4, 2, dtype=jnp.bfloat16, key=keys[4]),
        "nested": eqx.nn.Linear(4, 3, key=keys[5]),
        "free": eqx.nn.Linear(3, 2, key=keys[6]),
        "alone": jnp.zeros((4, 3)),
    }


def test_a_file_of_version_0_1_0(tmp_path):
    base = _of_old(jr.key(0))
    model = load_adapter(OLD, base)
    tensors = safetensors.numpy.load_file(OLD)

    # The numbers.
    leaves = named_leaves(model)
    assert bits({name: leaves[name] for name in tensors}) == bits(tensors)
    unloaded = eqx.tree_at(lambda m: m["free"].weight, base, leaves["free.weight.base"])
    model_alone, base_alone = dict(model), dict(unloaded)
    alone = model_alone.pop("alone")
    del base_alone["alone"]
    assert bits(unload(model_alone)) == bits(base_alone)

    # All else.
    low_rank = {
        "linear": (2, 3.0, 1, 1),
        "conv": (1, 3.0, 1, 3),
        "embedding": (2, 3.0, 1, 1),
        "stacked": (2, 3.0, 1, 1),
        "half": (2, 3.0, 1, 1),
        "nested": (2, 4.0, 1, 1),
        "free": (1, 1.0, 1, 1),
    }
    facts = lambda x: (x.rank, x.alpha, x.rows, x.cols)
    for name, wanted in low_rank.items():
        weight = model[name].weight
        assert type(weight) is LoraArray and facts(weight.delta) == wanted
        assert weight.stop_gradient == (name != "free")
        assert weight.allow_materialise == (name == "free")
    assert facts(model["nested"].weight.base.delta) == (1, 3.0, 1, 1)
    assert type(alone) is LowRankArray and facts(alone) == (2, 5.0, 1, 1)
    assert type(model["linear"].bias) is FullArray

    # Saved again, it is of the new version, and the same.
    save_adapter(tmp_path / "new", model)
    again = load_adapter(tmp_path / "new", base)
    assert jax.tree.structure(again) == jax.tree.structure(model)
    assert bits(again) == bits(model)


def test_an_old_sum_may_be_formed_although_its_update_may_not(tmp_path):
    """Each had a flag of its own; what was asked was that of the sum."""
    path = tmp_path / "old"
    path.write_bytes(OLD.read_bytes())
    change = lambda _, about: about["weights"]["linear.weight"].update(
        allow_materialise=True
    )
    rewritten(path, change)
    model = load_adapter(path, _of_old(jr.key(0)))
    assert model["linear"].weight.allow_materialise
    assert not model["conv"].weight.allow_materialise


def _old_weight(change):
    return lambda _, about: change(about["weights"]["linear.weight"])


# What is done to the description of a linear layer, and what is said of it.
OLD_DESCRIPTIONS = {
    "no rank": (_old_weight(lambda w: w["delta"].pop("rank")), "it has no 'rank'"),
    "no layer": (_old_weight(lambda w: w.pop("layer")), "it has no 'layer'"),
    "no update": (_old_weight(lambda w: w.pop("delta")), "it has no 'delta'"),
    "no object": (
        lambda _, about: about["weights"].update({"linear.weight": [1]}),
        r"\[1\] is no description of an array",
    ),
    "rank 0": (_old_weight(lambda w: w["delta"].update(rank=0)), "`rank` must be"),
    "rank 2.0": (_old_weight(lambda w: w["delta"].update(rank=2.0)), "is no shape"),
    "rows": (_old_weight(lambda w: w["delta"].update(rows=2)), "too few axes for 2"),
    "true rows": (
        _old_weight(lambda w: w["delta"].update(rows=True)),
        "`rows` must be",
    ),
    "shape": (
        _old_weight(lambda w: w["base"].update(shape=[9, 3])),
        r"has shape \(5, 3\); the adapter is for \[9, 3\]",
    ),
    "a number for a shape": (
        _old_weight(lambda w: w["base"].update(shape=3)),
        "3 is no shape",
    ),
    "type": (
        _old_weight(lambda w: w["delta"].update(dtype={"a": "int8", "b": "int8"})),
        "its type is 'int8'",
    ),
    "alpha": (_old_weight(lambda w: w["delta"].update(alpha=True)), "`alpha` must be"),
    "form": (
        _old_weight(lambda w: w.update(form="scaled")),
        "form 'scaled' is not known",
    ),
}


@pytest.mark.parametrize("name", OLD_DESCRIPTIONS)
def test_old_descriptions_that_make_no_sense(name, tmp_path):
    """They are listed weight by weight, with all else that is wrong."""
    change, line = OLD_DESCRIPTIONS[name]
    path, model = tmp_path / "old", _of_old(jr.key(0))
    path.write_bytes(OLD.read_bytes())

    def spoil(tensors, about):
        change(tensors, about)
        about["weights"]["conv.weight"]["stop_gradient"] = 1
        about["weights"]["elsewhere"] = about["weights"]["half.weight"]

    rewritten(path, spoil)
    lines = f"`linear.weight`: .*({line})", "`conv.weight`: .*true or false"
    with refused(*lines, "no `elsewhere`", folder=tmp_path, model=model):
        load_adapter(path, model)


@pytest.mark.parametrize("n", [10, 300, 900])
def test_old_adapters_on_adapters_without_end(n, tmp_path):
    path, model = tmp_path / "old", _of_old(jr.key(0))
    path.write_bytes(OLD.read_bytes())

    def deepen(tensors, about):
        weight = about["weights"]["linear.weight"]
        for _ in range(n):
            weight = {**weight, "base": weight}
        about["weights"]["linear.weight"] = weight

    rewritten(path, deepen)
    with pytest.raises(AdapterError, match="is missing|too many adapters|too deeply"):
        load_adapter(path, model)
