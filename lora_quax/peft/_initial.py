"""The base that is left where an initialisation took the first update out of it.

PEFT repeats that when it loads such an adapter, from the weight alone, so it can be
repeated here. PiSSA: Meng et al., arXiv 2404.02948. OLoRA: Büyükakyüz, arXiv
2406.01775.
"""

import numpy as np

from ._layout import Kind


INITIALISATIONS = "pissa", "olora"


def reduced(
    initialisation: bool | str | None,
    weight: np.ndarray,
    kind: Kind,
    rank: int,
    scaling: float,
    transposed: bool,
) -> np.ndarray:
    """A weight without the first update that was taken out of it, in its dtype.

    **Raises:** `ValueError` for a kind of weight that PEFT does not initialise so.
    """
    if kind != "linear":
        raise ValueError(f"{initialisation!r} is known for linear layers alone")
    matrix = weight.astype(np.float64)
    matrix = matrix.T if transposed else matrix  # (out, in)
    if initialisation == "pissa":
        u, s, v = np.linalg.svd(matrix, full_matrices=False)
        first = (u[:, :rank] * s[:rank]) @ v[:rank]
    else:
        q, r = np.linalg.qr(matrix)
        first = scaling * q[:, :rank] @ r[:rank]
    rest = matrix - first
    return (rest.T if transposed else rest).astype(weight.dtype)
