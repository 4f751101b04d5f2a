"""The matrix products of a compiled program, by the text of it."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from jax.stages import Compiled


_SHAPE = r"\w+\[([\d,]*)\](?:\{([\d,]*)[^}]*\})?"
_DEFINITION = re.compile(rf"^\s*(?:ROOT )?%?([\w.\-]+) = {_SHAPE} (\S+?)\((.*)$")
_OPERANDS = re.compile(r"%([\w.\-]+)|(?<![\w.\-])([a-zA-Z_][\w.\-]*)(?=[,)])")


class _Array(NamedTuple):
    """The type of an array, as the text gives it."""

    shape: list[int]
    layout: list[int]


@dataclass(frozen=True)
class Operand:
    """An operand of a product: the lengths of its axes, outermost in memory first."""

    shape: tuple[int, ...]
    contracted: tuple[int, ...]  # Which of the axes, as they are ordered here.
    batch: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def free(self) -> list[int]:
        paired = (*self.contracted, *self.batch)
        return [i for i in range(len(self.shape)) if i not in paired]

    def length(self, axes) -> int:
        return math.prod(self.shape[i] for i in axes)


@dataclass(frozen=True)
class Product:
    """A `dot` of a compiled program, as its result lies in memory.

    A result whose axes from the right operand lie outermost is computed as the product
    of the operands in the other order, and so stands here.
    """

    left: Operand
    right: Operand

    @property
    def flops(self) -> int:
        return 2 * self.left.size * self.right.length(self.right.free)

    @property
    def thinnest(self) -> int:
        """The least of its three lengths; of a product with factors, the rank."""
        left, right = self.left, self.right
        return min(
            left.length(left.free),
            left.length(left.contracted),
            right.length(right.free),
        )

    @property
    def reads_across(self) -> bool:
        """Whether its wide operand is read otherwise than as it lies in memory.

        On the left, what is contracted has to lie innermost, on the right outermost.
        Where the result is wider than both operands, neither counts.
        """
        left, right = self.left, self.right
        result = left.size * right.length(right.free) // left.length(left.contracted)
        if result > max(left.size, right.size):
            return False
        if left.size >= right.size:
            return min(left.contracted) < max(left.free, default=-1)
        return max(right.contracted) > min(right.free, default=len(right.shape))


def products(program: Compiled) -> Iterator[Product]:
    """All products, those of the body of a loop once."""
    arrays: dict[str, _Array] = {}
    for line in (program.as_text() or "").splitlines():
        if not (definition := _DEFINITION.match(line)):
            continue
        name, shape, layout, opcode, rest = definition.groups()
        arrays[name] = _Array(_ints(shape), _ints(layout or ""))
        if opcode == "dot":
            first, second = (a or b for a, b in _OPERANDS.findall(rest)[:2])
            left = _operand(arrays[first], "lhs", rest)
            right = _operand(arrays[second], "rhs", rest)
            n_batch, n_left = len(left.batch), len(left.free)
            # The axes of the result: batch, free of the left, free of the right.
            free = [i for i in _outermost_first(arrays[name]) if i >= n_batch]
            turned = n_left and free[0] >= n_batch + n_left
            yield Product(right, left) if turned else Product(left, right)


def product_flops(program: Compiled) -> float:
    """The floating-point operations of all products.

    XLA's own count has the elementwise operations too.
    """
    return float(sum(product.flops for product in products(program)))


def _operand(array: _Array, side: str, text: str) -> Operand:
    order = _outermost_first(array)

    def axes(kind: str) -> tuple[int, ...]:
        found = re.search(rf"{side}_{kind}_dims={{([\d,]*)}}", text)
        return tuple(order.index(i) for i in _ints(found[1] if found else ""))

    shape = tuple(array.shape[i] for i in order)
    return Operand(shape, axes("contracting"), axes("batch"))


def _outermost_first(array: _Array) -> list[int]:
    # A layout names the axes innermost first, and is left out where there is no choice.
    return array.layout[::-1] or list(range(len(array.shape)))


def _ints(text: str) -> list[int]:
    return [int(x) for x in text.split(",") if x]
