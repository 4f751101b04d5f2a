"""What is done to a weight with dropout: it is done to the weight, and the key goes
along. Products are with the other rules of products."""

import quax
from jax import lax
from jax.extend.core.primitives import copy_p, name_p, stop_gradient_p
from jaxtyping import ArrayLike

from .._arrays.base import replace
from .._arrays.dropout import DropoutArray, renewed
from .._arrays.lora import LoraArray
from .._compat import pvary_p
from .register import as_array
from .scaled import gathered, MOVES


def _with_keys(w: DropoutArray, out, keys):
    """What is still a sum keeps its key; an activation, as a row is, has none."""
    return replace(w, w=out, key=keys) if isinstance(out, LoraArray) else out


def _moved(w: DropoutArray, move, *rest, **params):
    """The keys of what is moved. One key that stays as it is is the very same, so that
    its uses are counted. Others are new arrays, of which nobody knows what they were:
    so to move them counts as a use."""
    keys = move(w.key, w.shape, *rest, **params)
    shapes = [key.shape for key in (keys if isinstance(keys, list) else [keys])]
    if w.key.size == 1 and all(shape == w.key.shape for shape in shapes):
        return [w.key for _ in keys] if isinstance(keys, list) else w.key
    return move(renewed(w.key), w.shape, *rest, **params)


def _moves(primitive, move):
    @quax.register(primitive)
    def _(w: DropoutArray, *rest: ArrayLike, **params):
        keys = _moved(w, move, *rest, **params)
        out = quax.quaxify(primitive.bind)(w.w, *rest, **params)
        if not isinstance(keys, list):
            return _with_keys(w, out, keys)
        return [_with_keys(w, x, key) for x, key in zip(out, keys)]


for _primitive, _move in MOVES.items():
    _moves(_primitive, _move)


@quax.register(lax.gather_p)
def _(w: DropoutArray, indices: ArrayLike, **params):
    """A lookup has none; but whole matrices of a stack are weights still."""
    indices = as_array(indices)
    out = quax.quaxify(lax.gather_p.bind)(w.w, indices, **params)
    if not isinstance(out, LoraArray):
        return out
    params["mode"] = lax.GatherScatterMode.CLIP  # No key can be filled in.
    return _with_keys(w, out, gathered(renewed(w.key), w.shape, indices, **params))


def _stays(primitive):
    """An operation on each number by itself. What a product by a vector adds to the
    axes of the weight, it adds to those of the key."""

    def done(w: DropoutArray, out):
        new = (1,) * (out.ndim - w.ndim)
        key = renewed(w.key).reshape(new + w.key.shape) if new else w.key
        return _with_keys(w, out, key)

    @quax.register(primitive)
    def _(w: DropoutArray, *rest: ArrayLike, **params):
        return done(w, quax.quaxify(primitive.bind)(w.w, *rest, **params))

    if primitive is lax.mul_p:

        @quax.register(primitive)
        def _(x: ArrayLike, w: DropoutArray, **params):
            return done(w, quax.quaxify(primitive.bind)(x, w.w, **params))


for _primitive in (
    copy_p,
    lax.convert_element_type_p,
    lax.div_p,
    lax.mul_p,
    lax.neg_p,
    name_p,
    pvary_p,
    stop_gradient_p,
):
    _stays(_primitive)
