"""Which arrays of a model are adapted, and how.

A model is walked once into a list of `Leaf`, one per array, each with its path and the
modules around it. `targets` is read into a list of `Entry`, each of which says which
leaves it means. The last entry that means a leaf decides what becomes of it.
"""

import difflib
import re
from typing import NamedTuple

import equinox as eqx
import numpy as np

from .._arrays.base import is_adapted
from .._arrays.check import aval_of
from .paths import (
    is_array,
    is_float,
    is_linear,
    join,
    known_axes,
    Leaf,
    LINEAR_LAYERS,
    named,
    walk,
)
from .presets import PRESETS
from .targets import (
    Adapt,
    ANY_PREFIX,
    Entry,
    read_pattern,
    read_spec,
    read_targets,
    Targets,
    Treatment,
)


class Choice(NamedTuple):
    """What becomes of a leaf, and which entry said so."""

    spec: Treatment
    entry: Entry


def select(model, targets: Targets | None) -> list[tuple[Leaf, Choice | None]]:
    """What becomes of each leaf of a model.

    **Returns:** the leaves in the order of `jax.tree.flatten` with values as leaves,
    each with its choice: an `Adapt` or `"full"` with everything about it checked, or
    `"freeze"`, or `None` if no target means it.

    **Raises:** `ValueError` or `TypeError` if nothing, or one of the targets, matches
    nothing; if a weight is missing, adapted already, or has too few axes; if it is not
    a floating-point array.
    """
    entries = read_targets(targets)
    leaves = walk(model)
    choices: list[Choice | None] = [None] * len(leaves)
    for entry in entries:
        if entry.preset is not None:
            entry = entry._replace(target=frozenset(PRESETS[entry.preset](leaves)))
        said: list[Treatment | None] = [_spec_for(entry, leaf) for leaf in leaves]
        if all(spec is None for spec in said) and entry.spec is not None:
            raise _nothing(entry, leaves)
        for i, spec in enumerate(said):
            if spec is not None:
                choices[i] = Choice(spec, entry)
    out = list(zip(leaves, choices))
    if all(choice is None or choice.spec == "freeze" for choice in choices):
        raise ValueError(
            "`targets` leaves nothing to train: no array of the model is selected, or "
            f"all that are have the spec 'freeze'. {_what_there_is(leaves)}"
        )
    for leaf, choice in out:
        if choice is not None and choice.spec != "freeze":
            _check(leaf, choice)
    return [(leaf, choice) for leaf, choice in out if leaf.value is not None]


def with_biases(
    chosen: list[tuple[Leaf, Choice | None]], bias: str
) -> list[tuple[Leaf, Choice | None]]:
    """What becomes of the biases too, where no target says it: `bias` of `loraify`."""
    if bias not in ("none", "all", "lora_only"):
        raise ValueError(f"`bias` must be 'none', 'all' or 'lora_only', got {bias!r}.")
    trains = Choice("full", Entry(None, "full", f"bias={bias!r}"))
    adapted = {
        leaf.home
        for leaf, choice in chosen
        if choice is not None and isinstance(choice.spec, Adapt)
    }

    def means(leaf: Leaf) -> bool:
        if not (
            leaf.path.rpartition(".")[2].startswith("bias") and is_float(leaf.value)
        ):
            return False
        return bias == "all" or bias == "lora_only" and leaf.home in adapted

    return [
        (leaf, trains if choice is None and means(leaf) else choice)
        for leaf, choice in chosen
    ]


def _spec_for(entry: Entry, leaf: Leaf) -> Treatment | None:
    """What an entry says of a leaf; `None` if it does not mean it."""
    if entry.spec is None:
        if not (is_adapted(leaf.value) or is_float(leaf.value)):
            return None
        said = entry.target(leaf.path, leaf.value)
        if said is None or isinstance(said, bool | np.bool_) and not said:
            return None
        return read_spec(said, named(leaf.path))
    if isinstance(entry.spec, Adapt):
        means = _selects_weight(entry, leaf)
    else:
        means = _selects_array(entry, leaf)
    return entry.spec if means else None


