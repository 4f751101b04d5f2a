"""What `initialise` is given, checked before anything is computed."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import quax
from jax.core import Tracer

from .._arrays.check import check_key, check_number
from .._arrays.lora import LoraArray
from .moments import Moments
from .paths import is_float


_WAYS = {
    "key": "draws numbers: give it a `key`",
    "moments": "starts from data: give it `moments`, of `lora_quax.input_moments`",
    "gradients": "starts from a gradient: give it `gradients`, of the plain model",
}


def check_given(method: str, needs: str | None, given: dict[str, Any]) -> None:
    """What a method needs must be there. A key may always be."""
    if needs is not None and given[needs] is None:
        raise ValueError(f"{method!r} {_WAYS[needs]}.")
    if given["key"] is not None:
        check_key(given["key"])
    for name in "moments", "gradients":
        if given[name] is not None and name != needs:
            raise ValueError(f"{method!r} has no use for `{name}`: leave it out.")


def check_rho(rho: Any, method: str) -> float:
    rho = check_number("rho", rho)
    if rho < 1:
        raise ValueError(f"`rho` must be at least 1, got {rho}.")
    if rho > 1 and method != "eva":
        raise ValueError(f"`rho` is for 'eva' alone, and `method` is {method!r}.")
    return rho


def refuse_base(where: str, w: LoraArray, why: str) -> None:
    if isinstance(w.base, quax.Value):
        raise ValueError(
            f"{where} has a base that is a {type(w.base).__name__}, and {why}, which "
            "takes a plain array."
        )


def check_moments(where: str, w: LoraArray, found: Any) -> None:
    batch, axes = w.shape[: w.n_batch], w.shape[w.n_batch :]
    rows, cols = axes[: w.delta.rows], axes[w.delta.rows :]
    in_out = isinstance(found, Moments) and found.in_out
    n = math.prod(rows if in_out else cols)
    wanted = [batch, (*batch, n), (*batch, n, n)]
    if not isinstance(found, Moments) or _shapes(found) != wanted:
        raise ValueError(
            "`moments` must have `Moments` with arrays of shapes "
            f"{', '.join(map(str, wanted))} for {where}, as `input_moments` of this "
            f"model gives; got {found!r:.80}."
        )
    _check_finite("moments", where, found)
    if _is_known(found) and not bool(jnp.any(found.count)):
        side = "rows" if in_out else "columns"
        way_out = "not name it" if in_out else "if it is kept as (in, out), name it"
        raise ValueError(
            f"`moments` has no vector for {where}: no data were multiplied with it on "
            f"the side of its {side}, or what it computes does not reach the outputs "
            f"of the function. Give it such data; or {way_out} in `in_out` of "
            "`input_moments`; or leave it out of `targets`."
        )


def check_gradient(where: str, w: LoraArray, found: Any) -> None:
    if _shapes(found) != [w.shape] or not is_float(found):
        raise ValueError(
            f"`gradients` must have a floating-point array of shape {w.shape} for "
            f"{where}; got {found!r:.80}. It is the gradient with respect to the plain "
            "model."
        )
    _check_finite("gradients", where, found)
    if _is_known(found) and not jnp.any(found):
        raise ValueError(
            f"`gradients` has only zeros for {where}: the loss does not depend on it. "
            "Take a loss that does, or leave it out of `targets`."
        )


def _shapes(tree: Any) -> list[tuple[int, ...] | None]:
    return [getattr(x, "shape", None) for x in jax.tree.leaves(tree)]


def _check_finite(name: str, where: str, found: Any) -> None:
    leaves = jax.tree.leaves(found)
    if _is_known(found) and not all(bool(jnp.isfinite(x).all()) for x in leaves):
        raise ValueError(f"`{name}` has numbers that are not finite for {where}.")


def refuse_unknown(seen: list) -> None:
    if not all(map(_is_known, seen)):
        raise ValueError(
            "With `rho` more than 1 the ranks, and so the shapes, depend on the data; "
            "these are abstract or traced here. Call `initialise` outside of `jit`."
        )


def _is_known(tree: Any) -> bool:
    return not any(
        isinstance(x, Tracer | jax.ShapeDtypeStruct) for x in jax.tree.leaves(tree)
    )
