"""The kinds of work that are measured, one a file."""

from .._transformer import MANY, QUICK, SIZES
from .._work import Case
from . import (
    adapters,
    bfloat16,
    convolution,
    decode,
    derivatives,
    dora,
    embedding,
    forms,
    initialise,
    lstm,
    order,
    prefill,
    quantised,
    scanned,
    sweeps,
    tracing,
    transformer,
)


def all_cases(quick: bool, torch: str, size: str = "base") -> list[Case]:
    """Every case.

    **Arguments:**

    - `quick`: small models, to see whether they run.
    - `torch`: an interpreter that has PyTorch and PEFT.
    - `size`: of the transformer that is trained.
    """
    of = QUICK if quick else SIZES[size]
    suffix = "" if size == "base" else f"-{size}"
    return [
        transformer.case(f"transformer{suffix}", of, torch),
        transformer.many_tokens("many-tokens", QUICK if quick else MANY),
        bfloat16.case(f"bfloat16{suffix}", of),
        quantised.case(f"quantised{suffix}", of),
        dora.case(f"dora{suffix}", of),
        forms.case(f"forms{suffix}", of, torch),
        *sweeps.cases(quick),
        convolution.case(quick),
        embedding.case(quick),
        lstm.case(quick),
        *scanned.cases(quick),
        decode.case(quick),
        prefill.case(quick),
        derivatives.case(quick),
        order.case(quick),
        tracing.case(quick),
        initialise.case(quick),
        adapters.case(quick),
    ]
