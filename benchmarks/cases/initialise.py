"""`loraify` itself: a large model's factors, and the plan of a huge one's."""

import dataclasses

import equinox as eqx
import jax
import jax.random as jr

import lora_quax

from .._transformer import BASE, QUICK, Size, Transformer
from .._work import Case, Claim, Row


# Brown et al., arXiv 2005.14165, table 2.1.
GPT3 = Size(layers=96, width=12288, heads=96)
# Hu et al., arXiv 2106.09685, table 4: 37.7 million, for r = 8 on q and v.
GPT3_TRAINABLE = 96 * 2 * 8 * 2 * 12288


def case(quick: bool) -> Case:
    size = QUICK if quick else dataclasses.replace(BASE, layers=24, width=1024)
    huge = dataclasses.replace(GPT3, layers=2) if quick else GPT3
    text = f"loraify, {size.layers} layers of width {size.width}: seconds"
    gpt3 = "loraify at GPT-3's shapes"

    def seconds(point, row):
        return lambda points: points[point][row].time

    def off(points):
        expected = GPT3_TRAINABLE * huge.layers / GPT3.layers
        return abs(points["GPT-3"]["abstract"].facts["trainable"] - expected)

    return Case(
        "initialise",
        "Calls of loraify, after the first",
        {
            "large": lambda: [_large(size)],
            "GPT-3": lambda: [_abstract(huge)],
        },
        [
            Claim(text, seconds("large", "loraify"), 1.0),
            Claim(f"{gpt3}: seconds", seconds("GPT-3", "abstract"), 10.0),
            Claim(f"{gpt3}: trainable parameters, off the paper's", off, 0),
        ],
        measure="call",
        rounds=5,
    )


def _large(size: Size) -> Row:
    model = Transformer(size, jr.key(0))

    def call(state, fixed):
        adapted = lora_quax.loraify(model, size.rank, jr.key(1))
        return state, 0.0, lora_quax.partition(adapted)[0]

    return Row("loraify", call, (), ())


def _abstract(size: Size) -> Row:
    model = eqx.filter_eval_shape(Transformer, size, jr.key(0))

    def adapt():
        return lora_quax.loraify(model, 8, jr.key(1), targets=["q", "v"])

    params, _ = lora_quax.partition(adapt())
    trainable = sum(x.size for x in jax.tree.leaves(params))

    def call(state, fixed):
        adapt()
        return state, 0.0

    return Row("abstract", call, (), (), facts=dict(trainable=trainable))
