"""Adapters on disk: what is saved comes back bit for bit."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import safetensors.numpy
from adapters import (
    abstract,
    an_mlp,
    Case,
    CASES,
    linears_and,
    models,
    models_of,
    named_leaves,
    runner,
)
from files import bits
from helpers import normal
from jaxtyping import Array

from lora_quax import (
    AbstractDelta,
    AdaptedArray,
    AdapterError,
    load_adapter,
    LoraArray,
    loraify,
    LowRankArray,
    partition,
    role,
    save_adapter,
    ScaledArray,
    unload,
)
from lora_quax.__main__ import main
from lora_quax._arrays.base import replace


@pytest.fixture(params=CASES)
def saved(request, tmp_path):
    """A case's name, `models` of it, and the file with the adapter."""
    base, model, other = models_of(request.param)
    save_adapter(tmp_path / "adapter", model)
    return request.param, base, model, other, tmp_path / "adapter"


def test_round_trips(saved):
    name, *onto, path = saved
    _, model, _ = onto
    run, x = runner(name), np.cos(np.arange(20.0, dtype=np.float32))
    x = jnp.asarray(np.resize(x, CASES[name].x))
    want = bits(run(model, x))
    for where, other in zip(("the base", "the model", "another draw"), onto):
        before = bits(other)
        got = load_adapter(path, other)
        assert jax.tree.structure(got) == jax.tree.structure(model), where
        assert bits(got) == bits(model), where
        assert bits(run(got, x)) == want, where
        assert bits(other) == before, where


def test_loading_onto_an_abstract_model(saved):
    _, base, model, _, path = saved
    in_file = safetensors.numpy.load_file(path)
    # What is not in the file is as abstract as it came.
    want = {
        name: x if name in in_file else abstract(x)
        for name, x in named_leaves(model).items()
    }
    for onto in base, model:
        got = load_adapter(path, abstract(onto))
        assert jax.tree.structure(got) == jax.tree.structure(model)
        assert eqx.tree_equal(named_leaves(got), want)


def test_the_file_holds_what_is_not_the_bases(saved):
    name, _, model, _, path = saved
    tensors = safetensors.numpy.load_file(path)
    assert set(tensors) == named_leaves(partition(model)[0]).keys() | CASES[name].more
    for name, x in named_leaves(model).items():
        assert name not in tensors or bits(tensors[name]) == bits(x)


def test_saving_is_deterministic(saved, tmp_path):
    _, base, _, _, path = saved
    save_adapter(tmp_path / "again", load_adapter(path, base))
    assert (tmp_path / "again").read_bytes() == path.read_bytes()
    assert set(tmp_path.iterdir()) == {path, tmp_path / "again"}


def test_the_file_is_small(tmp_path):
    size = 512
    layer = Case(lambda key: eqx.nn.Linear(size, size, key=key))
    save_adapter(tmp_path / "x", models(layer)[1])
    factors = 2 * 2 * size * 4
    assert factors < (tmp_path / "x").stat().st_size < factors + 1024


def test_saving_replaces_a_file(tmp_path):
    path = tmp_path / "x"
    for name in "biases", "mlp":
        base, model, _ = models_of(name)
        save_adapter(str(path), model)
        assert bits(load_adapter(str(path), base)) == bits(model)
        assert list(tmp_path.iterdir()) == [path]


# base, factors
DTYPES = [
    ("float32", "float32"),
    ("bfloat16", "float32"),
    ("bfloat16", "bfloat16"),
    ("float16", "float16"),
    ("float64", "float64"),
    ("float64", "float32"),
]


@pytest.mark.filterwarnings("ignore:The factors of:UserWarning")
@pytest.mark.parametrize("base_dtype,dtype", DTYPES)
def test_dtypes(base_dtype, dtype, tmp_path, x64):
    def make(key):
        cast = lambda x: x.astype(base_dtype) if eqx.is_array(x) else x
        return jax.tree.map(cast, an_mlp(key))

    case = Case(make, options=dict(dtype=dtype, targets=linears_and("bias")))
    base, model, other = models(case)
    weight, bias = model.layers[0].weight, model.layers[0].bias
    assert (weight.base.dtype, weight.a.dtype) == (base_dtype, dtype)
    assert bias.value.dtype == base_dtype
    save_adapter(tmp_path / "x", model)
    for onto in base, other:
        assert bits(load_adapter(tmp_path / "x", onto)) == bits(model)
    got = load_adapter(tmp_path / "x", abstract(base))
    assert bits(partition(got)[0]) == bits(partition(model)[0])


