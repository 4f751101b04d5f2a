"""Where what trains of a weight lies: as the axes of the weight do, from the start."""

from typing import Any

import jax.tree_util as jtu
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from .._arrays.base import base_of, is_adapted, with_base
from .._arrays.check import aval_of
from .._arrays.low_rank import LowRankArray
from .._rules.leaves import leaf_specs
from .lay import all_on, check_spec, laid_as, put_on, sharding_of_weight
from .paths import dotted, is_value, named


def beside_base(where: str, w: Any, spec: PartitionSpec | None) -> Any:
    """An adapted weight, what trains of it laid out as its base is.

    Of the axes of a weight `b` has the rows and `a` the columns; the rank is on every
    device, and so is what has no axis in common with the weight. Beside a base that was
    put on a single device everything is on that one.

    **Arguments:**

    - `where`: the path of the weight.
    - `spec`: that of the weight, if its base's is not to be followed.

    **Raises:** `ValueError` if `spec` is none of this weight or its mesh.
    """
    base = base_of(w)
    sharding = sharding_of_weight(base)
    if not isinstance(sharding, NamedSharding):
        if spec is None:
            return with_base(all_on(with_base(w, None), sharding), base)
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
        return put_on(x, NamedSharding(mesh, spec, memory_kind=sharding.memory_kind))

    bare = with_base(w, None)
    placed = jtu.tree_map(place, bare, is_leaf=lambda x: isinstance(x, LowRankArray))
    return with_base(placed, base)


def all_beside_bases(model: PyTree, before: PyTree = None) -> PyTree:
    """A model of which what trains lies where its bases do; or where it lay before, if
    the model was adapted in the same way."""
    found, treedef = jtu.tree_flatten_with_path(model, is_leaf=is_value)
    old = jtu.tree_leaves(before, is_leaf=is_value) or [None] * len(found)

    def place(where: str, x: Any, like: Any) -> Any:
        if jtu.tree_structure(x) == jtu.tree_structure(like):
            return laid_as(x, like)
        return beside_base(where, x, None)

    placed = [
        place(dotted(path), x, like) if has_base(x) else x
        for (path, x), like in zip(found, old, strict=True)
    ]
    return jtu.tree_unflatten(treedef, placed)


def has_base(x: Any) -> bool:
    """An update that is a weight by itself has none."""
    return is_adapted(x) and base_of(x) is not None


def _spec_of_leaf(shape, of_weight, entries) -> PartitionSpec:
    """Of a leaf with an axis, or a 1, for each axis of the weight, such as a scale."""
    if len(shape) != len(of_weight):
        return PartitionSpec()
    sizes = zip(shape, of_weight, entries)
    return PartitionSpec(*(entry if n == m else None for n, m, entry in sizes))
