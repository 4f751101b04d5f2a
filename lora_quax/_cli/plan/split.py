"""How a Llama and its batch are divided among the devices of a mesh."""

import math

from jax.sharding import PartitionSpec

from .sizes import Sizes


AXES = ("dp", "fsdp", "tp")
TILE = 64  # Of a quantised base: how many numbers share a scale.
# Of a layer: those whose outputs lie along `tp`, and those whose inputs do.
_COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_ROWS = ("o_proj", "down_proj")


def read_mesh(text: str) -> dict[str, int]:
    """`fsdp=8,tp=4` as the sizes of the axes.

    **Raises:** `ValueError` for an axis that is not known, there twice, or of no size.
    """
    out: dict[str, int] = {}
    for part in text.split(","):
        name, equals, size = (x.strip() for x in part.partition("="))
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


def check_divides(axes: dict[str, int], sizes: Sizes, batch: int) -> None:
    """**Raises:** `ValueError` if an axis does not divide what lies along it."""
    of_axis = {
        "tp": dict(
            num_attention_heads=sizes.heads,
            num_key_value_heads=sizes.kv_heads,
            intermediate_size=sizes.hidden,
            vocab_size=sizes.words,
        ),
        "fsdp": dict(hidden_size=sizes.width),
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


def check_tiles(base: str, sizes: Sizes) -> None:
    """**Raises:** `ValueError` if tiles leave a rest of the inputs of a layer."""
    inputs = {
        "hidden_size": sizes.width,
        "num_attention_heads times head_dim": sizes.heads * sizes.head,
        "intermediate_size": sizes.hidden,
    }
    for name, n in inputs.items():
        if n % TILE:
            raise ValueError(
                f"--base {base} is in tiles of {TILE}, which are to divide {name}, and "
                f"that is {n:,}."
            )


def row_axes(axes: dict[str, int]) -> tuple[str, ...]:
    """Those along which the rows of a batch lie."""
    return tuple(name for name in ("dp", "fsdp") if name in axes)


def batch_spec(axes: dict[str, int]) -> PartitionSpec:
    return PartitionSpec(row_axes(axes) or None, None)


def rules(axes: dict[str, int], tied: bool) -> dict[str, PartitionSpec]:
    """Of the layers the outputs of q, k, v, gate and up lie along `tp`, and the inputs
    of o and down; of the embedding and the head, the words. The other axis of each lies
    along `fsdp`."""
    tp, fsdp = (name if name in axes else None for name in ("tp", "fsdp"))
    out = {name: PartitionSpec(None, tp, fsdp) for name in _COLUMNS}
    out |= {name: PartitionSpec(None, fsdp, tp) for name in _ROWS}
    words = {"embed_tokens": PartitionSpec(tp, fsdp)}
    return out | words if tied else {**out, **words, "lm_head": PartitionSpec(tp, fsdp)}


def gathered(axes: dict[str, int]) -> dict[str, PartitionSpec]:
    """How the weights of one layer lie while it runs: whole along `fsdp`."""
    tp = "tp" if "tp" in axes else None
    out = {name: PartitionSpec(tp, None) for name in _COLUMNS}
    return {**out, **{name: PartitionSpec(None, tp) for name in _ROWS}}
