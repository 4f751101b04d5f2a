"""Which update goes to which tensor of a base, and how it lies there.

All of it is settled before a number is touched. The files of PEFT leave two things to
the model: whether a weight is kept as (out, in) or as (in, out), and which of several
parameters of a module is meant. Shapes tell, or there is no telling. In a file of ours
the fingerprint of the base tells of square weights too.
"""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np

from .._disk.files import refuse
from .._model.names import Namer, split, stack_axes, unstack
from ..peft._initial import INITIALISATIONS
from .content import Added, arrays_of, Content, is_finite, Update


_FLOATS = ("BF16", "F16", "F32", "F64")
_TURNS = ("linear", "array", "experts")  # Kinds that a model may keep as (in, out).
# What `transformers` calls its layers that are kept so. PEFT has one flag for them all,
# which says no where others are adapted beside them.
_CONV1D = ("c_attn", "c_fc", "c_proj", "q_attn")


class Tensor(NamedTuple):
    """Where a tensor of the base lies."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int  # in the file


Tensors: TypeAlias = dict[str, Tensor]  # by name


class Part(NamedTuple):
    """An update of one tensor: a slice of an update, turned or not."""

    update: Update
    at: tuple[int, ...]  # where in its stack
    turned: bool


class Task:
    """What becomes of one tensor of the base."""

    def __init__(self):
        self.parts: list[Part] = []
        self.value: np.ndarray | None = None
        self.added: list[Added] = []


class _Planner:
    """Finds the tensors, and remembers what does not fit."""

    def __init__(
        self,
        content: Content,
        tensors: Tensors,
        namer: Namer,
        turned: Mapping[str, bool],
    ):
        self.content = content
        self.tensors = tensors
        self.namer = namer
        self.turned = turned
        self.problems: list[str] = []
        self.tasks: dict[str, Task] = {}
        self.owners: dict[str, str] = {}  # tensor -> weight of the adapter
        self.squares: list[tuple[str, Part]] = []
        self.turns: dict[str, set[bool]] = {kind: set() for kind in _TURNS}

    def plan(self) -> dict[str, Task]:
        for name, x in arrays_of(self.content).items():
            if not is_finite(x):
                self.problems.append(f"`{name}` is not finite")
        for weight, update in self._identified():
            self._update(weight, update)
        for weight, part in self.squares:
            self._square(weight, part)
        for weight, x in self.content.values.items():
            self._value(weight, x)
        for bias, added in self.content.added.items():
            self._add(bias, added)
        self.problems += [
            f"`{name}` is adapted by DoRA, whose norms are those of whole rows: load "
            "it around the model, and `lora_quax.merge` merges it"
            for name in self.content.magnitudes
        ]
        if self.content.initialisation in INITIALISATIONS:
            self.problems.append(
                f"`init_lora_weights` is {self.content.initialisation!r}: the base is "
                "to be reduced first, as `lora_quax.peft.load` does"
            )
        self._refuse_turned_values()
        refuse(
            f"{self.content.path} cannot be merged into the base; nothing was written",
            self.problems,
        )
        self.namer.check()
        return self.tasks

    def _task(self, name: str) -> Task:
        return self.tasks.setdefault(name, Task())

    def _find(self, weight: str, name: str) -> Tensor | None:
        """The tensor of the base that a weight of the adapter is."""
        tensor = self.tensors.get(name)
        called = "" if name == weight else f", called `{name}`"
        if tensor is None:
            self.problems.append(f"the base has no `{weight}`{called}")
        if (other := self.owners.setdefault(name, weight)) != weight:
            self.problems.append(f"`{other}` and `{weight}` are both called `{name}`")
            return None
        return tensor

    def _names(self, weight: str, shape: tuple[int, ...], most: int):
        """The tensors that an array, of which `most` axes may stack, stands for."""
        name = self.namer(weight)
        if stack_axes(name) > most:
            self.problems.append(
                f"`{weight}` is called `{name}`, which is for more stacked axes than "
                f"it has: its shape is {shape}"
            )
            return {}
        return unstack(name, shape)

    def _identified(self) -> list[tuple[str, Update]]:
        """The updates, each with the one weight that it is of."""
        out, open_ = [], {}  # `open_`: those that may be of several.
        for name, update in self.content.updates.items():
            if not update.has_base:
                self.problems.append(
                    f"`{name}` is a product with no base, not an update of a weight"
                )
            elif len(update.weights) == 1:
                out.append((update.weights[0], update))
            else:
                holder = split(update.weights[0])[0]
                open_.setdefault(holder, []).append(update)
        for holder, updates in open_.items():
            out += self._matched(holder, updates)
        return out

    def _matched(self, holder: str, updates: list[Update]) -> list[tuple[str, Update]]:
        """Which of several parameters of a module each update is of, by the shapes."""
        weights = updates[0].weights
        if None in [self._find(weight, self.namer(weight)) for weight in weights]:
            return []
        fits = [
            order
            for order in itertools.permutations(weights, len(updates))
            if all(
                _turns(x, self.tensors[self.namer(weight)].shape)
                for weight, x in zip(order, updates)
            )
        ]
        if len(fits) == 1:
            return list(zip(fits[0], updates))
        why = "fit none of" if not fits else "fit in more than one way to"
        self.problems.append(
            f"the factors of `{holder}` {why} {', '.join(weights)}; PEFT tells them "
            "apart by the order in the model, which a file does not have"
        )
        return []

    def _update(self, weight: str, update: Update) -> None:
        names = self._names(weight, update.shape, update.b.ndim - 2)
        for index, name in names.items():
            tensor = self._find(weight, name)
            if tensor is None or not self._takes(name, tensor, _FLOATS):
                continue
            turns = _turns(update, tensor.shape, len(index))
            if len(turns) == 2:
                self.squares.append((name, Part(update, index, False)))
            elif turns:
                (turned,) = turns
                self.turns.get(update.kind, set()).add(turned)
                self._task(name).parts.append(Part(update, index, turned))
            else:
                shape = update.shape[len(index) :]
                self.problems.append(
                    f"`{name}` has shape {tensor.shape} in the base; the update is of "
                    f"shape {shape}"
                )

    def _square(self, name: str, part: Part) -> None:
        """A square weight lies as the others do."""
        others = set(self.turns[part.update.kind])
        may_be_conv1d = split(split(name)[0])[1] in _CONV1D
        if self.content.fan_in_fan_out:
            others = {True} if part.update.kind == "linear" else others
        elif part.update.kind == "linear":
            others = set() if may_be_conv1d else others | {False}
        if name in self.turned:
            others = {self.turned[name]}
        if len(others) == 1:
            (turned,) = others
            self._task(name).parts.append(part._replace(turned=turned))
            return
        self.problems.append(
            f"`{name}` is square, and nothing says whether it is kept as (out, in) or "
            "(in, out): a model says it, merged in Python by `lora_quax.merge` and "
            "written by `save_model`"
        )

    def _value(self, weight: str, x: np.ndarray) -> None:
        for index, name in self._names(weight, x.shape, x.ndim).items():
            tensor, value = self._find(weight, name), x[index]
            if tensor is None or not self._takes(name, tensor, _types_for(value)):
                continue
            if self._fits(name, tensor, value.shape):
                self._task(name).value = value

    def _refuse_turned_values(self) -> None:
        """A square matrix given whole lies as it does in the adapter, or who knows."""
        for name, task in self.tasks.items():
            if task.value is None or task.value.ndim != 2:
                continue
            rows, cols = task.value.shape
            is_turned = any(part.turned for part in task.parts)
            if rows == cols and (self.content.fan_in_fan_out or is_turned):
                self.problems.append(
                    f"`{name}` is square and given whole, so that there is no telling "
                    "whether the base keeps it transposed"
                )

    def _add(self, bias: str, added: Added) -> None:
        name = self.namer(bias)
        tensor = self._find(bias, name)
        if tensor is None or not self._takes(name, tensor, _FLOATS):
            return
        if self._fits(name, tensor, added.x.shape):
            self._task(name).added.append(added)

    def _takes(self, name: str, tensor: Tensor, dtypes: tuple[str, ...]) -> bool:
        if tensor.dtype not in dtypes:
            self.problems.append(
                f"`{name}` is of type {tensor.dtype} in the base; "
                f"{' or '.join(dtypes)} is wanted"
            )
        return tensor.dtype in dtypes

    def _fits(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> bool:
        # The bias of a convolution is (out, 1, 1) in Equinox, a vector in PyTorch.
        one, other = _without_ones(tensor.shape), _without_ones(shape)
        if one != other:
            self.problems.append(
                f"`{name}` has shape {tensor.shape} in the base and {shape} in the "
                "adapter"
            )
        return one == other


def _turns(update: Update, shape: tuple[int, ...], stacked: int = 0) -> set[bool]:
    """The ways in which an update fits a tensor: as it is, or transposed."""
    wanted = update.shape[stacked:]
    if not update.may_turn:
        # PEFT has the single expert of a parameter (1, out, in) as (out, in).
        alone = update.kind == "parameter" and shape == (1, *wanted)
        return {False} if shape == wanted or alone else set()
    turned = *wanted[:-2], wanted[-1], wanted[-2]
    return {flag for flag, x in ((False, wanted), (True, turned)) if x == shape}


def _types_for(value: np.ndarray) -> tuple[str, ...]:
    """The types of a base that can take a value; an integer is never converted."""
    if value.dtype.kind not in "biu":
        return _FLOATS
    bits = 8 * value.dtype.itemsize
    return ("BOOL" if value.dtype.kind == "b" else f"{value.dtype.kind}{bits}".upper(),)


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without the axes of size 1 at the end."""
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def plan(
    content: Content, tensors: Tensors, namer: Namer, turned: Mapping[str, bool]
) -> dict[str, Task]:
    """What becomes of each tensor of the base that changes, by its name. `turned` is
    what is known already: which tensors are transposed, and which are not.

    **Raises:** `AdapterError`, which lists everything that is wrong; `ValueError` if a
    name to be changed is none of the adapter's.
    """
    return _Planner(content, tensors, namer, turned).plan()
