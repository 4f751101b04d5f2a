"""A weight for one step of training, in which part of what its update is given is
dropped."""

import itertools as it
import sys
import weakref
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import quax
from jax.core import ShapedArray
from jaxtyping import Array

from .base import AdaptedArray, dense, replace, role
from .check import aval_of
from .lora import LoraArray
from .show import show
from .thin_dot import arrange


class DropoutArray(AdaptedArray):
    """A weight `base + s · b · a` and the key of its dropout: `with_dropout_key` makes
    one.

    A product `x · w` is `x · base + s · (mask · x / (1 - rate)) · b · a`, in which each
    number of the mask is zero with probability `rate`, and else one. A convolution and
    a mixture of experts have dropout as well; a lookup has none, as in PEFT. What moves
    the weight about keeps it; what joins the weight to others or adds to it does not.

    A mask depends on the key, on how often that was used before in the same call of
    `quaxify`, and on nothing else: a program that is compiled, differentiated or
    checkpointed sees the same one. A `jit` or a loop inside of it is one use, and
    counts its own.

    Srivastava et al., *Dropout: A Simple Way to Prevent Neural Networks from
    Overfitting*, JMLR 15 (2014).
    """

    form = "dropout"
    has_rules = True

    rate: float = eqx.field(static=True)
    w: Any = role()  # a `LoraArray`
    # Each axis as that of the weight, or 1: of a stack, each index has its own key.
    key: Array = role("frozen")

    def __check_init__(self):
        if not isinstance(self.w, LoraArray):
            raise TypeError(
                f"Dropout is of a `LoraArray`; got a {type(self.w).__name__}. See "
                "`lora_quax.with_dropout_key`."
            )

    @property
    def allow_materialise(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the dense weight may be formed: what the weight says of itself."""
        return self.w.allow_materialise

    def lower(self):
        """The weight without dropout, for operations that have none."""
        return self.w

    def dense(self) -> Array:
        return dense(self.w)

    def aval(self) -> ShapedArray:
        return aval_of(self.w)

    def __pdoc__(self, **kwargs):
        return show(self, self.w, self.key, **kwargs)


def dropped(x: Any, w: DropoutArray) -> Any:
    """What the update is given in place of `x`, under one key for all of it."""
    if not w.rate or 0 in w.key.shape:
        return x
    return _masked(x, jr.bernoulli(w.key.ravel()[0], 1 - w.rate, x.shape), w.rate)


def dropped_in_product(x: Any, w: DropoutArray, x_labels, w_labels) -> tuple[Any, list]:
    """The same in a product, whose axes are labelled; and the labels of the result.

    Each key of a stack of weights has a mask of its own, so that the result has an axis
    for each axis of the keys, also where the stack was given one `x` for all of it.
    """
    if not w.rate or isinstance(x, quax.Value):  # A product of two weights has none.
        return x, x_labels
    stacked = [i for i, n in enumerate(w.key.shape) if n != 1]
    batch = [w_labels[i] for i in stacked]
    rest = [i for i in x_labels if i not in batch]
    shape = [n for i, n in zip(x_labels, x.shape) if i in rest]
    draw = lambda key: jr.bernoulli(key, 1 - w.rate, shape)
    for _ in stacked:
        draw = jax.vmap(draw)
    mask = draw(w.key.reshape([w.key.shape[i] for i in stacked]))
    labels = [*(i for i in batch if i not in x_labels), *x_labels]
    return _masked(x, arrange(mask, [*batch, *rest], labels), w.rate), labels


def _masked(x, mask, rate: float):
    return jnp.where(mask, x / (1 - rate), 0).astype(x.dtype)


def used(tree: Any) -> Any:
    """`tree` with, in place of each key of dropout in it, one for this use of it.

    **Raises:** `RuntimeError` inside of `quaxify` and of a derivative, where the
    cotangent would meet another mask than its activation did.
    """
    is_leaf = lambda x: isinstance(x, DropoutArray)
    if not any(map(is_leaf, jtu.tree_leaves(tree, is_leaf=is_leaf))):
        return tree
    uses, differentiated = _surroundings()

    def use(x):
        if not is_leaf(x):
            return x
        if x.rate and differentiated:
            raise RuntimeError(
                "A weight with dropout is differentiated inside of `quaxify`: "
                "`quaxify(grad(f))`. There the cotangent would meet another mask than "
                "the activation. Differentiate outside, `grad(quaxify(f))`; or leave "
                "`with_dropout_key` away, and so dropout."
            )
        return replace(x, key=_next(x.key, uses))

    return jtu.tree_map(use, tree, is_leaf=is_leaf)


def renewed(key: Array) -> Array:
    """Keys for one use of those there are, whatever it is."""
    return _next(key, _surroundings()[0])


def _next(key: Array, uses: dict) -> Array:
    # Forgotten with the key, so that no other one gets its number; and not kept, for it
    # may be a tracer.
    i = id(key)
    if i not in uses:
        uses[i] = weakref.ref(key, lambda _: uses.pop(i)), it.count()
    n = next(uses[i][1])
    return jax.vmap(lambda key: jr.fold_in(key, n))(key.ravel()).reshape(key.shape)


# How many uses each key has had in a call of `quaxify`: the next call sees the same
# masks, as a function gives the same for the same.
_uses: Any = weakref.WeakKeyDictionary()


def _surroundings() -> tuple[dict, bool]:
    """The uses in the outermost call of `quaxify`, and whether a derivative is taken
    inside of it. Only the stack knows: Quax hands its rules values and no trace."""
    call, differentiated, since = None, False, False
    frame = sys._getframe()
    while frame is not None:
        module = frame.f_globals.get("__name__")
        if module == "jax._src.interpreters.ad":
            since = True
        elif frame.f_code.co_name == "_process_shard_map" and _is_ours(module):
            since = False  # A derivative of the map, which is taken around it.
        elif module == "quax._quaxify" and "tag" in frame.f_locals:
            call, differentiated = frame.f_locals["tag"], since
        frame = frame.f_back
    return _uses.setdefault(call, {}), differentiated


def _is_ours(module: str | None) -> bool:
    return (module or "").startswith(f"{__name__.partition('.')[0]}.")


def refuse_dropout(values: Any, operation: str) -> None:
    """**Raises:** `RuntimeError` if there is dropout among what an operation is given
    that multiplies with a weight more than once, as if it were the same each time."""
    is_dropout = lambda x: isinstance(x, DropoutArray)
    for x in jtu.tree_leaves(values, is_leaf=is_dropout):
        if is_dropout(x) and x.rate:
            raise RuntimeError(
                f"A weight with dropout met `{operation}`, which multiplies with it in "
                "its derivative as well, where the mask would be another one. Leave "
                "`with_dropout_key` away, or this weight out of `dropout`."
            )
