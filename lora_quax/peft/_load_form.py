"""From the files of PEFT to a model adapted in another form than LoRA."""

import functools as ft
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from .._arrays.base import AdaptedArray, checked, make, replace
from .._arrays.check import aval_of
from .._arrays.lora import unsummed
from .._arrays.low_rank import LowRankArray
from .._disk.files import AdapterError, read_json, refuse
from .._forms.ia3 import IA3
from .._forms.vera import VeRA
from .._model.names import split
from ._config import Config, config_of, FILE as CONFIG
from ._forms import About, check_layer, Exchange, EXCHANGED, stacked
from ._patterns import Whole
from ._places import Place
from ._read import FILE, Parts, PeftAdapter, PREFIX, read_pair


class Other(NamedTuple):
    """What there is to an adapter that is not of LoRA, beside its tensors."""

    form: Exchange
    config: Config
    shared: dict[str, np.ndarray]
    feedforward: list[str] | str  # modules whose inputs are scaled, as PEFT finds them
    seen: dict[Any, LowRankArray]  # what weights of one shape have in common

    def is_scaled_bias(self, name: str) -> bool:
        """Whether a parameter is a bias that PEFT scales as what its layer gives."""
        module, parameter = split(name)
        if self.form.cls is not IA3 or parameter != "bias":
            return False
        return not self._is_feedforward(module)

    def _is_feedforward(self, module: str) -> bool:
        names = self.feedforward
        if isinstance(names, str):
            return Whole(names).match(module)
        return module.endswith(tuple(names))

    def around(
        self,
        base: Any,
        place: Place,
        updates: Mapping[tuple[int, ...], Parts | None],
        dtype: Any,
        allow_materialise: bool,
    ) -> AdaptedArray:
        """An array with what the files have for it, of each of its slices if it is a
        stack.

        **Raises:** `ValueError` if the tensors do not fit it.
        """
        is_bias = place.leaf.is_bias
        if not is_bias:
            check_layer(self.form, place)
        found, feedforward = [], set()
        for index, update in updates.items():
            if update is None:
                raise ValueError(
                    "some of its layers have an update, and some have none"
                )
            module = split(place.names[index])[0]
            feedforward.add(self._is_feedforward(module))
            rank, alpha = self.config.rank(module), self.config.alpha(module)
            about = About(place.shape, rank, alpha, self.shared, [*feedforward][-1])
            try:
                found.append(self.form.read(update.tensors, about))
            except KeyError as e:
                raise ValueError(f"`{module}` has no {e}") from e
        lead = aval_of(place.origin).shape[: -len(place.shape)]
        update = stacked(found, lead, dtype)
        policy = dict(stop_gradient=True, allow_materialise=allow_materialise)
        if self.form.cls is IA3:
            if len(feedforward) > 1:
                raise ValueError("its layers differ in which side of them is scaled")
            fields = dict(feedforward=feedforward.pop(), scale=update)
            return checked(make(IA3, base=base, **fields, **policy))
        if isinstance(update, VeRA):
            alike = place.shape, lead
            update = replace(update, shared=self.seen.setdefault(alike, update.shared))
        update = replace(update, allow_materialise=allow_materialise)
        return checked(unsummed(base, update))


def form_in(folder: Path) -> str | None:
    """The form of an adapter, by PEFT's name; `None` for LoRA and what is not known."""
    path = folder / CONFIG
    name = read_json(path).get("peft_type") if path.is_file() else None
    return name if isinstance(name, str) and name in EXCHANGED else None


def read_form(name: str, folder: Path, ignore: Collection[str]) -> PeftAdapter:
    """**Raises:** `FileNotFoundError`; `AdapterError` if the files are no adapter."""
    form, path = EXCHANGED[name], folder / FILE
    given: dict[str, Any] = {}
    config, tensors = read_pair(folder, ft.partial(_config, form, ignore, given))
    parts: dict[str, dict[str, np.ndarray]] = {}
    shared, values, problems = {}, {}, []
    for key, x in tensors.items():
        module, _, suffix = key.removeprefix(PREFIX).rpartition(".")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            problems.append(f"`{key}` is of type {x.dtype.name}, no floating point")
        elif key.removeprefix("base_model.") in form.shared:
            shared[key.removeprefix("base_model.")] = x
        elif not key.startswith(PREFIX):
            problems.append(f"`{key}` does not begin with `{PREFIX}`")
        elif suffix in form.suffixes:
            parts.setdefault(module, {})[suffix] = x
        else:
            values[key.removeprefix(PREFIX)] = x
    if {*form.shared} - {*shared}:
        problems.append(
            f"it lacks {' and '.join(form.shared)}, which PyTorch would draw again "
            "from a seed, with other numbers on another machine; save it with PEFT's "
            "`save_projection=True`"
        )
    refuse(f"The adapter {path} is not sound", problems)
    updates: Any = {module: Parts(x) for module, x in parts.items()}
    other = Other(form, config, shared, given.get("feedforward_modules") or [], {})
    return PeftAdapter(path, config, updates, {}, values, other=other)


# What these say does not change what a finished adapter computes.
_HARMLESS = {
    "d_initial",
    "init_ia3_weights",
    "init_weights",
    "module_dropout",
    "projection_prng_key",
    "rank_dropout",
    "rank_dropout_scale",
    "save_projection",
    "vera_dropout",
    # What they decide is seen by the tensors.
    "decompose_both",
    "decompose_factor",
}


def _config(form: Exchange, ignore, given: dict[str, Any], folder: Path):
    """The configuration, read as one of LoRA."""
    path = folder / CONFIG
    fields = read_json(path)
    given.update(fields)
    out = {name: x for name, x in fields.items() if name not in _HARMLESS}
    out.pop("feedforward_modules", None)
    if "fan_in_fan_out" in fields and fields["fan_in_fan_out"]:
        raise AdapterError(f"{path}: `fan_in_fan_out` is exchanged for LoRA alone.")
    for name in ("r", "alpha") if form.ranked else ():
        if fields.get(name) is None:
            raise AdapterError(
                f"{path}: `{name}` is missing. PEFT would take a default, which may "
                "not be what the adapter was trained with."
            )
    if form.ranked:
        out["lora_alpha"] = out.pop("alpha", None)
    elif form.cls is IA3:
        out |= dict(r=1, lora_alpha=1)
    else:
        out["lora_alpha"] = out.get("r")
    out["peft_type"] = "LORA"
    return config_of(path, out, ignore)
