"""The arrays of a model on a mesh, by rules for their paths."""

import re
from collections.abc import Mapping
from typing import Any

import jax.tree_util as jtu
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from .._arrays.base import base_of, with_base
from .._arrays.check import aval_of, is_abstract
from .lay import check_spec, laid_out
from .paths import is_array, is_value, join, Leaf, leaves_of, named
from .placed import beside_base, has_base
from .select import nearest
from .targets import read_pattern
from .together import described, in_step, is_on_all, said_of


def shard(model: PyTree, mesh: Mesh | AbstractMesh, rules: Mapping[Any, Any]) -> PyTree:
    """Lays the arrays of a model out on a mesh. The model is not changed.

    ```python
    P = jax.sharding.PartitionSpec
    mesh = jax.make_mesh((8, 4), ("fsdp", "tp"))
    columns, rows = P("tp", "fsdp"), P("fsdp", "tp")
    rules = {
        r".*\\.[qkv]_proj": columns,
        r".*\\.(gate|up)_proj": columns,
        "o_proj": rows,
        "down_proj": rows,
        "embed_tokens": P("tp", "fsdp"),
    }
    model = lora_quax.shard(model, mesh, rules)
    model = lora_quax.loraify(model, rank=8, key=key)
    ```

    Of an abstract model the `jax.ShapeDtypeStruct`s are given shardings, which
    `load_model` then reads the parts of. What is adapted or quantised is laid out as
    the weight that it stands for.

    **Arguments:**

    - `model`: any PyTree.
    - `mesh`: the devices; of an abstract model it may be abstract as well.
    - `rules`: from a name, which is matched with the last segments of a path, or a
        regular expression for the whole of one, to the spec of such arrays. The path is
        that of an array, or of a layer, of which it means the weight. Where several
        mean an array the last one decides; what none means is on every device.

    **Returns:** the model, all of its arrays on the mesh.

    **Raises:** `ValueError` if a rule means no array; or names an axis that the mesh
    has not, or one that does not divide the array; if the mesh has devices of several
    processes, and not of all. `TypeError` if a rule is not from a name or expression to
    a `PartitionSpec`; or if the mesh is abstract, and the model is not.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    shared = isinstance(mesh, Mesh) and is_on_all(everywhere)
    with in_step("shard", shared) as said:
        specs = _specs(model, mesh, rules)
        if not isinstance(mesh, Mesh):
            _refuse_concrete(model)
        if shared:
            said |= described(model) | {"mesh": f"{mesh}, {said_of(mesh)}"}
            said |= {f"rule {target!r}": str(spec) for target, spec in rules.items()}
            said |= {"the order of the rules": str([*rules])}
    leaves, treedef = jtu.tree_flatten(model, is_leaf=is_value)
    done: dict[tuple, Any] = {}

    def laid(path: str, x: Any, spec: PartitionSpec) -> Any:
        # What is in two places, as where weights are tied, stays one.
        key = spec, jtu.tree_structure(x), *map(id, jtu.tree_leaves(x))
        if key not in done:
            done[key] = _laid(path, x, NamedSharding(mesh, spec))
        return done[key]

    out = [
        laid(leaf.path, x, spec) if is_array(x) else x
        for leaf, x, spec in zip(leaves_of(model), leaves, specs, strict=True)
    ]
    return jtu.tree_unflatten(treedef, out)


def _refuse_concrete(model: PyTree) -> None:
    for path, x, *_ in leaves_of(model):
        if is_array(x) and not is_abstract(x):
            raise TypeError(
                f"The mesh is abstract, and {named(path)} is not, so that there is no "
                "device to put it on. Give a `jax.sharding.Mesh`."
            )


def _specs(model: PyTree, mesh: Mesh | AbstractMesh, rules) -> list[PartitionSpec]:
    """Of each leaf, by the rules."""
    places = leaves_of(model)
    specs = [PartitionSpec()] * len(places)
    for target, spec in rules.items():
        if not isinstance(target, str | re.Pattern):
            raise TypeError(
                f"A rule is for a name or a regular expression, got {target!r}."
            )
        if not isinstance(spec, PartitionSpec):
            raise TypeError(
                f"The rule {target!r} must say a `jax.sharding.PartitionSpec`, got "
                f"{spec!r}."
            )
        pattern, _ = read_pattern(target)
        meant = [i for i, leaf in enumerate(places) if _means(pattern, leaf)]
        if not meant:
            raise ValueError(
                f"The rule {target!r} means no array. {nearest(target, places)}"
            )
        for i in meant:
            what = f"{named(places[i].path)}, meant by the rule {target!r}"
            check_spec(what, spec, tuple(aval_of(places[i].value).shape), mesh)
            specs[i] = spec
    return specs


def _means(pattern: re.Pattern, leaf: Leaf) -> bool:
    if not is_array(leaf.value):
        return False
    paths = [leaf.path]
    if leaf.layer is not None:
        paths += [leaf.layer[0], join(leaf.layer[0], "weight")]
    return any(map(pattern.fullmatch, paths))


def _laid(path: str, x: Any, sharding: NamedSharding) -> Any:
    if has_base(x):
        base = _laid(path, base_of(x), sharding)
        return beside_base(path, with_base(x, base), None)
    return laid_out(named(path), x, sharding)
