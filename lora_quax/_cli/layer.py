"""Layers of Equinox in which nothing but the weight or the bias is of account."""

from typing import Any, Literal, NamedTuple, TypeAlias

import equinox as eqx
import jax.random as jr


Type: TypeAlias = Literal["Linear", "Embedding", "Conv", "ConvTranspose"]


class Layer(NamedTuple):
    """What of a layer decides how PEFT lays out its factors."""

    type: Type
    spatial: int = 0  # axes of a convolution
    groups: int = 1

    def make(self, weight: Any, bias: Any = None) -> eqx.Module:
        """The layer around a weight, a bias or both."""
        kind = getattr(eqx.nn, self.type)
        n = self.groups
        sizes = (self.spatial, n, n, 1) if "Conv" in self.type else (1, 1)
        options = {"groups": n} if "Conv" in self.type else {}
        layer = eqx.filter_eval_shape(kind, *sizes, **options, key=jr.key(0))
        if self.type == "Embedding":
            return eqx.tree_at(lambda l: l.weight, layer, weight)
        return eqx.tree_at(lambda l: (l.weight, l.bias), layer, (weight, bias))
