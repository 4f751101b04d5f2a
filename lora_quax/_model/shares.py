"""Ranks that are shared out among weights under one budget, as EVA has it."""

import numpy as np

from .._arrays.lora import LoraArray
from .moments import Moments
from .together import whole


def shares(weights: list[LoraArray], moments: list[Moments], rho: float) -> list[int]:
    """A rank for each weight, and no more in all than they have now.

    They go to the components that explain most of the variance of what their weight is
    given, at most `rho` times as many to a weight as it has now. Those of a stack have
    one rank, by the mean of what a component explains in each, and each counts.
    """
    entries = []
    for i, (w, x) in enumerate(zip(weights, moments)):
        explained = _explained(x)[: round(w.rank * rho)]
        entries += [(-part, i) for part in explained.tolist()]
    left = sum(w.rank * _stacked(w) for w in weights)
    out = [0] * len(weights)
    for _, i in sorted(entries, key=lambda entry: entry[0]):
        if _stacked(weights[i]) <= left:
            left -= _stacked(weights[i])
            out[i] += 1
    return out


def _stacked(w: LoraArray) -> int:
    return int(np.prod(w.shape[: w.n_batch]))


def _explained(moments: Moments) -> np.ndarray:
    """The part of the variance that each component explains, the largest first."""
    covariance = whole(moments.covariance()).astype(np.float64)
    values = np.linalg.eigvalsh(covariance)[..., ::-1].clip(0)
    parts = values / np.maximum(values.sum(-1, keepdims=True), np.finfo(float).tiny)
    return parts.reshape(-1, parts.shape[-1]).mean(0)
