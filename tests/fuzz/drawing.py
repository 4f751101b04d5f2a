"""What every part of a drawn program is drawn with."""

from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import quax
from hypothesis import reject
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from .arrays import abstract, Input, Weight


NAMES = dict(
    jax=jax, jnp=jnp, lax=lax, np=np, quax=quax, checkpoint_name=checkpoint_name
)
_LARGEST = 300


class Draft:
    """A function that is being written: its arguments, its lines, what each name is."""

    def __init__(self, draw, weight: Weight):
        self.draw = draw
        self.arguments: dict[str, Any] = {}  # Weights and inputs.
        self.lines: list[str] = []
        self.types: dict[str, jax.ShapeDtypeStruct] = {}
        self.casts: list[str] = []
        self.looked_up = 0  # How many numbers of the weight, at the most.
        self.returns_weight = False
        self.is_dilated = False  # Whether a convolution has strides or gaps.
        self.add("w", weight)

    # Choices.

    def integer(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def flag(self) -> bool:
        return self.draw(st.booleans())

    def one(self, options: Sequence) -> Any:
        if not options:
            reject()
        return self.draw(st.sampled_from(list(options)))

    def some(self, options: Sequence, least: int = 0, most: int | None = None) -> list:
        """A subset, in any order."""
        options = list(options)
        most = len(options) if most is None else min(most, len(options))
        if least > most:
            reject()
        return self.order(options)[: self.integer(least, most)]

    def order(self, options: Sequence) -> list:
        return self.draw(st.permutations(list(options)))

    def axis(self, shape) -> int:
        return self.one(range(len(shape)))

    # What is written.

    def add(self, name: str, array: Weight | Input) -> str:
        self.arguments[name] = array
        self.types[name] = abstract(array)
        return name

    def input(self, shape) -> str:
        name = f"x{sum(isinstance(x, Input) for x in self.arguments.values())}"
        seed = len(self.arguments)
        return self.add(name, Input(tuple(shape), seed, self.types["w"].dtype.name))

    def second_weight(self) -> str:
        """Another weight, of the shape that the first one has now."""
        n = sum(isinstance(x, Weight) for x in self.arguments.values())
        w = self.arguments["w"]
        assert isinstance(w, Weight)
        shape = self.shape
        if len(shape) < 2:
            reject()
        rows = min(w.rows, len(shape) - 1)
        cols = min(w.cols, len(shape) - rows)
        return self.add(
            f"v{n}",
            w._replace(
                shape=shape, rows=rows, cols=cols, rank=self.integer(1, 2), seed=10 + n
            ),
        )

    def let(self, name: str, expression: str):
        """Writes `name = expression`. What JAX would not accept is not written."""
        names = list(self.types)
        f = eval(f"lambda {', '.join(names)}: {expression}", NAMES)
        try:
            out = jax.eval_shape(f, *self.types.values())
        except Exception:
            reject()
        if out.size > _LARGEST:
            reject()
        self.lines.append(f"{name} = {expression}")
        self.types[name] = out

    @property
    def shape(self) -> tuple[int, ...]:
        return self.types["w"].shape
