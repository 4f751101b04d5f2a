"""What `update=` means: a form of adaptation, and what its `init` is told.

A form is a class with a classmethod `init`, one of ours or of the user's. By the names
of its arguments `init` says what it wants to be told of what `loraify` knows.
"""

import functools as ft
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .._arrays.base import AbstractDelta, AdaptedArray


# What `loraify` may tell, beside the weight.
TOLD = (
    "key",
    "rank",
    "alpha",
    "init_a",
    "init_b",
    "dtype",
    "rows",
    "cols",
    "stop_gradient",
    "allow_materialise",
)
_TOLD_AS = {"scale": "init_a"}  # An initialiser, by its number.


class Form(NamedTuple):
    """A form of adaptation that was asked for."""

    cls: type[AdaptedArray]
    init: Callable  # the classmethod, with the options that the user gave
    takes: frozenset[str]  # of what it may be told

    @property
    def is_update(self) -> bool:
        """Whether it is added to a weight. Otherwise it is made around one."""
        return issubclass(self.cls, AbstractDelta)

    def told(self, known: Mapping[str, Any]) -> dict[str, Any]:
        """What of `known` it takes. What nobody has said, it knows itself."""
        return {x: y for x, y in known.items() if x in self.takes and y is not None}

    def refuse(self, given: Mapping[str, Any]) -> None:
        """**Raises:** `ValueError` for what was given beside a form that has none."""
        name = self.cls.__name__
        for argument, value in given.items():
            if value is None or _TOLD_AS.get(argument, argument) in self.takes:
                continue
            wanted = ", ".join(f"`{x}`" for x in TOLD if x in self.takes)
            way_out = "give None" if argument == "rank" else "leave it out"
            raise ValueError(
                f"`{argument}` is {value!r}, and {name} has none; {way_out}. Of what "
                f"`loraify` is given `{name}.init` takes {wanted or 'nothing'}."
            )


def read_update(update: Any) -> Form:
    """**Raises:** `TypeError` if it is no form, or has no such option, or lacks one."""
    init: Any = getattr(update, "init", None)
    options: Mapping[str, Any] = {}
    if isinstance(update, ft.partial) and not update.args:
        init, options = update.func, update.keywords
    cls = getattr(init, "__self__", None)
    if not (isinstance(cls, type) and issubclass(cls, AdaptedArray)):
        raise TypeError(
            "`update` must be a form of adaptation with a classmethod `init`, such as "
            "`lora_quax.LoHa`; or, with options of that, "
            "`functools.partial(lora_quax.LoKr.init, factor=8)`. It may be a class of "
            f"your own. Got {update!r}."
        )
    signature = inspect.signature(init)
    try:
        signature.bind_partial(None, **options)
    except TypeError as e:
        raise TypeError(f"An option of `{cls.__name__}.init` is none: {e}.") from e
    _, *rest = signature.parameters.values()
    named = {x.name for x in rest if x.kind is not x.VAR_KEYWORD}
    for x in rest:
        if x.name in named - {*TOLD, *options} and x.default is x.empty:
            raise TypeError(
                f"`{cls.__name__}.init` has to be told its `{x.name}`: `update="
                f"functools.partial({cls.__name__}.init, {x.name}=...)`."
            )
    takes = named.intersection(TOLD) - options.keys()
    return Form(cls, ft.partial(init, **options), frozenset(takes))
