"""From an adapted model to the files of PEFT."""

import collections
import json
import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import numpy as np
import quax
from jaxtyping import PyTree

from .._adapter import to_numpy
from .._array import FactoredArray, LoraArray, LowRankArray
from .._files import write_tensors, written_whole
from .._full import FullArray
from .._merge import refuse_missing
from .._paths import leaves_of, named
from . import _config, _read
from ._layout import Kind, kind_of, SUFFIXES, to_peft
from ._names import is_in, Names, split
from ._places import Place, places_of, wrappers


def save(
    directory: str | os.PathLike,
    model: PyTree,
    *,
    names: Names = None,
    transposed: Sequence[str] = (),
    adapter_name: str = "default",
    initial: PyTree = None,
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
    lora_dropout: float = 0.0,
    fan_in_fan_out: bool = False,
    use_rslora: bool = False,
) -> None:
    """Writes the adapter of a model as PEFT writes one.

    ```python
    names = {"blocks.{}.q": "model.layers.{}.self_attn.q_proj"}
    lora_quax.peft.save("my-adapter", model, names=names)
    ```

    ```python
    model = peft.PeftModel.from_pretrained(torch_model, "my-adapter")
    ```

    Low-rank updates are written as such. An array trained in full is written with the
    module that it is part of, among `modules_to_save`; a bias alone by PEFT's modes
    `bias="lora_only"` or `"all"`. In these an array that was not trained is written as
    it is. Each tensor has the dtype that it has in the model.

    **Arguments:**

    - `directory`: is made if need be. The files in it of other names are left alone.
    - `model`: a model with adapted weights.
    - `names`: what arrays are called in PyTorch, where that differs from their paths
        here: a function from a path to a name, or a mapping from the beginnings of
        paths. The entry that says most of a path decides. In a path `{}` stands for any
        segment, and what it stands for is put in the place of `{}` in the name; for
        layers stacked along a leading axis `{}` in the name is the index:
        `{"blocks": "model.layers.{}"}`. Two such axes need two `{}`.
    - `transposed`: arrays of no known layer that are kept as `(in, out)`, where PEFT
        would have a weight `(out, in)`; by the ends of their paths or as regular
        expressions, as for `targets` of `loraify`.
    - `adapter_name`: one that is not `"default"` gets a folder below.
    - `initial`: the model as it was before training, if its initialisation took the
        first update out of the base, as PiSSA and OLoRA do. The adapter is then written
        with twice the rank and works on the untouched base.
    - `base_model_name_or_path`, `task_type`, `lora_dropout`, `fan_in_fan_out`: what the
        configuration says. The last is true for a GPT-2, whose `Conv1D` keeps its
        weight as `(in, out)` in PyTorch; it does not concern the arrays here.
    - `use_rslora`: whether to write the scaling as `alpha / √rank`.

    **Raises:** `ValueError` if there is no low-rank update, if a leaf is missing, if
    `names` or `transposed` matches nothing, or if an array has no counterpart in PEFT,
    with the reason; `TypeError` if the model is abstract or traced. Nothing is written
    then. `OSError` if the files cannot be written.
    """
    export = _Export(model, initial, names, transposed)
    fields = export.config(use_rslora)
    fields |= dict(
        base_model_name_or_path=base_model_name_or_path,
        fan_in_fan_out=fan_in_fan_out,
        lora_dropout=float(lora_dropout),
        task_type=task_type,
    )
    tensors = export.tensors()
    folder = _read.folder_of(directory, adapter_name)
    folder.mkdir(parents=True, exist_ok=True)
    goals = folder / _read.FILE, folder / _config.FILE
    with written_whole(*goals) as (weights, config):
        write_tensors(weights, tensors, {"format": "pt"})
        config.write_text(json.dumps(fields, indent=2, sort_keys=True))


class _Update(NamedTuple):
    """The update of one parameter, as PEFT has it."""

    kind: Kind
    A: np.ndarray
    B: np.ndarray
    rank: int
    alpha: float


_UNCHANGED = object()  # In place of an initial update that left the base as it was.


