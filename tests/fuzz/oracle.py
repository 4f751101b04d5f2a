"""Runs a program on factored weights, and on dense ones in double precision.

Of both, the value and the gradients of everything that is a number: factors, inputs,
and the bases, of which those that are frozen have a gradient of zero.
"""

import re
from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from helpers import densify, DERIVATIVES, formed, TRANSFORMS

from lora_quax import LowRankArray, MaterialiseError

from .arrays import Input, Weight


# How many roundings of the narrowest type a result may be off by, on the scale of the
# result and of how much it changes when what it is made from is rounded.
_ROUNDINGS = 100
_LEAST_EPSILON = 1e-13
# How many programs, with numbers a rounding away, are asked what roundings come to.
_NEIGHBOURS = 4


class NotAProgram(Exception):
    """What JAX cannot do with dense weights either."""


def verify(
    program: Callable,
    arrays: Sequence[Weight | Input],
    *,
    transform: str = "Q(f)",
    derivative: str = "grad",
    casts: Sequence[str] = (),
    formed_nothing: bool = True,
) -> str | None:
    """Checks one program, and returns why it had to have dense weights, if it had to.

    **Arguments:**

    - `program`: the function, of what `arrays` describe.
    - `arrays`: weights, and then inputs.
    - `transform`, `derivative`: names in the tables of `helpers`, or `"grad"`.
    - `casts`: the dtypes that the program casts to.
    - `formed_nothing`: whether it can be asserted that nothing of the size of the first
        weight is computed from its factors alone, because no lookup is as large.

    **Raises:** `AssertionError` if a result is wrong or a dense weight was formed
    without leave; and what the program raises on factored weights.
    """
    change = TRANSFORMS[transform]
    give = lambda f: lambda *args: f(*change.arguments(args))
    ours = give(change.ours(program))
    plain = give(change.plain(lambda *args: program(*densify(args))))
    args = [x.make(leave=False) for x in arrays]
    epsilon = _epsilon([*(x.dtype for x in jtu.tree_leaves(args)), *casts])
    reason = None
    try:
        _compare(ours, plain, args, derivative, epsilon)
    except MaterialiseError as error:
        reason = _reason(error)
        args = [x.make(leave=True) for x in arrays]
        _compare(ours, plain, args, derivative, epsilon)
    # How other forms make their factors is their affair; the rules see the same ones.
    plain_update = isinstance(getattr(args[0], "delta", args[0]), LowRankArray)
    if reason is None and formed_nothing and plain_update:
        found = formed(ours, args)
        assert not found, f"a dense weight was formed without leave, by {found}"
    return reason


def _reason(error: MaterialiseError) -> str:
    found = re.search(r"`(\S+)` needs.*reason:\s*(.*?)\n", str(error), re.DOTALL)
    assert found, f"a refusal without a reason: {error}"
    return ": ".join(found.groups())


def _epsilon(dtypes) -> float:
    inexact = [d for d in dtypes if jnp.issubdtype(d, jnp.inexact)]
    return max(_LEAST_EPSILON, *(float(jnp.finfo(d).eps) for d in inexact))


def _compare(ours, plain, args, derivative, epsilon):
    wide = jtu.tree_map(_widen, args)
    is_narrow = epsilon > _LEAST_EPSILON
    try:
        expected_types = jax.eval_shape(plain, *args)
        if is_narrow:
            jax.eval_shape(plain, *wide)
    except Exception as error:
        raise NotAProgram(str(error)) from error
    counts = [_counts(x.shape) for x in jtu.tree_leaves(expected_types)]

    # One program, since most of the time goes to compiling. A dense program in the
    # given types says by how much their roundings in between put a result off; if they
    # are narrow, for else it is the exact one.
    @jax.jit
    def all_three(args, wide):
        out = _numbers(ours, args, derivative, counts)
        exact = _numbers(plain, wide, derivative, counts)
        narrow = _numbers(plain, args, derivative, counts) if is_narrow else exact
        return out, exact, narrow

    (out, types), (expected, _), _ = all_three(args, wide)
    if derivative == "grad":
        assert _types(types) == _types(expected_types), "the result has other types"
    out, expected = jax.device_get((out, expected))
    # Of one program roundings may cancel by chance, so its neighbours are asked too.
    spread = [np.zeros(()) for _ in expected]
    roundings = [np.zeros(()) for _ in expected]
    for near in [args, *(_rounded(args, epsilon, seed) for seed in range(_NEIGHBOURS))]:
        _, (exact, _), (rounded, _) = all_three(near, jtu.tree_map(_widen, near))
        exact, rounded = jax.device_get((exact, rounded))
        spread = [_most(s, x, y) for s, x, y in zip(spread, exact, expected)]
        roundings = [_most(r, x, y) for r, x, y in zip(roundings, rounded, exact)]
    results = zip(out, expected, spread, roundings, strict=True)
    for i, (x, y, s, r) in enumerate(results):
        assert x.shape == y.shape, f"result {i} has another shape"
        if not y.size or not np.isfinite(y).all():
            continue
        allowed = _ROUNDINGS * (epsilon * (1 + abs(y).max()) + s) + 10 * r
        off = np.nan_to_num(abs(x.astype(float) - y), nan=np.inf)
        worst = np.unravel_index(np.argmax(off), off.shape)
        assert off[worst] <= allowed, (
            f"result {i} of {len(expected)} (values, then gradients) is {x[worst]} and "
            f"not {y[worst]}, off by {off[worst]:.1e} where {allowed:.1e} is allowed"
        )


def _most(most, x, y):
    """The largest of `most` and of what two results are apart. (A type too narrow for
    a number has no say in how near to it a result is.)"""
    return max(most, np.nan_to_num(abs(x - y), nan=np.inf).max(initial=0.0))


def _types(tree):
    return [(x.shape, jnp.dtype(x.dtype)) for x in jtu.tree_leaves(tree)]


def _counts(shape):
    """What each element of a result counts in the loss: fixed, and of no symmetry."""
    return np.cos(1.0 + np.arange(np.prod(shape))).reshape(shape)


def _widen(x):
    return x.astype(float) if jnp.issubdtype(x.dtype, jnp.inexact) else x


def _rounded(tree, epsilon, seed):
    rng = np.random.default_rng(seed)

    def change(x):
        signs = rng.choice([-1.0, 1.0], x.shape)
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return x
        return (x.astype(float) * (1 + epsilon * signs)).astype(x.dtype)

    return jtu.tree_map(change, tree)


def _numbers(f, args, derivative, counts):
    """All that is compared, as a list of arrays; and the value, for its types."""
    if derivative != "grad":
        return jtu.tree_leaves(DERIVATIVES[derivative](f)(*args)), []

    def loss(args):
        out = densify(f(*args))
        leaves = jtu.tree_leaves(out)
        return sum(jnp.sum(x * n) for x, n in zip(leaves, counts, strict=True)), out

    (_, out), grads = eqx.filter_value_and_grad(loss, has_aux=True)(args)
    return jtu.tree_leaves((out, grads)), out
