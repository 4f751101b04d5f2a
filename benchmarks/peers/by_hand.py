"""LoRA as it is written by hand in Equinox: a wrapper round every layer."""

from collections.abc import Callable
from typing import TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PyTree

from lora_quax import LoraArray

from .._work import Program, program as _program


class LoraLinear(eqx.Module):
    """A linear layer, and its update."""

    linear: eqx.nn.Linear
    a: Float[Array, "rank in"]
    b: Float[Array, "out rank"]

    def __call__(self, x: Float[Array, " in"]) -> Float[Array, " out"]:
        y = self.linear(x)
        return y + (self.b @ (self.a @ x)).astype(y.dtype)


class LoraConv(eqx.Module):
    """A convolution without groups, padded with zeros, and its update.

    The update is two convolutions: one with the window of the layer, to `rank`
    channels, and a pointwise one.
    """

    conv: eqx.nn.Conv
    a: Float[Array, "rank in *window"]
    b: Float[Array, "out rank"]

    def __call__(self, x: Float[Array, "in *size"]) -> Float[Array, "out ..."]:
        conv, window = self.conv, self.a.shape[2:]
        z = lax.conv_general_dilated(
            x[None],
            self.a,
            conv.stride,
            conv.padding,
            rhs_dilation=conv.dilation,
        )
        point = self.b.reshape(*self.b.shape, *(1,) * len(window))
        update = lax.conv_general_dilated(z, point, (1,) * len(window), "VALID")
        return conv(x) + update[0]


class LoraEmbedding(eqx.Module):
    """An embedding, and its update, for a model that may tie its head to it."""

    embedding: eqx.nn.Embedding
    a: Float[Array, "rank width"]
    b: Float[Array, "vocabulary rank"]

    def __call__(self, token: Int[Array, ""]) -> Float[Array, " width"]:
        return self.embedding(token) + self.b[token] @ self.a

    def attend(
        self, x: Float[Array, "tokens width"]
    ) -> Float[Array, "tokens vocabulary"]:
        """The product with the transposed weight."""
        return x @ self.embedding.weight.T + (x @ self.a.T) @ self.b.T


class Update(eqx.Module):
    """An update on its own, for a layer that has several weights."""

    a: Float[Array, "rank in"]
    b: Float[Array, "out rank"]

    def __call__(self, x: Float[Array, " in"]) -> Float[Array, " out"]:
        return self.b @ (self.a @ x)


class LoraLSTMCell(eqx.Module):
    """An LSTM's cell, written anew: the updates have to get at its sum."""

    cell: eqx.nn.LSTMCell
    ih: Update
    hh: Update

    def __call__(self, x: Float[Array, " in"], state):
        h, c = state
        cell = self.cell
        gates = cell.weight_ih @ x + self.ih(x) + cell.weight_hh @ h + self.hh(h)
        if cell.bias is not None:
            gates = gates + cell.bias
        i, f, g, o = jnp.split(gates, 4)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return jax.nn.sigmoid(o) * jnp.tanh(c), c


Factored: TypeAlias = LoraLinear | LoraConv | LoraEmbedding | Update

_WRAPPERS = {
    eqx.nn.Linear: LoraLinear,
    eqx.nn.Conv: LoraConv,
    eqx.nn.Embedding: LoraEmbedding,
}


def by_hand(model: PyTree, ours: PyTree) -> PyTree:
    """`model` with the factors of `ours` in wrappers.

    **Arguments:**

    - `model`: a plain model.
    - `ours`: what `lora_quax.loraify` made of it, with a scaling of 1.

    **Returns:** the model with a wrapper for each layer that is adapted in `ours`.
    """

    def is_layer(x):
        return isinstance(x, (*_WRAPPERS, eqx.nn.LSTMCell))

    return jax.tree.map(_wrap, model, ours, is_leaf=is_layer)


def _wrap(layer, adapted):
    if isinstance(layer, eqx.nn.LSTMCell):
        ih, hh = adapted.weight_ih, adapted.weight_hh
        return LoraLSTMCell(layer, Update(ih.a, ih.b), Update(hh.a, hh.b))
    for cls, wrapper in _WRAPPERS.items():
        if isinstance(layer, cls) and isinstance(adapted.weight, LoraArray):
            return wrapper(layer, adapted.weight.a, adapted.weight.b)
    return layer


def factors(model: PyTree) -> PyTree:
    """A filter spec, true at the factors in wrappers: what trains."""

    def is_factored(x):
        return isinstance(x, Factored)

    def spec(x):
        spec = jax.tree.map(lambda _: False, x)
        if is_factored(x):
            spec = eqx.tree_at(lambda s: (s.a, s.b), spec, (True, True))
        return spec

    return jax.tree.map(spec, model, is_leaf=is_factored)


def program(model: PyTree, ours: PyTree, loss_fn: Callable) -> Program:
    """`loss_fn` of the plain `model`, with the factors of `ours` in wrappers."""
    hand = by_hand(model, ours)
    return _program(eqx.partition(hand, factors(hand)), loss_fn)
