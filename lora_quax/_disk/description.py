"""An adapted array as JSON: all that there is to it beside its numbers.

What `describe` writes, `build` reads, and puts around a base. Both go by the fields of
the class, so that a new form of array needs nothing here.
"""

from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .._arrays.base import (
    AdaptedArray,
    BASE,
    checked,
    fields_of,
    FROZEN,
    is_adapted,
    make,
)
from .._arrays.check import aval_of
from .._model.paths import Leaf


_LEVELS = 16  # Of arrays inside arrays; a file may claim any number.


def describe(x) -> dict[str, Any]:
    """What there is to an array beside its numbers, as JSON.

    **Raises:** `TypeError` if a field holds what JSON has not.
    """
    if not is_adapted(x):
        return {
            "form": "array",
            "shape": list(aval_of(x).shape),
            "dtype": aval_of(x).dtype.name,
        }
    out: dict[str, Any] = {"form": type(x).form}
    for field in fields_of(type(x), static=False):
        out[field.name] = describe(getattr(x, field.name))
    for field in fields_of(type(x), static=True):
        value = getattr(x, field.name)
        if not isinstance(value, bool | int | float | str | None):
            raise TypeError(
                f"the field `{field.name}` of {type(x).__name__} is {value!r}, and only "
                "numbers, strings, true and false are written"
            )
        out[field.name] = value
    return out


def build(about: dict[str, Any], base) -> Any:
    """The array described, around `base`, with abstract leaves for those of the file.

    **Raises:** `KeyError`, `TypeError` or `ValueError` if the description makes no
    sense, or not around this base.
    """
    out = _build(about, base, _LEVELS)
    if base is not None and aval_of(out).shape != aval_of(base).shape:
        raise _misfit(base, aval_of(out).shape)
    return out


def _build(about: dict[str, Any], base, levels: int) -> AdaptedArray:
    if not levels:
        raise ValueError("it has too many adapters on one another")
    form = about["form"]
    cls, values = _class_of(form), {}
    for field in fields_of(cls, static=False):
        inner, role = about[field.name], field.metadata.get("role")
        if inner["form"] != "array":
            values[field.name] = _build(inner, base, levels - 1)
        elif role == BASE:
            values[field.name] = _same_shape(base, inner)
        else:
            values[field.name] = _abstract(inner, may_count=role == FROZEN)
    for field in fields_of(cls, static=True):
        values[field.name] = _static(field, about[field.name])
    unknown = about.keys() - values.keys() - {"form", "layer"}
    if unknown:
        raise ValueError(f"a {form!r} has no {', '.join(map(repr, sorted(unknown)))}")
    return checked(make(cls, **values))


def _class_of(form) -> type:
    for cls in _classes(AdaptedArray):
        if cls.form == form:
            return cls
    raise ValueError(
        f"its form {form!r} is not known; import the module that defines it first"
    )


def _classes(cls: type) -> Iterator[Any]:
    for sub in cls.__subclasses__():
        # What is still abstract has no instances.
        if not getattr(sub, "__abstractmethods__", None):
            yield sub
        yield from _classes(sub)


def _abstract(about: dict[str, Any], *, may_count: bool) -> jax.ShapeDtypeStruct:
    """A leaf of the file. What does not train may be a count, or an index."""
    shape, name = tuple(about["shape"]), about["dtype"]
    if any(type(n) is not int or n < 0 for n in shape):
        raise ValueError(f"{about['shape']} is no shape")
    counts = may_count and name in _INTEGERS
    return jax.ShapeDtypeStruct(shape, jnp.dtype(name) if counts else float_type(name))


def _same_shape(base, about: dict[str, Any]):
    """The base, which has the shape described, be it in another type of number."""
    if base is None:
        raise ValueError("it has a base, and there is none")
    if list(aval_of(base).shape) != about["shape"]:
        raise _misfit(base, about["shape"])
    float_type(aval_of(base).dtype.name)
    return base


def _misfit(base, shape) -> ValueError:
    return ValueError(f"it has shape {aval_of(base).shape}; the adapter is for {shape}")


def _static(field, value):
    """A field without numbers, of the type that the class says."""
    kinds = {t.__name__: t for t in (bool, int, float, str)}
    kind = kinds.get(getattr(field.type, "__name__", field.type))
    if kind is not None and type(value) is not kind:
        raise TypeError(
            f"{value!r} stands where `{field.name}`, {kind.__name__}, should"
        )
    if not isinstance(value, bool | int | float | str | None):
        raise TypeError(f"{value!r} stands where `{field.name}` should")
    return value


_TYPES = "float16", "bfloat16", "float32", "float64"
_INTEGERS = "int8", "int16", "int32", "uint8", "uint16", "uint32", "bool"


def float_type(name: str) -> np.dtype:
    """**Raises:** `TypeError` if it is no name of a type that is written."""
    if name not in _TYPES:
        raise TypeError(f"its type is {name!r}; {', '.join(_TYPES)} are known")
    return jnp.dtype(name)


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
