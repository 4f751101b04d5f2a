"""What is said of an array, said of its leaves: how they are sharded, or sliced.

Here stands what each type of array is made of; the rules of calls, loops and meshes
know leaves alone. A base may be of any type, and is known by its shapes alone.
"""

from typing import Any

import jax.numpy as jnp
import jax.tree_util as jtu
import quax
from jax.sharding import NamedSharding, PartitionSpec

from .._arrays.base import replace
from .._arrays.check import aval_of, wider
from .._arrays.dropout import DropoutArray
from .._arrays.lora import add, LoraArray
from .._arrays.low_rank import LowRankArray
from .._arrays.quantised import QuantisedArray
from .._arrays.scaled import ScaledArray
from .._compat import core
from .scaled import settle
from .traced import type_of


def leaf_specs(x, spec) -> list[PartitionSpec]:
    """The partition spec of each leaf of an array that is partitioned by `spec`."""
    entries = (*spec, *(None,) * (len(aval_of(x).shape) - len(spec)))
    return [PartitionSpec(*axes) for axes in _leaf_axes(x, entries)]


def _parts(x: ScaledArray | DropoutArray) -> tuple[Any, Any]:
    """The array inside, and a leaf of its own of which an axis may have length 1."""
    return (x.w, x.key) if isinstance(x, DropoutArray) else (x.base, x.scale)


def leaf_shardings(x, sharding: NamedSharding) -> list[NamedSharding]:
    memory = sharding.memory_kind
    return [
        NamedSharding(sharding.mesh, spec, memory_kind=memory)
        for spec in leaf_specs(x, sharding.spec)
    ]


def _leaf_axes(x, entries: tuple) -> list[tuple]:
    """Of `entries`, one for each axis of `x`, those for the axes of each leaf."""
    if isinstance(x, LoraArray):
        return [*_leaf_axes(x.base, entries), *_leaf_axes(x.delta, entries)]
    if isinstance(x, LowRankArray):
        a_labels, b_labels, _ = x.labels
        return [
            tuple(None if i == "rank" else entries[i] for i in labels)
            for labels in (a_labels, b_labels)
        ]
    if isinstance(x, ScaledArray | DropoutArray):
        inner, own = _parts(x)
        sizes = zip(own.shape, entries)
        of_own = tuple(None if n == 1 else entry for n, entry in sizes)
        return [*_leaf_axes(inner, entries), of_own]
    if not isinstance(x, quax.Value):
        return [entries]
    axes = []
    for leaf in jtu.tree_leaves(x):
        if len(jnp.shape(leaf)) == len(entries):
            sizes = zip(jnp.shape(leaf), entries)
            axes.append(tuple(None if n == 1 else entry for n, entry in sizes))
        elif len(jnp.shape(leaf)) == 0 or all(entry is None for entry in entries):
            axes.append(())
        else:
            raise TypeError(
                f"A {type(x).__name__} {aval_of(x).str_short()} cannot be partitioned "
                f"by {PartitionSpec(*entries)}: it has a leaf of shape "
                f"{jnp.shape(leaf)}, which is neither a scalar nor has as many axes, "
                "so that nothing says how its axes are those of the array."
            )
    return axes


# A scan slices each leaf along its first axis. Of an array that is scanned over, some
# leaves have no axis for it, and every step has the whole of them: the factor `a`, if
# it is rows that are scanned over, and the scale or the codebook of a quantised base.


def split_for_scan(x, length: int) -> tuple[Any, Any]:
    """The leaves of `x` that a scan slices, and those that every step shares."""
    x = _in_slices(x)
    treedef = jtu.tree_structure(x)
    sliced, shared = zip(*_scan_leaves(x, length))
    return jtu.tree_unflatten(treedef, sliced), jtu.tree_unflatten(treedef, shared)


def _in_slices(x):
    """An array of which each slice along the first axis has leaves of its own, or
    shares them with all the others."""
    if isinstance(x, LoraArray | ScaledArray):
        return replace(x, base=_in_slices(x.base))
    if isinstance(x, DropoutArray):
        return replace(x, w=_in_slices(x.w))
    if not isinstance(x, QuantisedArray):
        return x
    x = x.unpacked() if x.packed == -x.ndim else x
    n, m = x.shape[0], x.scale.shape[0]
    if m in (1, n):
        return x
    return x.moved((x.codes, x.packed), lambda s: jnp.repeat(s, n // m, 0))


def _scan_leaves(x, length: int) -> list[tuple]:
    """Each leaf beside None, in front of it if it is sliced, behind it if shared."""
    if isinstance(x, LoraArray):
        return [*_scan_leaves(x.base, length), *_scan_leaves(x.delta, length)]
    if isinstance(x, ScaledArray | DropoutArray):
        inner, own = _parts(x)
        same = own.shape[0] == 1 != length  # The same for each slice.
        return [
            *_scan_leaves(inner, length),
            (None, jnp.squeeze(own, 0)) if same else (own, None),
        ]
    if isinstance(x, LowRankArray):
        return [(x.a, None) if x.n_batch else (None, x.a), (x.b, None)]
    out = []
    for leaf in jtu.tree_leaves(x):
        if jnp.shape(leaf)[:1] == (length,):
            out.append((leaf, None))
        elif jnp.ndim(leaf) == len(aval_of(x).shape):  # The same for each slice.
            out.append((None, jnp.squeeze(leaf, 0)))
        else:
            out.append((None, leaf))
    return out


def slices(sliced, length: int):
    """The types of one slice of each leaf."""

    def slice_of(leaf):
        return core.mapped_aval(length, 0, type_of(leaf))

    return jtu.tree_map(slice_of, sliced)


def step_of_scan(x):
    """One slice of an array, put together of the leaves that were sliced and the rest.

    Each part says by its own factors whether it lost an axis of batch or one of rows:
    an axis of batch is lost by both factors.
    """
    if isinstance(x, LoraArray):
        base, delta = step_of_scan(x.base), _step_of_update(x.delta)
        if isinstance(delta, LowRankArray):
            return replace(x, base=base, delta=delta)
        return add(replace(x, base=base).frozen_base(), delta)
    if isinstance(x, ScaledArray):
        return settle(replace(x, base=step_of_scan(x.base)))
    if isinstance(x, DropoutArray):
        step = step_of_scan(x.w)
        return replace(x, w=step) if isinstance(step, LoraArray) else step
    if isinstance(x, LowRankArray):
        step = _step_of_update(x)
        dtype = wider(x.a.dtype, x.b.dtype)
        return step if isinstance(step, LowRankArray) else step.astype(dtype)
    return x


def _step_of_update(x: LowRankArray):
    """One slice of an update. A row is dense, and as wide as it was computed."""
    if x.b.ndim - x.rows == x.a.ndim - x.cols:
        return x
    row = replace(x, rows=x.rows - 1)
    return row if row.rows else row.product()
