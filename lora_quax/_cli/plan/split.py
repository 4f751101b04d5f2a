"""How a Llama and its batch are divided among the devices of a mesh."""

import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..._model.shard import shard
from .llama import Llama
from .sizes import Sizes


AXES = ("dp", "fsdp", "tp", "sp")
_COLUMNS = r"layers\.(q|k|v|gate|up)_proj"
_ROWS = r"layers\.(o|down)_proj"


def read_mesh(text: str) -> dict[str, int]:
    """`fsdp=8,tp=4` as the sizes of the axes.

    **Raises:** `ValueError` for an axis that is not known, there twice, or of no size.
    """
    out: dict[str, int] = {}
    for part in text.split(","):
        name, equals, size = part.strip().partition("=")
        if name not in AXES:
            raise ValueError(
                f"--mesh has the axis {name!r} in {text!r}. The axes are "
                f"{', '.join(AXES)}, each with a size, as in fsdp=8,tp=4."
            )
        if name in out:
            raise ValueError(f"--mesh has the axis {name!r} twice in {text!r}.")
        is_count = size.isascii() and size.isdigit() and len(size) < 10
        if not equals or not is_count or int(size) < 1:
            raise ValueError(
                f"--mesh says {part.strip()!r}, and the size of an axis is to be a "
                "positive integer, as in fsdp=8,tp=4."
            )
        out[name] = int(size)
    return out


def check_divides(axes: dict[str, int], sizes: Sizes, batch: int, tokens: int) -> None:
    """**Raises:** `ValueError` if an axis does not divide what lies along it."""
    of_axis = {
        "tp": dict(
            num_attention_heads=sizes.heads,
            num_key_value_heads=sizes.kv_heads,
            intermediate_size=sizes.hidden,
            vocab_size=sizes.words,
        ),
        "fsdp": dict(hidden_size=sizes.width),
        "sp": {"--tokens": tokens},
    }
    for axis, lengths in of_axis.items():
        for name, n in lengths.items():
            if n % axes.get(axis, 1):
                raise ValueError(
                    f"--mesh has {axis}={axes[axis]}, which is to divide {name}, and "
                    f"that is {n:,}."
                )
    parts = math.prod(axes[name] for name in row_axes(axes))
    if batch % parts:
        raise ValueError(
            f"--batch is {batch:,}, which {parts} parts do not divide: "
            f"{' and '.join(f'{name}={axes[name]}' for name in row_axes(axes))} take "
            "rows of it each."
        )


def row_axes(axes: dict[str, int]) -> tuple[str, ...]:
    """Those along which the rows of a batch lie."""
    return tuple(name for name in ("dp", "fsdp") if name in axes)


def batch_spec(axes: dict[str, int]) -> PartitionSpec:
    return PartitionSpec(row_axes(axes) or None, "sp" if "sp" in axes else None)


def rules(axes: dict[str, int], tied: bool) -> dict[str, PartitionSpec]:
    """The outputs of q, k, v, gate and up lie along `tp`, and so do the inputs of o and
    down, and the words; of each the other axis lies along `fsdp`."""
    tp, fsdp = (name if name in axes else None for name in ("tp", "fsdp"))
    out = {
        _COLUMNS: PartitionSpec(None, tp, fsdp),
        _ROWS: PartitionSpec(None, fsdp, tp),
        "embed_tokens": PartitionSpec(tp, fsdp),
    }
    return out if tied else {**out, "lm_head": PartitionSpec(tp, fsdp)}


def split(model: Llama, mesh: Any, sizes: Sizes) -> Llama:
    """**Raises:** `ValueError` if an axis does not divide the tiles of a weight."""
    return shard(model, mesh, rules(dict(mesh.shape), sizes.tied))