def _selects_weight(entry: Entry, leaf: Leaf) -> bool:
    """Whether a low-rank entry means this leaf."""
    if isinstance(entry.target, re.Pattern):
        paths = [leaf.path]
        if leaf.layer is not None:
            paths += [leaf.layer[0], join(leaf.layer[0], "weight")]
        if not any(map(entry.target.fullmatch, paths)):
            return False
        # A name is meant literally. A regular expression, which may well be `.*`,
        # passes over what cannot be adapted; so do both inside a wrapped weight.
        literal = entry.is_name and entry.target.fullmatch(leaf.path)
        if literal and (leaf.value is None or is_array(leaf.value)):
            return True
        return _can_adapt(leaf)
    if isinstance(entry.target, frozenset):
        inside = any(path in entry.target for path, _ in leaf.modules)
        return inside and is_linear(leaf) and _can_adapt(leaf)
    if not any(isinstance(module, entry.target) for _, module in leaf.modules):
        return False
    if leaf.layer is not None:
        layer = leaf.layer[1]
        return isinstance(layer, (entry.target, LINEAR_LAYERS)) and _can_adapt(leaf)
    held = isinstance(leaf.holder, entry.target) and known_axes(leaf.holder) is None
    return held and _can_adapt(leaf)


def _can_adapt(leaf: Leaf) -> bool:
    """Whether a leaf that is not named itself can be meant.

    The missing, or integer, weight of a layer is meant too, and then refused by name.
    """
    if leaf.value is None:
        return True
    own = leaf.layer is not None and leaf.path == join(leaf.layer[0], "weight")
    if own and is_array(leaf.value):
        return True
    return is_float(leaf.value) and not leaf.is_vector


def _selects_array(entry: Entry, leaf: Leaf) -> bool:
    """Whether an entry 'full' or 'freeze' means this leaf."""
    if isinstance(entry.target, re.Pattern):
        if entry.is_name and entry.target.fullmatch(leaf.path):
            return leaf.value is None or is_array(leaf.value)
        paths = [leaf.path, *(path for path, _ in leaf.modules)]
        means = any(map(entry.target.fullmatch, paths))
    elif isinstance(entry.target, frozenset):
        means = any(path in entry.target for path, _ in leaf.modules)
    else:
        modules = [module for _, module in leaf.modules]
        means = any(isinstance(module, entry.target) for module in modules)
    # What is frozen may be anything; what trains is of floating point.
    return means and (entry.spec == "freeze" or is_float(leaf.value))


def _check(leaf: Leaf, choice: Choice) -> None:
    where = f"{named(leaf.path)}, selected by {choice.entry.shown},"
    x = leaf.value
    if x is None:
        raise ValueError(
            f"{where} is missing: the tree has None in its place. Adapt the whole "
            "model, before it is partitioned or filtered."
        )
    if is_adapted(x):
        raise ValueError(
            f"{where} is already adapted: it is {x!r}. Use `lora_quax.merge` or "
            "`lora_quax.unload` first, or leave it out of `targets`."
        )
    if not is_float(x):
        raise TypeError(f"{where} is not a floating-point array: it is {aval_of(x)}.")
    if isinstance(choice.spec, Adapt):
        rows, cols = leaf.axes
        rows, cols = choice.spec.rows or rows, choice.spec.cols or cols
        aval = aval_of(x)
        if leaf.is_bias or aval.ndim < rows + cols:
            why = "is a bias" if leaf.is_bias else f"needs at least {rows + cols} axes"
            raise ValueError(
                f"{where} of shape {aval.shape} has no low-rank update: it {why}. A "
                "bias or another vector can be trained in full, with the spec 'full'."
            )


