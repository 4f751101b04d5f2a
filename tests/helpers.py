"""The oracle, the same program on dense weights; and what the tables of tests share."""

import contextlib
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.extend.core as jexc
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
import quax
from forms import FORMS, ORACLES
from jax import lax
from jaxtyping import Array

from lora_quax import (
    DropoutArray,
    LoraArray,
    loraify,
    LowRankArray,
    MaterialiseError,
    QuantisedArray,
    ScaledArray,
)
from lora_quax._arrays.base import fields_of, is_adapted, make, replace


# See `conftest`.
CANARY = [x for x in os.environ.get("LORA_QUAX_CANARY", "").split(",") if x]


# Arrays. Every kind has nonzero factors, a scaling other than 1 and a random base.

normal = jax.nn.initializers.normal(0.5)


class Scaled(quax.ArrayValue):
    """A second value type, as a quantised base might be: `scale · array`."""

    array: Array
    scale: Array

    def aval(self):
        return jax.typeof(self.array)

    def materialise(self):
        return self.array * self.scale


@quax.register(lax.dot_general_p)
def _(x: Array, w: Scaled, **params):
    return lax.dot_general_p.bind(x, w.array, **params) * w.scale


@quax.register(lax.dot_general_p)
def _(w: Scaled, x: Array, **params):
    return lax.dot_general_p.bind(w.array, x, **params) * w.scale


def drawn(
    shape, seed: int | tuple[int, ...], dtype: Any = None, scale: float = 1.0
) -> Array:
    """Random numbers. They are NumPy's, since to draw with JAX is to compile."""
    numbers = np.random.default_rng(seed).normal(scale=scale, size=shape)
    return jnp.asarray(numbers, dtype)


def _lora(
    weight,
    rank,
    seed,
    *,
    alpha=3.0,
    rows=1,
    cols=1,
    stop_gradient=True,
    allow_materialise=False,
):
    shape, dtype = weight.shape, jnp.promote_types(weight.dtype, jnp.float32)
    n = len(shape) - rows - cols
    delta = LowRankArray(
        drawn((*shape[:n], rank, *shape[n + rows :]), (seed, 1), dtype, 0.5),
        drawn((*shape[: n + rows], rank), (seed, 2), dtype, 0.5),
        alpha=alpha,
        rows=rows,
        cols=cols,
        allow_materialise=allow_materialise,
    )
    return LoraArray.from_parts(weight, delta, stop_gradient=stop_gradient)


def lora(shape, *, rank=2, seed=0, dtype=jnp.float64, **kwargs) -> LoraArray:
    return _lora(drawn(shape, seed, dtype), rank, seed, **kwargs)


def low_rank(shape, **kwargs) -> LowRankArray:
    return lora(shape, **kwargs).delta


def nested(shape, *, rank=2, seed=0, **kwargs) -> LoraArray:
    inner = lora(shape, rank=rank + 1, seed=seed + 10, **kwargs)
    kwargs.pop("dtype", None)
    return _lora(inner, rank, seed, stop_gradient=False, **kwargs)


def on_scaled(shape, *, rank=2, seed=0, dtype=jnp.float64, **kwargs) -> LoraArray:
    array = drawn(shape, seed, dtype)
    return _lora(Scaled(array, jnp.asarray(0.7, dtype)), rank, seed, **kwargs)


