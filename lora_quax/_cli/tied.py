"""A base whose head is its embedding: one tensor, or two of which one is not read."""

from pathlib import Path
from typing import Any

import numpy as np

from .._disk.files import AdapterError, read_json
from .._model.names import split
from ..peft._tied import says_tied
from .content import Content, Update
from .merge_plan import Tensors


def settled(
    base: Path, content: Content, tensors: Tensors, names: Any, tied: bool
) -> Content:
    """An adapter less what it has for the head, where the base has none.

    **Arguments:**

    - `tied`: whether it is said that what adapts the embedding adapts the head.

    **Raises:** `AdapterError` if the base ties them, and the adapter does not.
    """
    path = base / "config.json"
    config = read_json(path) if base.is_dir() and path.is_file() else {}
    if not says_tied(config):
        return content
    rows = _vocabulary(config)
    touched = [
        weight
        for weight, shape in _shapes(content).items()
        if len(shape) == 2 and rows in shape
    ]
    absent = [weight for weight in touched if names(weight) not in tensors]
    held = [weight for weight in touched if weight not in absent]
    for weight in absent:
        if not any(_are_one(content, weight, other) for other in held):
            continue
        updates = {k: x for k, x in content.updates.items() if k != weight}
        values = {k: x for k, x in content.values.items() if k != weight}
        content = content._replace(updates=updates, values=values, ties=True)
    alike = len(held) > 1 and all(_are_one(content, held[0], x) for x in held[1:])
    if held and not (content.ties or tied or alike):
        raise AdapterError(
            f"{path} says that the head of the base is its embedding, and the adapter "
            f"changes `{held[0]}` alone: merged, it would change both. If it was "
            "trained with them tied, say so with `--tied`; otherwise load the base "
            "with an array for each, and merge there."
        )
    return content


def _vocabulary(config: dict[str, Any]) -> Any:
    inner = config.get("text_config")
    own = inner.get("vocab_size") if isinstance(inner, dict) else None
    return config.get("vocab_size", own)


def _shapes(content: Content) -> dict[str, tuple[int, ...]]:
    shapes = {name: x.shape for name, x in content.values.items()}
    updates = content.updates.items()
    return shapes | {name: x.shape for name, x in updates if len(x.weights) == 1}


def _are_one(content: Content, one: str, other: str) -> bool:
    """Whether two weights become the same."""
    if split(one)[1] != split(other)[1]:
        return False
    x, y = (content.updates.get(name) for name in (one, other))
    if x is not None and y is not None:
        return _equal(x, y)
    u, v = (content.values.get(name) for name in (one, other))
    return u is not None and v is not None and np.array_equal(u, v)


def _equal(x: Update, y: Update) -> bool:
    return (
        x.shape == y.shape
        and x.scaling == y.scaling
        and np.array_equal(x.a, y.a)
        and np.array_equal(x.b, y.b)
    )
