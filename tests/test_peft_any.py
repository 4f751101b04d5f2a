"""Any model comes back from PEFT's files as it was."""

import functools as ft
import re
from typing import Any, NamedTuple

import hypothesis as hp
import hypothesis.strategies as st
import jax
import pytest
from files import bits, listing
from peft_models import adapted, conv, embedding, exported, linear, stacked

from lora_quax import Adapt, load_adapter, peft, save_adapter, unload


class Layer(NamedTuple):
    """A layer, and the adapter that it gets."""

    layer: Any
    rank: int | None  # None: it is not adapted.
    alpha: float
    stack: int | None  # How many of it lie along a leading axis.


sizes = st.integers(1, 4)


kinds = st.one_of(
    st.builds(linear, sizes, sizes, st.booleans()),
    st.builds(embedding, sizes, sizes),
    st.builds(conv, st.integers(1, 3), sizes, sizes, st.integers(1, 2)),
)


layers = st.builds(
    Layer,
    kinds,
    st.none() | st.integers(1, 5),
    st.floats(-1e3, 1e3, width=32).filter(bool),
    st.none() | st.integers(1, 3),
)


# A dot parts segments, and braces stand for one.
keys = st.sampled_from(
    ["q", "q_proj", "xq", "0", "a b", "a+", "(", "[x]", "^", "$", "\\d", "β", "\n", "/"]
    + ["..".replace(".", "\u2024"), "lora_A", "base_layer", "weight", "bias", "default"]
) | st.text(
    st.characters(exclude_characters=".{}", exclude_categories=["Cs"]), min_size=1
)


trees = st.recursive(
    st.lists(layers, min_size=1, max_size=3)
    | st.dictionaries(keys, layers, min_size=1),
    lambda inner: (
        st.dictionaries(keys, inner, min_size=1, max_size=3)
        | st.lists(inner, min_size=1, max_size=2)
    ),
    max_leaves=4,
)


def _is_layer(x) -> bool:
    return isinstance(x, Layer)


def _model_of(tree, full_biases: bool):
    """The adapted model that a tree of layers describes, and the names of its parts."""
    found = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_layer)[0]
    specs, names = {}, {}
    for path, layer in found:
        name = ".".join(str(getattr(k, "key", getattr(k, "idx", None))) for k in path)
        specs[name] = layer
        if layer.stack is not None:
            names[name] = f"{name}.{{}}"
    hp.assume(any(layer.rank is not None for layer in specs.values()))

    def target(path, x):
        name, _, field = path.rpartition(".")
        layer = specs[name]
        if layer.rank is None:
            return None
        if field == "bias":
            return "full" if full_biases else None
        return Adapt(rank=layer.rank, alpha=layer.alpha)

    base = jax.tree.map(
        lambda x: x.layer if x.stack is None else stacked(x.layer, x.stack),
        tree,
        is_leaf=_is_layer,
    )
    return adapted(base, target), names


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("adapters")


@pytest.mark.slow
@hp.given(trees, st.booleans())
@hp.settings(max_examples=40, deadline=None)
def test_any_model_comes_back_as_it_was(folder, tree, full_biases):
    model, names = _model_of(tree, full_biases)
    base = unload(model)
    for save, load in [
        (ft.partial(peft.save, names=names), ft.partial(peft.load, names=names)),
        (
            lambda path, model: save_adapter(path / "adapter", model),
            lambda path, model: load_adapter(path / "adapter", model),
        ),
    ]:
        save(folder, model)
        first = listing(folder)
        got = load(folder, base)
        assert jax.tree.structure(got) == jax.tree.structure(model)
        assert bits(got) == bits(model)
        assert bits(load(folder, model)) == bits(model)
        save(folder, got)
        assert listing(folder) == first


@hp.given(trees)
@hp.settings(max_examples=10, deadline=None)
def test_patterns_mean_one_name_each(folder, tree):
    """Whatever the order of the patterns, the update of a module is its own."""
    model, names = _model_of(tree, False)
    config, tensors = exported(folder, model, names=names)
    modules = {re.sub(r"\.lora_.*", "", name, flags=re.DOTALL) for name in tensors}
    for field in "rank_pattern", "alpha_pattern":
        for pattern in config[field]:
            matches = [m for m in modules if re.match(rf"(.*\.)?({pattern})$", m)]
            assert len(matches) <= 1
