"""From a model adapted in another form than LoRA to what PEFT's files say of it."""

import re
from typing import Any

import jax
import numpy as np

from .._arrays.base import is_adapted, with_base
from .._arrays.full import FullArray
from .._arrays.lora import LoraArray
from .._disk.exchange import to_numpy
from .._forms.ia3 import IA3
from .._model.names import is_in, split
from .._model.paths import named
from ._forms import (
    check_layer,
    Exchange,
    EXCHANGED,
    lokr_options,
    one_of,
    update_of,
    vera_shared,
    Written,
)
from ._places import Place
from ._read import PREFIX
from ._targets import most_common, target_modules
from ._whole import has_own_base, value_of, whole


def of_form(
    name: str, places: list[Place], said: dict[str, Any], consumer: str
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The fields of the configuration, and the tensors.

    **Arguments:**

    - `name`: of the form, as PEFT has it.
    - `said`: arguments of `save` that are for LoRA alone.

    **Raises:** `ValueError` if PEFT has no such adapter.
    """
    form = EXCHANGED[name]
    for argument, value in said.items():
        if value not in (None, False, 0.0):
            raise ValueError(f"`{argument}` is for LoRA, and the adapter is of {name}.")
    if consumer != "peft":
        raise ValueError(f"{consumer} takes LoRA, and the adapter is of {name}.")
    updates, written = _updates(form, places)
    if aliases := [x for place in places for x in place.aliases if _is_of(place)]:
        raise ValueError(
            f"`{aliases[0].source}` is adapted, and is also `{aliases[0].name}`. PEFT "
            f"ties what adapts them for LoRA alone, and not for {name}."
        )
    modules = {split(parameter)[0] for parameter in written}
    rest = whole(places, modules)
    if rest.bias != "none":
        trained = sorted(x for x in rest.biases if x.endswith("bias"))[0]
        raise ValueError(
            f"`{trained}` is trained in full, and PEFT trains no biases beside {name}."
        )
    tensors = {
        f"{PREFIX}{split(parameter)[0]}.{suffix}": x
        for parameter, update in written.items()
        for suffix, x in update.tensors.items()
    }
    tensors |= {
        key: x for place in places for key, x in _saved(place, rest.modules, written)
    }
    fields = dict(
        peft_type=name,
        target_modules=target_modules(places, written),
        modules_to_save=sorted(rest.modules) or None,
        inference_mode=True,
        **form.fields,
    )
    if name != "IA3":
        fields |= _settings(form, written)
    if name == "LOKR":
        fields |= lokr_options(updates)
    if name == "VERA":
        tensors |= {f"base_model.{x}": y for x, y in vera_shared(updates).items()}
    if name == "IA3":
        fields["feedforward_modules"] = _feedforward(places, written)
    return fields, tensors


def _is_of(place: Place) -> bool:
    x = place.leaf.value
    return is_adapted(x) and not isinstance(x, FullArray)


def _updates(form: Exchange, places: list[Place]):
    """The updates, and what is written of each, by the parameter."""
    biases = _biases(places)
    updates, written = [], {}
    for place in filter(_is_of, places):
        if place.path in biases:
            continue
        x = place.leaf.value
        try:
            if isinstance(x, LoraArray) and is_adapted(x.base):
                if not isinstance(x.base, FullArray):
                    raise ValueError("it is an adapter on an adapter")
            if has_own_base(place):
                raise ValueError("its base trains as well")
            check_layer(form, place)
            if isinstance(x, IA3) and x.feedforward and _groups(place) > 1:
                raise ValueError("PEFT scales all inputs of a grouped convolution")
            x = with_base(update_of(x), None)
            x = jax.tree.map(lambda leaf: to_numpy(place.path, leaf), x)
            for index, name in place.names.items():
                module, parameter = split(name)
                if parameter != "weight" or not module:
                    raise ValueError(
                        f"it would be `{name}`, which is no module's weight"
                    )
                updates.append(one_of(x, index))
                written[name] = form.write(updates[-1])
        except ValueError as e:
            raise ValueError(
                f"{named(place.path)} cannot be exchanged with PEFT: {e}."
            ) from e
    return updates, written


def _groups(place: Place) -> int:
    return getattr(place.leaf.layer[1], "groups", 1) if place.leaf.layer else 1


def _saved(place: Place, modules, written):
    """What of the modules that are saved whole is written of an array."""
    for index, name in place.names.items():
        if name not in written and any(is_in(split(name)[0], x) for x in modules):
            yield f"{PREFIX}{name}", value_of(place, index, False)


def _settings(form: Exchange, written: dict[str, Written]) -> dict[str, Any]:
    ranks = {split(name)[0]: x.rank for name, x in written.items()}
    rank, rank_pattern = most_common(ranks)
    if not form.ranked:
        return dict(r=rank)
    alpha, alpha_pattern = most_common(
        {
            split(name)[0]: round(x.alpha) if x.alpha == round(x.alpha) else x.alpha
            for name, x in written.items()
        }
    )
    return dict(
        r=rank, rank_pattern=rank_pattern, alpha=alpha, alpha_pattern=alpha_pattern
    )


# IA³ scales what a layer gives, and with it the bias.


def _biases(places: list[Place]) -> dict[str, Place]:
    """The biases that are scaled, by their paths."""
    return {
        place.path: place
        for place in places
        if isinstance(place.leaf.value, IA3) and place.leaf.is_bias
    }


def _feedforward(places: list[Place], written: dict[str, Written]):
    """The modules whose inputs are scaled.

    **Raises:** `ValueError` if a bias is not scaled as the outputs are, or is where
    they are not.
    """
    inputs = []
    biases = {
        name: (place, index)
        for place in places
        for index, name in place.names.items()
        if split(name)[1] == "bias"
    }
    for place in places:
        x = place.leaf.value
        for index, name in place.names.items():
            if name not in written:
                continue
            assert isinstance(x, IA3)
            module = split(name)[0]
            if x.feedforward:
                inputs.append(module)
            found = biases.get(f"{module}.bias")
            if found is None:
                continue
            bias = found[0].leaf.value
            scale = np.asarray(x.scale)[index].ravel()
            is_same = isinstance(bias, IA3) and np.array_equal(
                np.asarray(bias.scale)[found[1]].ravel(), scale
            )
            if isinstance(bias, IA3) if x.feedforward else not is_same:
                raise ValueError(
                    f"{named(place.path)} cannot be exchanged with PEFT, which scales "
                    "the bias of a layer as its outputs, and with its inputs not at "
                    "all; here the bias is another array, and is scaled otherwise."
                )
    ends = tuple(inputs)
    others = {split(name)[0] for name in written} - {*inputs}
    if inputs and any(name.endswith(ends) for name in others):
        return "|".join(map(re.escape, inputs))
    return inputs
