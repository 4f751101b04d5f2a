"""First updates that are taken from the weights, or from data, and not drawn.

Some are taken out of the base, so that the sum is what it was. An adapter that was
trained from there belongs to that base; `rebase` puts it on the one before.
"""

import functools as ft
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import PRNGKeyArray, PyTree

from .._arrays.base import dense, is_adapted, replace
from .._arrays.check import is_abstract, wider
from .._arrays.lora import LoraArray
from .._arrays.low_rank import LowRankArray
from . import factors
from .each import at_weights, is_lora, on_each
from .given import (
    check_given,
    check_gradient,
    check_moments,
    check_rho,
    refuse_base,
    refuse_unknown,
)
from .lay import laid_as
from .shares import shares


Method = Literal[
    "pissa",
    "randomised pissa",
    "olora",
    "orthogonal",
    "eva",
    "corda ipm",
    "corda kpm",
    "lora-ga",
]


class _Method(NamedTuple):
    find: Callable  # see `factors`
    takes_out: bool = True  # whether the update is taken out of the base
    needs: str | None = None  # of the arguments of `initialise`


_METHODS: dict[str, _Method] = {
    "pissa": _Method(factors.pissa),
    "randomised pissa": _Method(factors.randomised_pissa, needs="key"),
    "olora": _Method(factors.olora),
    "orthogonal": _Method(factors.orthogonal, takes_out=False, needs="key"),
    "eva": _Method(factors.eva, takes_out=False, needs="moments"),
    "corda ipm": _Method(ft.partial(factors.corda, smallest=False), needs="moments"),
    "corda kpm": _Method(ft.partial(factors.corda, smallest=True), needs="moments"),
    "lora-ga": _Method(factors.lora_ga, needs="gradients"),
}


def initialise(
    model: PyTree,
    method: Method,
    *,
    key: PRNGKeyArray | None = None,
    moments: PyTree | None = None,
    gradients: PyTree | None = None,
    rho: float = 1.0,
) -> PyTree:
    """Gives the updates of a model other first values, from its weights or from data.

    ```python
    model = lora_quax.loraify(plain, rank=8, key=key)
    model = lora_quax.initialise(model, "pissa")
    ```

    - `"pissa"`: the largest singular values and vectors of a weight, which are taken
        out of the base (Meng et al., arXiv 2404.02948); `"randomised pissa"` finds them
        by products with few random vectors and four power iterations (Halko et al.,
        arXiv 0909.4061), which is fast for large weights.
    - `"olora"`: the first columns and rows of the QR decomposition of a weight, which
        are taken out of the base (Büyükakyüz, arXiv 2406.01775).
    - `"orthogonal"`: factors that are not zero and whose product is, of halves of an
        orthogonal matrix, as PEFT has it; the base is left as it is. The rank is even.
    - `"eva"`: `a` is the principal components of what a weight is given by data, and
        `b` is zero; the base is left as it is (Paischer et al., arXiv 2410.07170).
    - `"corda ipm"` and `"corda kpm"`: of the weight times the second moment of what it
        is given, the largest singular values, or the smallest, so that what the weight
        does for these data is learnt from, or is kept (*instruction-previewed* and
        *knowledge-preserved* mode). They are taken out of the base (Yang et al., arXiv
        2406.05223).
    - `"lora-ga"`: singular vectors of the gradient, so that the first step is near to
        that of full fine-tuning; the update is taken out of the base (Wang et al.,
        arXiv 2407.05000; PEFT's direction `"ArB2r"`, and γ = 16).

    The model computes what it computed before, as exactly as the base can hold the
    rest. A weight with several axes of columns, such as a convolution's, is taken as a
    matrix; one with batch axes as a matrix for each index.

    **Arguments:**

    - `model`: a model with `LoraArray`s, abstract or not.
    - `method`: one of the above.
    - `key`: for the methods that draw: `"orthogonal"` and `"randomised pissa"`.
    - `moments`: for `"eva"` and CorDA: what `input_moments` gives, of this model.
    - `gradients`: for `"lora-ga"`: the gradient of a loss with respect to the weights,
        a tree like the plain model, as `equinox.filter_grad` gives it.
    - `rho`: for `"eva"`: at most this many times its rank goes to a weight. With more
        than 1, the ranks are shared out anew, no more in all than before, by how much
        of the variance of its data a component explains; a weight that gets none is the
        plain one again. A stack has one rank. The scalings stay. PEFT's default is 2.

    **Returns:** the model with other factors, and other bases where they are taken out.

    **Raises:** `ValueError` if `method` is not known, lacks an argument or is given one
    that it has no use for, or a rank is odd; if nothing in the model is a `LoraArray`,
    or one has an update that is no `LowRankArray`, or a base that is no plain array,
    out of which nothing can be taken; if the data are not those of the model, are not
    finite, or have nothing for a weight; if `rho` leaves no rank for the update inside
    of a `DoRA`.
    """
    if not isinstance(method, str) or method not in _METHODS:
        known = ", ".join(map(repr, _METHODS))
        raise ValueError(f"`method` must be one of {known}, got {method!r}.")
    given = dict(key=key, moments=moments, gradients=gradients)
    _, takes_out, needs = _METHODS[method]
    check_given(method, needs, given)
    rho = check_rho(rho, method)
    data = None
    if needs in ("moments", "gradients"):
        data = at_weights(needs, model, given[needs])

    seen = []

    def look(where: str, w: LoraArray, word, own: Any) -> LoraArray:
        del word
        if takes_out:
            refuse_base(where, w, f"{method!r} takes the update out of the base")
        if method == "orthogonal" and w.rank % 2:
            raise ValueError(
                f"{where} has rank {w.rank}; for orthogonal factors it must be even."
            )
        if needs == "moments":
            check_moments(where, w, own)
        if needs == "gradients":
            check_gradient(where, w, own)
        seen.append((w, own))
        return w

    on_each(model, look, data)
    ranks = iter([w.rank for w, _ in seen])
    if rho > 1:
        refuse_unknown(seen)
        weights = [w for w, _ in seen]
        found = shares(weights, [own for _, own in seen], rho)
        _refuse_hollow(model, [w for w, rank in zip(weights, found) if not rank])
        ranks = iter(found)

    def change(where: str, w: LoraArray, word, own: Any) -> Any:
        del where
        rank = next(ranks)
        if not rank:
            return w.base
        own_key = None if key is None else jr.fold_in(key, word[0])
        run = _abstract_initialised if is_abstract((w, own)) else _initialised
        delta, base = run(w, own, own_key, method, rank)
        base = w.base if base is None else laid_as(base, w.base)
        return replace(w, base=base, delta=laid_as(delta, w.delta))

    return on_each(model, change, data)


