"""Forms of update that `loraify` is asked for: `update=`, here and in an `Adapt`."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import quax
from helpers import assert_close, dense

import lora_quax
from lora_quax import (
    AbstractDelta,
    Adapt,
    IA3,
    LoHa,
    LoKr,
    LoraArray,
    loraify,
    LowRankArray,
    role,
    Rows,
    VeRA,
)
from lora_quax._arrays.base import replace


class LastRow(AbstractDelta):
    """A form of a user's own: nothing but the last row trains."""

    above: int = eqx.field(static=True)
    row: jax.Array = role("row")

    @classmethod
    def init(cls, shape, *, dtype, start=0.0):
        *_, rows, cols = shape
        row = jnp.full((*shape[:-2], cols), start, dtype)
        return cls(rows - 1, row)

    def lower(self):
        a = self.row[..., None, :]
        b = jnp.zeros((*self.row.shape[:-1], self.above, 1), a.dtype)
        return LowRankArray(a, jnp.concatenate([b, jnp.ones_like(b[..., :1, :])], -2))


FORMS = {
    "loha": (2, LoHa),
    "lokr": (1, LoKr),
    "lokr, plain": (9, LoKr),
    "lokr, both": (1, ft.partial(LoKr.init, both=True, factor=4)),
    "vera": (5, VeRA),
    "ia3": (None, IA3),
    "ia3 of inputs": (None, ft.partial(IA3.init, feedforward=True)),
    "rows": (None, ft.partial(Rows.init, indices=[5, 0])),
    "a user's own": (None, LastRow),
}
CONVOLVES = ["loha", "lokr", "lokr, plain", "lokr, both", "vera", "ia3"]


class _Net(eqx.Module):
    embedding: eqx.nn.Embedding
    conv: eqx.nn.Conv1d
    layers: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, key):
        self.embedding = eqx.nn.Embedding(10, 6, key=key)
        self.conv = eqx.nn.Conv1d(4, 4, 3, padding=1, groups=2, key=key)
        layer = lambda key: eqx.nn.Linear(6, 6, key=key)
        self.layers = eqx.filter_vmap(layer)(jr.split(key, 3))
        self.head = eqx.nn.Linear(6, 8, key=key)

    def __call__(self, ids):
        x = jnp.tanh(self.conv(jax.vmap(self.embedding)(ids)))
        step = lambda x, layer: (jnp.tanh(jax.vmap(layer)(x)), None)
        return jax.vmap(self.head)(jax.lax.scan(step, x, self.layers)[0])


IDS = jnp.array([0, 5, 9, 5])


def _adapted(form, base, key=jr.key(1)):
    rank, update = FORMS[form]
    targets = ["embedding", "layers", "head", *(["conv"] * (form in CONVOLVES))]
    return loraify(base, rank, key, update=update, targets=targets)


def _trained(model):
    params, rest = lora_quax.partition(model)
    leaves, treedef = jax.tree.flatten(params)
    leaves = [x + 0.3 * jr.normal(jr.key(i), x.shape) for i, x in enumerate(leaves)]
    return eqx.combine(jax.tree.unflatten(treedef, leaves), rest)


@pytest.mark.parametrize("form", FORMS)
def test_a_form_in_a_model(form, tmp_path):
    base = _Net(jr.key(0))
    model = _adapted(form, base)
    run = eqx.filter_jit(lambda model: quax.quaxify(model)(IDS))
    # Two programs, of which XLA may round the sums otherwise; the weights are the same.
    assert_close(run(model), run(base), rtol=1e-5, atol=1e-6)
    assert eqx.tree_equal(lora_quax.merge(model), base)
    assert eqx.tree_equal(lora_quax.unload(model), base)

    model = _trained(model)
    merged = lora_quax.merge(model)
    assert_close(run(model), merged(IDS), rtol=1e-5, atol=1e-5)
    assert not np.allclose(run(model), run(base), atol=1e-3)
    loss = lambda model: (quax.quaxify(model)(IDS) ** 2).sum()
    grads = lora_quax.filter_grad(loss)(model)
    params = lora_quax.partition(model)[0]
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(grads))

    path = tmp_path / "adapter.safetensors"
    lora_quax.save_adapter(path, model, base=base)
    assert eqx.tree_equal(lora_quax.load_adapter(path, base), model)


@pytest.mark.parametrize("form", FORMS)
def test_an_abstract_model(form):
    base = _Net(jr.key(0))
    model = _adapted(form, base)
    shapes = eqx.filter_eval_shape(lambda: base)
    for key in jr.key(1), eqx.filter_eval_shape(lambda: jr.key(1)):
        abstract = _adapted(form, shapes, key)
        assert eqx.tree_equal(abstract, eqx.filter_eval_shape(lambda: model))


