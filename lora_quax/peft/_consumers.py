"""Adapters for programs that read PEFT's files, and less of them than PEFT does.

What each of them takes is in `docs/consumers.md`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from .._model.names import split
from ._update import ParameterUpdate


class _Takes(NamedTuple):
    kinds: tuple[str, ...]  # of updates
    whole: tuple[str, ...]  # modules, by the ends of their names


_TAKES = {
    "vllm": _Takes(("linear", "embedding"), ("lm_head",)),
    "llama.cpp": _Takes(("linear",), ()),
}


def check_consumer(consumer: str) -> None:
    """**Raises:** `ValueError` if it is none that is known."""
    known = "peft", *_TAKES
    if consumer not in known:
        raise ValueError(
            f"`consumer` must be {' or '.join(map(repr, known))}, got {consumer!r}."
        )


def for_consumer(
    consumer: str, updates: dict[str, ParameterUpdate]
) -> dict[str, ParameterUpdate]:
    """Updates of one rank and one alpha, where a consumer knows no more than these.

    Factors of a lower rank get zeros, and scalings that differ go into `B`.
    """
    ranks = {x.rank for x in updates.values()}
    if consumer == "peft" or len({(x.rank, x.alpha) for x in updates.values()}) == 1:
        return updates
    return {name: _folded(x, max(ranks)) for name, x in updates.items()}


def _folded(x: ParameterUpdate, rank: int) -> ParameterUpdate:
    more = rank - x.rank
    if x.kind not in ("linear", "embedding"):  # Refused below, for what it is.
        return x
    # A product with a scaling would lose much in 16 bits.
    dtype = jnp.promote_types(x.B.dtype, np.float32)
    B = x.B.astype(dtype) * np.asarray(x.alpha / x.rank, dtype)
    A = np.pad(x.A, [(0, more), (0, 0)])
    return x._replace(A=A, B=np.pad(B, [(0, 0), (0, more)]), rank=rank, alpha=rank)


def refuse_for(
    consumer: str,
    updates: Mapping[str, ParameterUpdate],
    fields: Mapping[str, Any],
    tensors: Mapping[str, Any],
) -> None:
    """**Raises:** `ValueError`, which lists what a consumer does not take."""
    if consumer == "peft":
        return
    kinds, whole = _TAKES[consumer]
    parameters = fields["target_parameters"] or ()
    problems = [
        f"`{name}` is adapted, {'a single parameter' if name in parameters else x.kind}"
        for name, x in updates.items()
        if x.kind not in kinds or name in parameters
    ]
    problems += [
        f"`{name}` is trained in full"
        for name in fields["modules_to_save"] or ()
        if split(name)[1] not in whole
    ]
    problems += [
        f"`{name}` is adapted by DoRA"
        for name, x in updates.items()
        if x.magnitude is not None
    ]
    if fields["bias"] != "none":
        problems.append(f"biases are trained (`bias={fields['bias']!r}`)")
    if fields.get("ensure_weight_tying"):
        problems.append("what adapts the embedding adapts the head tied to it")
    problems += [
        f"`{key}` is a weight that is adapted, and trained itself"
        for key in tensors
        if key.endswith(".base_layer.weight")
    ]
    if problems:
        lines = "".join(f"\n  - {problem}" for problem in problems)
        raise ValueError(
            f"{consumer} does not take such an adapter; merge it with "
            f"`lora_quax.merge`, and give it the model:{lines}"
        )
