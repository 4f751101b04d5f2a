"""What all our arrays share: a policy on dense weights, and fields with a role.

An array that adapts a weight is an `AdaptedArray`. It says, by `lower`, what it comes
to in terms of the few arrays that the rules of `_rules` know; and it says, by the role
of each field, what of it trains and what of it belongs on disk. Nothing else has to be
known of it anywhere, so that a new form of adaptation is a class of a few lines.
"""

import abc
import dataclasses
import functools as ft
from collections.abc import Callable
from typing import Any, ClassVar, TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import quax
from jax import lax
from jax.core import ShapedArray
from jaxtyping import Array

from .check import aval_of
from .misuse import Unquaxified


if TYPE_CHECKING:
    from .low_rank import LowRankArray


# Roles.

BASE, FROZEN = "base", "frozen"


def role(name: str | None = None, **kwargs: Any) -> Any:
    """A field of an `AdaptedArray`, and what its leaves are.

    - `"base"`: what was there before. It is kept as it is and not written to disk,
        unless the array has a `stop_gradient` that is false: then it trains, as
        `"full"`.
    - `"frozen"`: belongs to the adaptation and is written with it, but does not train.
    - any other name, such as `"a"` or `"b"`: trains, under this label.

    Without a name, as without a role, it holds adapted arrays, which have roles of
    their own.
    """
    return eqx.field(metadata={"role": name}, **kwargs)


def fields_of(cls: type, *, static: bool) -> list[dataclasses.Field]:
    """The fields of a class of arrays that hold leaves, or those that are static."""
    return [
        field
        for field in dataclasses.fields(cls)
        if field.metadata.get("static", False) == static
    ]


def is_adapted(x: Any) -> bool:
    return isinstance(x, AdaptedArray)


def roles(tree: Any) -> Any:
    """`tree` with, in place of each leaf, its role.

    That is `"base"`, `"frozen"` or the name under which it trains. A leaf outside an
    adapted array is a `"base"`: it is as it was before.

    **Raises:** `TypeError` if a field that has no role holds more than adapted arrays.
    """
    return jtu.tree_map(
        lambda x: _roles(x) if is_adapted(x) else BASE, tree, is_leaf=is_adapted
    )


def _roles(x: "AdaptedArray") -> Any:
    out = {}
    for field in fields_of(type(x), static=False):
        name, value = field.metadata.get("role"), getattr(x, field.name)
        if name is None:
            out[field.name] = jtu.tree_map(
                ft.partial(_own_roles, type(x), field.name), value, is_leaf=is_adapted
            )
        elif name == BASE:
            frozen = getattr(x, "stop_gradient", True)
            inner = _frozen_role if frozen else _free_role
            out[field.name] = jtu.tree_map(inner, value, is_leaf=is_adapted)
        else:
            out[field.name] = jtu.tree_map(lambda _, name=name: name, value)
    return replace(x, **out)


def _own_roles(cls: type, name: str, x: Any) -> Any:
    if not is_adapted(x):
        raise TypeError(
            f"The field `{name}` of {cls.__name__} holds an array and has no role. "
            f"Declare it as `{name}: jax.Array = lora_quax.role(...)`, with the label "
            'under which it trains, or "frozen", or "base".'
        )
    return _roles(x)


def _frozen_role(x: Any) -> Any:
    """The roles in a base that does not train. What adapted it before is kept."""
    if not is_adapted(x):
        return BASE
    return jtu.tree_map(lambda name: BASE if name == BASE else FROZEN, _roles(x))


def _free_role(x: Any) -> Any:
    if is_adapted(x):
        return _roles(x)
    dtype = getattr(x, "dtype", jnp.dtype(bool))
    return "full" if jnp.issubdtype(dtype, jnp.floating) else BASE