def quantised(
    shape, *, seed=0, dtype=jnp.float64, kind="int4", tile=2, **kwargs
) -> QuantisedArray:
    """In tiles of two columns, or of all of them if they are odd."""
    del kwargs
    codes = np.random.default_rng(seed).integers(-8, 8, shape)
    size = tile if shape[-1] % tile == 0 else shape[-1]
    tiles = (*shape[:-1], shape[-1] // size)
    scale, offset = drawn(tiles, (seed, 3), dtype, 0.2), drawn(tiles, (seed, 4), dtype)
    return QuantisedArray(jnp.asarray(codes), scale, offset, kind=kind, dtype=dtype)


def on_quantised(shape, *, rank=2, seed=0, dtype=jnp.float64, **kwargs) -> LoraArray:
    return _lora(quantised(shape, seed=seed, dtype=dtype), rank, seed, **kwargs)


def with_key(shape, **kwargs) -> DropoutArray:
    """With a rate of zero: all but the masks is as with any other."""
    w = lora(shape, **kwargs)
    key = jr.split(jr.key(0), w.a.shape[: w.n_batch])
    key = key.reshape(*key.shape, *(1,) * (w.ndim - key.ndim))
    return make(DropoutArray, rate=0.0, w=w, key=key)


def adapted(model, rank=2, **kwargs):
    """A model with nonzero factors, and a scaling other than 1."""
    return loraify(model, rank, jr.key(5), alpha=3.0, init_b=normal, **kwargs)


def filled(make: Callable, *args) -> Any:
    """What `make` makes, of other numbers: to draw these compiles nothing."""
    leaves, treedef = jtu.tree_flatten(eqx.filter_eval_shape(make, *args))
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            leaves[i] = drawn(leaf.shape, (i,), leaf.dtype, 0.5)
    return jtu.tree_unflatten(treedef, leaves)


def x(*shape, seed=7):
    """An input."""
    return drawn(shape, seed)


def _of(form):
    return lambda shape, **kwargs: form(lora(shape, **kwargs))


KINDS = {
    "lora": lora,
    "low_rank": low_rank,
    "nested": nested,
    "on_scaled": on_scaled,
    "on_quantised": on_quantised,
    "with_key": with_key,
    **{name: _of(form) for name, form in FORMS.items()},
}


def some_of(kinds, programs, quick=1):
    """All pairs of a kind and a program, for `parametrize`; of the programs each is
    quick with `quick` of the kinds, which take turns, and slow with the others."""
    names = list(kinds)
    pairs = []
    for i, program in enumerate(programs):
        for k, kind in enumerate(names):
            marks = [] if (k - i) % len(names) < quick else [pytest.mark.slow]
            pairs.append(pytest.param(kind, program, marks=marks))
    return pairs


# The oracle.


def is_value(x) -> bool:
    return isinstance(x, quax.ArrayValue)


def dense(w):
    """The dense array, written out by einsum and so apart from what is tested."""
    if isinstance(w, LoraArray):
        base = dense(w.base)
        base = lax.stop_gradient(base) if w.stop_gradient and not w.stopped else base
        delta = dense(w.delta)
        wide = jnp.promote_types(base.dtype, delta.dtype)
        total = base.astype(wide) + delta.astype(wide)
        return total.astype(base.dtype)
    if isinstance(w, DropoutArray):
        return dense(w.w)
    if isinstance(w, LowRankArray):
        n = w.a.ndim - 1 - w.cols
        batch, rows, cols = w.a.shape[:n], w.b.shape[n:-1], w.a.shape[n + 1 :]
        a = w.a.reshape(*batch, w.rank, -1)
        b = w.b.reshape(*batch, -1, w.rank)
        out = jnp.einsum("...or,...ri->...oi", b, a) * (w.alpha / w.rank)
        return out.reshape(*batch, *rows, *cols)
    if isinstance(w, ScaledArray):
        base = dense(w.base)
        base = lax.stop_gradient(base) if w.stop_gradient and not w.stopped else base
        return (base * w.scale).astype(base.dtype)
    if type(w) in ORACLES:
        return ORACLES[type(w)](w, dense)
    return w.materialise() if is_value(w) else w


def densify(tree):
    return jtu.tree_map(dense, tree, is_leaf=is_value)


def assert_close(x, y, *, rtol=1e-9, atol=1e-9):
    x, y = jtu.tree_leaves(densify(x)), jtu.tree_leaves(densify(y))
    assert len(x) == len(y)
    for u, v in zip(x, y):
        assert jnp.shape(u) == jnp.shape(v)
        assert jnp.result_type(u) == jnp.result_type(v)
        u, v = (np.asarray(z).astype(np.float64) for z in (u, v))
        np.testing.assert_allclose(u, v, rtol=rtol, atol=atol)


def scalar(tree):
    """A scalar that depends on every element of every inexact array, unevenly."""
    total = jnp.zeros(())
    for i, x in enumerate(jtu.tree_leaves(tree)):
        if jnp.issubdtype(jnp.result_type(x), jnp.inexact):
            # In NumPy, so that it is a constant of what is compiled.
            weights = np.cos(np.arange(jnp.size(x)) + i).reshape(jnp.shape(x))
            total = total + jnp.sum(jnp.sin(x) * weights)
    return total


def _value_and_grads(fn: Callable, args):
    def loss(args):
        out = densify(fn(*args))
        return scalar(out), out

    (_, out), grads = eqx.filter_value_and_grad(loss, has_aux=True)(args)
    return out, jtu.tree_leaves(grads)


@eqx.filter_jit
def value_and_grads(fn: Callable, args):
    """The value, and the gradients with respect to every inexact leaf of `args`."""
    return _value_and_grads(fn, args)


def check(ours: Callable, program: Callable, args, **tolerance):
    """`ours(*args)` against `program` of dense weights: the value and all gradients."""
    check_all({"the only one": (ours, program, args)}, **tolerance)


def check_all(cases: dict[str, tuple], **tolerance):
    """`check` of several `(ours, program, args)`, compiled as one program: most of the
    time of a test goes to compiling, and most of that to starting."""

    @eqx.filter_jit
    def run(all_args):
        return {
            name: _both(name, ours, program, all_args[name])
            for name, (ours, program, _) in cases.items()
        }

    results = run({name: args for name, (_, _, args) in cases.items()})
    possible = {name: both for name, both in results.items() if both is not None}
    if not possible:
        pytest.skip("JAX cannot do this with dense weights either")
    for name, ((value, grads), (expected, expected_grads)) in possible.items():
        with _named(name):
            assert_close(value, expected, **tolerance)
            assert_close(grads, expected_grads, **tolerance)


def _both(name, ours, program, args):
    plain = lambda *args: program(*densify(args))
    with _named(name):
        try:
            return _value_and_grads(ours, args), _value_and_grads(plain, args)
        except (NotImplementedError, MaterialiseError):
            # JAX's next loops have no gradient yet. What it can't do has to be refused.
            if CANARY and not _is_possible(plain, args):
                return None
            raise


def _is_possible(plain, args) -> bool:
    try:
        eqx.filter_eval_shape(_value_and_grads, plain, args)
    except NotImplementedError:
        return False
    return True


@contextlib.contextmanager
def _named(case: str):
    try:
        yield
    except Exception as error:
        error.add_note(f"This is of the case: {case}.")
        raise


def check_derivative(derive: Callable, program: Callable, args, **tolerance):
    """The same of what `derive` makes of the two."""
    ours = derive(quax.quaxify(program))
    plain = derive(lambda *args: program(*densify(args)))
    both = eqx.filter_jit(lambda *args: (ours(*args), plain(*args)))
    assert_close(*both(*args), **tolerance)


# Transforms: each takes a program of `(w, x)` and gives ours, and the plain program.


def _stack(*trees):
    return jtu.tree_map(lambda *leaves: jnp.stack(leaves), *trees)


class Transform(NamedTuple):
    ours: Callable[[Callable], Callable]
    plain: Callable[[Callable], Callable]
    batch: tuple[bool, ...] = ()  # Which arguments are given a leading axis.

    def arguments(self, args):
        half = lambda leaf: leaf * 0.5 if eqx.is_inexact_array(leaf) else leaf
        twice = lambda x: jtu.tree_map(half, x)
        flags = _flags(self.batch or (False,), len(args))
        return [_stack(x, twice(x)) if f else x for x, f in zip(args, flags)]


def _flags(batch, n):
    """One for each of `n` arguments: the last one serves for all that follow."""
    return (*batch, *batch[-1:] * (n - len(batch)))


def _axes(batch, n):
    return tuple(0 if f else None for f in _flags(batch, n))


def _mapped(inside: bool, *batch):
    def plain(f):
        return lambda *args: jax.vmap(f, _axes(batch, len(args)))(*args)

    def ours(f):
        return quax.quaxify(plain(f)) if inside else plain(quax.quaxify(f))

    return Transform(ours, plain, batch)


def _jvp(f):
    """The tangent along a fixed direction of every inexact leaf."""

    def run(*args):
        dynamic, static = eqx.partition(args, eqx.is_inexact_array)
        tangent = jtu.tree_map(lambda x: jnp.sin(x + 1.0), dynamic)
        call = lambda dynamic: densify(f(*eqx.combine(dynamic, static)))
        return jax.jvp(call, (dynamic,), (tangent,))

    return run


def _hvp(f):
    """A product with the Hessian: forward over reverse."""

    def run(*args):
        dynamic, static = eqx.partition(args, eqx.is_inexact_array)
        tangent = jtu.tree_map(lambda x: jnp.sin(x + 1.0), dynamic)
        loss = lambda dynamic: scalar(densify(f(*eqx.combine(dynamic, static))))
        out = jax.jvp(jax.grad(loss), (dynamic,), (tangent,))[1]
        return jtu.tree_leaves(out)  # Those that were no numbers have none.

    return run


def _on_dense(transform):
    return lambda f: transform(lambda *args: f(*densify(args)))


def _gradient_of_input(f):
    return lambda *args: jax.grad(lambda x: scalar(f(*args[:-1], x)))(args[-1])


TRANSFORMS = {
    "Q(f)": Transform(quax.quaxify, lambda f: f),
    "Q(vmap f)": _mapped(True, False, True),
    "vmap(Q f)": _mapped(False, False, True),
    "Q(vmap f) of weights": _mapped(True, True, True),
    "vmap(Q f) of weights": _mapped(False, True, True),
    "Q(grad f)": Transform(
        lambda f: quax.quaxify(_gradient_of_input(f)), _gradient_of_input
    ),
    "Q(jit f)": Transform(lambda f: quax.quaxify(jax.jit(f)), lambda f: f),
    "Q(checkpoint f)": Transform(
        lambda f: quax.quaxify(jax.checkpoint(f)), lambda f: f
    ),
}
DERIVATIVES = {"jvp": _jvp, "hvp": _hvp}


# Jaxprs.


def _subjaxprs(eqn):
    for value in eqn.params.values():
        for x in value if isinstance(value, tuple | list) else [value]:
            if hasattr(x, "jaxpr") or hasattr(x, "eqns"):
                yield getattr(x, "jaxpr", x)


def equations(jaxpr):
    """Every equation of a jaxpr and of those inside it."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield eqn
        for sub in _subjaxprs(eqn):
            yield from equations(sub)


def _scan_carry(params) -> tuple[int, int]:
    """Where the carry of a `scan` starts among its operands, and how many it has."""
    if "num_carry" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()  # JAX 0.12.
    return len(consts), len(carry)


def _marks_out(run, eqn, sub, inputs) -> list:
    """The marks of what an inner jaxpr returns; a loop's, until they settle."""
    marks = inputs[len(inputs) - len(sub.invars) :]
    if str(eqn.primitive) == "scan":
        start, n = _scan_carry(eqn.params)
    elif str(eqn.primitive) == "while" and len(sub.outvars) == len(eqn.outvars):
        start, n = eqn.params["body_nconsts"], len(eqn.outvars)
    else:
        return run(sub, marks)
    while True:
        out = run(sub, marks)
        carry = [old | new for old, new in zip(marks[start : start + n], out)]
        if carry == marks[start : start + n]:
            return out
        marks = [*marks[:start], *carry, *marks[start + n :]]


# What of an update goes with the rows. All else of it goes with the columns.
_OF_ROWS = ("b", "lambda_b")


def _marks(x):
    """An array with, in place of each leaf, a set of what it is: of the base, of the
    scale, or of one factor."""
    out = {}
    for field in fields_of(type(x), static=False):
        value, name = getattr(x, field.name), field.metadata.get("role")
        if is_adapted(value):
            out[field.name] = _marks(value)
            continue
        name = "scale" if name == "magnitude" else name
        if name not in ("base", "scale"):
            name = "b" if name in _OF_ROWS else "a"
        mark = lambda y, name=name: frozenset({name} if eqx.is_inexact_array(y) else {})
        out[field.name] = jtu.tree_map(mark, value)
    return replace(x, **out)


def formed(program: Callable, args) -> list[str]:
    """Equations that form the dense update of the first of `args`, a factored array, or
    the scaled weight of a scaled one.

    That is: whose result has the size of the weight or more, and depends on both of its
    factors, or on base and scale, but on no other argument. (What depends on an
    activation too is an output.)
    """
    weight = args[0]
    marks = [_marks(weight), *jtu.tree_map(lambda _: frozenset("x"), list(args[1:]))]
    marks = jtu.tree_leaves(marks, is_leaf=lambda x: isinstance(x, frozenset))
    found: list[str] = []

    def run(jaxpr, marks) -> list:
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        env: dict[Any, frozenset] = {}
        read = lambda v: (
            frozenset() if isinstance(v, jexc.Literal) else env.get(v, frozenset())
        )
        env.update(zip(jaxpr.invars, marks))
        for eqn in jaxpr.eqns:
            inputs = [read(v) for v in eqn.invars]
            outputs = [frozenset().union(*inputs)] * len(eqn.outvars)
            if eqn.primitive.name == "optimization_barrier":  # Each operand by itself.
                outputs = inputs
            inside = [_marks_out(run, eqn, sub, inputs) for sub in _subjaxprs(eqn)]
            inside = [marks for marks in inside if len(marks) == len(outputs)]
            if inside:  # Not the condition of a loop.
                outputs = [frozenset().union(*marks) for marks in zip(*inside)]
            for v, mark in zip(eqn.outvars, outputs):
                # Whether a factor is finite says nothing of its numbers.
                mark = frozenset() if v.aval.dtype == bool else mark
                env[v] = mark
                product = {"a", "b"} <= mark or {"base", "scale"} <= mark
                if product and "x" not in mark and v.aval.size >= weight.size:
                    found.append(str(eqn.primitive))
        return [read(v) for v in jaxpr.outvars]

    run(jax.make_jaxpr(lambda args: program(*args))(list(args)), marks)
    return found
