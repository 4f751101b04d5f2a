"""Folding updates in, and taking them out."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
import quax
from files import bits, Int8
from jax.core import ShapedArray

from lora_quax import (
    FullArray,
    load_adapter,
    LoraArray,
    LowRankArray,
    save_adapter,
    summary,
)
from lora_quax._model.loraify import loraify
from lora_quax._model.merge import merge, unload
from lora_quax._model.training import partition


normal = jax.nn.initializers.normal(0.5)


def linear(key):
    return eqx.nn.Linear(4, 5, key=key)


def stacked(key):
    return eqx.filter_vmap(linear)(jr.split(key, 3))


def conv(key):
    return eqx.nn.Conv2d(4, 6, 3, groups=2, key=key)


def upconv(key):
    return eqx.nn.ConvTranspose1d(4, 6, 3, key=key)


def mlp(key):
    return eqx.nn.MLP(4, 5, 8, 2, key=key)


MODELS = [linear, stacked, conv, upconv, mlp]
DTYPES = [jnp.float64, jnp.float32, jnp.bfloat16]


def cast(model, dtype):
    # A minus zero, which adding a plus zero would turn.
    return jax.tree.map(
        lambda x: (
            x.astype(dtype).at[(0,) * x.ndim].set(-0.0)
            if eqx.is_inexact_array(x)
            else x
        ),
        model,
    )


def dense(x):
    """The sum, by einsum."""
    n = x.delta.n_batch
    base, a, b = (np.asarray(y) for y in (x.base, x.a, x.b))
    batch = b.shape[:n]
    b, a = b.reshape(*batch, -1, x.rank), a.reshape(*batch, x.rank, -1)
    delta = np.einsum("...or,...ri->...oi", b, a) * x.scaling
    total = base.astype(a.dtype) + delta.reshape(base.shape)
    return total.astype(base.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.__name__)
@pytest.mark.parametrize("build", MODELS)
def test_merge_and_unload(build, dtype, getkey):
    with jax.enable_x64(True):
        model = cast(build(getkey()), dtype)
        original = bits(model)
        lora = loraify(model, 2, getkey(), init_b=normal, alpha=3)
        is_lora = lambda x: isinstance(x, LoraArray)
        want = jtu.tree_map(
            lambda x: dense(x) if is_lora(x) else x, lora, is_leaf=is_lora
        )
        got = merge(lora)
        assert jax.tree.structure(got) == jax.tree.structure(model)
        tol = {8: 1e-12, 4: 1e-5, 2: 1e-2}[jnp.dtype(dtype).itemsize]
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
            if eqx.is_array(x):
                assert x.dtype == y.dtype == dtype
                x, y = (np.asarray(z, np.float64) for z in (x, y))
                assert np.allclose(x, y, rtol=tol, atol=tol)
        assert bits(got) != original
        assert bits(unload(lora)) == original
        assert bits(model) == original
        assert bits(eqx.filter_jit(merge)(lora)) == bits(got)
        assert bits(merge(lora, donate=True)) == bits(got)


@pytest.mark.parametrize("build", MODELS)
def test_fresh_adapters_merge_to_the_bit(build, getkey):
    model = cast(build(getkey()), jnp.float32)
    lora = loraify(model, 2, getkey())
    assert bits(merge(lora)) == bits(model)


def test_donation_frees_the_bases(getkey):
    model = mlp(getkey())
    lora = loraify(model, 2, getkey(), init_b=normal, targets={eqx.nn.Linear: 2})
    bases = [layer.weight.base for layer in lora.layers]
    factors = [layer.weight.a for layer in lora.layers]
    want = bits(merge(lora))
    assert not any(x.is_deleted() for x in bases)
    got = merge(lora, donate=True)
    assert all(x.is_deleted() for x in bases)
    assert not any(x.is_deleted() for x in factors)
    assert bits(got) == want


def test_donation_leaves_a_base_that_is_there_twice(getkey):
    weight = LoraArray(jnp.ones((4, 4)), rank=2, key=getkey(), init_b=normal)
    other = LoraArray(weight.base, rank=2, key=getkey(), init_b=normal)
    one, two, base = merge((weight, other, weight.base), donate=True)
    assert jnp.all(base == 1) and not jnp.allclose(one, two)


@pytest.mark.parametrize("donate", [False, True])
def test_a_quantised_base(donate, getkey):
    base = Int8(jr.randint(getkey(), (4, 5), -100, 100, jnp.int8))
    value = base.materialise()
    weight = LoraArray(base, rank=2, key=getkey(), init_b=normal)
    want = value + weight.b @ weight.a
    assert unload([weight]) == [base]
    (got,) = merge([weight], donate=donate)
    assert eqx.is_array(got) and jnp.allclose(got, want, atol=1e-5)
    assert base.q.is_deleted() == donate


class Affine(quax.ArrayValue):
    """A quantised array, of which a part is optional, as that of other libraries."""

    q: jax.Array
    zero_point: jax.Array | None = None

    def aval(self):
        return ShapedArray(self.q.shape, jnp.float32)

    def materialise(self):
        zero = 0 if self.zero_point is None else self.zero_point
        return (self.q.astype(jnp.float32) - zero) / 16


@pytest.mark.parametrize("zero_point", [None, 3.0])
def test_a_base_with_an_optional_part(zero_point, getkey, tmp_path):
    zero_point = None if zero_point is None else jnp.asarray(zero_point)
    q = jr.randint(getkey(), (4, 5), -100, 100, jnp.int8)
    base = {"w": Affine(q, zero_point)}
    model = loraify(base, 2, getkey(), targets="w", init_b=normal)
    (row,) = summary(model).rows
    assert (row.trainable, row.frozen) == (2 * (4 + 5), 4 * 5)
    want = base["w"].materialise() + model["w"].b @ model["w"].a
    assert jnp.allclose(merge(model)["w"], want, atol=1e-5)
    assert unload(model)["w"] is base["w"]
    save_adapter(tmp_path / "adapter", model, base=base)
    loaded = load_adapter(tmp_path / "adapter", base)
    assert jax.tree.structure(loaded) == jax.tree.structure(model)
    assert jnp.all(merge(loaded)["w"] == merge(model)["w"])


def test_an_adapter_on_an_adapter(getkey):
    base = jr.normal(getkey(), (4, 5))
    inner = LoraArray(base, rank=1, key=getkey(), init_b=normal)
    outer = LoraArray(inner, rank=2, key=getkey(), init_b=normal)
    want = base + inner.b @ inner.a + outer.b @ outer.a
    assert jnp.allclose(merge(outer), want, atol=1e-5)
    assert unload(outer) is base


def test_full_arrays():
    x = FullArray(jnp.ones(3))
    x = eqx.tree_at(lambda x: x.value, x, jnp.zeros(3))
    assert jnp.all(merge({"x": x})["x"] == 0)
    assert jnp.all(unload({"x": x})["x"] == 1)


def test_low_rank_arrays_alone(getkey):
    x = LowRankArray.init((4, 5), rank=2, key=getkey(), init_b=normal, alpha=3.0)
    assert jnp.allclose(merge([x])[0], 1.5 * x.b @ x.a, atol=1e-6)
    with pytest.raises(ValueError, match="`w` is a low-rank array with no base"):
        unload({"w": x})


def test_plain_models_are_unchanged(getkey):
    model = mlp(getkey())
    assert eqx.tree_equal(merge(model), model) and eqx.tree_equal(unload(model), model)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_check_finite(bad, getkey):
    targets = {eqx.nn.Linear: 2, "bias": "full"}
    lora = loraify(mlp(getkey()), 2, getkey(), targets=targets)
    assert eqx.tree_equal(merge(lora, check_finite=True), merge(lora))
    lora = eqx.tree_at(
        lambda m: (m.layers[1].weight.delta.b, m.layers[2].bias.value),
        lora,
        replace_fn=lambda x: x.at[0].set(bad),
    )
    with pytest.raises(ValueError, match="`layers.1.weight`, `layers.2.bias`.$"):
        merge(lora, check_finite=True, donate=True)
    assert not lora.layers[0].weight.base.is_deleted()  # Nothing was merged.
    assert not jnp.all(jnp.isfinite(merge(lora).layers[2].bias))


def test_check_finite_sees_the_inner_adapter(getkey):
    inner = LoraArray(jnp.ones((4, 5)), rank=1, key=getkey())
    inner = eqx.tree_at(
        lambda x: x.delta.b, inner, replace_fn=lambda b: b.at[0].set(jnp.nan)
    )
    outer = LoraArray(inner, rank=2, key=getkey())
    with pytest.raises(ValueError, match="the model itself"):
        merge(outer, check_finite=True)


@pytest.mark.parametrize("function", [merge, unload])
def test_missing_leaves(function, getkey):
    lora = loraify(mlp(getkey()), 2, getkey())
    for part, name in zip(partition(lora), ("base", "delta.a")):
        with pytest.raises(ValueError, match=f"`layers.0.weight` has None.*`{name}`"):
            function(part)
