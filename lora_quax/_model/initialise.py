"""First updates that are taken from the weights, and not drawn.

Some are taken out of the base, so that the sum is what it was. An adapter that was
trained from there belongs to that base; `rebase` puts it on the one before.
"""

import functools as ft
import math
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import quax
from jaxtyping import PRNGKeyArray, PyTree

from .._arrays.base import dense, replace
from .._arrays.check import check_count, check_key, wider
from .._arrays.lora import LoraArray
from .._arrays.low_rank import LowRankArray
from .paths import dotted, named, words
from .quantise import check_codec, Kind, quantised


Method = Literal["pissa", "randomised pissa", "olora", "orthogonal"]


def initialise(
    model: PyTree, method: Method, *, key: PRNGKeyArray | None = None
) -> PyTree:
    """Gives the updates of a model other first values, taken from its weights.

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

    The model computes what it computed before, as exactly as the base can hold the
    rest. A weight with several axes of columns, such as a convolution's, is taken as a
    matrix; one with batch axes as a matrix for each index.

    **Arguments:**

    - `model`: a model with `LoraArray`s, abstract or not.
    - `method`: one of the above.
    - `key`: for the methods that draw: `"orthogonal"` and `"randomised pissa"`.

    **Returns:** the model with other factors, and other bases where they are taken out.

    **Raises:** `ValueError` if `method` is not known, needs a key, or a rank is odd; if
    nothing in the model is a `LoraArray`, or one has an update that is no
    `LowRankArray`, or a base that is no plain array, out of which nothing can be taken.
    """
    if method not in _METHODS:
        known = ", ".join(map(repr, _METHODS))
        raise ValueError(f"`method` must be one of {known}, got {method!r}.")
    if method in _DRAWN:
        if key is None:
            raise ValueError(f"{method!r} draws numbers: give it a `key`.")
        check_key(key)

    def change(where: str, w: LoraArray, word) -> LoraArray:
        if method != "orthogonal":
            _refuse_base(where, w, f"{method!r} takes the update out of the base")
        if method == "orthogonal" and w.rank % 2:
            raise ValueError(
                f"{where} has rank {w.rank}; for orthogonal factors it must be even."
            )
        own = None if key is None else jr.fold_in(key, word[0])
        run: Any = _abstract_initialised if _is_abstract(w) else _initialised
        return run(w, own, method)

    return _on_each(model, change)


def loftq(
    model: PyTree, kind: Kind = "nf4", *, tile: int | None = 64, steps: int = 1
) -> PyTree:
    """Quantises the bases of a model, with first updates that make up for the error.

    In each step the weight less its update is quantised, and the update is the best of
    its rank for what quantising lost (Li et al., *LoftQ*, arXiv 2310.08659).

    **Arguments:**

    - `model`: a model with `LoraArray`s around plain arrays.
    - `kind`, `tile`: as for `quantise`.
    - `steps`: how often.

    **Returns:** the model with quantised bases, and such updates. It is nearer to the
    model before than `quantise` alone is, and is no longer equal to it.

    **Raises:** as `quantise` and `initialise`.
    """
    check_codec(kind, tile)
    check_count("steps", steps)

    def change(where: str, w: LoraArray, _) -> LoraArray:
        _refuse_base(where, w, "the base is to be quantised")
        out, rest = w, w.base
        for _ in range(steps):
            base = quantised(where, rest, w.delta.cols, kind, tile)
            out = replace(w, base=base, delta=_best_update(w, base))
            rest = _less_update(w.base, out.delta)
        return out

    return _on_each(model, change)


def _on_each(model: PyTree, change: Callable) -> PyTree:
    """The model with `change(where, w, word)` of each `LoraArray`."""
    is_leaf = lambda x: isinstance(x, LoraArray)
    leaves, treedef = jtu.tree_flatten_with_path(model, is_leaf=is_leaf)
    if not any(is_leaf(x) for _, x in leaves):
        raise ValueError("Nothing in the model is a `LoraArray`. Call `loraify` first.")
    paths = [dotted(path) for path, _ in leaves]
    done: dict[tuple, LoraArray] = {}  # One array in two places stays one.
    out = []
    for path, word, (_, x) in zip(paths, words(paths), leaves):
        arrays = tuple(map(id, jax.tree.leaves(x)))
        if is_leaf(x) and arrays not in done:
            done[arrays] = change(named(path), low_rank(named(path), x), word)
        out.append(done[arrays] if is_leaf(x) else x)
    return jax.tree.unflatten(treedef, out)


def low_rank(where: str, w: LoraArray) -> LoraArray:
    if not isinstance(w.delta, LowRankArray):
        raise ValueError(
            f"{where} has an update of the form {type(w.delta).__name__}; only the two "
            "factors of a `LowRankArray` are known from a weight."
        )
    return w