@pytest.mark.parametrize("form", ["loha", "lokr, both", "vera"])
def test_each_part_has_a_scaling_of_its_own(form):
    rank, update = FORMS[form]
    update = _trained(loraify(MODEL, rank, jr.key(1), update=update)).weight.delta
    is_part = lambda x: isinstance(x, LowRankArray)
    scaled = lambda x: replace(x, alpha=2.5 * x.rank) if is_part(x) else x
    update = jax.tree.map(scaled, update, is_leaf=is_part)
    assert_close(update.lower(), dense(update), rtol=1e-5, atol=1e-5)


def test_what_others_are_adapted_does_not_change_an_update():
    base = _Net(jr.key(0))
    for form in "loha", "lokr":
        rank, update = FORMS[form]
        one = loraify(base, rank, jr.key(1), update=update, targets=["head"])
        assert eqx.tree_equal(one.head, _adapted(form, base).head)


def test_a_form_for_one_target():
    base = _Net(jr.key(0))
    update = ft.partial(LoKr.init, factor=2)
    targets = {"head": True, "layers": Adapt(update=update, rank=1, alpha=3.0)}
    model = loraify(base, 4, jr.key(1), alpha=8, targets=targets)
    layers = model.layers.weight.delta
    assert isinstance(layers, LoKr)
    assert (layers.rank, layers.alpha, layers.w1.shape) == (1, 3.0, (3, 2, 2))
    plain = loraify(base, 4, jr.key(1), alpha=8, targets=["head"])
    assert eqx.tree_equal(model.head, plain.head)


def test_vera_shares_its_factors():
    base = _Net(jr.key(0))
    model = _adapted("vera", base)
    embedding = model.embedding.weight.delta.shared
    head = model.head.weight.delta.shared
    assert embedding.a is head.a  # Of six columns each.
    np.testing.assert_array_equal(head.b, embedding.b[:8])
    layers = model.layers.weight.delta.shared
    np.testing.assert_array_equal(layers.b, jnp.stack([head.b[:6]] * 3))
    targets = {"embedding": True, "head": Adapt(dtype=jnp.bfloat16)}
    mixed = loraify(base, 4, jr.key(1), targets=targets, update=VeRA)
    types = [x.weight.delta.shared.a.dtype for x in (mixed.embedding, mixed.head)]
    assert types == [jnp.float32, jnp.bfloat16]
    again = _adapted("vera", base, jr.key(2))
    assert not np.array_equal(again.head.weight.delta.shared.a, head.a)


@pytest.mark.parametrize("n", [1, 2, 12, 30, 31, 36, 128])
@pytest.mark.parametrize("factor", [-1, 1, 4, 5, 100])
def test_the_sizes_of_lokr(n, factor):
    shape = (n, n)
    x = LoKr.init(shape, rank=1000, key=jr.key(0), factor=factor)
    p, o = x.w1.shape[0], x.w2.shape[0]
    assert p * o == n
    if factor > 0 and n % factor == 0:
        assert p == factor
    else:
        divisors = [k for k in range(1, n + 1) if n % k == 0 and k * k <= n]
        assert p == max(k for k in divisors if factor == -1 or k <= factor)


def test_rows_of_a_tied_head():
    """Lookup and head, of a vocabulary of which no array is formed but the head's."""
    vocabulary, ids = 5000, [17, 4999, 3]
    embedding = eqx.nn.Embedding(vocabulary, 8, key=jr.key(0))
    update = ft.partial(Rows.init, indices=ids)
    model = loraify(embedding, None, jr.key(1), targets="weight", update=update)
    model = _trained(model)
    expected = embedding.weight.at[jnp.array(ids)].add(model.weight.delta.values)
    assert_close(dense(model.weight), expected, rtol=1e-6, atol=1e-6)
    assert_close(lora_quax.merge(model).weight, expected, rtol=1e-6, atol=1e-6)
    tokens = jnp.array([3, 4, 17, 4999, 0])

    def look_up(e):
        return jax.vmap(e)(tokens)

    def program(e):
        return look_up(e) @ e.weight.T

    plain = eqx.nn.Embedding(weight=expected)
    assert_close(quax.quaxify(program)(model), program(plain), rtol=1e-5, atol=1e-5)
    params, rest = lora_quax.partition(model)

    @jax.jit
    def grads(params, rest):
        loss = lambda p: (quax.quaxify(look_up)(eqx.combine(p, rest)) ** 2).sum()
        return jax.value_and_grad(loss)(params)

    memory = grads.lower(params, rest).compile().memory_analysis()
    # Not even the one-hot columns.
    assert memory is not None
    assert memory.temp_size_in_bytes < vocabulary * 4


