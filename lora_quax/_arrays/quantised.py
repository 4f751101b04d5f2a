"""A weight that is kept in a few bits a number."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import quax
import wadler_lindig as wl
from jax import lax
from jax.core import ShapedArray, Tracer
from jaxtyping import Array, Float, Integer

from .._compat import partition_spec, shaped_array
from .base import make, replace
from .check import aval_of, check_float_dtype, wider
from .misuse import Unquaxified


class Kind(NamedTuple):
    """What codes are, and what they stand for."""

    bits: int
    first: int = 0  # the code that is kept as 0, of those that are kept unsigned
    book: tuple[float, ...] | None = None  # or what each of them stands for


# NF4: Dettmers et al., *QLoRA*, arXiv 2305.14314, appendix E. Those with a `q` are
# llama.cpp's.
KINDS = {
    "nf4": Kind(
        4,
        book=(
            *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
            *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
            *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
            *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
            *(0.7229568362236023, 1.0),
        ),
    ),
    "int4": Kind(4, -8),
    "int8": Kind(8),
    "q4_0": Kind(4, -8),
    "q4_1": Kind(4),
    "q6_k": Kind(8),
    "q8_0": Kind(8),
}


class QuantisedArray(Unquaxified, quax.ArrayValue):
    """The array `scale · code + offset`, with a scale, and perhaps an offset, for each
    tile of it. `lora_quax.quantise` and `lora_quax.load_gguf` make them.

    Inside `quax.quaxify` it stands for that array, which a product forms for as long as
    it needs it, forward and again backward: what is kept is the codes. It is frozen: no
    gradient reaches it. With a `LoraArray` around it, that is QLoRA: Dettmers et al.,
    arXiv 2305.14314.
    """

    codes: Integer[Array, "..."]  # along the axis `packed` two in a byte
    scale: Float[Array, "..."]  # each axis divides that of the array, into tiles
    offset: Float[Array, "..."] | None  # as `scale`
    kind: str = eqx.field(static=True)
    # The types that a decoded number is rounded to, one after the other. The last is
    # the type of the array that it stands for.
    casts: tuple[Any, ...] = eqx.field(static=True)
    packed: int | None = eqx.field(static=True)  # counted from the end

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
        - `kind`: what the codes are: `"nf4"`, of which they are the numbers of its
            values, `"int4"`, `"int8"`, or llama.cpp's `"q4_0"`, `"q4_1"`, `"q6_k"` or
            `"q8_0"`.
        - `dtype`: the type of the array that it stands for.

        **Raises:** `ValueError` if `kind` is not known, has not all of the codes, or
        the shapes do not fit each other; `TypeError` if the codes are no integers, or
        `dtype` is no floating-point type.
        """
        if kind not in KINDS:
            raise ValueError(f"`kind` must be one of {', '.join(KINDS)}, got {kind!r}.")
        _check_codes(codes, kind)
        self.scale = scale
        self.offset = offset
        self.kind = kind
        self.casts = (jax.dtypes.canonicalize_dtype(check_float_dtype(dtype)),)
        self.codes, self.packed = codes.astype(jnp.int8), None
        if KINDS[kind].bits == 4:
            self.codes = (self.codes - KINDS[kind].first).astype(jnp.uint8)
            self.codes, self.packed = _packed(self.codes)

    def __check_init__(self):
        shape, tiles = self._shape(), self.scale.shape
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
        return tuple(n // max(1, m) for n, m in zip(self.shape, self.scale.shape))

    def _shape(self) -> tuple[int, ...]:
        shape = [*aval_of(self.codes).shape]
        if self.packed is not None:
            shape[self.packed] *= 2
        return tuple(shape)

    def aval(self) -> ShapedArray:
        shape = self._shape()
        tiles = getattr(self.scale, "shape", shape)
        if len(tiles) != len(shape) or any(n % max(1, m) for n, m in zip(shape, tiles)):
            raise ValueError(
                f"A QuantisedArray has scales of shape {tiles} for codes of shape "
                f"{shape}. `jax.vmap` outside of `quaxify` maps over each of "
                "its parts: right for a leading axis that stacks arrays, and no other."
            )
        parts = self.codes, self.scale
        return shaped_array(shape, self.casts[-1], partition_spec(self.codes), *parts)

    def unpacked(self) -> "QuantisedArray":
        """The same with a byte for each code."""
        if self.packed is None:
            return self
        axis = self.packed + self.codes.ndim + 1
        pairs = jnp.stack([self.codes & 15, self.codes >> 4], axis)
        return replace(self, codes=pairs.reshape(self.shape), packed=None)

    def materialise(self) -> Array:
        """The array that it stands for."""
        dtype = wider(self.casts[0], self.scale.dtype, jnp.float32)
        kind, x = KINDS[self.kind], self.unpacked().codes
        if kind.book is None:
            x = x.astype(dtype) + kind.first
        else:  # What is looked up is known to be there: nothing need be filled in.
            book, lies = jnp.asarray(kind.book, dtype), _explicit_sharding(x)
            x = book.at[x].get(mode="promise_in_bounds", out_sharding=lies)
        x = _times(x, self.scale.astype(dtype))
        if self.offset is not None:
            x = _plus(x, self.offset.astype(dtype))
        for dtype in self.casts:
            x = x.astype(dtype)
        return lax.stop_gradient(x)

    def moved(self, codes: tuple[Any, int | None], move) -> "QuantisedArray":
        """With other codes, packed along an axis, and `move` of scales and offsets."""
        offset = None if self.offset is None else move(self.offset)
        return make(
            QuantisedArray,
            codes=codes[0],
            scale=move(self.scale),
            offset=offset,
            kind=self.kind,
            casts=self.casts,
            packed=codes[1],
        )

    def __pdoc__(self, **kwargs):
        docs = [wl.TextDoc(repr(self.kind))]
        if hasattr(self.codes, "shape"):
            name = np.dtype(self.casts[-1]).name
            docs.insert(0, wl.array_summary(self.shape, name, kind=None))
            if hasattr(self.scale, "shape"):
                docs.append(wl.TextDoc(f"tile={self.tile}"))
        name = wl.TextDoc(f"{type(self).__name__}(")
        indent = kwargs.get("indent", 2)
        return wl.bracketed(name, docs, wl.comma, wl.TextDoc(")"), indent)


def _check_codes(codes, kind: str) -> None:
    if not jnp.issubdtype(codes.dtype, jnp.integer):
        raise TypeError(f"Codes must be integers, got {aval_of(codes)}.")
    bits, first = KINDS[kind].bits, KINDS[kind].first
    if bits == 8:
        first = -128
    if isinstance(codes, Tracer) or not codes.size:
        return
    least, most = int(codes.min()), int(codes.max())
    if least < first or most >= first + 2**bits:
        raise ValueError(
            f"The codes of {kind!r} are from {first} to {first + 2**bits - 1}; got "
            f"some from {least} to {most}."
        )


def _packed(codes) -> tuple[Any, int | None]:
    """Two in a byte, along the last axis of even length, if there is one."""
    even = [i for i, n in enumerate(codes.shape) if n and n % 2 == 0]
    if not even:
        return codes, None
    low, high = (lax.slice_in_dim(codes, i, None, 2, even[-1]) for i in (0, 1))
    return low | high << 4, even[-1] - codes.ndim


def _tiled(op):
    """`op(x, s)` with a number of `s` for each tile of `x`."""

    def run(x, s):
        # Each axis as (tiles, numbers in one), of which `s` has the first alone.
        split = [k for n, m in zip(x.shape, s.shape) for k in (m, n // max(1, m))]
        s = s.reshape([k for m in s.shape for k in (m, 1)])
        lies = _explicit_sharding(x)
        return lax.reshape(op(x.reshape(split), s), x.shape, out_sharding=lies)

    return run


def _explicit_sharding(x):
    """That of an array on a mesh with explicit axes, which JAX asks for."""
    return jax.typeof(x).sharding if any(partition_spec(x)) else None


_times, _plus = _tiled(jnp.multiply), _tiled(jnp.add)
