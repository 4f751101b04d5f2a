"""Weights that are tied: an array that is an embedding, and the head as well.

PEFT has an adapter for each module. Where it is told to, by `ensure_weight_tying`, that
of the embedding is the head's as well; where it is not, the head stays as it is, until
the adapter is merged into what both have in common.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from .._arrays.base import is_adapted
from .._arrays.full import FullArray
from .._model.names import split
from .._model.paths import named
from .._model.ties import twins_of
from ._config import Config, EMBEDDINGS
from ._places import Alias, Place
from ._read import Factors, PeftAdapter
from ._update import ParameterUpdate


_HEAD = "lm_head"


def ensured(
    places: list[Place], wanted: bool | None, base: str | None
) -> tuple[list[Alias], bool]:
    """The names beside those of `places`, and whether PEFT is to tie them.

    **Arguments:**

    - `wanted`: what the user says, if anything.
    - `base`: the name of the base model, which may be a folder.

    **Raises:** `ValueError` if PEFT would compute something else.
    """
    adapted = [place for place in places if is_adapted(place.leaf.value)]
    aliases = [x for place in adapted for x in place.aliases]
    if aliases:
        if wanted is False:
            return aliases, False
        for x in aliases:
            ends = {split(split(name)[0])[1] for name in (x.name, x.source)}
            if not ends & {*EMBEDDINGS}:
                raise ValueError(
                    f"`{x.source}` is also `{x.name}`. PEFT ties an adapter where one "
                    f"of the modules is called {' or '.join(map(repr, EMBEDDINGS))}; "
                    "say with `names` what they are called in PyTorch, or write each "
                    "for itself with `ensure_weight_tying=False`."
                )
        return aliases, True
    if wanted is False:
        return [], False
    _refuse_twins(places, adapted)
    sources = [place for place in adapted if place.is_embedding]
    names = {name for place in places for name in place.names.values()}
    if wanted:
        return [_unseen(sources, names)], True
    if sources and _is_tied(base):
        raise ValueError(
            f"The model in {base} ties its head to the embedding "
            f"`{sources[0].names[()]}`, which is adapted: say with "
            "`ensure_weight_tying` whether the adapter is the head's as well."
        )
    return [], False


def _unseen(sources: list[Place], names: set[str]) -> Alias:
    """The head, where the program itself uses the embedding as such."""
    if len(sources) != 1:
        raise ValueError(
            "`ensure_weight_tying` is for a model with one embedding that is adapted; "
            f"this one has {len(sources)}."
        )
    ((_, source),) = sources[0].names.items()
    if f"{_HEAD}.weight" in names:
        raise ValueError(
            f"`{_HEAD}.weight` is an array of its own in the model, so that what "
            f"adapts `{source}` does not adapt it. Tie them with `equinox.nn.Shared`."
        )
    return Alias(f"{_HEAD}.weight", source, False)


def _refuse_twins(places: list[Place], adapted: list[Place]) -> None:
    # A value trained in full is saved with its own module, and merged into no other.
    updated = {p.path for p in adapted if not isinstance(p.leaf.value, FullArray)}
    for twins in twins_of({place.path: place.origin for place in places}):
        if updated & {*twins}:
            raise ValueError(
                f"{' and '.join(map(named, twins))} are one array, with an adapter "
                "that is not that of all of them. If they are tied in PyTorch as well, "
                "PEFT computes the same until it merges the adapter, and then changes "
                "all of them. Tie them with `equinox.nn.Shared`, or accept that with "
                "`ensure_weight_tying=False`."
            )


def _is_tied(base: str | None) -> bool:
    """Whether the configuration of a base model that is at hand says so."""
    path = Path(base or "") / "config.json"
    try:
        return base is not None and says_tied(json.loads(path.read_text()))
    except (OSError, ValueError):
        return False


def says_tied(config: Any) -> bool:
    """Whether the configuration of a model says that its embeddings are tied."""
    if not isinstance(config, dict):
        return False
    inner = config.get("text_config")
    return config.get("tie_word_embeddings") is True or says_tied(inner)


def of_alias(update: ParameterUpdate, alias: Alias) -> ParameterUpdate:
    """The update of an array by another of its names."""
    if update.kind != ("linear" if alias.is_embedding else "embedding"):
        raise ValueError(
            f"`{alias.source}` is also `{alias.name}`. PEFT ties an embedding and a "
            "linear layer, and no others."
        )
    if update.magnitude is not None:
        raise ValueError(
            f"`{alias.source}` is also `{alias.name}`, and is adapted by DoRA: PEFT "
            "gives the embedding a magnitude for each feature and the head one for "
            "each token, which are not those of one array."
        )
    kind = "embedding" if alias.is_embedding else "linear"
    # (rank, vocabulary) and (dimension, rank), or (rank, in) and (out, rank).
    return update._replace(kind=kind, A=update.B.T, B=update.A.T)


# On reading.


def without_aliases(
    adapter: PeftAdapter, places: list[Place]
) -> tuple[PeftAdapter, list[str]]:
    """An adapter without what it has for the other names of an array, and what is wrong
    about that."""
    updates, values = dict(adapter.updates), dict(adapter.values)
    problems: list[str] = []
    names = {name for place in places for name in place.names.values()}
    aliases = [x for place in places for x in place.aliases]
    if adapter.config.ties:
        aliases += _unseen_in(adapter, names, aliases)
    for x in aliases:
        problems += _drop_update(x, updates, adapter.config)
        problems += _drop_value(x, updates, values, adapter.config)
    if adapter.config.ties and not aliases:
        problems += _left_out(adapter, places)
    return adapter._replace(updates=updates, values=values), problems


def _unseen_in(
    adapter: PeftAdapter, names: set[str], known: list[Alias]
) -> list[Alias]:
    """The names of an embedding that the model has no array by."""
    taken = {x.name for x in known}
    sources = [module for module, x in adapter.updates.items() if x.is_embedding]
    saved = [x for x in adapter.values if x in names and split(x)[1] == "weight"]
    out = []
    for name in [f"{module}.weight" for module in adapter.updates] + [*adapter.values]:
        if name in names or name in taken or split(name)[1] != "weight":
            continue
        for source in [f"{module}.weight" for module in sources] or saved:
            if source in names and _is_same(adapter, split(name)[0], split(source)[0]):
                out.append(Alias(name, source, False))
                taken.add(name)
                break
    return out


def _is_same(adapter: PeftAdapter, one: str, other: str) -> bool:
    x, y = adapter.updates.get(one), adapter.updates.get(other)
    if x is not None and y is not None:
        return _are_turned(x, y)
    x, y = (adapter.values.get(f"{module}.weight") for module in (one, other))
    return x is not None and y is not None and np.array_equal(x, y)


def _are_turned(x: Factors, y: Factors) -> bool:
    turned = np.array_equal(x.A, y.B.T) and np.array_equal(x.B, y.A.T)
    dora = x.magnitude is not None or y.magnitude is not None
    return turned and not dora and x.is_embedding != y.is_embedding


def _drop_update(alias: Alias, updates: dict[str, Factors], config: Config):
    name, source = (split(x)[0] for x in (alias.name, alias.source))
    x, y = updates.pop(name, None), updates.get(source)
    if x is None and y is None:
        return []
    if x is None:
        if config.ties:
            return []
        return [
            f"`{source}` is also `{name}` in the model, which the adapter leaves as it "
            "is: without `ensure_weight_tying` PEFT adapts the one alone. Give the "
            "model an array for each"
        ]
    settings = (config.rank(name), config.alpha(name))
    if y is None or not _are_turned(x, y):
        return [
            f"`{source}` is also `{name}` in the model, and the adapter has another "
            "update for each. Give the model an array for each"
        ]
    if settings != (config.rank(source), config.alpha(source)):
        return [f"`{source}` and `{name}` are tied, and differ in rank or alpha"]
    return []


def _drop_value(alias: Alias, updates, values: dict[str, np.ndarray], config: Config):
    x, y = values.pop(alias.name, None), values.get(alias.source)
    if x is None and (y is None or split(alias.source)[0] in updates):
        return []
    if x is None and config.ties:
        return []
    if x is None or y is None or not np.array_equal(x, y):
        return [
            f"`{alias.source}` is also `{alias.name}` in the model, and the adapter "
            "has another value for each. Give the model an array for each"
        ]
    return []


def _left_out(adapter: PeftAdapter, places: list[Place]) -> list[str]:
    """A head of its own, to which PEFT would give the adapter of the embedding."""
    shapes = {
        place.shape
        for place in places
        if place.is_embedding and split(place.names.get((), ""))[0] in adapter.updates
    }
    return [
        f"`{name}` is an array of its own in the model, and PEFT would give it the "
        "adapter of the embedding, by `ensure_weight_tying`. Tie them with "
        "`equinox.nn.Shared`"
        for place in places
        for name in place.names.values()
        if place.shape in shapes
        and split(split(name)[0])[1] == _HEAD
        and split(name)[0] not in adapter.updates
    ]