class _Export:
    """What of a model goes into the files, by the names of the PyTorch model."""

    def __init__(self, model: PyTree, initial: PyTree, names: Names, transposed):
        self.places = places_of(model, names, transposed)
        self.changes_base = initial is None
        first = {leaf.path: leaf.value for leaf in leaves_of(initial)}
        self.updates: dict[str, _Update] = {}
        for place in self.places:
            refuse_missing(place.path, place.leaf.value)
            if isinstance(place.leaf.value, FactoredArray):
                start = _UNCHANGED if initial is None else first.get(place.path)
                self.updates |= _updates(place, start)
        if not self.updates:
            raise ValueError("The model has no low-rank update that could be written.")
        self.parameters = [
            name
            for name, update in self.updates.items()
            if split(name)[1] != "weight" or update.kind == "experts"
        ]
        # Parameter -> what stands for its module in the keys of its factors.
        self.wrapped = {name: split(name)[0] for name in self.updates}
        self.wrapped |= wrappers(self.parameters)
        self.adapted = {split(name)[0] for name in self.updates}
        self.modules = _modules(self.places)
        self.saved = self._saved()
        self.bias, self.biases = self._biases()

    def tensors(self) -> dict[str, np.ndarray]:
        """What `adapter_model.safetensors` holds."""
        out = {}
        for name, update in self.updates.items():
            for suffix, x in zip(SUFFIXES[update.kind], (update.A, update.B)):
                out[f"{self.wrapped[name]}.{suffix}"] = x
        for place in self.places:
            for index, name in place.names.items():
                if (key := self._key_of_value(place, name)) is not None:
                    out[key] = _value(place, index)
        return {_read.PREFIX + key: x for key, x in out.items()}

    def _key_of_value(self, place: Place, name: str) -> str | None:
        """What a parameter itself is called in the file; `None` if it is not in it."""
        module, parameter = split(name)
        if name in self.updates:
            # A base that training, or an earlier load, has changed.
            changed = _has_own_base(place) and self.changes_base
            return f"{self.wrapped[name]}.base_layer.{parameter}" if changed else None
        if name in self.biases:
            infix = "base_layer." if module in self.adapted else ""
            return f"{module}.{infix}bias"
        return name if any(is_in(module, saved) for saved in self.saved) else None

    def config(self, use_rslora: bool) -> dict[str, Any]:
        """The fields of `adapter_config.json` that the arrays decide."""
        ranks, alphas = {}, {}
        for name, update in self.updates.items():
            key = name if name in self.parameters else split(name)[0]
            root = math.sqrt(update.rank) if use_rslora else 1
            ranks[key], alphas[key] = update.rank, _number(update.alpha / root)
        rank, rank_pattern = _most_common(ranks)
        alpha, alpha_pattern = _most_common(alphas)
        return dict(
            peft_type="LORA",
            r=rank,
            lora_alpha=alpha,
            rank_pattern=rank_pattern,
            alpha_pattern=alpha_pattern,
            target_modules=self._target_modules(),
            target_parameters=self._target_parameters(),
            modules_to_save=sorted(self.saved) or None,
            bias=self.bias,
            use_rslora=use_rslora,
            use_dora=False,
            lora_bias=False,
            init_lora_weights=True,
            inference_mode=True,
        )

    def _target_modules(self) -> list[str] | str:
        """The modules adapted, or a regular expression where their names are the ends
        of other names as well."""
        names = sorted({split(name)[0] for name in self.updates.keys() - self.parameters})
        others = self.modules - set(names)
        if any(_ends_in(other, name) for other in others for name in names):
            return "|".join(map(re.escape, names))
        return names

    def _target_parameters(self) -> list[str] | None:
        others = {name for place in self.places for name in place.names.values()}
        for name in self.parameters:
            for other in others - set(self.parameters):
                if _ends_in(other, name):
                    raise ValueError(
                        f"PEFT would take the parameter `{name}`, which is adapted, for "
                        f"`{other}` as well, which is not."
                    )
        return self.parameters or None

    def _saved(self) -> set[str]:
        """The modules to save: those that have an array, not a bias, trained in full."""
        trained = {
            split(name)[0]: place
            for place in self.places
            for name in place.names.values()
            if isinstance(place.leaf.value, FullArray) and split(name)[1] != "bias"
        }
        # PEFT means every module whose name ends in one of these, dot or no dot.
        saved = {m for m in self.modules if any(m.endswith(name) for name in trained)}
        saved -= {m for m in saved if any(is_in(m, n) for n in saved - {m})}
        for module, place in trained.items():
            why = None
            if not module:
                why = "it is no part of a module"
            elif isinstance(place.leaf.holder, eqx.nn.BatchNorm):
                why = "PyTorch keeps running statistics with it, which are not here"
            elif isinstance(place.leaf.holder, eqx.nn.ConvTranspose):
                why = "PyTorch lays out the kernel of a transposed convolution otherwise"
            if why is not None:
                raise ValueError(
                    f"{named(place.path)} is trained in full and cannot be written "
                    f"among `modules_to_save`: {why}."
                )
        for module in saved:
            inside = sorted(name for name in self.adapted if is_in(name, module))
            if inside:
                raise ValueError(
                    f"PEFT would save the module `{module}` whole, for an array in it "
                    f"is trained in full; but `{inside[0]}` is adapted."
                )
        return saved

    def _biases(self) -> tuple[str, set[str]]:
        """PEFT's mode for biases, and those that it writes."""
        biases = {
            name: isinstance(place.leaf.value, FullArray)
            for place in self.places
            for name in place.names.values()
            if split(name)[1] == "bias"
            and not any(is_in(name, module) for module in self.saved)
        }
        if not any(biases.values()):
            return "none", set()
        of_adapted = {name for name in biases if split(name)[0] in self.adapted}
        if all(name in of_adapted for name, trained in biases.items() if trained):
            return "lora_only", of_adapted
        return "all", set(biases)


