"""Arrays on the devices of a mesh: where one lies, and how another is put there."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import quax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec, Sharding
from jaxtyping import PyTree

from .._arrays.check import aval_of
from .._rules.leaves import leaf_shardings
from .together import is_shared


def sharding_of(x: Any) -> Sharding | None:
    """Where an array was put, or a stand-in for one is to be; nothing, if nobody said,
    or it is traced on a mesh that is not explicit."""
    if isinstance(x, Tracer):
        sharding = jax.typeof(x).sharding
        return sharding if _is_explicit(sharding) else None
    is_put = getattr(x, "committed", True)
    return getattr(x, "sharding", None) if is_put else None


def sharding_of_weight(base: Any) -> Sharding | None:
    """As `sharding_of`; a quantised weight lies as its codes do."""
    n_axes = len(aval_of(base).shape)
    leaves = jax.tree.leaves(base)
    return sharding_of(next((x for x in leaves if len(x.shape) == n_axes), None))


def _is_explicit(sharding: Any) -> bool:
    is_on_mesh = isinstance(sharding, NamedSharding)
    return is_on_mesh and AxisType.Explicit in sharding.mesh.axis_types


def put_on(x: Any, sharding: Sharding) -> Any:
    """An array, or a stand-in for one, laid out so."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    if isinstance(x, Tracer) and isinstance(sharding, NamedSharding):
        # `device_put` would move nothing here.
        is_explicit = _is_explicit(sharding)
        place = jax.reshard if is_explicit else jax.lax.with_sharding_constraint
        return place(x, sharding)
    if sharding.is_fully_addressable or is_shared(x):
        return jax.device_put(x, sharding)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = put_on(jax.random.key_data(x), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    # Each process has all of it. `device_put` would send it to all the others, to see
    # whether theirs is the same; the digests that were compared say so already.
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda at: host[at])


def all_on(tree: PyTree, sharding: Sharding | None) -> PyTree:
    if sharding is None:
        return tree
    return jtu.tree_map(lambda x: put_on(x, sharding), tree)


def laid_as(tree: PyTree, like: PyTree) -> PyTree:
    """A tree, each of its arrays where that of another is, one for one."""
    leaves, treedef = jtu.tree_flatten(tree)
    pairs = zip(leaves, jtu.tree_leaves(like), strict=True)
    placed = [all_on(x, sharding_of(other)) for x, other in pairs]
    return jtu.tree_unflatten(treedef, placed)


def laid_out(where: str, x: Any, sharding: Sharding | None) -> Any:
    """An array, or a value as the array that it stands for, laid out so.

    **Arguments:**

    - `where`: the array, for a message.

    **Raises:** `ValueError` if a part of a value has too few numbers for that.
    """
    if not (isinstance(x, quax.Value) and isinstance(sharding, NamedSharding)):
        return all_on(x, sharding)
    leaves, treedef = jtu.tree_flatten(x)
    shardings = leaf_shardings(x, sharding)
    for leaf, of_leaf in zip(leaves, shardings):  # Such as the scales of its tiles.
        what = f"A part of {where}, which is a {type(x).__name__}"
        check_spec(what, of_leaf.spec, leaf.shape, sharding.mesh)
    return jtu.tree_unflatten(treedef, map(put_on, leaves, shardings))


def check_spec(what: str, spec: PartitionSpec, shape: tuple[int, ...], mesh) -> None:
    """**Raises:** `ValueError` if an array of that shape cannot lie so on the mesh."""
    sizes = dict(mesh.shape)
    named_axes = [x if isinstance(x, tuple) else (x,) for x in spec]
    axes = [axis for entry in named_axes for axis in entry if axis is not None]
    why = None
    if unknown := [axis for axis in axes if axis not in sizes]:
        why = f"the mesh has no axis {unknown[0]!r}"
    elif len(set(axes)) < len(axes):
        why = "an axis of the mesh is there twice"
    elif len(spec) > len(shape):
        why = f"it has {len(shape)} axes"
    else:
        for n, entry in zip(shape, named_axes):
            parts = math.prod(sizes[axis] for axis in entry if axis is not None)
            if n % parts:
                why = f"{parts} parts do not divide {n}"
    if why is not None:
        raise ValueError(
            f"{what}, of shape {shape}, cannot lie as {spec} on the mesh {sizes}: "
            f"{why}."
        )
