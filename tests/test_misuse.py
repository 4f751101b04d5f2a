"""Computing with an adapted array outside of `quaxify` says so, and nothing else is
in anybody's way."""

import copy
import math
import operator
import pickle
from collections.abc import Callable
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
import quax
from helpers import adapted, lora
from jax import lax
from jax.flatten_util import ravel_pytree

from lora_quax import FullArray, partition, ScaledArray
from lora_quax._arrays.misuse import UnquaxifiedError


X, Y, I = jnp.ones(3), jnp.ones(5), jnp.array([0, 2])

OPERATORS: dict[str, Callable] = {
    "w @ x": lambda w: w @ X,
    "y @ w": lambda w: Y @ w,
    "w @ numpy": lambda w: w @ np.ones(3),
    "numpy @ w": lambda w: np.ones(5) @ w,
    "2 * w": lambda w: 2 * w,
    "w * numpy": lambda w: w * np.float32(2),
    "numpy * w": lambda w: np.float32(2) * w,
    "w + w": lambda w: w + w,
    "sum": lambda w: sum([w, w]),
    "w - 1": lambda w: w - 1,
    "1 / w": lambda w: 1 / w,
    "w ** 2": lambda w: w**2,
    "divmod": lambda w: divmod(w, 2),
    "-w": operator.neg,
    "abs": abs,
    "w > 0": lambda w: w > 0,
    "0 > w": lambda w: 0 > w,
    "jax == w": lambda w: X == w,
    "numpy == w": lambda w: np.ones(3) == w,
    "bool": lambda w: bool(w),
    "and": lambda w: w and 1,
    "float": lambda w: float(w),
    "int": lambda w: int(w),
    "complex": lambda w: complex(w),
    "round": lambda w: round(w),
    "math": math.sqrt,
    "len": lambda w: len(w),
    "list": lambda w: list(w),
    "in": lambda w: 1.0 in w,
    "w[0]": lambda w: w[0],
    "w[i]": lambda w: w[I],
    "w[:, 1]": lambda w: w[:, 1],
    "format": lambda w: f"{w:.2f}",
}
ATTRIBUTES = (
    "T mT at real sum mean max astype reshape transpose item tolist copy flatten"
)

FUNCTIONS: dict[str, Callable] = {
    "jnp.sin": jnp.sin,
    "jnp.sum": jnp.sum,
    "jnp.sort": jnp.sort,
    "jnp.pad": lambda w: jnp.pad(w, 1),
    "jnp.dot": lambda w: jnp.dot(w, X),
    "jnp.matmul": lambda w: jnp.matmul(w, X),
    "jnp.einsum": lambda w: jnp.einsum("ij,j", w, X),
    "jnp.tensordot": lambda w: jnp.tensordot(w, X, 1),
    "jnp.take": lambda w: jnp.take(w, I, axis=0),
    "jnp.where": lambda w: jnp.where(True, w, 0),
    "jnp.concatenate": lambda w: jnp.concatenate([w, w]),
    "jnp.stack": lambda w: jnp.stack([w, w]),
    "jnp.reshape": lambda w: jnp.reshape(w, -1),
    "jnp.transpose": jnp.transpose,
    "jnp.asarray": jnp.asarray,
    "jnp.array of a list": lambda w: jnp.array([w, w]),
    "jnp.linalg": jnp.linalg.norm,
    "jnp.isfinite": jnp.isfinite,
    "jnp.allclose": lambda w: jnp.allclose(w, w),
    "jax.nn": jax.nn.relu,
    "jax.random": lambda w: jr.choice(jr.key(0), w),
    "jax.ops": lambda w: jax.ops.segment_sum(w, jnp.arange(5)),
    "jax.typeof": jax.typeof,
    "lax.dot": lambda w: lax.dot(w, X),
    "lax.add": lambda w: lax.add(w, w),
    "lax.sin": lax.sin,
    "lax.transpose": lambda w: lax.transpose(w, (1, 0)),
    "lax.convert_element_type": lambda w: lax.convert_element_type(w, jnp.float16),
    "lax.dynamic_slice": lambda w: lax.dynamic_slice(w, (0, 0), (1, 1)),
    "a convolution": lambda w: lax.conv_general_dilated(w, w, (), "SAME"),
    "a loop": lambda w: lax.fori_loop(0, 2, lambda _, x: w @ x, X),
    "np.asarray": np.asarray,
    "np.array of a list": lambda w: np.array([w, w]),
    "np.sum": np.sum,
    "np.sin": np.sin,
    "np.stack": lambda w: np.stack([w, w]),
    "np.linalg": np.linalg.norm,
    "np.testing": lambda w: np.testing.assert_allclose(w, w),
}