def _updates(place: Place, initial: Any) -> dict[str, _Update]:
    """The updates of the parameters that an array stands for, by name.

    **Raises:** `ValueError` if PEFT has no such update.
    """
    try:
        kind = kind_of(place.leaf, len(place.shape))
        delta = _delta(place.leaf.value, place, kind)
        a, b = (to_numpy(place.path, x) for x in (delta.a, delta.b))
        rank, alpha = delta.rank, delta.alpha
        if initial is not _UNCHANGED:
            first = _delta(initial, place, kind)
            if (first.rank, first.alpha) != (rank, alpha):
                raise ValueError("`initial` has another rank or alpha for it")
            a0, b0 = (to_numpy(place.path, x) for x in (first.a, first.b))
            a = np.concatenate([a, a0], axis=a.ndim - 1 - delta.cols)
            b = np.concatenate([b, -b0], axis=-1)
            rank, alpha = 2 * rank, 2 * alpha
    except ValueError as e:
        raise ValueError(
            f"{named(place.path)} cannot be exchanged with PEFT: {e}."
        ) from e
    out = {}
    for index, name in place.names.items():
        # A layer of several that has no update, as `load` leaves it.
        if index and not (a[index].any() or b[index].any()):
            continue
        A, B = to_peft(kind, a[index], b[index], place.transposed)
        out[name] = _Update(kind, A, B, rank, alpha)
    return out


def _delta(x, place: Place, kind: Kind) -> LowRankArray:
    """The update of a weight, if it is one that PEFT can have."""
    if not isinstance(x, LoraArray):
        raise ValueError("there is no `LoraArray`, which has a base and an update")
    if isinstance(x.base, FactoredArray):
        raise ValueError("it is an adapter on an adapter; merge one of them first")
    wanted = 1, len(place.shape) - 1 if kind == "conv" else 1
    if (x.delta.rows, x.delta.cols) != wanted:
        raise ValueError(
            f"it has {x.delta.rows} axes of rows and {x.delta.cols} of columns; PEFT "
            f"has {wanted[0]} and {wanted[1]}"
        )
    return x.delta


def _has_own_base(place: Place) -> bool:
    """Whether the base may not be that of the model that was adapted."""
    x = place.leaf.value
    return isinstance(x.base, FullArray) or not x.stop_gradient


def _value(place: Place, index: tuple[int, ...]) -> np.ndarray:
    """What a parameter itself is now, in PyTorch's layout."""
    x = place.leaf.value
    x = x.base if isinstance(x, LoraArray) else x
    x = x.value if isinstance(x, FullArray) else x
    if isinstance(x, quax.Value):
        raise ValueError(
            f"{named(place.path)} would have to be written whole, and is no plain "
            f"array but a {type(x).__name__}."
        )
    return to_numpy(place.path, x)[index].reshape(place.torch_shape)


def _modules(places: list[Place]) -> set[str]:
    """All modules of the PyTorch model that hold an array, near or far."""
    segments = [split(name)[0].split(".") for p in places for name in p.names.values()]
    return {".".join(x[: i + 1]) for x in segments for i in range(len(x))}


def _most_common(values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The value that most have, and patterns for the names of the others.

    A pattern matches its name alone, so that their order is of no account: PEFT sorts
    them.
    """
    ((common, _),) = collections.Counter(values.values()).most_common(1)
    others = {name: value for name, value in values.items() if value != common}
    return common, {f"^{re.escape(name)}": value for name, value in others.items()}


def _number(x: float) -> int | float:
    return int(x) if x == int(x) else x


def _ends_in(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")
