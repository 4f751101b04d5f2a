"""`dot_general` and `ragged_dot_general`: products with a weight.

Both products, with the base and with the factors, are taken activations first,
whatever the program wrote: `dot_general(w, x)` puts the features in front, and the
transpositions around it cost more than the product with the factors.
"""

import functools as ft

import jax
import quax
from jax import lax
from jaxtyping import ArrayLike

from .._arrays.check import wider
from .._arrays.dropout import DropoutArray, dropped_in_product, used
from .._arrays.lora import add, LoraArray
from .._arrays.low_rank import LowRankArray, preferred, scaled
from .._arrays.scaled import ScaledArray
from .._arrays.stored import stored
from .._arrays.thin_dot import arrange, contract, label_sharding
from .._compat import ragged_dot_general_p
from .register import linear, NotLazy
from .scaled import scaled_product


# The arrays that a product has rules for.
Lowered = LowRankArray | LoraArray | ScaledArray | DropoutArray


def _product(x, w: Lowered, axes, out_sharding, precision, dtype):
    """`x · w`, its axes labelled and in the order `(*batch, *x_free, *w_free)`.

    `axes` are the labels of `x` and of `w`, and those that are not contracted.
    """
    x_labels, w_labels, keep = axes
    params = dict(precision=precision, preferred_element_type=dtype)
    if isinstance(w, ScaledArray):
        return scaled_product(x, w, axes, out_sharding=out_sharding, **params)
    if isinstance(w, LowRankArray):
        out, labels = _low_rank_product(x, w, axes, out_sharding, **params)
        result = dtype or wider(x.dtype, w.dtype)
        return lax.convert_element_type(out, result), labels
    # Its cotangent, a sum over both products, is stored as the result is.
    x = given = stored(x)
    given_axes = axes
    if isinstance(w, DropoutArray):
        given, labels = dropped_in_product(x, w, x_labels, w_labels)
        w, given_axes = w.w, (labels, w_labels, keep)
    assert isinstance(w, LoraArray)
    out, labels = contract(
        x,
        x_labels,
        w.frozen_base(),
        w_labels,
        keep=keep,
        out_sharding=out_sharding,
        dot=lax.dot_general,
        **params,
    )
    update = w.delta.lower()
    delta, delta_labels = _low_rank_product(
        given, update, given_axes, out_sharding, **params
    )
    return stored(add(out, arrange(delta, delta_labels, labels))), labels


def _low_rank_product(
    x, w: LowRankArray, axes, out_sharding, *, precision, preferred_element_type
):
    """First `z = x · (the factor that x contracts with)`, then `z ·` the other one."""
    x_labels, w_labels, keep = axes
    a_labels, b_labels, _ = w.labels
    # The labels of the factors: "rank", and those of the weight's axes that they hold.
    a_labels = [i if i == "rank" else w_labels[i] for i in a_labels]
    b_labels = [i if i == "rank" else w_labels[i] for i in b_labels]
    first, second = (w.a, a_labels), (w.b, b_labels)
    contracted = [i for i in x_labels if i in w_labels and i not in keep]
    if _size(*second, contracted) > _size(*first, contracted):
        first, second = second, first

    dtype = wider(x.dtype, w.a.dtype, w.b.dtype)
    cast = quax.quaxify(lambda y, dtype: y.astype(dtype))
    (u, u_labels), (v, v_labels) = first, second
    x = cast(x, dtype)
    z, z_labels = contract(
        x,
        x_labels,
        cast(u, dtype),
        u_labels,
        # What the second factor holds too is contracted with it.
        keep=[*keep, *v_labels],
        out_sharding=out_sharding,
        precision=precision,
        preferred_element_type=preferred(preferred_element_type, x),
    )
    z = w.between(z, z_labels.index("rank"))
    z, v = scaled(z, cast(v, z.dtype), w.scaling)
    return contract(
        z,
        z_labels,
        v,
        v_labels,
        keep=keep,
        out_sharding=out_sharding,
        precision=precision,
        preferred_element_type=preferred(preferred_element_type, z),
    )


def _size(array, labels, which) -> int:
    size = 1
    for n, label in zip(array.shape, labels):
        size *= n if label in which else 1
    return size


def _label(x, w, x_contract, w_contract, x_batch, w_batch):
    """Labels of x and of w, whose axes are numbered, and those left in the result."""
    w_labels = list(range(w.ndim))
    x_labels: list = [("x", i) for i in range(x.ndim)]
    for i, j in zip((*x_contract, *x_batch), (*w_contract, *w_batch)):
        x_labels[i] = w_labels[j]
    batch = [w_labels[j] for j in w_batch]
    x_free = [i for i in x_labels if i not in w_labels]
    w_free = [j for j in w_labels if j not in x_labels]
    return (x_labels, w_labels), (batch, x_free, w_free)