ARRAYS = {
    "LoraArray": lora((5, 3), dtype=jnp.float32),
    "LowRankArray": lora((5, 3), dtype=jnp.float32).delta,
    "FullArray": FullArray(jnp.ones((5, 3))),
    "ScaledArray": ScaledArray(jnp.ones((5, 3)), jnp.ones((5, 1))),
}


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("use", OPERATORS | FUNCTIONS)
def test_wrong_uses(use, jit):
    f = (OPERATORS | FUNCTIONS)[use]
    f = eqx.filter_jit(f) if jit else f
    with pytest.raises(UnquaxifiedError, match=r"LoraArray outside of `quax\.quaxify`"):
        f(ARRAYS["LoraArray"])


@pytest.mark.parametrize("use", ["w @ x", "y @ w", "w[i]", "jnp.sin", "np.asarray"])
@pytest.mark.parametrize("name", ARRAYS)
def test_wrong_uses_of_each_kind(name, use):
    with pytest.raises(UnquaxifiedError, match=f"a {name} outside of `quax.quaxify`"):
        (OPERATORS | FUNCTIONS)[use](ARRAYS[name])


@pytest.mark.parametrize("name", ATTRIBUTES.split())
def test_attributes(name):
    w = ARRAYS["LoraArray"]
    with pytest.raises(AttributeError, match=rf"`\.{name}` was asked.*quax\.quaxify"):
        getattr(w, name)
    assert not hasattr(w, name)


@pytest.mark.parametrize("name", ["sharding", "devices", "block_until_ready", "nbytes"])
def test_attributes_of_leaves(name):
    with pytest.raises(AttributeError, match=f"no `{name}`.*jax.tree.leaves"):
        getattr(ARRAYS["LoraArray"], name)


def test_other_attributes():
    w = ARRAYS["LoraArray"]
    with pytest.raises(AttributeError, match="'LoraArray' object has no attribute 'q'"):
        w.q  # pyright: ignore
    # What is wrong inside a property is said, not that there is no such property.
    part = eqx.tree_at(lambda w: w.delta, w, None)
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'a'"):
        part.a


# Models, each called as if it were plain.

_key = jr.key(0)
MODELS: dict[str, tuple[eqx.Module, tuple]] = {
    "Linear": (eqx.nn.Linear(3, 4, key=_key), (X,)),
    "MLP": (eqx.nn.MLP(3, 4, 8, 1, key=_key), (X,)),
    "Conv": (eqx.nn.Conv1d(3, 4, 3, key=_key), (jnp.ones((3, 8)),)),
    "ConvTranspose": (
        eqx.nn.ConvTranspose2d(3, 4, 3, key=_key),
        (jnp.ones((3, 8, 8)),),
    ),
    "Embedding": (eqx.nn.Embedding(9, 4, key=_key), (jnp.array(2),)),
    "MultiheadAttention": (
        eqx.nn.MultiheadAttention(1, 3, key=_key),
        (jnp.ones((2, 3)),) * 3,
    ),
    "GRU": (eqx.nn.GRUCell(3, 4, key=_key), (X, jnp.ones(4))),
}


def _adapted(name: str):
    model, args = MODELS[name]
    named = {"GRU": "weight_ih", "Embedding": eqx.nn.Embedding}
    return adapted(model, targets=named.get(name)), args