def test_numbers_that_are_not_finite_are_kept(tmp_path):
    odd = [np.nan, -np.nan, np.inf, -np.inf, -0.0, 1e-45, 3e38, 1.0]
    base, model, _ = models_of("mlp")
    b = jnp.asarray(np.array([odd, odd], np.float32).T)
    model = eqx.tree_at(lambda m: m.layers[0].weight.delta.b, model, b)
    match = r"`layers\.0\.weight\.delta\.b` have infinities or NaNs.*check_finite=False"
    with pytest.raises(ValueError, match=match):
        save_adapter(tmp_path / "x", model)
    assert not list(tmp_path.iterdir())
    save_adapter(tmp_path / "x", model, check_finite=False)
    assert bits(load_adapter(tmp_path / "x", base)) == bits(model)


# What is held to be as in the base: `test_peft.py` has it for both formats.


def test_what_is_written_may_change(tmp_path):
    base = {"w": jnp.ones((3, 4)), "x": jnp.ones(4)}
    model = loraify(base, 1, jr.key(0), targets={"w": True, "x": "full"})
    model = {**model, "w": replace(model["w"], stop_gradient=False)}
    where = lambda m: (m["w"].base, m["w"].delta.b, m["x"].value)
    model = eqx.tree_at(where, model, replace_fn=lambda x: x + 1)
    save_adapter(tmp_path / "x", model, base=base)
    assert bits(load_adapter(tmp_path / "x", base)) == bits(model)


def test_a_low_rank_array_alone_may_change(tmp_path):
    base, model, _ = models_of("a low-rank array")
    assert bits(base) != bits(model)
    save_adapter(tmp_path / "x", model, base=base)


def test_complex_arrays_may_not_change(tmp_path):
    base = {"w": jnp.ones((3, 4)), "z": jnp.ones(4, jnp.complex64), "n": jnp.arange(3)}
    model = loraify(base, 1, jr.key(0), targets="w")
    save_adapter(tmp_path / "x", model, base=base)
    model = {**model, "z": model["z"] * 2, "n": model["n"] + 1}
    with pytest.raises(ValueError, match="^`n`, `z` would not be written"):
        save_adapter(tmp_path / "x", model, base=base)


# Forms of one's own.


class Unlike(AdaptedArray):
    """A weight with two scales, around another adapted one."""

    weight: LoraArray
    x: Array = role("magnitude")
    signs: Array = role("frozen")  # Integers, which do not train.
    allow_materialise: bool = eqx.field(static=True, default=False)

    def lower(self):
        return ScaledArray(self.weight, self.x * self.signs)


def _twofold(factor):
    """A class that is defined more than once, as in a cell of a notebook."""

    class Twofold(AbstractDelta):
        times: int = eqx.field(static=True)
        x: Array = role("b")

        def lower(self):
            return LowRankArray(self.x.T, factor * self.times * self.x)

    return Twofold


def test_forms_of_ones_own(tmp_path, capsys):
    base = {"w": jr.normal(jr.key(0), (4, 3)), "v": jr.normal(jr.key(1), (3, 3))}
    lora = LoraArray(base["w"], rank=2, key=jr.key(2), init_b=normal)
    unlike: Any = Unlike  # Its policy is a property, which type checkers do not see.
    _twofold(1)
    delta = _twofold(2)(3, jr.normal(jr.key(3), (3, 1)))
    model = {
        "w": unlike(lora, jnp.full((4, 1), 0.5), jnp.array([[1], [-1], [1], [1]])),
        "v": LoraArray.from_parts(base["v"], delta),
    }
    save_adapter(tmp_path / "x", model, base=base)
    loaded = load_adapter(tmp_path / "x", base)
    assert jax.tree.structure(loaded) == jax.tree.structure(model)
    assert bits(loaded) == bits(model) and bits(unload(loaded)) == bits(base)
    assert main(["inspect", str(tmp_path / "x")]) == 0
    shown = capsys.readouterr().out
    assert "w.x" in shown and "w.signs" in shown and "w.weight.delta.a" in shown


def _namesake(module):
    """A class whose name another one, in another module, has as well."""

    class Namesake(AbstractDelta):
        __module__, __qualname__ = module, "Namesake"
        x: Array = role("b")

        def lower(self):
            return LowRankArray(self.x, self.x)

    return Namesake


def test_forms_of_the_same_name(tmp_path):
    base = {"w": jr.normal(jr.key(0), (3, 3))}
    first, _ = (_namesake(module) for module in ("first", "second"))
    model = {"w": LoraArray.from_parts(base["w"], first(jnp.ones((3, 3))))}
    save_adapter(tmp_path / "x", model, base=base)
    several = "'Namesake' is that of several classes, first.Namesake and second.Name"
    with pytest.raises(AdapterError, match=several):
        load_adapter(tmp_path / "x", base)