def _refuse_hollow(model: PyTree, plain: list[LoraArray]) -> None:
    """What is around an update, as DoRA is, cannot do without it."""
    for x in jax.tree.leaves(model, is_leaf=is_adapted):
        inside = [] if is_lora(x) else jax.tree.leaves(x, is_leaf=is_lora)
        if any(y is w for y in inside for w in plain):
            raise ValueError(
                f"No rank is left for the update inside of a {type(x).__name__}, a "
                f"weight of shape {x.shape}: give a smaller `rho`."
            )


def update_of(w: LoraArray, of, data: Any, key, method: str, rank: int) -> LowRankArray:
    """The update of `w` that a method finds in the array `of`, matrix by matrix."""
    n, old = w.n_batch, w.delta
    batch, row_shape, col_shape = w.b.shape[:n], w.b.shape[n:-1], w.a.shape[n + 1 :]
    wide = wider(of.dtype, jnp.float32)
    sizes = [math.prod(shape) for shape in (batch, row_shape, col_shape)]
    matrices = _whole(of.astype(wide)).reshape(sizes)
    # A method is given the matrix that data are multiplied with from the right.
    turned = getattr(data, "in_out", False)
    if turned:
        matrices = jnp.swapaxes(matrices, 1, 2)
    keys = jr.split(jr.key(0) if key is None else key, len(matrices))
    if method == "lora-ga":
        data = _whole(data).reshape(sizes)
    else:
        data = jax.tree.map(lambda x: x.reshape(sizes[0], *x.shape[n:]), data)
    find = ft.partial(_METHODS[method].find, rank=rank, scaling=old.scaling)
    of_one = lambda matrix, own, key: find(matrix, own, key=key)
    b, a = jax.vmap(of_one)(matrices, data, keys)
    if turned:
        b, a = jnp.swapaxes(a, 1, 2), jnp.swapaxes(b, 1, 2)
    missing = rank - b.shape[-1]  # A rank beyond that of the matrix.
    b = jnp.pad(b, ((0, 0), (0, 0), (0, missing)))
    missing = rank - a.shape[-2]
    a = jnp.pad(a, ((0, 0), (0, missing), (0, 0)))
    return replace(
        old,
        a=a.reshape(*batch, rank, *col_shape).astype(old.a.dtype),
        b=b.reshape(*batch, *row_shape, rank).astype(old.b.dtype),
        rank=rank,
        alpha=old.alpha if rank == old.rank else old.scaling * rank,
    )


def less_update(base, delta: LowRankArray):
    wide = wider(base.dtype, jnp.float32)
    update = delta.product().astype(wide)
    return (base.astype(wide) - laid_as(update, base)).astype(base.dtype)


def _whole(x):
    """On a mesh with explicit axes decompositions are of whole matrices alone."""
    sharding = jax.typeof(x).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return x
    return jax.reshard(x, NamedSharding(sharding.mesh, PartitionSpec()))


def _initialise(w: LoraArray, data: Any, key, method: str, rank: int):
    """The update, and the base if it is another one."""
    delta = update_of(w, dense(w.base), data, key, method, rank)
    return delta, less_update(w.base, delta) if _METHODS[method].takes_out else None


_initialised = eqx.filter_jit(_initialise)
_abstract_initialised = ft.partial(eqx.filter_eval_shape, _initialise)
