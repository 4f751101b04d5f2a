"""A weight that is kept in a few bits a number."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import quax
import wadler_lindig as wl
from jax import lax
from jax.core import ShapedArray
from jaxtyping import Array, Float, Integer

from .base import make
from .check import aval_of, wider
from .misuse import Unquaxified


# What a code stands for, where that is not itself. NF4: Dettmers et al., *QLoRA*, arXiv
# 2305.14314, appendix E.
_BOOKS = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
        *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
        *(0.7229568362236023, 1.0),
    )
}


class QuantisedArray(Unquaxified, quax.ArrayValue):
    """The array `scale · code + offset`, with a scale, and perhaps an offset, for each
    tile of it. `lora_quax.quantise` makes them.

    Inside `quax.quaxify` it stands for that array, which a product forms for as long as
    it needs it, forward and again backward: what is kept is the codes. It is frozen: no
    gradient reaches it. With a `LoraArray` around it, that is QLoRA: Dettmers et al.,
    arXiv 2305.14314.
    """

    codes: Integer[Array, "..."]
    scale: Float[Array, "..."]  # each axis divides that of the codes, into tiles
    offset: Float[Array, "..."] | None  # as `scale`
    kind: str = eqx.field(static=True)  # "nf4", "int8", …
    # The types that a decoded number is rounded to, one after the other; the last is the
    # type of the array that it stands for.
    casts: tuple[Any, ...] = eqx.field(static=True)

    def __init__(
        self,
        codes: Integer[Array, "..."],
        scale: Float[Array, "..."],
        offset: Float[Array, "..."] | None = None,
        *,
        kind: str,
        dtype: Any = jnp.float32,
    ):
        """**Arguments:**

        - `codes`: integers, of the shape of the array.
        - `scale`: with as many axes, each of which divides that of the codes: 64 of the
            codes share one number where it is a 64th as long.
        - `offset`: what is added to a tile, if anything is; as `scale`.
        - `kind`: what it is called. The codes of `"nf4"` are numbers of NormalFloat's
            values; those of any other stand for themselves.
        - `dtype`: the type of the array that it stands for.

        **Raises:** `ValueError` if the shapes do not fit each other.
        """
        self.codes = codes
        self.scale = scale
        self.offset = offset
        self.kind = kind
        self.casts = (jnp.dtype(dtype),)

    def __check_init__(self):
        shape, tiles = self.codes.shape, self.scale.shape
        fits = len(shape) == len(tiles) and all(
            n % max(1, m) == 0 and bool(m) == bool(n) for n, m in zip(shape, tiles)
        )
        if not fits or self.offset is not None and self.offset.shape != tiles:
            also = "" if self.offset is None else f" and offsets {self.offset.shape}"
            raise ValueError(
                f"Scales of shape {tiles}{also} are no tiles of an array of shape "
                f"{shape}."
            )

    @property
    def tile(self) -> tuple[int, ...]:
        """How many numbers share a scale, along each axis."""
        sizes = zip(self.codes.shape, self.scale.shape)
        return tuple(n // max(1, m) for n, m in sizes)

    def aval(self) -> ShapedArray:
        return ShapedArray(aval_of(self.codes).shape, self.casts[-1])

    def materialise(self) -> Array:
        """The array that it stands for."""
        wide = wider(self.casts[0], self.scale.dtype, jnp.float32)
        x = self.codes
        if (book := _BOOKS.get(self.kind)) is not None:
            # What is looked up is known to be there: nothing need be filled in.
            x = jnp.asarray(book, wide).at[x].get(mode="promise_in_bounds")
        x = _times(x.astype(wide), self.scale.astype(wide))
        if self.offset is not None:
            x = _plus(x, self.offset.astype(wide))
        for dtype in self.casts:
            x = x.astype(dtype)
        return lax.stop_gradient(x)

    def on_tiles(self, codes, move) -> "QuantisedArray":
        """With other codes, and `move` of the scales and the offsets."""
        offset = None if self.offset is None else move(self.offset)
        return make(
            QuantisedArray,
            codes=codes,
            scale=move(self.scale),
            offset=offset,
            kind=self.kind,
            casts=self.casts,
        )

    def __pdoc__(self, **kwargs):
        name = np.dtype(self.casts[-1]).name
        shape = getattr(self.codes, "shape", None)
        said = f"{name}{[*shape]}" if shape is not None else repr(self.codes)
        docs = [wl.TextDoc(said), wl.TextDoc(repr(self.kind))]
        if shape is not None and hasattr(self.scale, "shape"):
            docs.append(wl.TextDoc(f"tile={self.tile}"))
        name = wl.TextDoc(f"{type(self).__name__}(")
        return wl.bracketed(
            name, docs, wl.comma, wl.TextDoc(")"), kwargs.get("indent", 2)
        )


def _tiled(op):
    """`op(x, s)` with a number of `s` for each tile of `x`."""

    def run(x, s):
        # Each axis as (tiles, numbers in one), of which `s` has the first alone.
        split = [k for n, m in zip(x.shape, s.shape) for k in (m, n // max(1, m))]
        s = s.reshape([k for m in s.shape for k in (m, 1)])
        return op(x.reshape(split), s).reshape(x.shape)

    return run


_times, _plus = _tiled(jnp.multiply), _tiled(jnp.add)