MODEL = eqx.nn.Linear(6, 4, key=jr.key(0))
REFUSED = {
    "no form": (2, dict(update=LoraArray), "`update` must be a form of adaptation"),
    "a text": (2, dict(update="loha"), "`update` must be a form of adaptation"),
    "rank of IA3": (2, dict(update=IA3), "`rank` is 2, and IA3 has none; give None"),
    "alpha of IA3": (None, dict(update=IA3, alpha=2), "`alpha` is 2, and IA3 has none"),
    "rank of rows": (2, dict(update=FORMS["rows"][1]), "`rank` is 2, and Rows has"),
    "no rank": (None, dict(update=LoHa), "`rank` must be a positive integer"),
    "no rank for LoRA": (None, {}, "`rank` must be a positive integer"),
    "init_a": (
        2,
        dict(update=LoHa, init_a=lora_quax.init.zeros),
        "`init_a` is .* LoHa",
    ),
    "scale": (2, dict(update=VeRA, scale=0.1), "`scale` is 0.1, and VeRA has none"),
    "alpha of VeRA": (2, dict(update=VeRA, alpha=2), "`alpha` is 2, and VeRA has none"),
    "no indices": (None, dict(update=Rows), "has to be told its `indices`"),
    "another option": (
        1,
        dict(update=ft.partial(LoKr.init, fctor=1)),  # pyright: ignore
        "`LoKr.init` is none: .*'fctor'",
    ),
    "factor": (1, dict(update=ft.partial(LoKr.init, factor=0)), "`factor` must be a"),
    "row": (
        None,
        dict(update=ft.partial(Rows.init, indices=[4])),
        "`indices` has 4, and the weight has rows from 0 to 3",
    ),
    "row below zero": (
        None,
        dict(update=ft.partial(Rows.init, indices=[-1])),
        "`indices` has -1",
    ),
    "row twice": (
        None,
        dict(update=ft.partial(Rows.init, indices=[1, 2, 1])),
        "`indices` has 1 more than once",
    ),
    "where a row is not": (
        None,
        dict(update=ft.partial(Rows.init, indices=[4])),
        "`weight`: `indices` has 4",
    ),
    "DoRA of IA3": (
        None,
        dict(update=IA3, use_dora=True),
        r"`weight` cannot have DoRA, which .* and IA3 is not. Give `Adapt\(use_dora",
    ),
    "dropout of IA3": (
        None,
        dict(update=IA3, dropout=0.1),
        r"`weight` cannot have dropout, which .* Give `Adapt\(dropout=0\)`",
    ),
    "no rows": (
        None,
        dict(update=ft.partial(Rows.init, indices=[])),
        "`indices` must be a list of integers",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense_is_refused(case):
    rank, options, message = REFUSED[case]
    with pytest.raises((TypeError, ValueError), match=message):
        loraify(MODEL, rank, jr.key(0), **options)


@pytest.mark.parametrize("form", [LowRankArray, LoHa, LoKr, VeRA])
@pytest.mark.parametrize("shape, rows", [((), 1), ((3,), 1), ((4, 6), 2), ((4, 6), -1)])
def test_an_array_of_too_few_axes(form, shape, rows):
    with pytest.raises(ValueError, match=f"cannot have {rows} axes of rows and 1 of"):
        form.init(shape, rank=2, key=jr.key(0), rows=rows)


def test_a_base_that_trains():
    model = loraify(MODEL, None, jr.key(0), update=IA3, stop_gradient=False)
    assert lora_quax.labels(model).weight.base == "full"


def test_an_adapt_refuses_at_once():
    with pytest.raises(ValueError, match="`rank` is 2, and IA3 has none"):
        Adapt(rank=2, update=IA3)
    with pytest.raises(ValueError, match="`rows` is 3, and LastRow has none"):
        Adapt(rows=3, update=LastRow)
    with pytest.raises(TypeError, match="`update` must be a form"):
        Adapt(update=3)


def test_a_form_that_does_not_speak_of_dense_weights():
    """`LastRow` neither takes the permission nor gives it to what it lowers to."""
    programs = [jnp.sin, lambda w: jax.nn.relu(w.T), lambda w: jnp.exp(2 * w[1:])]
    model = loraify(MODEL, None, jr.key(0), update=ft.partial(LastRow.init, start=0.5))
    allowed = loraify(
        MODEL,
        None,
        jr.key(0),
        update=ft.partial(LastRow.init, start=0.5),
        allow_materialise=True,
    )
    dense = lora_quax.merge(model).weight
    for program in programs:
        with pytest.raises(lora_quax.MaterialiseError, match="needs the dense weight"):
            quax.quaxify(program)(model.weight)
        out = quax.quaxify(program)(allowed.weight)
        np.testing.assert_allclose(out, program(dense), rtol=1e-5)


def test_axes_that_a_form_has_not_are_refused():
    """They would be batch without a word."""
    kernel, targets = {"kernel": jnp.zeros((3, 3, 4, 8))}, {"kernel": Adapt(rows=3)}
    with pytest.raises(ValueError, match="`rows` is 3, and LastRow has none"):
        loraify(kernel, None, jr.key(0), targets=targets, update=LastRow)
