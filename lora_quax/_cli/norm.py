"""How large an update is, and how far two are apart, without forming either."""

import numpy as np

from .update import Update


def norm(update: Update) -> float:
    """The Frobenius norm of `scaling · b @ a`, in float64."""
    return _norm(*_wide(update))


def distance(one: Update, other: Update) -> float:
    """The norm of the difference of two updates of one shape, relative to the larger.

    It is NaN if either is not finite.
    """
    (a1, b1), (a2, b2) = _wide(one), _wide(other)
    most = max(_norm(a1, b1), _norm(a2, b2))
    if most == 0:
        return 0.0
    # b1 @ a1 - b2 @ a2 is itself a product, of both ranks together.
    a = np.concatenate([a1, a2], axis=-2)
    b = np.concatenate([b1, -b2], axis=-1)
    return _norm(a, b) / most


def same(one: Update, other: Update) -> bool:
    pairs = (one.a, other.a), (one.b, other.b)
    return one.alpha == other.alpha and all(same_bits(x, y) for x, y in pairs)


def same_bits(x: np.ndarray, y: np.ndarray) -> bool:
    return (x.shape, x.dtype) == (y.shape, y.dtype) and x.tobytes() == y.tobytes()


def distance_of_values(x: np.ndarray, y: np.ndarray) -> float:
    """The same for two arrays of one shape."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    most = max(float(np.linalg.norm(x)), float(np.linalg.norm(y)))
    return float(np.linalg.norm(x - y)) / most if most else 0.0


def _wide(update: Update) -> tuple[np.ndarray, np.ndarray]:
    a, b = update.a.astype(np.float64), update.b.astype(np.float64)
    return a, update.scaling * b


def _norm(a: np.ndarray, b: np.ndarray) -> float:
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("nan")
    # ‖b @ a‖ = ‖R_b @ R_aᵀ‖ for b = Q_b R_b and aᵀ = Q_a R_a. A Gram matrix would have
    # the squares, and half of the digits, where two updates nearly cancel.
    r_a = np.linalg.qr(np.swapaxes(a, -1, -2), mode="r")
    r_b = np.linalg.qr(b, mode="r")
    return float(np.linalg.norm(r_b @ np.swapaxes(r_a, -1, -2)))
