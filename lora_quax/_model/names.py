"""What an array is called in the PyTorch model.

A name is that of a parameter, such as `model.layers.0.self_attn.q_proj.weight`. An
array with layers stacked along its leading axes has a name with `{}` for each such
axis, and stands for as many parameters.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import TypeAlias

from .paths import named


Names: TypeAlias = Mapping[str, str] | Callable[[str], str] | None


class Namer:
    """Reads `names`, and remembers which of its entries were of use."""

    def __init__(self, names: Names):
        if not (names is None or isinstance(names, Mapping) or callable(names)):
            raise TypeError(
                "`names` must be a mapping from paths to names, or a function of a "
                f"path, got {names!r}."
            )
        for key, name in names.items() if isinstance(names, Mapping) else ():
            if not isinstance(key, str) or not isinstance(name, str):
                raise TypeError(
                    "`names` is a mapping from paths to names, which are strings; got "
                    f"{name!r} for {key!r}."
                )
        self.names = names
        self.unused = set(names) if isinstance(names, Mapping) else set()

    def __call__(self, path: str) -> str:
        """The name of the array at a path of the Equinox model."""
        if self.names is None:
            return path
        name = self._mapped(path) if isinstance(self.names, Mapping) else None
        if name is None:
            name = path if isinstance(self.names, Mapping) else self.names(path)
        if not isinstance(name, str) or not name:
            raise TypeError(f"`names` gives {name!r} for {named(path)}, and no name.")
        return name

    def _mapped(self, path: str) -> str | None:
        """The name that the entry gives which fixes most of the path, if one does."""
        assert isinstance(self.names, Mapping)
        segments = path.split(".") if path else []
        best: list[str] | None = None
        for key in self.names:
            wanted = key.split(".") if key else []
            begins = len(wanted) <= len(segments) and all(
                want in ("{}", segment) for want, segment in zip(wanted, segments)
            )
            if begins and (best is None or _precision(wanted) > _precision(best)):
                best = wanted
        if best is None:
            return None
        key = ".".join(best)
        self.unused.discard(key)
        name = self.names[key]
        # What `{}` stood for in the path, it stands for in the name.
        for want, segment in zip(best, segments):
            if want == "{}":
                name = name.replace("{}", segment, 1)
        return ".".join([*filter(None, [name]), *segments[len(best) :]])

    def check(self) -> None:
        """**Raises:** `ValueError` if an entry of a mapping matched no array."""
        if self.unused:
            unused = ", ".join(map(repr, sorted(self.unused)))
            raise ValueError(f"{unused} of `names` matched no array of the model.")


def _precision(segments: list[str]) -> tuple[int, int]:
    """How much an entry fixes: its segments, then those of them that are no `{}`."""
    return len(segments), sum(segment != "{}" for segment in segments)


def stack_axes(name: str) -> int:
    return name.count("{}")


def unstack(name: str, shape: tuple[int, ...]) -> dict[tuple[int, ...], str]:
    """The name of each slice along the stacking axes, which come first in `shape`."""
    n = stack_axes(name)
    indices = itertools.product(*(range(size) for size in shape[:n]))
    return {index: _fill(name, index) for index in indices}


def _fill(name: str, index: tuple[int, ...]) -> str:
    for i in index:
        name = name.replace("{}", str(i), 1)
    return name


def split(name: str) -> tuple[str, str]:
    """The module that holds a parameter, and its name there."""
    module, _, parameter = name.rpartition(".")
    return module, parameter


def is_in(name: str, module: str) -> bool:
    """Whether a parameter or module is in a module, or is it."""
    return name == module or name.startswith(f"{module}.")
