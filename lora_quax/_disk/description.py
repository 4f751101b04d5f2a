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
    AbstractDelta,
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

# Fields that came later, and what they are in a file that does not say.
_LATER = {"dropout": 0.0}

# What a description that makes no sense may raise. A form from elsewhere checks itself.
NONSENSE = ArithmeticError, AttributeError, LookupError, TypeError, ValueError


def said(e: Exception) -> str:
    """An error of `NONSENSE` for a message."""
    return f"it has no {e}" if isinstance(e, KeyError) else str(e)


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
        if _LATER.get(field.name) == value:
            continue
        if not isinstance(value, bool | int | float | str | None):
            raise TypeError(
                f"The field `{field.name}` of {type(x).__name__} is {value!r}. Only "
                "numbers, strings, true and false can be written."
            )
        out[field.name] = value
    return out


def form_of(about: Any) -> Any:
    """What a description says it is of. A file may have anything in its place."""
    if not isinstance(about, dict):
        raise TypeError(f"{about!r:.40} is no description of an array")
    return about["form"]


def build(about: Any, base) -> Any:
    """The array described, around `base`, with abstract leaves for those of the file.

    **Raises:** one of `NONSENSE` if the description makes no sense, or not around this
    base.
    """
    out = _build(about, base, _LEVELS)
    if base is not None and aval_of(out).shape != aval_of(base).shape:
        raise _misfit(base, aval_of(out).shape)
    return out


def _build(about: Any, base, levels: int) -> AdaptedArray:
    if not levels:
        raise _too_deep()
    form = form_of(about)
    cls, values = _class_of(form), {}
    for field in fields_of(cls, static=False):
        inner, role = about[field.name], field.metadata.get("role")
        if form_of(inner) != "array":
            values[field.name] = _build(inner, base, levels - 1)
        elif role == BASE:
            values[field.name] = _same_shape(base, inner)
        else:
            # What does not train may be a count, or an index.
            types = _TYPES + _INTEGERS if role == FROZEN else _TYPES
            values[field.name] = _abstract(inner, types)
    for field in fields_of(cls, static=True):
        value = {**_LATER, **about}[field.name]
        values[field.name] = _static(field, value)
    unknown = about.keys() - values.keys() - {"form", "layer"}
    if unknown:
        first = min(unknown)
        raise ValueError(f"an array of the form {form!r} has no field {first!r:.40}")
    return checked(make(cls, **values))


def base_type(about: Any) -> jax.ShapeDtypeStruct | None:
    """The type of the weight that was adapted; `None` for an update alone.

    **Raises:** as `build`.
    """
    for _ in range(_LEVELS):
        if form_of(about) == "array":
            return _abstract(about, _TYPES + _SMALL_TYPES)
        # As `base_of` finds it in an array.
        for field in fields_of(_class_of(about["form"]), static=False):
            inner, role = about[field.name], field.metadata.get("role")
            is_update = role is None and issubclass(
                _class_of(form_of(inner)), AbstractDelta
            )
            if role == BASE or role is None and not is_update:
                about = inner
                break
        else:
            return None
    raise _too_deep()


def _too_deep() -> ValueError:
    return ValueError("it has too many adapters on one another")


def _class_of(form) -> type:
    # By the place of its definition: a cell of a notebook may have run several times.
    found = {
        f"{cls.__module__}.{cls.__qualname__}": cls
        for cls in _classes(AdaptedArray)
        if cls.form == form
    }
    if not found:
        raise ValueError(
            f"its form {form!r:.40} is not known; if it is that of an array of your "
            "own, import the module that defines it first"
        )
    if len(found) > 1:
        raise ValueError(
            f"its form {form!r:.40} is that of several classes, {' and '.join(found)}; "
            "give one of them another `form`, a class attribute"
        )
    return next(iter(found.values()))


def _classes(cls: type) -> Iterator[Any]:
    for sub in cls.__subclasses__():
        # What is still abstract has no instances.
        if not getattr(sub, "__abstractmethods__", None):
            yield sub
        yield from _classes(sub)


def _abstract(about: dict[str, Any], types: tuple[str, ...]) -> jax.ShapeDtypeStruct:
    """The type of an array, which must be one of these types of number."""
    shape, name = about["shape"], about["dtype"]
    if not isinstance(shape, list) or any(type(n) is not int or n < 0 for n in shape):
        raise ValueError(f"{shape!r:.40} is no shape")
    return jax.ShapeDtypeStruct(tuple(shape), _type_of_number(name, types))


def _same_shape(base, about: dict[str, Any]):
    """The base, which has the shape described, be it in another type of number."""
    if base is None:
        raise ValueError("it has a base, and there is none")
    if list(aval_of(base).shape) != about["shape"]:
        raise _misfit(base, about["shape"])
    _type_of_number(aval_of(base).dtype.name, _TYPES + _SMALL_TYPES)
    return base


def _misfit(base, shape) -> ValueError:
    return ValueError(
        f"it has shape {aval_of(base).shape}; the adapter is for {str(shape):.80}"
    )


_KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}


def _static(field, value):
    """A field without numbers, of the type that the class says."""
    names = {kind.__name__: kind for kind in _KINDS}
    kind = names.get(getattr(field.type, "__name__", field.type))
    if kind is float and type(value) is int:
        value = float(value)
    if kind is not None and type(value) is not kind:
        raise TypeError(f"`{field.name}` must be {_KINDS[kind]}, got {value!r:.40}")
    if not isinstance(value, bool | int | float | str | None):
        raise TypeError(f"`{field.name}` is {str(value):.40}, an object or a list")
    return value


_TYPES = "float16", "bfloat16", "float32", "float64"
_INTEGERS = "int8", "int16", "int32", "uint8", "uint16", "uint32", "bool"
# Those of a base that is stored in 8 bits.
_SMALL_TYPES = "float8_e4m3fn", "float8_e5m2"
_SMALL_TYPES += "float8_e4m3b11fnuz", "float8_e4m3fnuz", "float8_e5m2fnuz"


def _type_of_number(name: str, known: tuple[str, ...]) -> np.dtype:
    """**Raises:** `TypeError` if it is no name of one of these types."""
    if name not in known:
        raise TypeError(f"its type is {name!r:.40}; {', '.join(known)} are known")
    return jnp.dtype(name)


def describe_layer(leaf: Leaf) -> dict[str, Any] | None:
    """The known layer that a leaf is the weight of: another program may need it."""
    layer = leaf.layer[1] if leaf.layer else None
    for kind in (eqx.nn.Linear, eqx.nn.Embedding):
        if isinstance(layer, kind):
            return {"type": kind.__name__}
    for kind in (eqx.nn.Conv, eqx.nn.ConvTranspose):
        if isinstance(layer, kind):
            return {"type": kind.__name__, "groups": layer.groups}
    return None
