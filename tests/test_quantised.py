"""A quantised base is the array that it stands for, and decoded while that is used."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import quax
from files import bits
from helpers import adapted, assert_close, check, drawn, filled, low_rank, quantised
from jax import lax

import lora_quax
from lora_quax import (
    dequantise,
    LoraArray,
    loraify,
    merge,
    quantise,
    QuantisedArray,
    unload,
)


pytest.importorskip("qwix")


class Net(eqx.Module):
    """One of each layer that can be quantised, and one that is not."""

    embed: eqx.nn.Embedding
    linear: eqx.nn.Linear
    conv: eqx.nn.Conv1d
    head: eqx.nn.Linear

    def __init__(self, key):
        self.embed = eqx.nn.Embedding(11, 16, key=key)
        self.linear = eqx.nn.Linear(16, 8, key=key)
        self.conv = eqx.nn.Conv1d(8, 4, 3, padding=1, key=key)
        self.head = eqx.nn.Linear(4, 3, key=key)

    def __call__(self, tokens):
        x = jax.vmap(self.linear)(jax.vmap(self.embed)(tokens))
        x = self.conv(jnp.tanh(x).T)
        return jax.vmap(self.head)(x.T)


TARGETS = [eqx.nn.Linear, eqx.nn.Conv, eqx.nn.Embedding, ("head", "freeze")]
TOKENS = jnp.array([3, 1, 4, 1, 5, 9])


def net(dtype=jnp.float32):
    out = filled(Net, jr.key(0))
    return jax.tree.map(lambda x: x.astype(dtype) if eqx.is_array(x) else x, out)


KINDS = ["nf4", "int4", "int8"]
# The largest error of a number, as a share of the largest of its tile: half the widest
# gap between two values.
GAPS = {"nf4": 0.16, "int4": 0.5 / 7.5, "int8": 0.5 / 127.5}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_number_is_the_nearest_that_the_kind_has(kind, dtype):
    w = drawn((6, 32), 0, dtype)
    linear = eqx.tree_at(lambda l: l.weight, eqx.nn.Linear(32, 6, key=jr.key(0)), w)
    out = quantise(linear, kind, tile=8).weight
    assert isinstance(out, QuantisedArray)
    assert (out.shape, out.dtype, out.tile) == (w.shape, w.dtype, (1, 8))
    tiles = np.asarray(w, np.float32).reshape(6, 4, 8)
    error = np.asarray(out.materialise(), np.float32).reshape(tiles.shape) - tiles
    largest = np.abs(tiles).max(-1, keepdims=True)
    slack = 1e-6 if dtype == jnp.float32 else 1e-2
    assert (np.abs(error) <= (GAPS[kind] + slack) * largest).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_it_computes_what_it_stands_for(kind, dtype):
    """And so does what is adapted around it: values, and gradients of the factors."""
    model = adapted(quantise(net(dtype), kind, targets=TARGETS, tile=4))
    plain = eqx.tree_at(
        lambda m: (
            [m.embed.weight] + [getattr(m, x).weight.base for x in ("linear", "conv")]
        ),
        model,
        replace_fn=dequantise,
        is_leaf=lambda x: isinstance(x, QuantisedArray),
    )

    @eqx.filter_jit
    @lora_quax.filter_value_and_grad
    def run(model, tokens):
        out = quax.quaxify(model)(tokens)
        return jnp.sum(jnp.sin(out.astype(jnp.float32)))

    tolerance = 1e-6 if dtype == jnp.float32 else 1e-2
    ours, theirs = (jax.tree.leaves(run(m, TOKENS)) for m in (model, plain))
    assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_what_becomes_of_it(tmp_path):
    quantised = quantise(net(), targets=TARGETS, tile=4)
    model = adapted(quantised)
    assert bits(unload(model)) == bits(quantised)
    merged = merge(model)
    assert_close(merged.linear.weight, jax.jit(LoraArray.dense)(model.linear.weight))
    assert isinstance(merged.embed.weight, QuantisedArray)
    lora_quax.save_adapter(tmp_path / "x", model)
    again = lora_quax.load_adapter(tmp_path / "x", quantised, same_base=True)
    assert bits(again) == bits(model)
    with pytest.raises(lora_quax.AdapterError, match="trained on another base"):
        lora_quax.load_adapter(tmp_path / "x", net(), same_base=True)
    requantised = quantise(merged, targets="linear", tile=4)
    assert isinstance(requantised.linear.weight, QuantisedArray)


def test_an_abstract_model():
    abstract = eqx.filter_eval_shape(Net, jr.key(0))
    out = quantise(abstract, targets=TARGETS, tile=4)
    concrete = quantise(net(), targets=TARGETS, tile=4)
    shape = lambda x: (x.shape, x.dtype) if hasattr(x, "shape") else x
    assert jax.tree.map(shape, eqx.filter(out, eqx.is_array_like)) is not None
    assert eqx.filter_eval_shape(lambda: concrete) == out
    plain = dequantise(out)
    assert plain.linear.weight == abstract.linear.weight


# Layout. Of the shapes those that cut no tile keep the codes.

MOVES = {
    "transpose": (lambda w: w.T, True),
    "all axes": (lambda w: w.transpose(1, 2, 0), True),
    "squeeze": (lambda w: w[:1].squeeze(0), True),
    "a new axis": (lambda w: w[:, None], True),
    "rev": (lambda w: w[::-1, :, ::-1], True),
    "rows": (lambda w: w[1:3], True),
    "every other row": (lambda w: w[::2], True),
    "whole tiles": (lambda w: w[..., 2:6], True),
    "in one tile": (lambda w: w[..., 2:3], True),
    "a part of a tile": (lambda w: w[..., 1:5], False),
    "no columns": (lambda w: w[..., :0], True),
    "no rows": (lambda w: w[:0], True),
    "every other column": (lambda w: w[..., ::2], False),
    "split": (lambda w: jnp.split(w, 3, axis=-1)[1], True),
    "split in a tile": (lambda w: jnp.split(w, [3], axis=-1)[1], False),
    "merged rows": (lambda w: w.reshape(12, 6), True),
    "merged with columns": (lambda w: w.reshape(4, 18), True),
    "all in a row": (lambda w: w.reshape(-1), True),
    "tiles apart": (lambda w: w.reshape(4, 3, 3, 2), True),
    "a tile in two": (lambda w: w.reshape(4, 3, 2, 3), False),
    "rows apart": (lambda w: w.reshape(2, 2, 3, 6), True),
    "columns in front": (lambda w: w.T.reshape(18, 4), False),
    "a row": (lambda w: w[1], True),
    "a row that is traced": (lambda w: lax.dynamic_index_in_dim(w, jnp.array(1)), True),
    "some rows": (lambda w: w[jnp.array([2, 0])], True),
    "some rows, or none": (lambda w: w.at[jnp.array([2, 9])].get(mode="fill"), True),
    "some columns": (lambda w: w[..., jnp.array([2, 0])], False),
    "a cast": (lambda w: w.astype(jnp.float32), True),
    "casts": (lambda w: w.astype(jnp.bfloat16).astype(jnp.float32), True),
    "a cast to integers": (lambda w: w.astype(jnp.int32), False),
    "two axes of rows": (lambda w: w[jnp.array([2, 0]), jnp.array([1, 1])], False),
}


@pytest.mark.parametrize("kind", ["int4", "int8"])
@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("name", MOVES)
def test_layout(name, outside, kind, x64):
    move, is_kept = MOVES[name]
    w = quantised((4, 3, 6), kind=kind)
    run = quax.quaxify(move)
    out = eqx.filter_jit(run)(w) if outside else run(w)
    np.testing.assert_array_equal(
        out.materialise() if isinstance(out, QuantisedArray) else out,
        move(w.materialise()),
    )
    assert isinstance(out, QuantisedArray) == is_kept


def _loop(w, body):
    return lax.fori_loop(0, 2, lambda _, w: body(w), w)


CONTROL = {
    "a map over rows": lambda w: lax.map(lambda r: r.sum(1), w),
    "a map over columns": lambda w: lax.map(lambda r: r.sum(1), w.transpose(2, 0, 1)),
    "a map of products": lambda w: lax.map(lambda r: r @ r.T, w[:2]),
    "branches alike": lambda w: lax.cond(w.sum() > 0, lambda: w, lambda: w[::-1]),
    "branches that differ": lambda w: lax.cond(w.sum() > 0, lambda: w, lambda: w * 2),
    "reversed columns": lambda w: lax.cond(
        w.sum() > 0, lambda: w[..., ::-1], lambda: w
    ),
    "a switch": lambda w: lax.switch(
        1, [lambda: w[:, :, 0], lambda: w.sum(2), lambda: w.mean(2)]
    ),
    "a loop of casts": lambda w: _loop(
        w, lambda w: w.astype(jnp.bfloat16).astype(w.dtype)
    ),
    "a derivative of its own": lambda w: jax.nn.relu(w),
    "checkpointed": lambda w: jax.checkpoint(lambda w: jnp.sin(w))(w),
    "filled columns": lambda w: jnp.take(w, jnp.array([1, 99]), axis=2),
    "filled rows": lambda w: jnp.take(w, jnp.array([99, 1]), axis=0),
    "joined": lambda w: jnp.concatenate([w[..., :0], w, w[:, :, :2]], -1),
}


# Of an adapted one these are refused, or have NaNs in more of the gradient.
ALONE = (
    "a derivative of its own",
    "checkpointed",
    "filled columns",
    "filled rows",
)


@pytest.mark.parametrize("kind", ["int4", "int8"])
@pytest.mark.parametrize("tile", [2, 6])
@pytest.mark.parametrize("name", CONTROL)
def test_control(name, tile, kind, x64):
    """With several tiles, and with one; alone, and adapted."""
    program = CONTROL[name]
    w = quantised((4, 3, 6), kind=kind, tile=tile)
    check(quax.quaxify(program), program, (w,))
    if name not in ALONE:
        delta = low_rank((4, 3, 6), allow_materialise=True)
        check(quax.quaxify(program), program, (LoraArray.from_parts(w, delta),))


def test_tied_weights_stay_one():
    w = drawn((6, 8), 0, jnp.float32)
    tied = {"embed": w, "head": w}
    out = quantise(tied, "int8", targets=["embed", "head"], tile=4)
    assert out["embed"] is out["head"]
    plain = dequantise(out)
    assert plain["embed"] is plain["head"]
    with pytest.raises(ValueError, match="`head` is one array with another"):
        quantise(tied, "int8", targets="embed", tile=4)
    # Two arrays of one type are two, and so are two of the same codes.
    kind = jax.ShapeDtypeStruct((6, 8), jnp.float32)
    quantise({"embed": kind, "head": kind}, "int8", targets="embed", tile=4)
    twice = eqx.tree_at(lambda x: x.scale, out["embed"], 2 * out["embed"].scale)
    plain = dequantise({"one": out["embed"], "other": twice})
    np.testing.assert_array_equal(plain["other"], 2 * plain["one"])


# Memory: of each weight, decoded, there is no more than one at a time.

SIZE, LAYERS = 256, 8


def _block(w, x):
    return x + jnp.tanh(x @ w)


def _looped(ws, x):
    for i in range(LAYERS):
        x = _block(ws[i], x)
    return x


def _scanned(ws, x):
    return lax.scan(lambda x, w: (_block(w, x), None), x, ws)[0]


def _checkpointed(ws, x):
    step = jax.checkpoint(lambda x, w: (_block(w, x), None), prevent_cse=False)
    return lax.scan(step, x, ws)[0]


@pytest.mark.parametrize("program", [_looped, _scanned, _checkpointed])
def test_nothing_of_the_size_of_the_base_outlives_its_layer(program):
    if program is _looped and jax.__version_info__ < (0, 11):
        pytest.skip("XLA of JAX 0.10 decodes all weights of a written-out loop at once")
    shape = LAYERS, SIZE, SIZE
    rng = np.random.default_rng(0)
    codes = jnp.asarray(rng.integers(0, 16, shape), jnp.uint4)
    scale = jnp.full((*shape[:2], SIZE // 64), 0.01)
    base = QuantisedArray(codes, scale, kind="nf4")
    a, b = drawn((LAYERS, 2, SIZE), 1, jnp.float32), drawn((LAYERS, SIZE, 2), 2)
    delta = lora_quax.LowRankArray(a, b.astype(jnp.float32))
    x = drawn((4, SIZE), 3, jnp.float32)

    def loss(delta, base, x):
        ws = LoraArray.from_parts(base, delta)
        return jnp.sum(quax.quaxify(program)(ws, x) ** 2)

    run = jax.jit(jax.value_and_grad(loss)).lower(delta, base, x).compile()
    one = 4 * SIZE * SIZE
    analysis = run.memory_analysis()
    assert analysis is not None
    held = analysis.temp_size_in_bytes
    assert held < 3 * one, held / one


def test_summary_says_bits_and_bytes():
    model = eqx.nn.MLP(64, 64, 64, 1, key=jr.key(0))
    model = loraify(quantise(model), 2, jr.key(1), targets=r"layers\.0\..*")
    summary = lora_quax.summary(model)
    assert [row.bits for row in summary.rows] == [4.5]
    # Two quantised weights, two biases, and the factors of one update.
    assert summary.bytes == 2 * 64 * 64 * 4.5 / 8 + 4 * (2 * 64 + 2 * 2 * 64)
    assert "4.5" in str(summary) and "6.1 kB" in str(summary)
    abstract = lora_quax.summary(eqx.filter_eval_shape(lambda: model))
    assert abstract.bytes is None and "bits" not in str(abstract)
    assert "bits" not in str(lora_quax.summary(loraify(net(), 2, jr.key(1))))


def test_bytes_of_a_number():
    w = quantise(eqx.nn.Linear(256, 64, key=jr.key(0))).weight
    held = sum(x.on_device_size_in_bytes() for x in jax.tree.leaves(w))
    assert held <= 0.57 * w.size


# What a user gets wrong.

WRONG = {
    "a tile": (
        lambda: quantise(net(), targets="linear", tile=5),
        ValueError,
        r"`linear.weight` of shape \(8, 16\) has 16 columns, of which tiles of 5 leave",
    ),
    "no tile": (lambda: quantise(net(), tile=0), ValueError, "`tile` must be a pos"),
    "a rank": (
        lambda: quantise(net(), targets={"linear": 4}, tile=4),
        ValueError,
        "must be True or 'freeze'",
    ),
    "quantised already": (
        lambda: quantise(quantise(net(), tile=4), tile=4),
        ValueError,
        "`linear.weight` is quantised already",
    ),
    "adapted already": (
        lambda: quantise(loraify(net(), 2, jr.key(0)), tile=4),
        ValueError,
        "`linear.weight`, .* is already adapted",
    ),
    "adapting integers": (
        lambda: loraify(
            {"weight": jnp.zeros((3, 4), jnp.int8)}, 2, jr.key(0), targets="weight"
        ),
        TypeError,
        "is not a floating-point array: it is int8",
    ),
    "not finite": (
        lambda: quantise({"weight": jnp.full((2, 64), jnp.nan)}, targets="weight"),
        ValueError,
        "`weight` has infinities or NaNs",
    ),
    "no tiles": (
        lambda: QuantisedArray(
            jnp.zeros((2, 6), jnp.int8), jnp.ones((2, 4)), kind="int8"
        ),
        ValueError,
        r"Scales of shape \(2, 4\) are no tiles of an array of shape \(2, 6\)",
    ),
    "codes that it has not": (
        lambda: QuantisedArray(jnp.array([[17, 0]]), jnp.ones((1, 1)), kind="nf4"),
        ValueError,
        "The codes of 'nf4' are from 0 to 15; got some from 0 to 17",
    ),
    "codes that are no integers": (
        lambda: QuantisedArray(jnp.ones((1, 2)), jnp.ones((1, 1)), kind="int8"),
        TypeError,
        "codes",
    ),
    "a type that is no number's": (
        lambda: QuantisedArray(
            jnp.ones((1, 2), int), jnp.ones((1, 1)), kind="int8", dtype=jnp.int32
        ),
        TypeError,
        "`dtype` must be a floating-point type",
    ),
    "mapped along a tile": (
        lambda: jax.vmap(quax.quaxify(lambda w: w.sum()), in_axes=1)(
            quantise(net(), "int8", tile=4).linear.weight
        ),
        ValueError,
        "got arg|axis|scales",
    ),
    "outside of quaxify": (
        lambda: quantise(net(), tile=4).linear(jnp.ones(16)),
        lora_quax.UnquaxifiedError,
        "QuantisedArray outside of `quax.quaxify`",
    ),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_named(case):
    run, kind, message = case
    with pytest.raises(kind, match=message):
        run()