def _refuse_base(where: str, w: LoraArray, why: str) -> None:
    if isinstance(w.base, quax.Value):
        raise ValueError(
            f"{where} has a base that is a {type(w.base).__name__}, and {why}, which "
            "takes a plain array."
        )


def _is_abstract(w) -> bool:
    return any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(w))


# Of one matrix `(rows, cols)`: the factors `(rows, rank)` and `(rank, cols)`.


def _of_singular_values(u, s, v, rank: int, scaling: float):
    """The largest of them, shared by both factors."""
    root = jnp.sqrt(s[:rank] / abs(scaling))
    return math.copysign(1, scaling) * u[:, :rank] * root, root[:, None] * v[:rank]


def _pissa(w, rank: int, scaling: float, key):
    del key
    u, s, v = jnp.linalg.svd(w, full_matrices=False)
    return _of_singular_values(u, s, v, rank, scaling)


_MORE, _ITERATIONS = 10, 4  # Vectors beyond the rank; products with w · wᵀ.


def _randomised_pissa(w, rank: int, scaling: float, key):
    n = min(rank + _MORE, *w.shape)
    q, _ = jnp.linalg.qr(w @ jr.normal(key, (w.shape[1], n), w.dtype))
    for _ in range(_ITERATIONS):
        q, _ = jnp.linalg.qr(w.T @ q)
        q, _ = jnp.linalg.qr(w @ q)
    u, s, v = jnp.linalg.svd(q.T @ w, full_matrices=False)
    return _of_singular_values(q @ u, s, v, rank, scaling)


def _olora(w, rank: int, scaling: float, key):
    del scaling, key
    q, r = jnp.linalg.qr(w)
    return q[:, :rank], r[:rank]


def _orthogonal(w, rank: int, scaling: float, key):
    """Of the rows of an orthogonal matrix some are for one factor, some for the other,
    so that their product is zero."""
    del scaling
    keys, half = jr.split(key, 3), rank // 2
    q, _ = jnp.linalg.qr(jr.normal(keys[0], (rank, rank), w.dtype))
    a = jr.normal(keys[1], (w.shape[1], half), w.dtype) @ q[0::2] / 10
    b = jr.normal(keys[2], (w.shape[0], half), w.dtype) @ q[1::2] / 10
    return b, a.T


_METHODS: dict[str, Callable] = {
    "pissa": _pissa,
    "randomised pissa": _randomised_pissa,
    "olora": _olora,
    "orthogonal": _orthogonal,
}
_DRAWN = ("randomised pissa", "orthogonal")


def _factors(of, w: LoraArray, key, method: str) -> LowRankArray:
    """The update of `w` that a method finds in the array `of`, matrix by matrix."""
    n = w.n_batch
    batch, row_shape, col_shape = w.b.shape[:n], w.b.shape[n:-1], w.a.shape[n + 1 :]
    wide = wider(of.dtype, jnp.float32)
    sizes = [math.prod(shape) for shape in (batch, row_shape, col_shape)]
    matrices = of.astype(wide).reshape(sizes)
    keys = jr.split(jr.key(0) if key is None else key, len(matrices))
    find = ft.partial(_METHODS[method], rank=w.rank, scaling=w.scaling)
    b, a = jax.vmap(lambda matrix, key: find(matrix, key=key))(matrices, keys)
    missing = w.rank - b.shape[-1]  # A rank beyond that of the matrix.
    b = jnp.pad(b, ((0, 0), (0, 0), (0, missing)))
    a = jnp.pad(a, ((0, 0), (0, missing), (0, 0)))
    return replace(
        w.delta,
        a=a.reshape(*batch, w.rank, *col_shape).astype(w.a.dtype),
        b=b.reshape(*batch, *row_shape, w.rank).astype(w.b.dtype),
    )


def _less_update(base, delta: LowRankArray):
    wide = wider(base.dtype, jnp.float32)
    return (base.astype(wide) - delta.product().astype(wide)).astype(base.dtype)


def _initialise(w: LoraArray, key, method: str) -> LoraArray:
    delta = _factors(dense(w.base), w, key, method)
    keeps = method == "orthogonal"
    base = w.base if keeps else _less_update(w.base, delta)
    return replace(w, base=base, delta=delta)


_initialised = eqx.filter_jit(_initialise)
_abstract_initialised = ft.partial(eqx.filter_eval_shape, _initialise)


@eqx.filter_jit
def _best_update(w: LoraArray, base) -> LowRankArray:
    """That of what a quantised base lacks."""
    wide = wider(w.base.dtype, jnp.float32)
    lacking = w.base.astype(wide) - dense(base).astype(wide)
    return _factors(lacking, w, None, "pissa")
