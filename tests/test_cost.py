"""What things cost, counted rather than timed; times are in `benchmarks`."""

import dataclasses
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import pytest
import quax
from helpers import adapted, equations
from jax import lax

import lora_quax
from benchmarks._compiled import product_flops
from benchmarks._transformer import (
    factors,
    lora_products,
    loss_fn,
    make,
    Size,
    Transformer,
)


SIZE = Size(layers=1, width=32, batch=2, tokens=16, rank=4)


def nbytes(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def training_step(size: Size, loss):
    model, ours, data = make(size, jr.key(0))
    params, frozen = lora_quax.partition(ours)

    def step(params, x, y):
        return jax.grad(lambda p: loss(eqx.combine(p, frozen), x, y))(params)

    return step, params, data


# Compiled work.

# One at a time: each is a factor of the cost of a product.
SIZES = {
    "as it is": {},
    "layers": dict(layers=2),
    "width": dict(width=64),
    "tokens": dict(tokens=64),
    "one token": dict(batch=1, tokens=1),
    "rank 1": dict(rank=1),
    "rank as wide": dict(rank=32),
}
NESTINGS = {
    "quaxify(vmap(f))": quax.quaxify(loss_fn),
    "vmap(quaxify(f))": lambda model, x, y: loss_fn(quax.quaxify(model), x, y),
}


@pytest.mark.parametrize("nesting", NESTINGS)
@pytest.mark.parametrize("size", SIZES)
def test_products_of_a_step_are_those_on_paper(size, nesting):
    size = dataclasses.replace(SIZE, **SIZES[size])
    step, params, data = training_step(size, NESTINGS[nesting])
    compiled = product_flops(jax.jit(step).lower(params, *data).compile())
    paper = lora_products(size)
    assert compiled <= 1.01 * paper
    if min(size.rank, size.tokens) > 1:  # Those with a vector are compiled as sums.
        assert compiled >= 0.99 * paper


def test_gradients_and_optimiser_are_of_the_factors():
    step, params, data = training_step(SIZE, quax.quaxify(loss_fn))
    size = 4 * factors(SIZE)
    assert nbytes(params) == size
    assert nbytes(jax.eval_shape(step, params, *data)) == size
    counter = 4
    assert nbytes(optax.adam(1e-3).init(params)) == 2 * size + counter


def test_merged_is_the_plain_program():
    model, ours, (x, _) = make(SIZE, jr.key(0))
    merged = lora_quax.merge(ours)

    def program(model):
        arrays, static = eqx.partition(model, eqx.is_array)
        f = lambda arrays, x: jax.vmap(eqx.combine(arrays, static))(x)
        return jax.jit(f).lower(arrays, x).as_text()

    assert program(merged) == program(model)


def test_scanned_layers_make_programs_of_one_length():
    def length(depth):
        make_layer = lambda key: eqx.nn.Linear(4, 4, key=key)
        stacked = eqx.filter_vmap(make_layer)(jr.split(jr.key(0), depth))
        params, frozen = lora_quax.partition(adapted(stacked))

        def loss(model, x):
            dynamic, static = eqx.partition(model, eqx.is_array)
            body = lambda x, layer: (eqx.combine(layer, static)(x), None)
            return jnp.sum(lax.scan(body, x, dynamic)[0] ** 2)

        f = lambda params, x: quax.quaxify(loss)(eqx.combine(params, frozen), x)
        grad = jax.make_jaxpr(jax.grad(f))(params, jnp.ones(4))
        return len(list(equations(grad)))

    assert length(3) == length(30)


# Tracing.


def test_like_products_are_lowered_once():
    """Of like layers one has its rule traced, differentiated and lowered."""

    def loss(model, x):
        for layer in model:
            x = jnp.tanh(layer(x))
        return x.sum()

    def functions(depth):
        keys = jr.split(jr.key(0), depth)
        model = adapted([eqx.nn.Linear(4, 4, key=key) for key in keys])
        params, frozen = lora_quax.partition(model)
        f = lambda p, x: quax.quaxify(loss)(eqx.combine(p, frozen), x)
        text = jax.jit(jax.grad(f)).lower(params, jnp.ones(4)).as_text()
        return len(re.findall(r"func\.func private @_dot_general", text))

    # The first layer's input has no cotangent: it is a kind of its own.
    assert functions(9) == functions(3) <= 6


# loraify.


def test_gpt3_has_the_parameters_of_the_paper():
    """Hu et al., arXiv 2106.09685, table 4: 37.7 million for r = 8 on q and v."""
    size = Size(layers=96, width=12288, heads=96)
    model = eqx.filter_eval_shape(Transformer, size, jr.key(0))
    assert sum(x.size for x in jax.tree.leaves(eqx.filter(model, is_struct))) > 173e9
    model = lora_quax.loraify(model, 8, jr.key(1), targets=["q", "v"])
    params = jax.tree.leaves(lora_quax.partition(model)[0])
    assert all(map(is_struct, params))
    assert round(sum(x.size for x in params) / 1e6, 1) == 37.7


def is_struct(x) -> bool:
    return isinstance(x, jax.ShapeDtypeStruct)
