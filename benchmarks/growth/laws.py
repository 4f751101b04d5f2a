"""What is expected on paper of what is sent, and how much of each there is.

A term is a number of bytes that shapes say. A law is a sum of terms, and its
coefficients are fitted, by least squares, to the programs of one step and one split.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .programs import FULL, HIDDEN, LORA, MIDDLE, QLORA, RANK, TOKENS, WORDS


Program = Mapping[str, Any]  # As it is in the file of results.
# Of the linear layers of a block, in widths, the axes that a split divides and those
# that it leaves whole: b has the rows of each, and a the columns.
_DIVIDED = dict(dp=0, fsdp=5 + 2, tp=3 + 2 * HIDDEN + 1 + HIDDEN)
_AXES = 4 * 2 + 3 * (1 + HIDDEN)
_WEIGHTS = 4 + 3 * HIDDEN  # In squares of the width.


def _base(p: Program) -> float:
    width = 1 / 2 + 4 / 64 if p["step"] == QLORA else 4  # Codes and scales of tiles.
    return width * _WEIGHTS * p["layers"] * p["width"] ** 2


def _factors(p: Program, axes: int) -> float:
    return 4 * RANK * axes * p["layers"] * p["width"]


def _x(p: Program) -> float:
    """What goes from one layer to the next, of the rows that a device has."""
    rows = p["devices"] if p["split"] == "tp" else 1
    return 4 * rows * TOKENS * p["width"]


def _kept(p: Program) -> float:
    """The inputs of layers, of a quantised model in bfloat16, and the gradients."""
    inputs = p["layers"] * _x(p) / (2 if p["step"] == QLORA else 1)
    if p["step"] == FULL:
        n = 1 if p["split"] == "dp" else p["devices"]
        return inputs + (_base(p) + 2 * TERMS["head"](p)) / n
    return inputs + TERMS["split/n"](p) + TERMS["whole"](p)


def _layer(p: Program) -> float:
    """The weights of a layer, in float32, as they are when it runs."""
    n = p["devices"] if p["split"] == "tp" else 1
    return 4 * _WEIGHTS * p["width"] ** 2 / n


TERMS: dict[str, Callable[[Program], float]] = {
    "base": _base,
    "base/n": lambda p: _base(p) / p["devices"],
    "factors": lambda p: _factors(p, _AXES),
    "split": lambda p: _factors(p, _DIVIDED[p["split"]]),
    "split/n": lambda p: _factors(p, _DIVIDED[p["split"]]) / p["devices"],
    "whole": lambda p: _factors(p, _AXES - _DIVIDED[p["split"]]),
    "head": lambda p: 4 * WORDS * p["width"],
    "head/n": lambda p: 4 * WORDS * p["width"] / p["devices"],
    "x": _x,
    "x/n": lambda p: _x(p) / p["devices"],
    "L x": lambda p: p["layers"] * _x(p),
    "L z": lambda p: p["layers"] * _x(p) * RANK / p["width"],
    "kept": _kept,
    "layer": _layer,
}

# By step and split, then by figure: the terms, and how often each is there on paper.
# Along `tp` are added up what o and down make, what o makes once more, and on the way
# back what q, k, v, gate and up send, each by itself; of the rank also what down makes
# once more, for the gradient of its b. The ends are x: the embedding, and the head's
# cotangent.
Law = Mapping[str, float]
_ADAM = 3  # A number that trains, and its two moments.
_KEPT = {"base/n": 1, "split/n": _ADAM, "whole": _ADAM, "head/n": 2}
_ALL_TRAINS = {"base/n": _ADAM, "head/n": 2 * _ADAM}
LAWS: dict[tuple[str, str], Mapping[str, Law]] = {
    (LORA, "dp"): {
        "all-reduce": {"factors": 1},
        "arguments": {"base": 1, "factors": _ADAM, "head": 2},
    },
    (LORA, "fsdp"): {
        "all-gather": {"base": 2, "head": 1, "split": 2},
        "all-reduce": {"factors": 1},
        "all-to-all": {"x": 1},
        "arguments": _KEPT,
    },
    (LORA, "tp"): {
        "all-reduce": {"L x": 8, "x": 2, "L z": 9},
        "arguments": _KEPT,
    },
    (FULL, "dp"): {
        "all-reduce": {"base": 1, "head": 2},
        "arguments": {"base": _ADAM, "head": 2 * _ADAM},
    },
    (FULL, "fsdp"): {
        "all-gather": {"base": 2, "head": 1},
        "all-reduce": {"base": 1, "head": 1},
        "all-to-all": {"x": 2},
        "arguments": _ALL_TRAINS,
    },
    (FULL, "tp"): {
        "all-reduce": {"L x": 8, "x": 2},
        "arguments": _ALL_TRAINS,
    },
    (QLORA, "fsdp"): {
        "all-gather": {"base": 2, "head": 1, "split": 2},
        "all-reduce": {"factors": 1},
        "all-to-all": {"x": 1},
        "arguments": {**_KEPT, "head/n": 1},  # In bfloat16.
    },
}

# What there is besides arguments, by split. Of it paper has the terms alone, as some is
# XLA's own affair: what it copies, and how much of a layer is there at once.
BESIDES: dict[str, tuple[str, ...]] = {
    "dp": ("kept", "layer", "x"),
    "fsdp": ("kept", "layer", "base/n", "x"),
    "tp": ("kept", "layer", "x", "x/n"),
}


class Fit(NamedTuple):
    """A law fitted to programs."""

    coefficients: dict[str, float]
    off: float  # The largest deviation of a program from it, relative.


def terms_of(step: str, split: str) -> dict[str, tuple[str, ...]]:
    """Those of every figure."""
    exact = {name: (*law,) for name, law in LAWS[step, split].items()}
    return exact | {"besides": BESIDES[split]}


def figure(program: Program, name: str) -> float:
    return program["sent"][name] if "-" in name else program[name]


def fit(programs: Sequence[Program], name: str, terms: Sequence[str]) -> Fit:
    """Least squares, each program relative to what it is found to have."""
    y = np.array([figure(p, name) for p in programs])
    x = np.array([[TERMS[term](p) for term in terms] for p in programs])
    found, *_ = np.linalg.lstsq(x / y[:, None], np.ones(len(y)))
    off = abs(x @ found / y - 1).max()
    return Fit(dict(zip(terms, found.tolist())), float(off))


def exponents(programs: Sequence[Program], name: str) -> dict[str, float]:
    """By what power a figure grows with each size, with the others as in the middle."""
    out = {}
    for size in MIDDLE:
        others = [(key, n) for key, n in MIDDLE.items() if key != size]
        swept = [p for p in programs if all(p[key] == n for key, n in others)]
        x = [math.log(p[size]) for p in swept]
        y = [math.log(figure(p, name)) for p in swept]
        out[size] = statistics.linear_regression(x, y).slope
    return out
