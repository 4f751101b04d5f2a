"""The floating-point operations of matrix products: compiled, and on paper."""

import math
import re

from jax.stages import Compiled


_SHAPE = r"\w+\[([\d,]*)\]\S*"
_DEFINITION = re.compile(rf"^\s*(?:ROOT )?%?([\w.\-]+) = {_SHAPE} (\S+?)\((.*)$")
_OPERAND = re.compile(rf"^(?:{_SHAPE} )?%?([\w.\-]+)")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")


def product_flops(program: Compiled) -> float:
    """The operations of all `dot`s of a compiled program, by the text of it.

    XLA's own count has the elementwise operations too. The body of a loop counts once.
    """
    total, shapes = 0.0, {}
    for line in (program.as_text() or "").splitlines():
        if not (definition := _DEFINITION.match(line)):
            continue
        name, shape, opcode, rest = definition.groups()
        shapes[name] = _ints(shape)
        if opcode == "dot":
            operand = _OPERAND.match(rest)
            contracted = _CONTRACTED.search(rest)
            assert operand and contracted, line
            lhs = shapes[operand[2]]
            sizes = [lhs[i] for i in _ints(contracted[1])]
            total += 2 * math.prod(shapes[name]) * math.prod(sizes)
    return total


def _ints(text: str) -> list[int]:
    return [int(x) for x in text.split(",") if x]