def _nothing(entry: Entry, leaves: list[Leaf]) -> ValueError:
    """The error for an entry that means no leaf: what it met instead, or is near to."""
    met = []
    if isinstance(entry.target, re.Pattern):
        matches = entry.target.fullmatch
        met = [leaf for leaf in leaves if is_array(leaf.value) and matches(leaf.path)]
    vectors = [named(leaf.path) for leaf in met if is_float(leaf.value)]
    if vectors:
        return ValueError(
            f"The target {entry.shown} matches only vectors, which have no low-rank "
            f"update: {_some(vectors)}. To train them in full give the target the spec "
            "'full'."
        )
    if met:
        numbers = [f"{named(leaf.path)} is {aval_of(leaf.value)}" for leaf in met]
        return ValueError(
            f"The target {entry.shown} matches no floating-point array: "
            f"{_some(numbers)}."
        )
    if holder := _holder(entry, leaves):
        inside = rf"(.*\.)?{entry.target.pattern.removeprefix(ANY_PREFIX)}\..*"
        return ValueError(
            f"The target {entry.shown} means {named(holder)}, which is neither a layer "
            "nor an array, but a module that holds others. What can be adapted inside "
            f"it is meant by the regular expression {inside}"
        )
    wanted = entry.target if isinstance(entry.target, re.Pattern) else None
    hint = _hint(wanted and entry.shown.strip("'\""), entry.is_name, leaves)
    return ValueError(f"{entry.shown} of `targets` matched nothing. {hint}")


def nearest(target: str | re.Pattern, leaves: list[Leaf]) -> str:
    """A sentence on what is near to a target that matched nothing."""
    shown = target if isinstance(target, str) else target.pattern
    return _hint(shown, read_pattern(target)[1], leaves)


def _holder(entry: Entry, leaves: list[Leaf]) -> str | None:
    """The path of a module that a target is the name of, if there are arrays in it."""
    if not isinstance(entry.target, re.Pattern) or not entry.is_name:
        return None
    paths = [path for leaf in leaves if _can_adapt(leaf) for path, _ in leaf.modules]
    return next(filter(entry.target.fullmatch, filter(None, paths)), None)


def _hint(wanted: str | None, is_name: bool, leaves: list[Leaf]) -> str:
    near = [] if wanted is None else _near(wanted, is_name, leaves)
    return f"Near it are {_some(near)}." if near else _what_there_is(leaves)


def _near(wanted: str, is_name: bool, leaves: list[Leaf]) -> list[str]:
    """Paths that resemble a pattern, compared over as many last segments as it has."""
    n = wanted.count(".") + 1
    tails: dict[str, str] = {}
    for path in _paths(leaves):
        tail = ".".join(path.split(".")[-n:]) if is_name else path
        tails.setdefault(tail, path)
    near = difflib.get_close_matches(wanted, tails, n=5, cutoff=0.5)
    return [f"`{tails[tail]}`" for tail in near]


def _paths(leaves: list[Leaf]) -> list[str]:
    """Those of the floating-point arrays, and of the modules around them."""
    paths: dict[str, None] = {}
    for leaf in leaves:
        if is_float(leaf.value):
            paths.update(dict.fromkeys(path for path, _ in leaf.modules if path))
            paths[leaf.path] = None
    return list(paths)


def _what_there_is(leaves: list[Leaf]) -> str:
    layers = {
        type(module).__name__
        for leaf in leaves
        for _, module in leaf.modules
        if isinstance(module, eqx.Module)
    }
    paths = [f"`{leaf.path}`" for leaf in leaves if is_float(leaf.value)]
    if not paths:
        return "The model has no floating-point array."
    return (
        f"The model has the arrays {_some(paths)}"
        + (f" in modules of type {_some(sorted(layers))}" if layers else "")
        + "."
    )


def _some(items: list[str], n: int = 8) -> str:
    more = f" and {len(items) - n} more" if len(items) > n else ""
    return ", ".join(items[:n]) + more
