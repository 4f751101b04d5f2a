"""Which examples a step has, and how they lie in arrays of few shapes.

Both are functions of the seed and of the number of the step alone, so that a run that
is resumed has the batches that it would have had.
"""

import functools as ft
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .data import Tokens


_SHORTEST = 32


class Batch(NamedTuple):
    ids: np.ndarray  # (rows, length)
    learnt: np.ndarray  # (rows, length); false where a row is filled up

    @property
    def n_tokens(self) -> int:
        """How many there are, less what fills up."""
        return int(np.count_nonzero(self.ids >= 0))


class Order:
    """In each epoch each example once, in an order of its own. Those of a step are
    about as long as each other; the last steps of an epoch may have fewer."""

    def __init__(self, lengths: Sequence[int], per_step: int, seed: int):
        self._lengths = np.asarray(lengths)
        self._per_step, self._seed = per_step, seed
        self.steps_per_epoch = -(-len(lengths) // per_step)
        self._epoch = ft.lru_cache(maxsize=1)(self._shuffled)

    def __call__(self, step: int) -> np.ndarray:
        """The indices of the examples of a step, counted from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch)[place]

    def _shuffled(self, epoch: int) -> list[np.ndarray]:
        rng = np.random.default_rng([self._seed, epoch])
        order = rng.permutation(len(self._lengths))
        order = order[np.argsort(self._lengths[order], kind="stable")]
        cuts = range(self._per_step, len(order), self._per_step)
        parts = np.split(order, [*cuts])
        return [parts[i] for i in rng.permutation(len(parts))]


def padded_length(length: int, max_length: int) -> int:
    """The next power of two: few shapes, and few programs to compile."""
    return min(max_length, max(_SHORTEST, 1 << (length - 1).bit_length()))


def batches(examples: Sequence[Tokens], rows: int, max_length: int) -> list[Batch]:
    """These examples as batches of so many rows, all of one shape; rows of the last
    that are left over have nothing to be learnt."""
    longest, n = max(len(x.ids) for x in examples), -(-len(examples) // rows)
    shape = n * rows, padded_length(longest, max_length)
    ids, learnt = np.full(shape, -1, np.int32), np.zeros(shape, bool)
    for i, x in enumerate(examples):
        ids[i, : len(x.ids)] = x.ids
        learnt[i, : len(x.ids)] = x.learnt
    learnt[:, 0] = False  # There is nothing before it.
    split = lambda x: np.split(x, n)
    return [Batch(*parts) for parts in zip(split(ids), split(learnt))]
