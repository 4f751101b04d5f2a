"""Where what trains of a weight lies: as the axes of the weight do, from the start."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from .._arrays.base import base_of, is_adapted, with_base
from .._arrays.check import aval_of
from .._arrays.low_rank import LowRankArray
from .._rules.leaves import leaf_specs
from .paths import dotted, named
from .together import is_shared


def beside_base(where: str, w: Any, spec: PartitionSpec | None) -> Any:
    """An adapted weight, what trains of it laid out as its base is.

    Of the axes of a weight `b` has the rows and `a` the columns; the rank is on every
    device, and so is what has no axis in common with the weight. What is not on a mesh
    stays where it is.

    **Arguments:**

    - `where`: the path of the weight.
    - `spec`: that of the weight, if its base's is not to be followed.

    **Raises:** `ValueError` if `spec` is none of this weight or its mesh.
    """
    base = base_of(w)
    sharding = _sharding_of(base)
    if sharding is None:
        if spec is None:
            return w
        raise ValueError(
            f"{named(where)} lies on no mesh, and what trains of it is to lie as "
            f"{spec}. Put the weight on the mesh first, or leave `spec` out."
        )
    shape, mesh = tuple(aval_of(base).shape), sharding.mesh
    if spec is None:
        spec = sharding.spec
    else:
        check_spec(f"What trains of {named(where)}", spec, shape, mesh)
    entries = (*spec, *(None,) * (len(shape) - len(spec)))

    def place(x):
        if isinstance(x, LowRankArray) and aval_of(x).shape == shape:
            leaves, treedef = jtu.tree_flatten(x)
            specs = leaf_specs(x, PartitionSpec(*entries))
            return jtu.tree_unflatten(treedef, map(put, leaves, specs))
        if isinstance(x, LowRankArray):  # Of a part of the weight, as LoKr's.
            return jtu.tree_map(lambda leaf: put(leaf, PartitionSpec()), x)
        return put(x, _spec_of_leaf(x.shape, shape, entries))

    def put(x, spec: PartitionSpec):
        to = NamedSharding(mesh, spec, memory_kind=sharding.memory_kind)
        return jax.reshard(x, to) if isinstance(x, Tracer) else put_on(x, to)

    bare = with_base(w, None)
    placed = jtu.tree_map(place, bare, is_leaf=lambda x: isinstance(x, LowRankArray))
    return with_base(placed, base)


def all_beside_bases(model: PyTree) -> PyTree:
    """A model of which what trains lies where its bases do."""
    leaves, treedef = jtu.tree_flatten_with_path(model, is_leaf=is_adapted)
    placed = [
        beside_base(dotted(path), x, None) if has_base(x) else x for path, x in leaves
    ]
    return jtu.tree_unflatten(treedef, placed)


def has_base(x: Any) -> bool:
    """An update that is a weight by itself has none."""
    return is_adapted(x) and base_of(x) is not None


def as_before(x: Any, before: Any) -> Any:
    """What was computed in the place of an array, laid out as that was."""
    if isinstance(before, Tracer):  # On a mesh that is not explicit, nothing is known.
        sharding: Any = jax.typeof(before).sharding
        explicit = AxisType.Explicit in sharding.mesh.axis_types
        return jax.reshard(x, sharding) if explicit else x
    sharding = getattr(before, "sharding", None)
    return put_on(x, sharding) if isinstance(sharding, NamedSharding) else x


def put_on(x: Any, sharding: NamedSharding) -> Any:
    """An array, or a stand-in for one, laid out so."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    if sharding.is_fully_addressable or is_shared(x) or isinstance(x, Tracer):
        return jax.device_put(x, sharding)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = put_on(jax.random.key_data(x), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    # Each process has all of it. `device_put` would send it to all the others, to see
    # whether theirs is the same; the digests that were compared say so already.
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda at: host[at])


def _sharding_of(base: Any) -> NamedSharding | None:
    """How a weight is sharded, if it is on a mesh; a quantised one as its codes are."""
    n_axes = len(aval_of(base).shape)
    leaves = jax.tree.leaves(base)
    leaf = next((x for x in leaves if len(x.shape) == n_axes), None)
    if isinstance(leaf, Tracer):  # On a mesh that is not explicit, nothing is known.
        sharding: Any = jax.typeof(leaf).sharding
        return None if sharding.mesh.empty or not any(sharding.spec) else sharding
    sharding = getattr(leaf, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None


def _spec_of_leaf(shape, of_weight, entries) -> PartitionSpec:
    """Of a leaf with an axis, or a 1, for each axis of the weight, such as a scale."""
    if len(shape) != len(of_weight):
        return PartitionSpec()
    sizes = zip(shape, of_weight, entries)
    return PartitionSpec(*(entry if n == m else None for n, m, entry in sizes))


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
