"""What the weights of a model are given by data."""

import functools as ft
import re
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .._arrays.base import replace
from .._arrays.check import is_abstract
from .._arrays.lora import LoraArray
from .._arrays.probe import Probe, probe
from .dropout import without_key
from .each import is_lora, low_rank, weights_of
from .paths import named
from .targets import read_pattern


class Moments(eqx.Module):
    """How many vectors a weight was multiplied with, their sum, and `Σ x · xᵀ`.

    Those of several batches are added up: `jax.tree.map(jnp.add, first, second)`. With
    `in_out` the vectors lie along the rows of the weight, and else along its columns.
    """

    count: Float[Array, "*batch"]
    first: Float[Array, "*batch n"]
    second: Float[Array, "*batch n n"]
    in_out: bool = eqx.field(static=True, default=False, kw_only=True)

    def covariance(self) -> Float[Array, "*batch n n"]:
        """About the mean."""
        count = jnp.maximum(self.count, 1)[..., None, None]
        mean = self.first[..., None, :] / count
        return self.second / count - jnp.swapaxes(mean, -1, -2) * mean


def input_moments(
    fn: Callable, *, in_out: str | Sequence[str] = ()
) -> Callable[..., PyTree]:
    """What the adapted weights of a model are multiplied with, as their moments.

    ```python
    forward = lambda model, x: jax.vmap(quax.quaxify(model))(x)
    moments = eqx.filter_jit(lora_quax.input_moments(forward))(model, batch)
    ```

    They are taken by the derivative of `fn`, so `fn` may have loops over stacked
    layers, `vmap`, `checkpoint` and whatever else reverse mode goes through; compiled,
    no more than the products with the weights is left of it. A weight that multiplies
    patches, as a convolution does, has the moments of these; one of a stack, or an
    expert, those of its own vectors. Vectors of zeros, such as padding, do not count.
    The update is away meanwhile, and with it its dropout: what is observed is the base.

    **Arguments:**

    - `fn`: any function `fn(model, *args, **kwargs)`. Its outputs have to depend on
        what the weights compute; what they are does not matter. Of a model that is
        abstract the moments are.
    - `in_out`: the weights that are kept as `(in, out)`, as Flax does, and so are
        multiplied with data along their rows: names or regular expressions, as targets
        of `loraify` are.

    **Returns:** a function of the same arguments. It gives the model with `Moments` in
    place of each `LoraArray`, and `None` in place of the rest. With `n` the number of a
    weight's columns, or of its rows, these have `n²` numbers, of float32 at least.

    **Raises:** `TypeError` if `fn` is no function; `ValueError` if the model has no
    `LoraArray`, or one whose update is no `LowRankArray`; if one of `in_out` is the
    name of none; or if `fn` takes a derivative of the model.
    """
    if not callable(fn):
        raise TypeError(
            "`input_moments` takes a function of the model and data, and gives one of "
            f"the same arguments; got {fn!r:.80}."
        )

    patterns = _patterns(in_out)

    @ft.wraps(fn)
    def run(model, *args: Any, **kwargs: Any):
        if is_abstract(model):
            return eqx.filter_eval_shape(run, model, *args, **kwargs)
        model = without_key(model)
        paths, leaves, treedef = weights_of(model)
        adapted = [path for path, x in zip(paths, leaves) if is_lora(x)]
        turned = _named_by(patterns, adapted)

        def probe_of(path: str, w: LoraArray) -> Probe:
            return probe(w.base, low_rank(named(path), w).delta, in_out=path in turned)

        probes = [
            probe_of(path, x) if is_lora(x) else None for path, x in zip(paths, leaves)
        ]

        def outputs(factors):
            observed = [
                x if p is None else replace(x, delta=p.with_factor(factor))
                for x, p, factor in zip(leaves, probes, factors)
            ]
            out = fn(jax.tree.unflatten(treedef, observed), *args, **kwargs)
            return [y for y in jax.tree.leaves(out) if eqx.is_inexact_array(y)]

        # What is nearly the same for all vectors is subtracted later.
        with jax.default_matmul_precision("highest"):
            factors = [None if p is None else p.factor for p in probes]
            out, pull = jax.vjp(outputs, factors)
            (found,) = pull(jax.tree.map(jnp.zeros_like, out))
        moments = [
            None if p is None else Moments(*p.read(gradient), in_out=p.in_out)
            for p, gradient in zip(probes, found)
        ]
        return jax.tree.unflatten(treedef, moments)

    return run


def _patterns(in_out: Any) -> dict[str, re.Pattern]:
    names = [in_out] if isinstance(in_out, str) else in_out
    if not isinstance(names, list | tuple) or any(type(x) is not str for x in names):
        raise TypeError(f"`in_out` must be names of weights, got {in_out!r:.80}.")
    return {name: read_pattern(name)[0] for name in names}


def _named_by(patterns: dict[str, re.Pattern], paths: list[str]) -> set[str]:
    """**Raises:** `ValueError` if one of the patterns is the name of no path."""
    out = set()
    for name, pattern in patterns.items():
        found = set(filter(pattern.fullmatch, paths))
        if not found:
            raise ValueError(
                f"{name!r} of `in_out` is the name of no weight that is adapted; they "
                f"are {', '.join(map(named, paths[:8]))}."
            )
        out |= found
    return out
