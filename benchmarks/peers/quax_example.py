"""The adapted array that Quax ships as an example, `quax.examples.lora`."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.random as jr
import quax
from jaxtyping import PyTree
from quax.examples import lora

from .._work import Program, program as _program


def quax_example(model: PyTree, ours: PyTree) -> PyTree:
    """`model` with the factors of `ours`, which the example names the other way round.

    It adapts every `eqx.nn.Linear`, and nothing else.
    """

    def refill(x, y):
        if not _is_linear(x):
            return x
        weight = lora.LoraArray(x.weight, rank=y.weight.rank, key=jr.key(0))
        factors = y.weight.b, y.weight.a
        weight = eqx.tree_at(lambda w: (w.a, w.b), weight, factors)
        return eqx.tree_at(lambda x: x.weight, x, weight)

    return jax.tree.map(refill, model, ours, is_leaf=_is_linear)


def factors(model: PyTree) -> PyTree:
    """A filter spec, true at what trains."""

    def is_adapter(x):
        return isinstance(x, lora.LoraArray)

    def spec(x):
        spec = jax.tree.map(lambda _: False, x)
        if is_adapter(x):
            spec = eqx.tree_at(lambda s: (s.a, s.b), spec, (True, True))
        return spec

    return jax.tree.map(spec, model, is_leaf=is_adapter)


def program(model: PyTree, ours: PyTree, loss_fn: Callable) -> Program:
    """`loss_fn` of the plain `model`, with the factors of `ours`."""
    example = quax_example(model, ours)
    partitioned = eqx.partition(example, factors(example))
    return _program(partitioned, quax.quaxify(loss_fn))


def _is_linear(x) -> bool:
    return isinstance(x, eqx.nn.Linear)
