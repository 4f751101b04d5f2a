"""The updates of weights: what each is to be, and how they are drawn.

What a weight gets depends on the key and its path alone. Like weights are drawn in one
loop, all of them in one compiled call.
"""

import functools as ft
import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax

from .. import init
from .._arrays.base import AbstractDelta, AdaptedArray, checked, with_base
from .._arrays.check import (
    aval_of,
    check_alpha,
    check_factor_dtype,
    check_number,
    check_rank,
    default_dtype,
    is_abstract,
)
from ..init import Initialiser
from .paths import Leaf, named
from .targets import Adapt
from .updates import read_update


class Plan(NamedTuple):
    """All that the update of a weight depends on, but for the key."""

    shape: tuple[int, ...]
    update: Any  # as it was asked for
    told: tuple[tuple[str, Any], ...]  # what its `init` is told
    abstract: bool

    @property
    def is_update(self) -> bool:
        return read_update(self.update).is_update


def plan_of(leaf: Leaf, spec: Adapt, defaults: Adapt, update: Any, policy) -> Plan:
    """The spec of a weight, completed: its own, then loraify's, then the layer's."""
    aval = aval_of(leaf.value)
    update = update if spec.update is None else spec.update
    form = read_update(update)
    form.refuse(spec.of_update)
    if not (form.is_update or policy["stop_gradient"] or "stop_gradient" in form.takes):
        raise ValueError(f"The base of {form.cls.__name__} is always frozen.")
    alpha = defaults.alpha if spec.alpha is None else spec.alpha
    dtype = spec.dtype if spec.dtype is not None else defaults.dtype
    rows, cols = leaf.axes
    known: dict[str, Any] = dict(
        init_a=_init_a(spec) or _init_a(defaults) or _layer_init_a(leaf),
        init_b=spec.init_b or defaults.init_b or init.zeros,
        dtype=default_dtype(aval) if dtype is None else check_factor_dtype(dtype),
        rows=spec.rows or rows,
        cols=spec.cols or cols,
        **policy,
    )
    if "rank" in form.takes:
        known["rank"] = check_rank(defaults.rank if spec.rank is None else spec.rank)
    if "alpha" in form.takes:
        known["alpha"] = check_alpha(alpha, known.get("rank", 1))
    if defaults.use_rslora if spec.use_rslora is None else spec.use_rslora:
        if not known.keys() >= {"rank", "alpha"}:
            raise ValueError(
                f"{named(leaf.path)} cannot be scaled by alpha / √rank: "
                f"{form.cls.__name__} has not both. Give `Adapt(use_rslora=False)` for "
                "it, or leave `use_rslora` out."
            )
        known["alpha"] *= math.sqrt(known["rank"])
    return Plan(
        shape=tuple(aval.shape),
        update=update,
        told=tuple(form.told(known).items()),
        abstract=is_abstract(leaf.value),
    )


def _init_a(spec: Adapt) -> Initialiser | None:
    if spec.scale is None:
        return spec.init_a
    return init.gaussian(check_number("scale", spec.scale))


def _layer_init_a(leaf: Leaf) -> Initialiser:
    return init.gaussian(1.0) if is_embedding(leaf) else init.uniform


def is_embedding(leaf: Leaf) -> bool:
    return leaf.layer is not None and isinstance(leaf.layer[1], eqx.nn.Embedding)


def draw(
    plans: dict[int, Plan], words, key, paths: list[str]
) -> dict[int, AbstractDelta]:
    """The updates of all weights that get one, by number of the leaf.

    **Raises:** `TypeError` if the key is abstract and a weight is not; what a form says
    of its arguments, with the name of the weight.
    """
    if isinstance(key, jax.ShapeDtypeStruct):
        _refuse_concrete(plans, paths)
    plans = {i: plan for i, plan in plans.items() if plan.is_update}
    return _shared(plans, _draw_all(plans, words, key, paths), key)


def _refuse_concrete(plans: dict[int, Plan], paths: list[str]) -> None:
    concrete = [named(paths[i]) for i, plan in plans.items() if not plan.abstract]
    if concrete:
        raise TypeError(
            "`key` is abstract, and the model is not: no factors can be drawn for "
            f"{', '.join(concrete[:8])}. Give a key from `jax.random.key`."
        )


def _draw_all(
    plans: dict[int, Plan], words, key, paths: list[str]
) -> dict[int, AbstractDelta]:
    """The updates of all weights, by number of the leaf, in one compiled call."""
    out = {}
    for abstract in (False, True):
        groups: dict[Plan, list[int]] = {}
        for i, plan in plans.items():
            if plan.abstract == abstract:
                groups.setdefault(plan, []).append(i)
        if groups:
            stacked = [np.stack([words[i] for i in group]) for group in groups.values()]
            run = ft.partial(eqx.filter_eval_shape, _draw) if abstract else _draw_jit
            try:
                drawn = run(tuple(groups), key, stacked)
            except (TypeError, ValueError):
                for plan, group in groups.items():
                    _try_to_draw(plan, words[group[0]], key, paths[group[0]])
                raise
            for group, deltas in zip(groups.values(), drawn):
                out.update(zip(group, deltas))
    return out


def _try_to_draw(plan: Plan, word, key, path: str) -> None:
    """**Raises:** what the form of an update has to say of a weight, with its name."""
    try:
        eqx.filter_eval_shape(_draw, (plan,), key, [word[None]])
    except (TypeError, ValueError) as e:
        if type(e) not in (TypeError, ValueError):
            raise
        raise type(e)(f"{named(path)}: {e}") from e


def _draw(plans: tuple[Plan, ...], key, words) -> list[list[AbstractDelta]]:
    """For each plan, one update per row of words."""

    def one(plan: Plan, word):
        form = read_update(plan.update)
        told = form.told({**dict(plan.told), "key": _folded(key, word)})
        return form.init(plan.shape, **told)

    out = []
    for plan, rows in zip(plans, words):
        # A loop, so that a hundred like weights compile as fast as one does; and not a
        # vmap, under which some of JAX's generators would draw other numbers.
        stacked = lax.map(ft.partial(one, plan), jnp.asarray(rows))
        out.append([jax.tree.map(lambda x: x[i], stacked) for i in range(len(rows))])
    return out


_draw_jit = eqx.filter_jit(_draw)


def _folded(key, word):
    for i in range(2):
        key = jr.fold_in(key, word[i])
    return key


def around(base: Any, plan: Plan, word, key) -> AdaptedArray:
    """What a form that is no update makes of a weight."""
    form = read_update(plan.update)

    def run(base, key):
        told = form.told({**dict(plan.told), "key": _folded(key, word)})
        return form.init(base, **told)

    out = eqx.filter_eval_shape(run, base, key) if plan.abstract else run(base, key)
    return checked(with_base(out, base))


def _shared(plans: dict[int, Plan], updates: dict[int, AbstractDelta], key):
    """Updates of forms that have parts in common, with these."""
    groups: dict[Any, list[int]] = {}
    for i in updates:
        share = getattr(read_update(plans[i].update).cls, "share", None)
        if share is not None:
            groups.setdefault((share, plans[i].abstract), []).append(i)
    out = dict(updates)
    for (share, abstract), group in groups.items():
        run = ft.partial(eqx.filter_eval_shape, share) if abstract else share
        out.update(zip(group, run([updates[i] for i in group], key)))
    return out
