"""The oracle: the same program on dense weights, with nonzero factors."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import quax
from lora_quax import LoraArray, LowRankArray


def is_factored(x):
    return isinstance(x, LoraArray | LowRankArray)


def lora(shape, *, rank=2, rows=1, cols=1, seed=0, dtype=jnp.float64, **kwargs):
    """A `LoraArray` with a random base and random factors, none of them zero."""
    w_key, key = jr.split(jr.key(seed))
    return LoraArray(
        jr.normal(w_key, shape, dtype),
        rank=rank,
        alpha=kwargs.pop("alpha", 3.0),
        key=key,
        rows=rows,
        cols=cols,
        init_b=jax.nn.initializers.normal(0.5),
        **kwargs,
    )


def low_rank(shape, **kwargs):
    """A `LowRankArray` without a base."""
    return lora(shape, **kwargs).delta


def dense(w):
    """The dense array, written out by einsum and so apart from what is tested."""
    if isinstance(w, LoraArray):
        base = w.base
        if isinstance(base, quax.ArrayValue):
            base = dense(base) if is_factored(base) else base.materialise()
        base = jax.lax.stop_gradient(base) if w.stop_gradient else base
        wide = jnp.promote_types(base.dtype, w.a.dtype)
        return (base.astype(wide) + dense(w.delta).astype(wide)).astype(base.dtype)
    if isinstance(w, LowRankArray):
        n = w.a.ndim - 1 - w.cols
        batch, rows, cols = w.a.shape[:n], w.b.shape[n:-1], w.a.shape[n + 1 :]
        a = w.a.reshape(*batch, w.rank, -1)
        b = w.b.reshape(*batch, -1, w.rank)
        out = jnp.einsum("...or,...ri->...oi", b, a) * (w.alpha / w.rank)
        return out.reshape(*batch, *rows, *cols)
    return w


def densify(tree):
    return jtu.tree_map(dense, tree, is_leaf=is_factored)


def assert_close(x, y, **kwargs):
    x, y = jtu.tree_leaves(densify(x)), jtu.tree_leaves(densify(y))
    assert len(x) == len(y)
    for u, v in zip(x, y):
        assert jnp.shape(u) == jnp.shape(v)
        assert jnp.result_type(u) == jnp.result_type(v)
        kwargs = {"rtol": 1e-9, "atol": 1e-9, **kwargs}
        u, v = (np.asarray(z, np.float64) for z in (u, v))
        np.testing.assert_allclose(u, v, **kwargs)


def scalar(tree):
    """A scalar that depends on every element of every inexact array, unevenly."""
    total = 0.0
    for i, x in enumerate(jtu.tree_leaves(tree)):
        if jnp.issubdtype(jnp.result_type(x), jnp.inexact):
            weights = jnp.cos(jnp.arange(jnp.size(x)) + i).reshape(jnp.shape(x))
            total = total + jnp.sum(jnp.sin(x) * weights)
    return total


def value_and_grads(fn, args):
    """The value, and the gradients with respect to every inexact leaf of `args`."""

    def loss(args):
        return scalar(densify(fn(*args)))

    return fn(*args), eqx.filter_grad(loss)(args)


def check_against_dense(program, args, *, wrap=lambda f: f, **tolerance):
    """`wrap(quaxify(program))` against `wrap(program)` of dense weights."""

    def on_dense(*args):
        return wrap(program)(*densify(args))

    ours = wrap(quax.quaxify(program))
    value, grads = value_and_grads(ours, args)
    expected, expected_grads = value_and_grads(on_dense, args)
    assert_close(value, expected, **tolerance)
    assert_close(jtu.tree_leaves(grads), jtu.tree_leaves(expected_grads), **tolerance)


def equations(jaxpr):
    """Every equation of a jaxpr, and of those inside it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for sub in jax.core.jaxprs_in_params(eqn.params):
            yield from equations(sub)


def assert_never_formed(program, args):
    """No product of the factors has as many elements as the dense weight.

    The rank of every array in `args` is 2, and nothing else in a program is; a product
    that contracts an axis of length 2 and gives a weight's worth of elements without an
    activation among its operands is the dense update.
    """
    del program, args
    raise NotImplementedError
