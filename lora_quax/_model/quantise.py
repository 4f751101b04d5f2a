"""From a model to a model whose weights are kept in a few bits a number."""

import functools as ft
from typing import Any, Literal, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import PyTree

from .._arrays.check import aval_of, check_count, is_abstract
from .._arrays.quantised import QuantisedArray
from .paths import is_value, named
from .select import select
from .targets import Adapt, Targets


Kind: TypeAlias = Literal["nf4", "int4", "int8"]
_KINDS = ("nf4", "int4", "int8")


def quantise(
    model: PyTree,
    kind: Kind = "nf4",
    *,
    targets: Targets = eqx.nn.Linear,
    tile: int | None = 64,
) -> PyTree:
    """Keeps weights of a model in a few bits a number. The model is not changed.

    ```python
    targets = [eqx.nn.Linear, ("lm_head", "freeze")]
    model = lora_quax.quantise(model, "nf4", targets=targets)
    model = lora_quax.loraify(model, rank=8, key=key)
    quax.quaxify(model)(x)
    ```

    The codec is that of qwix, which has to be installed. Each tile of a weight is
    divided by its largest number, and each number rounded to the nearest that the kind
    has: the values of NormalFloat (Dettmers et al., *QLoRA*, arXiv 2305.14314), or
    integers.

    **Arguments:**

    - `model`: any PyTree. Its arrays may be `jax.ShapeDtypeStruct`s.
    - `kind`: `"nf4"` and `"int4"` take half a byte a number, `"int8"` one; each tile
        takes the four bytes of its scale besides.
    - `targets`: which weights, as for `loraify`; but a spec says no more than whether
        (`True`), or not (`"freeze"`).
    - `tile`: how many numbers share a scale, along the columns of a weight: the inputs
        of a linear layer, the features of an embedding. Those of a convolution's window
        share one. `None` is one scale for each row.

    **Returns:** the model with a `QuantisedArray` in place of each of these weights.

    **Raises:** `ImportError` without qwix; `ValueError` if `tile` does not divide the
    columns of a weight, a weight is not finite, or is quantised or adapted already;
    `ValueError` or `TypeError` if `targets` is not what it should be, or matches
    nothing.
    """
    check_codec(kind, tile)
    leaves, treedef = jax.tree.flatten(model, is_leaf=is_value)
    chosen = select(model, targets)
    done: dict[int, QuantisedArray] = {}
    for i, (leaf, choice) in enumerate(chosen):
        if choice is None or choice.spec == "freeze":
            continue
        if choice.spec != Adapt():
            raise ValueError(
                f"The spec of {named(leaf.path)} in `targets` must be True or "
                f"'freeze', which say whether it is quantised; got {choice.spec!r}."
            )
        # An array in two places, as where weights are tied, stays one.
        if id(leaf.value) not in done:
            where, cols = named(leaf.path), leaf.axes[1]
            done[id(leaf.value)] = quantised(where, leaf.value, cols, kind, tile)
        leaves[i] = done[id(leaf.value)]
    for i, (leaf, _) in enumerate(chosen):
        if isinstance(leaf.value, jax.ShapeDtypeStruct):
            continue  # One type for two arrays does not make them one.
        if id(leaf.value) in done and leaves[i] is leaf.value:
            raise ValueError(
                f"{named(leaf.path)} is one array with another that `targets` means, "
                "as where weights are tied: both have to be quantised, or none."
            )
    return jax.tree.unflatten(treedef, leaves)


def dequantise(model: PyTree) -> PyTree:
    """The model with the plain array that each `QuantisedArray` stands for."""
    is_quantised = lambda x: isinstance(x, QuantisedArray)
    done: dict[tuple, Any] = {}

    def plain(x):
        if not is_quantised(x):
            return x
        # What is in two places, as where weights are tied, stays one.
        key = (*map(id, jax.tree.leaves(x)), x.kind, x.casts, x.packed)
        if key not in done:
            done[key] = _decode(x)
        return done[key]

    return jax.tree.map(plain, model, is_leaf=is_quantised)


def _decode(x: QuantisedArray) -> Any:
    if is_abstract(x):
        return eqx.filter_eval_shape(QuantisedArray.materialise, x)
    return _decode_jit(x)


_decode_jit = eqx.filter_jit(QuantisedArray.materialise)


def check_codec(kind: str, tile: int | None) -> None:
    if kind not in _KINDS:
        raise ValueError(f"`kind` must be one of {', '.join(_KINDS)}, got {kind!r}.")
    if tile is not None:
        check_count("tile", tile)


def quantised(where: str, x: Any, cols: int, kind: str, tile: int | None) -> Any:
    """An array quantised, of which the last `cols` axes are its columns.

    **Raises:** as `quantise`, of an array that stands at `where`.
    """
    if isinstance(x, QuantisedArray):
        raise ValueError(
            f"{where} is quantised already: it is {x!r}. `lora_quax.dequantise` gives "
            "the plain array; or leave it out of `targets`."
        )
    if is_value(x):
        raise TypeError(
            f"{where} is a {type(x).__name__}; only a plain array is quantised."
        )
    shape = aval_of(x).shape
    first = len(shape) - cols  # Of the columns.
    size = max(1, shape[first] if tile is None else tile)
    if shape[first] % size:
        raise ValueError(
            f"{where} of shape {shape} has {shape[first]} columns, of which tiles of "
            f"{tile} leave a rest. Give a `tile` that divides it, or leave it out of "
            '`targets` by the spec "freeze".'
        )
    if isinstance(x, jax.Array | np.ndarray) and not isinstance(x, Tracer):
        if not bool(jnp.isfinite(x).all()):
            raise ValueError(f"{where} has infinities or NaNs, which no kind has.")
    run = ft.partial(eqx.filter_eval_shape, _encode) if is_abstract(x) else _encode_jit
    return run(x, kind, first, size)


def _encode(x, kind: str, first: int, tile: int) -> QuantisedArray:
    try:
        import qwix
    except ImportError as e:
        raise ImportError(
            "`lora_quax.quantise` needs qwix: `pip install 'lora_quax[quantised]'`."
        ) from e
    found = qwix.quantize(
        x.astype(jnp.float32),
        kind if kind == "nf4" else jnp.dtype(kind),
        channelwise_axes=range(first),
        tiled_axes={first: tile},
    )
    return QuantisedArray(found.qvalue, found.scale, kind=kind, dtype=x.dtype)


_encode_jit = eqx.filter_jit(_encode)
