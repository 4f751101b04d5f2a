"""An adapter as the commands see it: updates, arrays given whole, additions."""

from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np


class Update(NamedTuple):
    """A low-rank update `scaling · b @ a`, of a weight or of a stack of weights."""

    weights: tuple[str, ...]  # the weight; several if the files leave it open which
    kind: str
    a: np.ndarray  # (*batch, rank, cols)
    b: np.ndarray  # (*batch, rows, rank)
    alpha: float
    shape: tuple[int, ...]  # of the weight: (*batch, *rows, *cols)
    has_base: bool = True  # or the weight is the product alone
    may_turn: bool = False  # whether a model may keep the weight transposed

    @property
    def rank(self) -> int:
        return self.b.shape[-1]

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    @property
    def dtype(self) -> str:
        return " and ".join(dict.fromkeys((self.a.dtype.name, self.b.dtype.name)))

    def dense(self, dtype, index: tuple[int, ...] = ()) -> np.ndarray:
        """The update as an array of the weight's shape, or one slice of its stack."""
        a, b = (x[index].astype(dtype) for x in (self.a, self.b))
        product = np.asarray(self.scaling, dtype) * (b @ a)
        return product.reshape(self.shape[len(index) :])


class Added(NamedTuple):
    """What is added to a bias: `scaling · x`."""

    x: np.ndarray
    scaling: float


class Content(NamedTuple):
    """What an adapter holds."""

    path: Path
    format: Literal["lora_quax", "PEFT"]
    # By where they stand: the path of the weight, for an adapter on an adapter with
    # `.base` for each adapter above it.
    updates: dict[str, Update]
    values: dict[str, np.ndarray]  # weight -> what it is, before updates
    added: dict[str, Added]  # bias -> what is added to it
    fan_in_fan_out: bool = False
    initialisation: bool | str | None = True  # by PEFT's names; it may change the base