# Compiled, not for speed but so that like products are traced, differentiated and
# lowered once: a model has hundreds of products and few kinds of them.
@ft.partial(
    jax.jit,
    static_argnames=(
        "numbers",
        "flipped",
        "precision",
        "preferred_element_type",
        "out_sharding",
    ),
)
def _dot_general(
    x, w, numbers, flipped, *, precision, preferred_element_type, out_sharding
):
    axes, (batch, x_free, w_free) = _label(x, w, *numbers)
    order = [*batch, *w_free, *x_free] if flipped else [*batch, *x_free, *w_free]
    if flipped and isinstance(precision, tuple):
        precision = precision[::-1]
    out, labels = _product(
        x,
        w,
        (*axes, [*batch, *x_free, *w_free]),
        label_sharding(out_sharding, order),
        precision,
        preferred_element_type,
    )
    return arrange(out, labels, order)


@quax.register(lax.dot_general_p)
def _(x: ArrayLike | quax.ArrayValue, w: Lowered, *, dimension_numbers, **params):
    ((x_contract, w_contract), (x_batch, w_batch)) = dimension_numbers
    numbers = (x_contract, w_contract, x_batch, w_batch)
    return _dot_general(x, used(w), numbers, False, **params)


@quax.register(lax.dot_general_p)
def _(w: Lowered, x: ArrayLike | quax.ArrayValue, *, dimension_numbers, **params):
    ((w_contract, x_contract), (w_batch, x_batch)) = dimension_numbers
    numbers = (x_contract, w_contract, x_batch, w_batch)
    return _dot_general(x, used(w), numbers, True, **params)


@quax.register(lax.dot_general_p)
def _(x: Lowered, w: Lowered, *, dimension_numbers, **params):
    # Distribute over one side; each product then dispatches again on the other. Neither
    # is an activation, of which anything could be dropped.
    x, w = (y.w if isinstance(y, DropoutArray) else y for y in (x, w))
    ((x_contract, w_contract), (x_batch, w_batch)) = dimension_numbers
    numbers = (x_contract, w_contract, x_batch, w_batch)
    return _dot_general(x, w, numbers, False, **params)


@linear(ragged_dot_general_p, operand=1, product=True)
def _(
    x,
    w: LowRankArray,
    group_sizes,
    *,
    ragged_dot_dimension_numbers,
    group_offset,
    precision,
    preferred_element_type,
    **of_result,
):
    """A mixture of experts: rows of `x`, sorted by expert, meet its factors."""
    numbers = ragged_dot_dimension_numbers
    ((x_contract, w_contract), batch) = numbers.dot_dimension_numbers
    a_labels, b_labels, _ = w.labels
    if any(batch) or numbers.rhs_group_dimensions != (0,) or w.n_batch != 1:
        raise NotLazy("the experts must be the weight's one batch axis, the first")
    a, b = (w.a, a_labels), (w.b, b_labels)
    for (u, u_labels), (v, v_labels) in ((a, b), (b, a)):
        if set(w_contract) == set(u_labels) - {0, "rank"}:
            break
    else:
        raise NotLazy("the contracted axes must be all the rows or all the columns")
    dtype = wider(x.dtype, w.dtype)

    # `of_result` is `out_sharding`, which JAX has from 0.11 on.
    def product(x, x_contract, ragged, factor, labels, contract, **of_result):
        dot_numbers = ((x_contract, tuple(map(labels.index, contract))), ((), ()))
        return lax.ragged_dot_general(
            x,
            factor,
            group_sizes,
            lax.RaggedDotDimensionNumbers(dot_numbers, ragged, (0,)),
            group_offset=group_offset,
            precision=precision,
            preferred_element_type=preferred(preferred_element_type, x),
            **of_result,
        )

    rows = numbers.lhs_ragged_dimensions
    x, u = x.astype(dtype), u.astype(dtype)
    z = product(x, x_contract, rows, u, u_labels, w_contract)
    free = [i for i in range(x.ndim) if i not in x_contract]
    # z: (*x_free, rank)
    z = w.between(z, -1)
    z, v = scaled(z, v.astype(z.dtype), w.scaling)
    rows = tuple(map(free.index, rows))
    return product(z, (z.ndim - 1,), rows, v, v_labels, ["rank"], **of_result)
