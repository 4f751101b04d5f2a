"""The arrays of an Equinox model, as PEFT would see them in its PyTorch twin."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxtyping import PyTree

from .._adapter import refuse_ambiguous
from .._check import aval_of
from .._merge import origin
from .._paths import is_float, known_axes, Leaf, leaves_of, named
from .._targets import read_pattern
from ._names import Namer, Names, split, stack_axes, unstack


class Place(NamedTuple):
    """A floating-point array of the model, and the parameters that it stands for."""

    leaf: Leaf
    position: int  # among the leaves of the model
    origin: Any  # the array as it was before it was adapted
    names: dict[tuple[int, ...], str]  # index along the stacking axes -> parameter
    transposed: bool

    @property
    def path(self) -> str:
        return self.leaf.path

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one of the parameters, in the layout of the Equinox model."""
        n = len(next(iter(self.names), ()))
        return tuple(aval_of(self.origin).shape)[n:]

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """The same, as PyTorch has it: the bias of a convolution is a vector there."""
        if self.leaf.is_bias and known_axes(self.leaf.holder) != (1, 1):
            return self.shape[:1]
        return self.shape


def places_of(model: PyTree, names: Names, transposed: Sequence[str]) -> list[Place]:
    """**Raises:** `ValueError` if an entry of `names` or `transposed` matches nothing,
    if two arrays have the same name, or an array has fewer axes than its name says."""
    namer = Namer(names)
    patterns = {name: read_pattern(name)[0] for name in transposed}
    unused = set(patterns)
    out = []
    for position, leaf in enumerate(leaves_of(model)):
        base = origin(leaf.value)
        if not is_float(base):
            continue
        shape = tuple(aval_of(base).shape)
        name = namer(leaf.path)
        if stack_axes(name) > len(shape):
            raise ValueError(
                f"{named(leaf.path)} is called {name!r}, which is for more stacked "
                f"axes than it has: its shape is {shape}."
            )
        flipped = {key for key, p in patterns.items() if p.fullmatch(leaf.path)}
        unused -= flipped
        parameters = unstack(name, shape)
        out.append(Place(leaf, position, base, parameters, bool(flipped)))
    namer.check()
    if unused:
        raise ValueError(
            f"{', '.join(map(repr, sorted(unused)))} of `transposed` matched no array."
        )
    refuse_ambiguous(name for place in out for name in place.names.values())
    return out


def wrappers(names: Sequence[str]) -> dict[str, str]:
    """Where PEFT keeps the factors of parameters targeted one by one.

    Those of one module are wrapped in the order in which it has them, so that the last
    one is outermost.

    **Arguments:**

    - `names`: of all such parameters, in the order of the model.

    **Returns:** for each, what its factors are called in place of a module.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(split(name)[0], []).append(name)
    return {
        name: module + ".base_layer" * (len(group) - 1 - i)
        for module, group in groups.items()
        for i, name in enumerate(group)
    }