CALLS = {
    "as it is": lambda f, *args: f(*args),
    "jit": lambda f, *args: eqx.filter_jit(f)(*args),
    "vmap": lambda f, *args: jax.vmap(f)(*(x[None] for x in args)),
    "grad": lambda f, *args: eqx.filter_grad(lambda f: f(*args).sum())(f),
    "closure": lambda f, *args: quax.quaxify(lambda *args: f(*args))(*args),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", MODELS)
def test_models_that_are_not_quaxified(name, call):
    model, args = _adapted(name)
    with pytest.raises(UnquaxifiedError, match=r"quax\.quaxify\(model\)\(x\)"):
        CALLS[call](model, *args)
    assert jax.tree.leaves(quax.quaxify(model)(*args))


def test_a_bias_that_trains_in_full():
    model = adapted(eqx.nn.Linear(3, 4, key=_key), targets={"bias": "full"})
    with pytest.raises(UnquaxifiedError, match="a FullArray outside"):
        model(X)


# Right uses.


def _same(x, y) -> bool:
    return bool(eqx.tree_equal(x, y))


def _trained(model):
    optim = optax.adamw(1e-3)
    params, rest = partition(model)
    state = optim.init(params)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = optim.update(grads, state, params)
    return eqx.combine(eqx.apply_updates(params, updates), rest)


def _ipython(w) -> str:
    formatters = pytest.importorskip("IPython.core.formatters")
    return formatters.DisplayFormatter().format(w)[0]["text/plain"]


RIGHT: dict[str, Callable] = {
    "repr": lambda w: repr(w) == str(w) == f"{w}",
    "repr of a model": lambda w: "LoraArray(" in repr({"w": w}),
    "print in a notebook": lambda w: _ipython(w) == repr(w),
    "eqx.tree_pformat": lambda w: eqx.tree_pformat(w) == repr(w),
    "shape and type": lambda w: (
        (w.shape, w.ndim, w.size, w.dtype) == ((5, 3), 2, 15, w.base.dtype)
    ),
    "np.shape": lambda w: (np.shape(w), np.ndim(w), np.size(w)) == ((5, 3), 2, 15),
    "jnp.result_type": lambda w: jnp.result_type(w) == w.dtype,
    "jnp.zeros_like": lambda w: _same(jnp.zeros_like(w), jnp.zeros((5, 3), w.dtype)),
    "is None": lambda w: w is not None,
    "equality": lambda w: w == jax.tree.map(lambda x: x, w) and w != w.delta,
    "eqx.tree_equal": lambda w: _same({"w": w}, {"w": w}),
    "in a list": lambda w: w in [w] and [w].index(w) == 0,
    "hash of what is static": lambda w: hash(eqx.filter(w, False)) is not None,
    "isinstance": lambda w: not isinstance(w, jax.Array) and isinstance(w, quax.Value),
    "eqx.is_array": lambda w: not (eqx.is_array(w) or eqx.is_array_like(w)),
    "callable": lambda w: not callable(w),
    "copy": lambda w: _same(copy.copy(w), w) and _same(copy.deepcopy(w), w),
    "pickle": lambda w: _same(pickle.loads(pickle.dumps(w)), w),
    "jax.tree.map": lambda w: _same(jax.tree.map(lambda x: x * 1, w), w),
    "jax.tree.leaves": lambda w: len(jax.tree.leaves(w)) == 3,
    "jax.device_get": lambda w: isinstance(jax.device_get(w).base, np.ndarray),
    "jax.device_put": lambda w: _same(jax.device_put(w, jax.devices()[0]), w),
    "jax.block_until_ready": lambda w: _same(jax.block_until_ready(w), w),
    "jax.jit": lambda w: _same(jax.jit(lambda w: w)(w), w),
    "jax.eval_shape": lambda w: jax.eval_shape(lambda w: w, w).shape == (5, 3),
    "jax.vmap": lambda w: _same(
        jax.vmap(lambda w: w, axis_size=2)(_twice(w)), _twice(w)
    ),
    "jax.lax.stop_gradient": lambda w: _same(lax.stop_gradient(w), w),
    "jax.lax.cond": lambda w: _same(lax.cond(True, lambda: w, lambda: w), w),
    "eqx.partition": lambda w: _same(eqx.combine(*eqx.partition(w, eqx.is_array)), w),
    "eqx.filter_jit": lambda w: _same(eqx.filter_jit(lambda w: w)(w), w),
    "eqx.filter_eval_shape": lambda w: eqx.filter_eval_shape(lambda: w).shape == (5, 3),
    "eqx.tree_at": lambda w: _same(eqx.tree_at(lambda w: w.delta.a, w, w.a), w),
    "optax": lambda w: not _same(_trained(w), w) and _same(_trained(w).base, w.base),
    "ravel_pytree": lambda w: ravel_pytree(w)[0].shape == (15 + 6 + 10,),
    "quaxify": lambda w: quax.quaxify(lambda w: w @ X)(w).shape == (5,),
    "quaxify, operators": lambda w: (
        quax.quaxify(lambda w: len(w) + w.T.shape[0])(w) == 8
    ),
    "quaxify returns it": lambda w: _same(quax.quaxify(lambda w: w)(w), w),
    "quaxify returns one": lambda w: type(quax.quaxify(lambda w: w.T)(w)) is type(w),
    "materialise": lambda w: w.dense().shape == (5, 3),
}


def _twice(w):
    return jax.tree.map(lambda x: jnp.stack([x, x]), w)


@pytest.mark.parametrize("use", RIGHT)
def test_right_uses(use):
    assert RIGHT[use](ARRAYS["LoraArray"])


def test_the_page_that_is_named_is_there():
    page = (Path(__file__).parents[1] / "docs/mistakes.md").read_text()
    with pytest.raises(
        UnquaxifiedError, match="docs/mistakes.md.*'Outside of quaxify'"
    ):
        len(ARRAYS["LoraArray"])
    assert "\n## Outside of quaxify\n" in page
