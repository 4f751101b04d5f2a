"""The arrays of an Equinox model, as PEFT would see them in its PyTorch twin."""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import numpy as np
from jaxtyping import PyTree

from .._arrays.check import aval_of
from .._disk.exchange import refuse_ambiguous
from .._model.merge import origin
from .._model.names import Namer, Names, split, stack_axes, unstack
from .._model.paths import is_float, known_axes, Leaf, leaves_of, named
from .._model.targets import read_pattern
from .._model.ties import ties_of


class Alias(NamedTuple):
    """Another name of an array."""

    name: str  # of the parameter
    source: str
    is_embedding: bool  # whether the module by this name is one


class Place(NamedTuple):
    """A floating-point array of the model, and the parameters that it stands for."""

    leaf: Leaf
    position: int  # among the leaves of the model
    origin: Any  # the array as it was before it was adapted
    names: dict[tuple[int, ...], str]  # index along the stacking axes -> parameter
    transposed: bool
    aliases: tuple[Alias, ...] = ()  # other parameters that it is, tied to the one

    @property
    def path(self) -> str:
        return self.leaf.path

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one of the parameters, in the layout of the Equinox model."""
        n = len(next(iter(self.names), ()))
        return tuple(aval_of(self.origin).shape)[n:]

    @property
    def is_embedding(self) -> bool:
        return self.leaf.layer is not None and isinstance(
            self.leaf.layer[1], eqx.nn.Embedding
        )

    @property
    def is_matrix(self) -> bool:
        """Whether it may be the weight of a linear layer."""
        return len(self.shape) == 2 and not self.is_embedding

    def to_torch(self, x: np.ndarray, conv1d: bool = False) -> np.ndarray:
        """One of the parameters in PyTorch's layout.

        The bias of a convolution is a vector there, and the weight of a GPT-2's
        `Conv1D` is `(in, out)`.
        """
        if self.leaf.is_bias and known_axes(self.leaf.holder) != (1, 1):
            return x.reshape(x.shape[:1])
        return x.T if self.is_matrix and self.transposed != conv1d else x

    def from_torch(self, x: np.ndarray, conv1d: bool = False) -> np.ndarray:
        """The inverse of `to_torch`.

        **Raises:** `ValueError` if it has another shape.
        """
        wanted = self.to_torch(np.broadcast_to(0, self.shape), conv1d).shape
        if x.shape != wanted:
            raise ValueError(
                f"it has shape {x.shape} there; in the model it is {wanted}"
            )
        turned = self.is_matrix and self.transposed != conv1d
        return (x.T if turned else x).reshape(self.shape)


def places_of(model: PyTree, names: Names, transposed: Sequence[str]) -> list[Place]:
    """**Raises:** `ValueError` if an entry of `names` or `transposed` matches nothing,
    if two arrays have the same name, an array has fewer axes than its name says, or the
    weight of a known layer is to be transposed."""
    namer = Namer(names)
    patterns = {name: read_pattern(name)[0] for name in transposed}
    unused = set(patterns)
    out = []
    leaves = leaves_of(model)
    aliases = _aliases(model, leaves, namer)
    for position, leaf in enumerate(leaves):
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
        if flipped and leaf.layer is not None:
            raise ValueError(
                f"{named(leaf.path)} is of a known layer, and not `transposed`: layers "
                "of Equinox keep their weights as (out, in)."
            )
        others = aliases.get(leaf.path, ())
        if others and stack_axes(name):
            raise ValueError(
                f"{named(leaf.path)} is tied to `{others[0].name}`, and is a stack of "
                "layers, which PEFT does not tie."
            )
        parameters = unstack(name, shape)
        out.append(Place(leaf, position, base, parameters, bool(flipped), others))
    namer.check()
    if unused:
        raise ValueError(
            f"{', '.join(map(repr, sorted(unused)))} of `transposed` matched no array."
        )
    refuse_ambiguous(
        name
        for place in out
        for name in (*place.names.values(), *(x.name for x in place.aliases))
    )
    return out


def _aliases(
    model: PyTree, leaves: list[Leaf], namer: Namer
) -> dict[str, tuple[Alias, ...]]:
    """The other names of the arrays that are tied, by their paths."""
    by_path = {leaf.path: leaf for leaf in leaves}
    out: dict[str, tuple[Alias, ...]] = {}
    for path, source in ties_of(model).items():
        # What is tied is a weight of a layer, or the layer with all that is in it.
        leaf = by_path.get(path, by_path[source])
        is_embedding = isinstance(leaf.holder, eqx.nn.Embedding)
        alias = Alias(namer(path), namer(source), is_embedding)
        out[source] = (*out.get(source, ()), alias)
    return out


def wrappers(places: list[Place], names: Collection[str]) -> dict[str, str]:
    """Where PEFT keeps the factors of parameters targeted one by one.

    Those of one module are wrapped in the order in which it has them, so that the last
    one is outermost. That order is taken to be the one here.

    **Arguments:**

    - `names`: of all such parameters.

    **Returns:** for each, what its factors are called in place of a module.

    **Raises:** `ValueError` if a mixed-up order could go unnoticed.
    """
    groups: dict[str, dict[str, Place]] = {}
    for place in places:
        for name in place.names.values():
            if name in names:
                groups.setdefault(split(name)[0], {})[name] = place
    for group in groups.values():
        shapes = [place.shape for place in group.values()]
        holders = [p.leaf.modules[-1][1] for p in group.values() if p.leaf.modules]
        in_dict = any(isinstance(holder, dict) for holder in holders)
        if in_dict and len(set(shapes)) < len(shapes):
            raise ValueError(
                f"{', '.join(group)} are of one shape, and PEFT tells them apart by "
                "their order alone, which a dictionary does not keep: JAX sorts it. "
                "Make them fields of an `equinox.Module`, in PyTorch's order."
            )
    return {
        name: module + ".base_layer" * (len(group) - 1 - i)
        for module, group in groups.items()
        for i, name in enumerate(group)
    }