def base_of(x: Any) -> Any:
    """What an adapted array is around. An update is around nothing: `None`."""
    for field in fields_of(type(x), static=False):
        value, name = getattr(x, field.name), field.metadata.get("role")
        if name == BASE:
            return value
        if name is None and is_adapted(value) and not isinstance(value, AbstractDelta):
            return base_of(value)
    return None


def with_base(x: Any, base: Any) -> Any:
    """`x` around another base."""
    for field in fields_of(type(x), static=False):
        value, name = getattr(x, field.name), field.metadata.get("role")
        if name == BASE:
            return replace(x, **{field.name: base})
        if name is None and is_adapted(value) and not isinstance(value, AbstractDelta):
            return replace(x, **{field.name: with_base(value, base)})
    return x


# The policy.


class MaterialiseError(RuntimeError):
    """An operation needs the dense weight, and the array does not allow it."""


# Rules for primitives of packages that need not be installed, by the primitive's name:
# `rule(primitive, values, params)`.
late_rules: dict[str, Callable] = {}


class AdaptedArray(Unquaxified, quax.ArrayValue):
    """An array that stands for a weight, or for the update of one, that is adapted.

    A subclass is an `equinox.Module` with a `role` for each field that holds arrays,
    and the method `lower`. That is all: an operation that has no rule for it is done to
    what it lowers to.
    """

    allow_materialise: eqx.AbstractVar[bool]

    # The name under which it is described in a file.
    form: ClassVar[str]
    # Whether there are rules for it, beside those for what it lowers to.
    has_rules: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "form" not in vars(cls):
            cls.form = cls.__name__

    @abc.abstractmethod
    def lower(self) -> Any:
        """What the array comes to now: a `LowRankArray`, `LoraArray`, `ScaledArray` or
        a plain array, of the same shape."""

    def dense(self) -> Array:
        """The dense array, whatever `allow_materialise` says."""
        return dense(self.lower())

    def aval(self) -> ShapedArray:
        return aval_of(lowered_type(self))

    def materialise(self) -> Array:
        """The dense array.

        **Raises:** `MaterialiseError` if `allow_materialise` is false. To fold an
        update into its weight on purpose, use `lora_quax.merge`.
        """
        if not self.allow_materialise:
            raise refusal("materialise", [self], "`materialise` was called")
        return self.dense()

    @staticmethod
    def default(primitive, values, params):
        if (rule := late_rules.get(primitive.name)) is not None:
            return rule(primitive, values, params)
        lowered = [lower(x) for x in values]
        if any(x is not y for x, y in zip(values, lowered)):
            return quax.quaxify(primitive.bind)(*lowered, **params)
        return materialise_or_refuse(
            primitive, values, params, f"there is no low-rank rule for `{primitive}`"
        )


class AbstractDelta(AdaptedArray):
    """An update of a weight: whatever can say, by `lower`, what its factors are.

    ```python
    class LoHa(AbstractDelta):
        '''The product element by element of two low-rank updates.'''

        b1: jax.Array = role("b")  # (rows, rank)
        a1: jax.Array = role("a")  # (rank, cols)
        b2: jax.Array = role("b")
        a2: jax.Array = role("a")

        def lower(self):
            b = jnp.einsum("or,os->ors", self.b1, self.b2)
            a = jnp.einsum("ri,si->rsi", self.a1, self.a2)
            return LowRankArray(a.reshape(-1, a.shape[-1]), b.reshape(len(b), -1))

    weight = LoraArray.from_parts(weight, LoHa(b1, a1, b2, a2))
    ```

    Every rule, every transformation, `merge`, `summary`, `save_adapter` and the rest
    then serve it as they serve a `LowRankArray`, which is its own `lower`.
    """

    allow_materialise: bool = eqx.field(static=True, default=False, kw_only=True)

    @abc.abstractmethod
    def lower(self) -> "LowRankArray":
        """The factors, as they are now."""


