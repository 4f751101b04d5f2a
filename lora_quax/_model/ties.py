"""Arrays that stand in several places of a model, as `equinox.nn.Shared` has them."""

from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu

from .paths import dotted, is_value, join


def ties_of(model: Any) -> dict[str, str]:
    """For each place that `equinox.nn.Shared` left empty, that of the array in it.

    **Raises:** `ValueError` if what is shared is not the array itself, but made of it.
    """
    return {alias: source for alias, source in _ties(model, "")}


def _ties(tree: Any, prefix: str) -> list[tuple[str, str]]:
    is_shared = lambda x: isinstance(x, eqx.nn.Shared)
    out = []
    for keys, node in jtu.tree_flatten_with_path(tree, is_leaf=is_shared)[0]:
        if is_shared(node):
            path = join(_join(prefix, dotted(keys)), "pytree")
            out += _of_node(node, path)
            out += _ties(node.pytree, path)
    return out


def _of_node(node: eqx.nn.Shared, path: str) -> list[tuple[str, str]]:
    # Where what is shared comes from is seen by what it does with the paths.
    paths = jtu.tree_map_with_path(
        lambda keys, _: _Path(_join(path, dotted(keys))), node.pytree, is_leaf=is_value
    )
    try:
        aliases, sources = node.where(paths), node.get(paths)
        if isinstance(aliases, _Path):
            aliases, sources = [aliases], [sources]
        leaves = [
            (_join(alias, dotted(keys)), source)
            for alias, tree in zip(aliases, sources, strict=True)
            for keys, source in jtu.tree_flatten_with_path(tree)[0]
        ]
        if not all(isinstance(x, _Path) for pair in leaves for x in pair[1:]):
            raise TypeError("it is no part of the tree")
    except Exception as e:  # It is a function of the user's, of a tree of arrays.
        raise ValueError(
            f"`{path}` is of an `equinox.nn.Shared` whose `get` gives no part of the "
            f"tree as it is, so that there is no telling what is tied to what: {e}"
        ) from e
    return [(alias, str(source)) for alias, source in leaves]


class _Path(str):
    """Of a leaf, in its place."""


def _join(path: str, rest: str) -> str:
    return _Path(join(path, rest) if rest else path)


def twins_of(leaves: dict[str, Any]) -> list[list[str]]:
    """The paths of arrays that are one object, for each such object."""
    found: dict[int, list[str]] = {}
    for path, x in leaves.items():
        if not isinstance(x, jax.ShapeDtypeStruct):
            found.setdefault(id(x), []).append(path)
    return [paths for paths in found.values() if len(paths) > 1]
