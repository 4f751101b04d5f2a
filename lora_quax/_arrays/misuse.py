"""What an adapted array answers where `quax.quaxify` was forgotten.

Inside `quax.quaxify` a program never meets an array of ours: Quax puts a tracer in its
place. So whatever asks one for its numbers, an element or a product is outside, and
each way to ask is here, and says so.
"""

import sys
from typing import Any, NoReturn

import jax
import numpy as np

from .._compat import on_binding


class UnquaxifiedError(RuntimeError):
    """An adapted array was computed with outside of `quax.quaxify`.

    No `TypeError`, which JAX catches on its way and replaces by one of its own.
    """


class Unquaxified:
    """The operators, conversions and attributes of an array, each of which refuses.

    Equality and hashing stay those of a PyTree; `shape`, `dtype`, `ndim` and `size` are
    those of the array that it stands for.
    """

    def __array__(self, *args, **kwargs) -> NoReturn:
        raise UnquaxifiedError(_message(self, "NumPy met"))

    def __format__(self, spec: str) -> str:
        if spec:
            raise UnquaxifiedError(_message(self, f"The format {spec!r} met"))
        return str(self)


def _message(x: Any, what: str) -> str:
    # Its type alone: the shape of a partitioned array is not known.
    return (
        f"{what} a {type(x).__name__} outside of `quax.quaxify`. It stands for a "
        "weight, and only a program that is quaxified computes with it:\n"
        "    quax.quaxify(model)(x)              # instead of model(x)\n"
        "    jax.vmap(quax.quaxify(model))(x)    # instead of jax.vmap(model)(x)\n"
        "What is quaxified must be the model, or take the model as an argument. Quax "
        "does not see into a closure, so `quaxify(jax.vmap(model))` fails as well. "
        "`lora_quax.merge(model)` gives a plain model, which needs no Quax.\n"
        "More of this is in docs/mistakes.md, under 'Outside of quaxify'."
    )


# The method, and what the user wrote.
_OPERATORS = {
    "abs": "`abs`",
    "add": "`+`",
    "and": "`&`",
    "bool": "A truth value",
    "complex": "`complex`",
    "contains": "`in`",
    "divmod": "`divmod`",
    "float": "`float`",
    "floordiv": "`//`",
    "ge": "`>=`",
    "getitem": "An index",
    "gt": "`>`",
    "int": "`int`",
    "invert": "`~`",
    "iter": "A loop",
    "le": "`<=`",
    "len": "`len`",
    "lshift": "`<<`",
    "lt": "`<`",
    "matmul": "`@`",
    "mod": "`%`",
    "mul": "`*`",
    "neg": "`-`",
    "or": "`|`",
    "pos": "`+`",
    "pow": "`**`",
    "round": "`round`",
    "rshift": "`>>`",
    "sub": "`-`",
    "truediv": "`/`",
    "xor": "`^`",
}
_REFLECTED = (
    "add and divmod floordiv lshift matmul mod mul or pow rshift sub truediv xor"
)


def _refusing(what: str):
    def refuse(self, *args) -> NoReturn:
        raise UnquaxifiedError(_message(self, f"{what} met"))

    return refuse


for _name, _what in _OPERATORS.items():
    setattr(Unquaxified, f"__{_name}__", _refusing(_what))
    if _name in _REFLECTED.split():
        setattr(Unquaxified, f"__r{_name}__", _refusing(_what))


on_binding(Unquaxified, _refusing("A primitive of JAX"))


# Where an array lies, and what becomes of its memory. That is known of each leaf,
# quaxified or not.
_OF_LEAVES = {
    "addressable_data",
    "addressable_shards",
    "block_until_ready",
    "committed",
    "copy_to_host_async",
    "data",
    "delete",
    "device",
    "devices",
    "format",
    "global_shards",
    "is_deleted",
    "is_fully_addressable",
    "is_fully_replicated",
    "itemsize",
    "nbytes",
    "on_device_size_in_bytes",
    "sharding",
    "unsafe_buffer_pointer",
}
# Everything else that an array has is made of its numbers.
_OF_NUMBERS = {*dir(jax.Array), *dir(np.ndarray)} - _OF_LEAVES


def _missing(x: Any, name: str, caller: str) -> Any:
    """What becomes of an attribute that is not there. `caller` is the module of who
    asks.

    **Raises:** `AttributeError`, so that `hasattr` goes on working; and to JAX, which
    asks for `__jax_array__` of what it is about to compute with, `UnquaxifiedError`.
    """
    if name == "__jax_array__" and caller.partition(".")[0] == "jax":
        # It is not there for others. What has it Quax and Equinox take for a plain
        # array, and Quax would wrap the results of our rules as such.
        raise UnquaxifiedError(_message(x, "A function of JAX met"))
    if name in _OF_NUMBERS and not name.startswith("_"):
        raise AttributeError(_message(x, f"`.{name}` was asked of"))
    if name in _OF_LEAVES:
        raise AttributeError(
            f"A {type(x).__name__} is made of several arrays and has no `{name}` of "
            "its own. `jax.tree.leaves` gives them; `jax.block_until_ready`, "
            "`jax.device_put` and the like take it as it is."
        )
    return object.__getattribute__(x, name)  # Raises what Python would have.


# No type checker sees it, for which an array would otherwise have every attribute.
setattr(
    Unquaxified,
    "__getattr__",
    lambda self, name: _missing(
        self, name, sys._getframe(1).f_globals.get("__name__", "")
    ),
)