def lower(x: Any) -> Any:
    """What an array of ours comes to, for which there are rules; others as they are.

    Whether it may be made dense an update says itself, and not what its `lower` gives.
    """
    while is_adapted(x):
        y = type(x).lower(x)
        if y is x:
            break
        of_updates = isinstance(x, AbstractDelta) and isinstance(y, AbstractDelta)
        if of_updates and y.allow_materialise != x.allow_materialise:
            y = replace(y, allow_materialise=x.allow_materialise)
        x = y
    return x


def lower_all(x: Any) -> Any:
    """`lower(x)`, and so the arrays inside it: its leaves are those of known types."""
    if not is_adapted(x) or not x.has_rules:
        x = lower(x)
    if not is_adapted(x):
        return x
    names = [field.name for field in fields_of(type(x), static=False)]
    return replace(x, **{name: lower_all(getattr(x, name)) for name in names})


def lowered_type(x: Any) -> Any:
    """`lower(x)` with types in place of arrays. The second time it costs nothing."""
    leaves, treedef = jtu.tree_flatten(x)
    return _lowered_type(treedef, tuple(map(aval_of, leaves)))


@ft.lru_cache(maxsize=512)
def _lowered_type(treedef, types):
    def run(*leaves):
        return lower(jtu.tree_unflatten(treedef, leaves))

    jaxpr, out = jax.make_jaxpr(run, return_shape=True)(*types)
    return jtu.tree_unflatten(jtu.tree_structure(out), jaxpr.out_avals)


def dense(x: Any) -> Any:
    """The dense array of any value; a plain array as it is."""
    if is_adapted(x):
        return type(x).dense(x)
    return type(x).materialise(x) if isinstance(x, quax.Value) else x


def frozen(x: Any) -> Any:
    """An array or value of which no gradient passes."""
    return jtu.tree_map(lax.stop_gradient, x)


def refusal(operation: str, values, why: str) -> MaterialiseError:
    """The error for an operation that has to have the dense weight and may not."""
    return MaterialiseError(
        f"`{operation}` needs the dense weight, base + scaling * b @ a, and this array "
        "has `allow_materialise=False`.\n"
        f"  operands: {', '.join(map(_describe, values))}\n"
        f"  reason:   {why}\n"
        "Ways out: `allow_materialise=True`, given to `loraify` or to the array, forms "
        "the dense weight for such operations; `lora_quax.merge(model)` forms it once "
        "and for all; `targets` of `loraify` can leave this weight alone."
    )


def _describe(x) -> str:
    said = getattr(aval_of(x), "str_short", lambda: str(aval_of(x)))()
    if not is_adapted(x):
        return said
    rank = getattr(x, "rank", None)
    of_rank = "" if rank is None else f" of rank {rank}"
    return f"{type(x).__name__} {said}{of_rank}"


def materialise_or_refuse(primitive, values, params, why: str):
    """What becomes of an operation that cannot stay factored: the policy."""
    plain = [densify_or_refuse(str(primitive), x, values, why) for x in values]
    return quax.quaxify(primitive.bind)(*plain, **params)


def densify_or_refuse(operation: str, x, values, why: str):
    """`x`, dense if it is ours and that is allowed; other values are untouched."""
    if not is_adapted(x):
        return x
    if not x.allow_materialise:
        raise refusal(operation, values, why)
    return dense(x)


# Instances.


def make(cls, /, **values):
    """An instance of a type of array from values that are known to fit.

    Rules make many, inside traces; the checks of the constructors, and Equinox's, are
    for what comes from outside.
    """
    self = object.__new__(cls)
    for name, value in values.items():
        object.__setattr__(self, name, value)
    return self


def replace(x, /, **changes):
    """A copy of an array with some fields changed; the new values must fit."""
    assert changes.keys() <= vars(x).keys(), changes.keys() - vars(x).keys()
    return make(type(x), **{**vars(x), **changes})


def checked(x):
    """`x`, of whose fields all that its constructor would check is checked."""
    for cls in type(x).__mro__:
        if "__check_init__" in vars(cls):
            vars(cls)["__check_init__"](x)
    return x
