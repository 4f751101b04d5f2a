"""First factors of one matrix `(rows, cols)`: `(rows, rank)` and `(rank, cols)`.

Each function is given the matrix, what data say of it, the rank, the scaling, and a
key. The rank may be more than there are directions; then fewer are given.
"""

import math
from typing import Any

import jax.numpy as jnp
import jax.random as jr


def _of_singular_values(u, s, v, rank: int, scaling: float):
    """The largest of them, shared by both factors."""
    root = jnp.sqrt(s[:rank] / abs(scaling))
    return math.copysign(1, scaling) * u[:, :rank] * root, root[:, None] * v[:rank]


def pissa(w, data: Any, rank: int, scaling: float, key):
    del data, key
    u, s, v = jnp.linalg.svd(w, full_matrices=False)
    return _of_singular_values(u, s, v, rank, scaling)


_MORE, _ITERATIONS = 10, 4  # Vectors beyond the rank; products with w · wᵀ.


def randomised_pissa(w, data: Any, rank: int, scaling: float, key):
    del data
    n = min(rank + _MORE, *w.shape)
    q, _ = jnp.linalg.qr(w @ jr.normal(key, (w.shape[1], n), w.dtype))
    for _ in range(_ITERATIONS):
        q, _ = jnp.linalg.qr(w.T @ q)
        q, _ = jnp.linalg.qr(w @ q)
    u, s, v = jnp.linalg.svd(q.T @ w, full_matrices=False)
    return _of_singular_values(q @ u, s, v, rank, scaling)


def olora(w, data: Any, rank: int, scaling: float, key):
    del data, scaling, key
    q, r = jnp.linalg.qr(w)
    return q[:, :rank], r[:rank]


def orthogonal(w, data: Any, rank: int, scaling: float, key):
    """Of the rows of an orthogonal matrix some are for one factor, some for the other,
    so that their product is zero."""
    del data, scaling
    keys, half = jr.split(key, 3), rank // 2
    q, _ = jnp.linalg.qr(jr.normal(keys[0], (rank, rank), w.dtype))
    a = jr.normal(keys[1], (w.shape[1], half), w.dtype) @ q[0::2] / 10
    b = jr.normal(keys[2], (w.shape[0], half), w.dtype) @ q[1::2] / 10
    return b, a.T


def eva(w, moments: Any, rank: int, scaling: float, key):
    """The principal components of what the weight is given."""
    del scaling, key
    _, components = jnp.linalg.eigh(moments.covariance().astype(w.dtype))
    a = components[:, ::-1][:, :rank].T
    return jnp.zeros((w.shape[0], len(a)), w.dtype), a


_DAMPING = 0.01  # Of the mean of the diagonal, as in PEFT.


def corda(w, moments: Any, rank: int, scaling: float, key, *, smallest: bool):
    """With `C` the mean of `x · xᵀ`, and `w · C = u · s · v`: of some singular values
    `u · s · v · C⁻¹`. That is `u · uᵀ · w`, so that nothing has to be inverted."""
    del key
    second = (moments.second / jnp.maximum(moments.count, 1)).astype(w.dtype)
    size = jnp.trace(second) / len(second)
    # An expert that was given nothing is taken as it is.
    damping = jnp.where(size > 0, _DAMPING * size, 1)
    u, s, _ = jnp.linalg.svd(w @ second + damping * w, full_matrices=False)
    which = slice(-rank, None) if smallest else slice(rank)
    u, s = u[:, which], jnp.sqrt(s[which] * abs(scaling))
    a = jnp.where(s > 0, 1 / jnp.where(s > 0, s, 1), 0)[:, None] * (u.T @ w)
    return u * s / scaling, a


_GAMMA = 16  # The paper's hyperparameter γ, as in PEFT.


def lora_ga(w, gradient: Any, rank: int, scaling: float, key):
    """Left and right singular vectors of the gradient, no two of one singular value,
    both of the length `rows^¼ / √γ`."""
    del scaling, key
    u, _, v = jnp.linalg.svd(gradient.astype(w.dtype), full_matrices=False)
    length = len(w) ** 0.25 / _GAMMA**0.5
    return length * u[:, rank : 2 * rank], length * v[:rank]
