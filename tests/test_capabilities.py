"""What the libraries before this one can do: each capability in a few lines of ours.

It is called as its own library calls it. Under these names `docs/coming-from.md` says
in words what is run here, and where one of these libraries is installed, its own
arguments are compared with the names.
"""

import functools as ft
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
import quax
from helpers import drawn, equations, normal
from jax.sharding import NamedSharding, PartitionSpec as P

import lora_quax
from lora_quax import Adapt, FullArray, LoraArray, LoraBranch, loraify


# The capabilities: by library and by name, what is run.
CAPABILITIES: dict[tuple[str, str], Callable] = {}


def can(library: str, *names: str):
    def register(function):
        CAPABILITIES.update({(library, name): function for name in names})
        return function

    return register


# A model with an embedding, attention and a head, whose factors are not zero.


class Model(eqx.Module):
    embedding: eqx.nn.Embedding
    attention: eqx.nn.MultiheadAttention
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jr.split(key, 3)
        self.embedding = eqx.nn.Embedding(10, 8, key=keys[0])
        self.attention = eqx.nn.MultiheadAttention(2, 8, key=keys[1])
        self.norm = eqx.nn.LayerNorm(8)
        self.head = eqx.nn.Linear(8, 3, key=keys[2])

    def encode(self, ids):
        x = jax.vmap(self.embedding)(ids)
        return jax.vmap(self.norm)(self.attention(x, x, x))

    def __call__(self, ids):
        return jax.vmap(self.head)(self.encode(ids))


MODEL, KEY, IDS = eqx.filter_jit(Model)(jr.key(0)), jr.key(1), jnp.arange(5)
adapt = ft.partial(loraify, MODEL, 2, KEY, init_b=normal)
# Of shapes alone, where numbers are of no account.
plan = ft.partial(loraify, eqx.filter_eval_shape(Model, KEY), 2, KEY)
run = eqx.filter_jit(lambda model: quax.quaxify(model)(IDS))
close = ft.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)


def loss(model):
    return jnp.sum(run(model) ** 2)


def adapted(model) -> dict[str, Any]:
    """What of a model is adapted, by its path."""
    is_ours = lambda x: isinstance(x, LoraArray | FullArray)
    leaves = jax.tree_util.tree_flatten_with_path(model, is_leaf=is_ours)[0]
    path = ft.partial(jax.tree_util.keystr, simple=True, separator=".")
    return {path(keys): x for keys, x in leaves if is_ours(x)}


def size(tree) -> int:
    return sum(x.size for x in jax.tree.leaves(tree) if eqx.is_inexact_array(x))


def agrees(model):
    """Unmerged it computes what it computes merged, and this is something new."""
    out = run(model)
    close(out, run(lora_quax.merge(model)))
    assert not np.allclose(out, run(MODEL), atol=1e-3)


# Which weights, and what becomes of them.


@can("lorax", "simple_spec", "decision_fn")
@can("Rapture", "make_lora_specs", "base_decision_function")
@can("Elixir", "target_node_fn")
def a_function_decides():
    def decide(path, array):
        return 3 if path.startswith("attention") and array.ndim == 2 else None

    model = adapt(targets=decide)
    assert {x.rank for x in adapted(model).values()} == {3}
    assert all(path.startswith("attention") for path in adapted(model))
    agrees(model)


@can("Rapture", "lora_fine_tune_parameters", "fully_fine_tune_parameters")
def names_decide():
    low_rank, full = ["query_proj", "value_proj"], ["head"]
    targets = [*low_rank, *((name, "full") for name in full)]
    found = adapted(plan(targets=targets))
    assert [type(x) for x in found.values()] == 2 * [LoraArray] + 2 * [FullArray]


@can("EasyDeL", "apply_lora_to_layers", "lora_pattern")
def a_pattern_decides():
    found = adapted(plan(targets=r".*attention.*(query|value)_proj"))
    assert len(found) == 2 and "attention.query_proj.weight" in found


@can("Elixir", "target_query", "target_key", "target_value")
def queries_keys_and_values():
    model = adapt(targets=["query_proj", "key_proj", "value_proj"])
    assert len(adapted(model)) == 3
    agrees(model)


@can("lorax", "tune_vectors", "LORA_FULL", "LORA_FREEZE")
@can("Rapture", "tune_vectors")
def vectors_train_in_full():
    def decide(path, array):
        if array.ndim < 2:
            return "full"
        return 2 if "attention" in path else "freeze"

    found = adapted(plan(targets=decide))
    full = [path for path, x in found.items() if isinstance(x, FullArray)]
    assert full == ["norm.weight", "norm.bias", "head.bias"] and len(found) == 7


