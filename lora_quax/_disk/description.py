"""An adapted array as JSON: all that there is to it beside its numbers.

What `describe` writes, `build` reads, and puts around a base. A new form of array joins
by a case in each.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .._arrays.array import LoraArray, LowRankArray, make
from .._arrays.check import aval_of, check_alpha, check_rank
from .._arrays.full import FullArray
from .._model.paths import Leaf


def describe(x) -> dict[str, Any]:
    """What there is to an array beside its numbers, as JSON."""
    if isinstance(x, LoraArray):
        return {
            "form": "lora",
            "base": describe(x.base),
            "delta": _describe_low_rank(x.delta),
            "stop_gradient": x.stop_gradient,
            "allow_materialise": x.allow_materialise,
        }
    if isinstance(x, FullArray):
        dtype = x.value.dtype.name
        return {"form": "full", "base": describe(x.base), "dtype": dtype}
    shape = list(aval_of(x).shape)
    if isinstance(x, LowRankArray):
        return {"form": "low_rank", "shape": shape, **_describe_low_rank(x)}
    return {"form": "array", "shape": shape, "dtype": aval_of(x).dtype.name}


def _describe_low_rank(x: LowRankArray) -> dict[str, Any]:
    return {
        "rank": x.rank,
        "alpha": x.alpha,
        "rows": x.rows,
        "cols": x.cols,
        "dtype": {"a": x.a.dtype.name, "b": x.b.dtype.name},
        "allow_materialise": x.allow_materialise,
    }


def build(about: dict[str, Any], base, levels: int = 16) -> Any:
    """The array described, around `base`, with abstract leaves where it trains.

    **Raises:** `KeyError`, `TypeError` or `ValueError` if the description makes no
    sense, or not around this base, or has more than so many levels.
    """
    form = about["form"]
    if not levels:
        raise ValueError("it has too many adapters on one another")
    if form == "lora":
        inner = build(about["base"], base, levels - 1)
        delta = _build_low_rank(aval_of(inner).shape, **about["delta"])
        return make(
            LoraArray,
            base=inner,
            delta=delta,
            stop_gradient=_flag(about["stop_gradient"]),
            allow_materialise=_flag(about["allow_materialise"]),
        )
    if form == "low_rank":
        if base is not None:
            _check_shape(base, about["shape"])
        return _build_low_rank(tuple(about["shape"]), **about)
    if form == "full":
        inner = build(about["base"], base, levels - 1)
        dtype = float_type(about["dtype"])
        value = jax.ShapeDtypeStruct(aval_of(inner).shape, dtype)
        return make(FullArray, base=inner, value=value)
    if form != "array":
        raise ValueError(f"its form {form!r} is not known")
    _check_shape(base, about["shape"])
    float_type(aval_of(base).dtype.name)
    return base


def _check_shape(x, shape: list[int]) -> None:
    if list(aval_of(x).shape) != shape:
        raise ValueError(f"it has shape {aval_of(x).shape}; the adapter is for {shape}")


def _build_low_rank(
    of_shape, /, *, rank, alpha, rows, cols, dtype, allow_materialise, **others
) -> LowRankArray:
    del others
    shape, rank = of_shape, check_rank(rank)
    n = len(shape) - rows - cols
    if min(n, rows, cols) < 0:
        raise ValueError(f"it has shape {shape}, too few axes for {rows} and {cols}")
    a_shape = (*shape[:n], rank, *shape[n + rows :])
    b_shape = (*shape[: n + rows], rank)
    return make(
        LowRankArray,
        a=jax.ShapeDtypeStruct(a_shape, float_type(dtype["a"])),
        b=jax.ShapeDtypeStruct(b_shape, float_type(dtype["b"])),
        rank=rank,
        alpha=check_alpha(alpha, rank),
        rows=rows,
        cols=cols,
        allow_materialise=_flag(allow_materialise),
    )


_TYPES = "float16", "bfloat16", "float32", "float64"


def float_type(name: str) -> np.dtype:
    """**Raises:** `TypeError` if it is no name of a type that is written."""
    if name not in _TYPES:
        raise TypeError(f"its type is {name!r}; {', '.join(_TYPES)} are known")
    return jnp.dtype(name)


def _flag(x) -> bool:
    if not isinstance(x, bool):
        raise TypeError(f"{x!r} stands where true or false should")
    return x


def describe_layer(place: Leaf) -> dict[str, Any] | None:
    """The known layer that a leaf is the weight of: another program may need it."""
    layer = place.layer[1] if place.layer else None
    for kind in (eqx.nn.Linear, eqx.nn.Embedding):
        if isinstance(layer, kind):
            return {"type": kind.__name__}
    for kind in (eqx.nn.Conv, eqx.nn.ConvTranspose):
        if isinstance(layer, kind):
            return {"type": kind.__name__, "groups": layer.groups}
    return None
