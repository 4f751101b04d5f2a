"""The arrays of a model, and where each stands."""

import collections
import hashlib
import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import quax

from .._arrays.check import aval_of


LINEAR_LAYERS = (eqx.nn.Linear, eqx.nn.Conv, eqx.nn.ConvTranspose)
_NORMS = (
    eqx.nn.LayerNorm,
    eqx.nn.RMSNorm,
    eqx.nn.GroupNorm,
    eqx.nn.BatchNorm,
)


def known_axes(layer) -> tuple[int, int] | None:
    """How many axes of a known layer's weight are rows, and how many columns."""
    if isinstance(layer, eqx.nn.Conv | eqx.nn.ConvTranspose):
        return 1, layer.num_spatial_dims + 1
    if isinstance(layer, eqx.nn.Linear | eqx.nn.Embedding):
        return 1, 1
    return None


def dotted(key_path) -> str:
    """A key path of JAX as it is written here: `blocks.0.attn.q_proj.weight`."""
    return jtu.keystr(key_path, simple=True, separator=".")


def named(path: str) -> str:
    """A path for a message; that of the model itself is empty."""
    return f"`{path}`" if path else "the model itself"


def join(path: str, name: str) -> str:
    """The path of a child; that of the model itself is empty."""
    return f"{path}.{name}" if path else name


def is_value(x) -> bool:
    return isinstance(x, quax.Value)


def is_array(x) -> bool:
    return eqx.is_array(x) or isinstance(
        x, np.ndarray | jax.ShapeDtypeStruct | quax.ArrayValue
    )


def is_float(x) -> bool:
    return is_array(x) and jnp.issubdtype(aval_of(x).dtype, jnp.floating)


class Leaf(NamedTuple):
    """A leaf of the model and where it stands."""

    path: str
    value: Any  # None for the weight of a known layer that is missing
    modules: tuple[tuple[str, Any], ...]  # those around it, outermost first
    layer: tuple[str, Any] | None  # the known layer that it is the weight of

    @property
    def axes(self) -> tuple[int, int]:
        """How many of its axes are rows, and how many columns."""
        return known_axes(self.layer[1] if self.layer else None) or (1, 1)

    @property
    def holder(self) -> Any:
        """The module that holds it, be it in a list or a dictionary."""
        for _, module in reversed(self.modules):
            if not isinstance(module, list | tuple | dict):
                return module
        return None

    @property
    def home(self) -> str:
        """The path of the layer, or else of the module or dictionary, that has it."""
        if self.layer is not None:
            return self.layer[0]
        homes = [path for path, x in self.modules if not isinstance(x, list | tuple)]
        return homes[-1] if homes else ""

    @property
    def is_bias(self) -> bool:
        """Whether it is the bias of a known layer; a convolution's has three axes."""
        name = self.path.rpartition(".")[2]
        return name == "bias" and known_axes(self.holder) is not None

    @property
    def is_vector(self) -> bool:
        """Whether it is a bias or a norm: stacked, these have two axes, but no rank."""
        name = self.path.rpartition(".")[2]
        too_few = aval_of(self.value).ndim < sum(self.axes)
        return too_few or name.startswith("bias") or isinstance(self.holder, _NORMS)


def walk(model) -> list[Leaf]:
    """The leaves of a model in the order of `jax.tree.flatten`, values being leaves.

    Among them are the weights of known layers that are missing, which `flatten` skips.
    """
    leaves = []

    def visit(keys, node, modules, layer):
        path = dotted(keys)
        if is_value(node):
            leaves.append(Leaf(path, node, modules, layer))
            return
        children = jtu.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)[0]
        if len(children) == 1 and children[0][0] == ():
            leaves.append(Leaf(path, node, modules, layer))
            return
        known = known_axes(node) is not None
        inner = (*modules, (path, node))
        if known and node.weight is None:
            leaves.append(Leaf(join(path, "weight"), None, inner, (path, node)))
        for key, child in children:
            is_weight = known and dotted(key) == "weight"
            visit((*keys, *key), child, inner, (path, node) if is_weight else layer)

    visit((), model, (), None)
    return _largest_in_wrappers(leaves)


def is_linear(leaf: Leaf) -> bool:
    """Whether it is the weight of a linear layer or a convolution."""
    return leaf.layer is not None and isinstance(leaf.layer[1], LINEAR_LAYERS)


def leaves_of(model) -> list[Leaf]:
    """As `walk`, without the weights that are missing."""
    return [leaf for leaf in walk(model) if leaf.value is not None]


def _largest_in_wrappers(leaves: list[Leaf]) -> list[Leaf]:
    """Where a wrapper stands for a layer's weight, the weight is its largest array.

    Beside it there may be others, such as the norms of a weight normalisation.
    """
    by_layer: dict[str, list[Leaf]] = {}
    for leaf in leaves:
        if leaf.layer is not None and is_float(leaf.value):
            by_layer.setdefault(leaf.layer[0], []).append(leaf)
    others = set()
    for group in by_layer.values():
        if len(group) > 1:
            sizes = [size_of(leaf.value) for leaf in group]
            others |= {x.path for x, n in zip(group, sizes) if n < max(sizes)}
    return [
        leaf._replace(layer=None) if leaf.path in others else leaf for leaf in leaves
    ]


def size_of(x) -> int:
    """How many numbers an array or a value stands for."""
    return math.prod(aval_of(x).shape)


def words(paths: list[str]) -> list[np.ndarray]:
    """Each path as 64 bits, to be folded into a key.

    Of several arrays with one path, as `{"a.b": x, "a": {"b": y}}` has, the later ones
    are told apart by their order.
    """
    out, seen = [], collections.Counter()
    for path in paths:
        text = path if not seen[path] else f"{path}\0{seen[path]}"
        seen[path] += 1
        digest = hashlib.sha256(text.encode()).digest()
        out.append(np.frombuffer(digest[:8], dtype="<u4").astype(np.uint32))
    return out