@can("Rapture", "freeze_subtrees")
@can("Elixir", "freeze")
def a_subtree_is_frozen():
    model = plan(targets=[eqx.nn.Linear, (r"attention\..*", "freeze")])
    assert list(adapted(model)) == ["head.weight"]
    grads = eqx.filter_eval_shape(lora_quax.filter_grad(loss), model)
    assert jax.tree.leaves(grads.attention) == [] != jax.tree.leaves(grads)


@can("Rapture", "verbose")
def it_says_what_it_did():
    assert "attention.query_proj.weight" in str(lora_quax.summary(plan()))


# Rank, scaling and initial values.


@can("lorax", "init_lora", "stddev", "dtype", "alpha")
@can("Rapture", "init_lora_parameters", "lora_dim", "dtype")
@can("Elixir", "inject", "r", "alpha", "param_type")
@can("nnx", "lora_rank", "param_dtype")
@can("quax", "loraify", "rank", "scale")
def rank_scaling_and_type():
    model = loraify(MODEL, 4, KEY, alpha=2, scale=0.5, dtype=jnp.bfloat16)
    w = model.attention.query_proj.weight
    assert (w.rank, w.scaling, w.a.dtype) == (4, 0.5, jnp.bfloat16)
    assert 0.3 < w.a.std() < 0.7 and not w.b.any()


@can("nnx", "a_initializer", "b_initializer")
def initialisers():
    """They are given what nnx gives them: (in, rank) and (rank, out)."""
    shapes = []

    def init(key, shape, dtype):
        shapes.append(tuple(shape))
        return jax.nn.initializers.he_uniform()(key, shape, dtype)

    targets = {"head": Adapt(init_a=init, init_b=init)}
    agrees(loraify(MODEL, 2, KEY, targets=targets))
    assert shapes == [(8, 2), (2, 3)]


@can("nnx", "dtype", "promote_dtype", "lora_dtype", "lora_promote_dtype")
def products_in_another_type():
    """The factors train in float32, and the products with them are of bfloat16."""
    params, frozen = lora_quax.partition(adapt(targets="head"))
    half = ft.partial(jax.tree.map, lambda x: x.astype(jnp.bfloat16))
    x = drawn((4, 8), 1, jnp.bfloat16)

    def forward(params):
        head = eqx.combine(half(params), half(eqx.filter(frozen, eqx.is_array))).head
        return jax.vmap(quax.quaxify(head))(x)

    dots = [
        eqn.outvars[0].aval.dtype
        for eqn in equations(jax.make_jaxpr(forward)(params))
        if eqn.primitive.name in ("dot_general", "thin_dot_general")
    ]
    assert len(dots) == 3 and set(dots) == {jnp.dtype(jnp.bfloat16)}
    grads = jax.eval_shape(jax.grad(lambda p: forward(p).sum()), params)
    assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}


@can("nnx", "a_metadata", "b_metadata")
def factors_have_shardings():
    mesh = jax.make_mesh((jax.device_count(),), ("d",))
    rows = NamedSharding(mesh, P("d"))
    model = adapt(targets="query_proj")
    put = lambda label, x: jax.device_put(x, rows) if label == "b" else x
    model = jax.tree.map(put, lora_quax.labels(model), model)
    assert model.attention.query_proj.weight.b.sharding == rows


# Dropout.


@can("Elixir", "dropout", "dropout_seed")
def dropout_by_a_seed():
    model = adapt(dropout=0.5)
    with_key = eqx.filter_jit(lora_quax.with_dropout_key)
    first, again, other = (run(with_key(model, jr.key(seed))) for seed in (0, 0, 1))
    close(first, again, rtol=0, atol=0)
    assert not np.allclose(first, other, atol=1e-3)
    agrees(model)  # Without a key nothing is dropped.


# Beside a module, or by itself.


@can("nnx", "base_module", "in_features", "out_features")
def beside_any_module():
    opaque = lambda x: jnp.sort(x)[:3]
    branch = LoraBranch(opaque, 8, 3, rank=2, key=KEY, init_b=normal)
    x, w = drawn((8,), 1), branch.weight
    close(eqx.filter_jit(branch)(x), np.sort(x)[:3] + np.asarray(w.b) @ (w.a @ x))


@can("nnx", "LoRA", "rngs")
def by_itself():
    layer = LoraBranch(None, 8, 3, rank=2, key=KEY, init_b=normal)
    x = drawn((5, 8), 1)
    close(layer(x), x @ layer.weight.a.T @ layer.weight.b.T)


@can("nnx", "LoRALinear")
@can("EasyDeL", "eLoRA")
def a_layer_keeps_its_type_and_its_arguments():
    head = adapt().head
    assert type(head) is eqx.nn.Linear
    close(quax.quaxify(head)(jnp.ones(8), key=KEY), lora_quax.merge(head)(jnp.ones(8)))


