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


class DropoutArray(AdaptedArray):
    """A weight `base + s · b · a` and the key of its dropout: `with_dropout_key` makes
    one.

    A product `x · w` is `x · base + s · (mask · x / (1 - rate)) · b · a`, in which each
    number of the mask is zero with probability `rate`, and else one. A convolution and
    a mixture of experts have dropout as well; a lookup has none, as in PEFT. What moves
    the weight about keeps it; what joins the weight to others or adds to it does not.

    A mask depends on the key, on how often that was used before in the same call of
    `quaxify`, and on nothing else: a program that is compiled, differentiated or
    checkpointed sees the same one.

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
    """What the update is given in place of `x`."""
    if not w.rate or isinstance(x, quax.Value):  # A product of two weights has none.
        return x
    # A product has one mask, be the weight a stack of several: `x` has an axis for it.
    mask = jr.bernoulli(w.key.ravel()[0], 1 - w.rate, x.shape)
    return jnp.where(mask, x / (1 - w.rate), 0).astype(x.dtype)


def used(tree: Any) -> Any:
    """`tree` with, in place of each key of dropout in it, one for this use of it.

    **Raises:** `RuntimeError` inside of `quaxify` and of a derivative, where the
    cotangent would meet another mask than its activation did.
    """
    is_leaf = lambda x: isinstance(x, DropoutArray)
    if not any(map(is_leaf, jtu.tree_leaves(tree, is_leaf=is_leaf))):
        return tree
    call, differentiated = _surroundings()

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
        # The key is kept, so that no other one gets its number.
        _, uses = _uses[call].setdefault(id(x.key), (x.key, it.count()))
        n = next(uses)
        keys = jax.vmap(lambda key: jr.fold_in(key, n))(x.key.ravel())
        return replace(x, key=keys.reshape(x.key.shape))

    return jtu.tree_map(use, tree, is_leaf=is_leaf)


# How many uses each key has had in a call of `quaxify`: the next call sees the same
# masks, as a function gives the same for the same.
_uses: Any = weakref.WeakKeyDictionary()


def _surroundings() -> tuple[Any, bool]:
    """The outermost call of `quaxify`, by its tag, and whether a derivative is taken
    inside of it. Only the stack knows: Quax hands its rules values and no trace."""
    call, differentiated, since = None, False, False
    frame = sys._getframe()
    while frame is not None:
        module = frame.f_globals.get("__name__")
        if module == "jax._src.interpreters.ad":
            since = True
        elif module == "quax._quaxify" and "tag" in frame.f_locals:
            call, differentiated = frame.f_locals["tag"], since
        frame = frame.f_back
    _uses.setdefault(call, {})
    return call, differentiated


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
