"""How PEFT lays out the factors of an update, for each kind of weight.

Its names are ours: `A` takes columns to rank, `B` takes rank to rows. Here `a` and `b`
are the factors of one weight, with no stacking axes.
"""

from typing import Literal, TypeAlias

import equinox as eqx
import numpy as np

from .._forms.norms import Per
from .._model.paths import Leaf


Kind: TypeAlias = Literal["linear", "embedding", "conv", "experts"]
SUFFIXES: dict[Kind, tuple[str, str]] = {
    "linear": ("lora_A.weight", "lora_B.weight"),
    "embedding": ("lora_embedding_A", "lora_embedding_B"),
    "conv": ("lora_A.weight", "lora_B.weight"),
    "experts": ("lora_A.weight", "lora_B.weight"),
}


MAGNITUDE = "lora_magnitude_vector"  # Of DoRA, behind the name of a module.


def magnitude_shape(
    kind: Kind, shape: tuple[int, ...], transposed: bool
) -> tuple[int, ...]:
    """The shape of the magnitudes of DoRA for a weight of this shape.

    **Raises:** `ValueError` for a kind of weight that PEFT has no DoRA of.
    """
    if kind == "experts":
        raise ValueError("PEFT has no DoRA of experts")
    if kind == "conv":
        return (1, shape[0], *(1 for _ in shape[2:]))
    return (shape[1 if per_of(kind, transposed) == "columns" else 0],)


def per_of(kind: Kind, transposed: bool) -> Per:
    """What has a magnitude each: the outputs of a layer, an embedding's features."""
    return "columns" if transposed or kind == "embedding" else "rows"


def kind_of(leaf: Leaf, shape: tuple[int, ...], transposed: bool) -> Kind:
    """The kind of a weight, of this shape beside the axes that stack it.

    **Raises:** `ValueError` if PEFT has no such update, with the reason.
    """
    layer = leaf.layer[1] if leaf.layer else None
    if isinstance(layer, eqx.nn.Embedding):
        kind = "embedding"
    elif isinstance(layer, eqx.nn.Conv):
        refuse_groups(layer.groups)
        if set(layer.dilation) != {1} or layer.padding_mode != "ZEROS":
            raise ValueError(
                f"it is a convolution of dilation {layer.dilation} and padding mode "
                f"{layer.padding_mode!r}, which PEFT leaves out of the update"
            )
        kind = "conv"
    elif isinstance(layer, eqx.nn.ConvTranspose):
        raise ValueError("it is a transposed convolution, of which PEFT has no LoRA")
    else:
        kind = "experts" if len(shape) == 3 and layer is None else "linear"
    wanted = sum(leaf.axes) if kind == "conv" else 3 if kind == "experts" else 2
    ndim = len(shape)
    if kind == "experts" and shape[0] == 1 and transposed:
        raise ValueError("PEFT does not transpose the update of a single expert")
    if ndim != wanted:
        raise ValueError(
            f"without the axes that `{{}}` in its name stands for it has {ndim} axes, "
            f"and {wanted} are wanted. Layers that are stacked need a name with `{{}}` "
            "for the index, as in `names={'blocks': 'blocks.{}'}`"
        )
    return kind


def refuse_groups(groups: int) -> None:
    """**Raises:** `ValueError` for a convolution of more than one group."""
    if groups > 1:
        raise ValueError(
            f"it is a convolution of {groups} groups. PEFT gives that a dense A and a "
            "grouped B, which is no low-rank update of its kernel"
        )


def peft_shapes(
    kind: Kind, shape: tuple[int, ...], rank: int, transposed: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of A and B for a weight of this shape."""
    if kind == "embedding":
        vocab, dim = shape
        return (rank, vocab), (dim, rank)
    if kind == "conv":
        return (rank, *shape[1:]), (shape[0], rank, *(1 for _ in shape[2:]))
    experts, rows, cols = (1, *shape)[-3:]
    if transposed:
        rows, cols = cols, rows
    return (experts * rank, cols), (rows, rank * experts)


def to_peft(kind: Kind, a, b, transposed: bool) -> tuple[np.ndarray, np.ndarray]:
    """A and B of a weight with the factors `a` and `b`."""
    if transposed or kind == "embedding":
        a, b = b.swapaxes(-1, -2), a.swapaxes(-1, -2)
    if kind == "conv":
        return a, b.reshape(*b.shape, *(1 for _ in a.shape[2:]))
    if kind == "experts":
        # a: (experts, rank, cols), b: (experts, rows, rank); B is rank-major.
        rows = b.shape[1]
        return a.reshape(-1, a.shape[-1]), b.transpose(1, 2, 0).reshape(rows, -1)
    return a, b


def from_peft(
    kind: Kind, A, B, rank: int, transposed: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The factors `a` and `b` of a weight with these A and B."""
    a, b = A, B
    if kind == "conv":
        b = B.reshape(B.shape[:2])
    if kind == "experts":
        a = A.reshape(-1, rank, A.shape[-1])
        b = B.reshape(B.shape[0], rank, -1).transpose(2, 0, 1)
    if transposed or kind == "embedding":
        a, b = b.swapaxes(-1, -2), a.swapaxes(-1, -2)
    return a, b
