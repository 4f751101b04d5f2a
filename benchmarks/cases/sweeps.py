"""The transformer's step as its width, tokens, rank and depth vary, one at a time."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping

import jax.random as jr

from .. import _work
from .._transformer import (
    BASE,
    best_products,
    floor_products,
    lora_products,
    loss_fn,
    make,
    QUICK,
    Size,
)
from .._work import Case, Claim, FROZEN, Measurement, OUTSIDE, Point, Row
from ..peers import by_hand


SHALLOW = dataclasses.replace(BASE, layers=2)


def cases(quick: bool) -> list[Case]:
    return [
        _case(
            "width",
            _vary(BASE, "width", (256, 512, 1024)),
            quick,
            [],
        ),
        _case(
            "tokens",
            # A batch of sequences of one length.
            {128 * n: dataclasses.replace(SHALLOW, batch=n) for n in (1, 4, 16, 64)},
            quick,
            [_flat],
        ),
        _case(
            "rank",
            _vary(SHALLOW, "rank", (1, 4, 16, 64, 256)),
            quick,
            [_growth],
        ),
        _case(
            "depth",
            _vary(BASE, "layers", (2, 6, 12, 24)),
            quick,
            [_flat],
        ),
    ]


def _vary(size: Size, field: str, values) -> dict[int, Size]:
    return {x: dataclasses.replace(size, **{field: x}) for x in values}


def _case(name: str, sizes: Mapping[int, Size], quick: bool, claims) -> Case:
    if quick:
        sizes = {1: QUICK, 2: dataclasses.replace(QUICK, rank=2)}

    def off(points):
        """By how much the compiled products differ from the best on paper, at worst."""
        return max(_off(points[str(x)][OUTSIDE], size) for x, size in sizes.items())

    return Case(
        f"{name}-sweep",
        f"A training step, by {name}",
        {str(x): _point(size) for x, size in sizes.items()},
        [
            Claim(f"{name}: FLOPs of products, off the fewest on paper", off, 0.01),
            *(claim(name, sizes) for claim in claims),
        ],
        rounds=3,
    )


def _point(size: Size) -> Callable[[], list[Row]]:
    def rows():
        model, adapted, data = make(size, jr.key(0))
        hand = by_hand.program(model, adapted, loss_fn)
        return [
            _work.frozen(model, loss_fn, data),
            _work.training("by hand, Equinox", hand, data, adapted=True),
            _work.ours(adapted, loss_fn, data)[0],
        ]

    return rows


def _off(m: Measurement, size: Size) -> float:
    off = (m.product_flops or 0) / best_products(size) - 1
    # Products with a vector are compiled as sums, which are not counted.
    return abs(off) if size.rank > 1 else max(off, 0)


# The floor takes the cotangents of the first layers' inputs, which LoRA does not need.
# The fewer the layers the more that counts, so what is compared is the time over the
# floor's *beyond* what the products on paper take.


def _beyond(rows: Point, size: Size) -> float:
    return rows[OUTSIDE].ratio(rows[FROZEN]) / _paper(size)


def _paper(size: Size) -> float:
    return lora_products(size) / floor_products(size)


def _flat(name: str, sizes: Mapping[int, Size]) -> Claim:
    def slope(points):
        y = [_beyond(points[str(x)], size) for x, size in sizes.items()]
        return statistics.linear_regression([math.log2(x) for x in sizes], y).slope

    text = f"{name}: rise a doubling of the ratio to the floor, over that on paper"
    return Claim(text, slope, 0.01)


def _growth(name: str, sizes: Mapping[int, Size]) -> Claim:
    def exponent(points):
        """Of the growth of time, as a power of the growth of FLOPs."""
        time = [points[str(x)][OUTSIDE].ratio(points[str(x)][FROZEN]) for x in sizes]
        logs = [[math.log(y) for y in ys] for ys in (map(_paper, sizes.values()), time)]
        return statistics.linear_regression(*logs).slope

    return Claim(
        f"{name}: time ÷ frozen grows as FLOPs ÷ frozen to the power", exponent, 1.0
    )