# What a program does to weights.


@can("lorax", "lora")
@can("quax", "LoraArray", "allow_materialise", "stop_gradient", "key")
def a_function_of_weights():
    w = LoraArray(MODEL.head.weight, rank=2, key=KEY, init_b=normal)
    free = LoraArray(w.base, rank=2, key=KEY, stop_gradient=False)
    lenient = LoraArray(w.base, rank=2, key=KEY, allow_materialise=True)
    run = quax.quaxify(lambda w: jnp.sum(w @ jnp.ones(8)))
    assert not jax.grad(run)(w).base.any() and jax.grad(run)(free).base.any()
    close(quax.quaxify(lambda w: jnp.sin(w))(lenient), jnp.sin(w.base))
    with pytest.raises(lora_quax.MaterialiseError, match="sin"):
        quax.quaxify(lambda w: jnp.sin(w))(w)


@can("lorax", "gather", "transpose", "convert_element_type")
@can("EasyDeL", "native_forward")
def lookups_casts_and_a_tied_head():
    def tied(w, ids):
        x = w[ids].astype(jnp.float32)
        return x @ w.astype(jnp.float32).T

    w = LoraArray(MODEL.embedding.weight, rank=2, key=KEY, init_b=normal)
    close(quax.quaxify(tied)(w, IDS), tied(lora_quax.merge(w), IDS))


# Training.


@can("lorax", "wrap_optimizer", "scalar_frozen_grads")
@can("Rapture", "wrap_tx", "freeze_keys")
def an_optimiser_of_the_whole_model():
    """What is frozen has neither state nor updates, though the optimiser has it."""
    adam = optax.adamw(1e-2)
    each: Any = {"a": adam, "b": adam, "full": adam, "frozen": optax.set_to_zero()}
    optim = optax.multi_transform(each, lora_quax.labels)
    model = adapt(targets={eqx.nn.Linear: True, "bias": "full"})

    @eqx.filter_jit
    def step(model):
        params = eqx.filter(model, eqx.is_inexact_array)
        state = optim.init(params)
        updates, state = optim.update(eqx.filter_grad(loss)(model), state, params)
        return eqx.apply_updates(model, updates), state

    after, state = step(model)
    trained, frozen = lora_quax.partition(model)
    assert size(state) == 2 * size(trained)  # Two moments.
    assert eqx.tree_equal(lora_quax.partition(after)[1], frozen)
    assert not eqx.tree_equal(after, model)


@can("Rapture", "apply_lora", "lora_opt_state", "lora_parameters")
def model_and_state_of_the_optimiser():
    def apply_lora(model, optim):
        model = loraify(model, 2, KEY)
        return model, optim.init(lora_quax.partition(model)[0])

    model, state = eqx.filter_jit(apply_lora)(MODEL, optax.adam(1e-2))
    assert size(state) == 2 * size(lora_quax.partition(model)[0])


@can("nnx", "lora_param_type")
@can("EasyDeL", "lora_is_enabled")
def what_trains_is_told_apart():
    spec = lora_quax.trainable(plan(targets="head"))
    assert spec.head.weight.a and not spec.head.weight.base
    assert any(jax.tree.leaves(spec))
    assert not any(jax.tree.leaves(lora_quax.trainable(MODEL)))


@can("lorax", "split_lora_params")
@can("Rapture", "get_lora_parameters")
@can("EasyDeL", "split_lora_params", "merge_lora_params")
def the_part_that_trains():
    model = adapt(targets={eqx.nn.Linear: True, "bias": "full"})
    params, frozen = lora_quax.partition(model)
    w = params.attention.query_proj.weight
    assert w.base is None and w.a.shape == (2, 8) and params.norm.weight is None
    assert eqx.tree_equal(eqx.combine(params, frozen), model)


# Out of it again.


@can("lorax", "merge_params", "destructive")
@can("Rapture", "merge_parameters", "destructive")
@can("EasyDeL", "unwrap_lora_to_layers")
@can("quax", "materialise")
def merged_in_place():
    own = jax.tree.map(lambda x: x.copy() if eqx.is_array(x) else x, MODEL)
    model = loraify(own, 2, KEY, init_b=normal)
    expected = lora_quax.merge(model)
    merged = lora_quax.merge(model, donate=True)
    assert eqx.tree_equal(merged, expected)
    assert own.head.weight.is_deleted() and not merged.head.weight.is_deleted()


# Dictionaries of Flax parameters, whose kernels are (*window, in, out).


