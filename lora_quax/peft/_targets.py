"""What a configuration of PEFT says of names: the modules, and what some have else."""

import collections
import re
from collections.abc import Iterable
from typing import Any

from .._model.names import split
from ._places import Place
from ._whole import modules_of


def most_common(values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The value that most have, and patterns for the names of the others.

    A pattern matches its name alone, so that their order is of no account: PEFT sorts
    them.
    """
    ((common, _),) = collections.Counter(values.values()).most_common(1)
    others = {name: value for name, value in values.items() if value != common}
    return common, {f"^{re.escape(name)}": value for name, value in others.items()}


def target_modules(places: list[Place], names: Iterable[str]) -> list[str] | str:
    """The modules adapted, or a regular expression where their names are the ends of
    other names as well."""
    modules = sorted({split(name)[0] for name in names})
    ends = {
        end for other in modules_of(places) - set(modules) for end in ends_of(other)
    }
    if ends & set(modules):
        return "|".join(map(re.escape, modules))
    return modules


def ends_of(name: str) -> set[str]:
    """What a name ends in, by whole segments, itself left out."""
    segments = name.split(".")
    return {".".join(segments[i:]) for i in range(1, len(segments))}