def of_flax(path, array):
    if "embedding" in path:
        return True
    if "kernel" not in path:
        return None
    if "attention" in path:  # (in, heads, size), and (heads, size, out) at the end.
        return Adapt(rows=2, cols=1) if "out" in path else Adapt(rows=1, cols=2)
    return Adapt(rows=array.ndim - 1, cols=1)


def like_its_merged(transform, apply, params):
    """A function of the factors that train, and that with dense kernels."""
    model = loraify(params, 2, KEY, targets=of_flax, init_b=normal)
    train, rest = lora_quax.partition(model)
    whole = lambda train: eqx.combine(train, rest)
    factored = lambda train: quax.quaxify(apply)(whole(train))
    dense = lambda train: apply(lora_quax.merge(whole(train)))
    outs = [jax.jit(transform(f))(train) for f in (factored, dense)]
    for x, y in zip(*map(jax.tree.leaves, outs), strict=True):
        close(x, y, rtol=1e-3, atol=1e-3)


@can("lorax", "conv_general_dilated")
@can("Rapture", "lora_module", "func_target")
@can("flax", "init", "apply")
def parameters_of_linen():
    nn: Any = pytest.importorskip("flax.linen")

    class Net(nn.Module):
        def setup(self):
            self.embed = nn.Embed(10, 6)
            self.conv = nn.Conv(8, (3,))
            self.attention = nn.MultiHeadDotProductAttention(2)
            self.dense = nn.Dense(4)

        def encode(self, ids):
            return self.attention(self.conv(self.embed(ids)))

        def __call__(self, ids):
            return self.dense(self.encode(ids))

    net = Net()
    params = jax.jit(net.init)(KEY, IDS)
    model = loraify(params, 2, KEY, targets=of_flax)["params"]
    assert model["conv"]["kernel"].b.shape == (3, 6, 2)
    assert model["attention"]["query"]["kernel"].a.shape == (2, 2, 4)
    like_its_merged(lambda f: f, lambda params: net.apply(params, IDS), params)
    encode = lambda params: net.apply(params, IDS, method="encode")
    encoded = jax.jit(quax.quaxify(encode))({"params": model})
    close(encoded, jax.jit(encode)(params))  # A fresh update changes nothing.


@can("nnx", "split", "to_pure_dict")
def parameters_of_nnx():
    nnx: Any = pytest.importorskip("flax.nnx")
    rngs = nnx.Rngs(0)
    net = nnx.Sequential(
        nnx.Embed(10, 6, rngs=rngs),
        nnx.Conv(6, 8, (3,), rngs=rngs),
        nnx.Linear(8, 4, rngs=rngs),
    )
    graph, state = nnx.split(net)
    apply = lambda params: nnx.merge(graph, params)(IDS[None])
    both = lambda f: jax.value_and_grad(lambda train: jnp.sum(f(train) ** 2))
    like_its_merged(both, apply, nnx.to_pure_dict(state))


@pytest.mark.parametrize(
    "function", dict.fromkeys(CAPABILITIES.values()), ids=lambda f: f.__name__
)
def test_capability(function):
    function()


# The names.

SECTIONS = {
    "quax": "## quax.examples.lora",
    "nnx": "## flax nnx",
    "flax": "## Dictionaries of Flax parameters",
    "lorax": "## Lorax",
    "Rapture": "## EasyDeL and its Rapture",
    "EasyDeL": "## EasyDeL and its Rapture",
    "Elixir": "## Lorax of Elixir",
}


@pytest.mark.parametrize("library", SECTIONS)
def test_the_documentation_says_so(library):
    page = Path(__file__).parents[1] / "docs" / "coming-from.md"
    [section] = re.findall(
        rf"^{re.escape(SECTIONS[library])}\n(.*?)(?=^## |\Z)",
        page.read_text(),
        re.M | re.S,
    )
    theirs = " ".join(re.findall(r"^\| (.*?) \| ", section, re.M))
    words = set(re.findall(r"\w+", " ".join(re.findall("`(.*?)`", theirs))))
    names = {name for of, name in CAPABILITIES if of == library}
    assert names - words == set()


@pytest.mark.parametrize(
    "library, module, functions",
    [
        ("quax", "quax.examples.lora", ["LoraArray", "loraify"]),
        ("nnx", "flax.nnx", ["LoRA", "LoRALinear"]),
    ],
)
def test_no_argument_of_theirs_is_left_out(library, module, functions):
    theirs = pytest.importorskip(module)
    names = {name for of, name in CAPABILITIES if of == library}
    for function in functions:
        parameters = set(inspect.signature(getattr(theirs, function)).parameters)
        left_out = parameters - {"self", "args", "kwargs", "weight", "model", *names}
        assert left_out == set()
