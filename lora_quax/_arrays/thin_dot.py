"""The product with a thin matrix, as a primitive of our own, and a labelled front end.

A low-rank product `(x aᵀ) bᵀ` is two products with a *thin* operand, one with an axis
of length `rank`. Their cost is memory traffic, not arithmetic, so it matters which
operand stands on the left: the wide one must be read in the order in which it lies in
memory. Autodiff of `lax.dot_general` always puts the cotangent on the left, which reads
it across the grain in the gradient of `b` and costs a factor of seven there on a CPU.

`thin_dot_general` means exactly what `lax.dot_general` means. It is a primitive so that
the order is chosen when it is lowered, from static shapes, after every transformation
has been applied; and forward mode, reverse mode, batching and their compositions remain
those of any bilinear function. A lowering for one platform can be added beside the
general one without touching a rule. It is not `dot_general` to a policy of
`jax.checkpoint` that saves products: these thin ones are computed again.
"""

import functools as ft
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeAlias

import jax
import quax
from jax import lax
from jax.experimental import jet
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from .._compat import auto_insert_reshard, HOLDS_BATCHES


thin_dot_general_p = Primitive("thin_dot_general")


def _free(ndim: int, *used: Sequence[int]) -> list[int]:
    return [i for i in range(ndim) if not any(i in axes for axes in used)]


def _reads_across(u, v, dimension_numbers) -> bool:
    """Whether the wider operand should be moved to the other side.

    On the left, contracted axes lie best last; on the right, first. Where the result
    is wider than both operands its own order counts, and moving would turn it.
    """
    ((u_contract, v_contract), (u_batch, v_batch)) = dimension_numbers
    if not all(isinstance(n, int) for n in (*u.shape, *v.shape)):
        return False  # `jax.export` has sizes that are symbols.
    contracted = math.prod(u.shape[i] for i in u_contract)
    shared = math.prod(u.shape[i] for i in u_batch)
    out_size = u.size * v.size // max(1, contracted**2 * shared)
    if not u_contract or out_size > max(u.size, v.size):
        return False
    if u.size >= v.size:
        last = max(_free(u.ndim, u_contract, u_batch), default=-1)
        return min(u_contract) < last
    first = min(_free(v.ndim, v_contract, v_batch), default=v.ndim)
    return max(v_contract) > first


def _lower(
    u, v, *, dimension_numbers, precision, out_sharding, hold=lambda out: out, **params
):
    ((u_contract, v_contract), (u_batch, v_batch)) = dimension_numbers
    if out_sharding is not None or not _reads_across(u, v, dimension_numbers):
        return lax.dot_general(
            u,
            v,
            dimension_numbers,
            precision=precision,
            out_sharding=out_sharding,
            **params,
        )
    out = lax.dot_general(
        v,
        u,
        ((v_contract, u_contract), (v_batch, u_batch)),
        precision=precision[::-1] if isinstance(precision, tuple) else precision,
        **params,
    )
    # (*batch, *v_free, *u_free) -> (*batch, *u_free, *v_free); this is the thin array.
    n_batch = len(u_batch)
    v_free = range(n_batch, n_batch + v.ndim - len(v_contract) - n_batch)
    u_free = range(v_free.stop, out.ndim)
    out = out if n_batch and not HOLDS_BATCHES else hold(out)
    return lax.transpose(out, (*range(n_batch), *u_free, *v_free))


# XLA folds a transposition into the product that it is of, which turns the operands
# back again. On the CPU, where their order was seen to count, it is kept from that.
_lower_on_cpu = ft.partial(_lower, hold=lax.optimization_barrier)


def _batch(args, dims, *, dimension_numbers, out_sharding, **params):
    (u, v), (u_dim, v_dim) = args, dims
    ((u_contract, v_contract), (u_batch, v_batch)) = dimension_numbers

    def shift(axes, dim):
        return tuple(i if dim is None or i < dim else i + 1 for i in axes)

    u_contract, u_batch = shift(u_contract, u_dim), shift(u_batch, u_dim)
    v_contract, v_batch = shift(v_contract, v_dim), shift(v_batch, v_dim)
    u_free, v_free = (
        _free(u.ndim, u_contract, u_batch),
        _free(v.ndim, v_contract, v_batch),
    )
    if u_dim is None:  # One more free axis of v.
        out_dim = len(v_batch) + len(u_free) + v_free.index(v_dim)
    elif v_dim is None:  # One more free axis of u.
        out_dim = len(u_batch) + u_free.index(u_dim)
    else:
        out_dim = 0
        u_batch, v_batch = (u_dim, *u_batch), (v_dim, *v_batch)
    if out_sharding is not None:
        spec = [*out_sharding.spec]
        spec.insert(out_dim, None)
        out_sharding = NamedSharding(out_sharding.mesh, PartitionSpec(*spec))
    out = thin_dot_general_p.bind(
        u,
        v,
        dimension_numbers=((u_contract, v_contract), (u_batch, v_batch)),
        out_sharding=out_sharding,
        **params,
    )
    return out, out_dim


def _taylor(primals, series, **params):
    """Of two Taylor series, by Cauchy's product: term k sums `u_j · v_{k-j}`."""
    u, v = ([x, *terms] for x, terms in zip(primals, series))
    out = [
        sum(thin_dot_general_p.bind(u[j], v[k - j], **params) for j in range(k + 1))
        for k in range(len(u))
    ]
    return out[0], out[1:]


def _labels(u, v, dimension_numbers):
    """Names for the axes of both operands and of the result; shared where paired."""
    ((u_contract, v_contract), (u_batch, v_batch)) = dimension_numbers
    u_labels = [("u", i) for i in range(u.ndim)]
    v_labels = [("v", i) for i in range(v.ndim)]
    for i, j in zip((*u_contract, *u_batch), (*v_contract, *v_batch)):
        v_labels[j] = u_labels[i]
    out_labels = (
        [u_labels[i] for i in u_batch]
        + [u_labels[i] for i in _free(u.ndim, u_contract, u_batch)]
        + [v_labels[i] for i in _free(v.ndim, v_contract, v_batch)]
    )
    return u_labels, v_labels, out_labels


def _cotangent(g, aval, other, labels, *, out_sharding, **params):
    """The cotangent of one operand, which is again a product with a thin matrix."""
    del out_sharding  # The result's; a cotangent is sharded like its operand.
    g_labels, labels, other_labels = labels
    # On an explicit mesh a spec of nothing but None asks for a replicated result.
    explicit = AxisType.Explicit in aval.sharding.mesh.axis_types
    sharding = aval.sharding if explicit else None
    ct, ct_labels = contract(
        g,
        g_labels,
        other,
        other_labels,
        keep=labels,
        out_sharding=label_sharding(sharding, labels),
        **params,
    )
    return lax.convert_element_type(arrange(ct, ct_labels, labels), aval.dtype)


def _transpose_u(g, u, v, *, dimension_numbers, **params):
    u_labels, v_labels, g_labels = _labels(u.aval, v, dimension_numbers)
    return _cotangent(g, u.aval, v, (g_labels, u_labels, v_labels), **params)


def _transpose_v(g, u, v, *, dimension_numbers, precision, **params):
    u_labels, v_labels, g_labels = _labels(u, v.aval, dimension_numbers)
    if isinstance(precision, tuple):  # For (u, v), where the cotangent is to be v's.
        precision = precision[::-1]
    labels = (g_labels, v_labels, u_labels)
    return _cotangent(g, v.aval, u, labels, precision=precision, **params)


_compiled = jax.jit(
    thin_dot_general_p.bind,
    static_argnames=(
        "dimension_numbers",
        "precision",
        "preferred_element_type",
        "out_sharding",
    ),
)


@thin_dot_general_p.def_impl
def _(u, v, **params):
    # What is not compiled under `jax.disable_jit` would come back here.
    return (_lower if jax.config.jax_disable_jit else _compiled)(u, v, **params)


# The type of the result (shape, dtype, sharding, varying axes) is lax.dot_general's.
thin_dot_general_p.def_abstract_eval(
    lambda u, v, **params: lax.dot_general_p.abstract_eval(u, v, **params)[0]
)
mlir.register_lowering(
    thin_dot_general_p, mlir.lower_fun(_lower, multiple_results=False)
)
mlir.register_lowering(
    thin_dot_general_p,
    mlir.lower_fun(_lower_on_cpu, multiple_results=False),
    platform="cpu",
)
ad.defbilinear(thin_dot_general_p, _transpose_u, _transpose_v)
batching.primitive_batchers[thin_dot_general_p] = _batch
jet.jet_rules[thin_dot_general_p] = _taylor


def thin_dot_general(
    u,
    v,
    dimension_numbers,
    precision=None,
    preferred_element_type=None,
    out_sharding=None,
):
    """`jax.lax.dot_general`, for operands of which one has an axis of length `rank`."""
    u, v = auto_insert_reshard(u, v)
    return thin_dot_general_p.bind(
        u,
        v,
        dimension_numbers=dimension_numbers,
        precision=precision,
        preferred_element_type=preferred_element_type,
        out_sharding=out_sharding,
    )


Labels: TypeAlias = Sequence[Hashable]
"""A name for each axis, as the letters of an `einsum`."""


def label_sharding(sharding, labels: Labels):
    """A function from labels to the sharding of an array with those axes.

    `sharding`, a `NamedSharding`, a `PartitionSpec` or `None`, is that of an array with
    axes `labels`; an axis that it does not know is replicated.
    """
    if sharding is None:
        return lambda labels: None
    named = isinstance(sharding, NamedSharding)
    spec = sharding.spec if named else sharding
    entries = dict(zip(labels, spec))

    def of(labels):
        spec = PartitionSpec(*(entries.get(label) for label in labels))
        return NamedSharding(sharding.mesh, spec) if named else spec

    return of


def contract(
    u,
    u_labels: Labels,
    v,
    v_labels: Labels,
    *,
    keep: Labels,
    out_sharding: Callable[[Labels], Any] = lambda labels: None,
    dot: Any = thin_dot_general,
    **params,
):
    """The product of two arrays, or `quax.Value`s, whose axes are named.

    A label that both operands have is contracted, or is a batch axis if it is in
    `keep`; every other label is a free axis. Returns the product with its labels, which
    stand in `dot_general`'s own order: batch, free of `u`, free of `v`.
    """
    shared = [label for label in u_labels if label in v_labels]
    batch = [label for label in shared if label in keep]
    contracted = [label for label in shared if label not in keep]
    free = [label for label in (*u_labels, *v_labels) if label not in shared]
    if isinstance(u, quax.Value) or isinstance(v, quax.Value):
        dot = quax.quaxify(lax.dot_general)
    out = dot(
        u,
        v,
        (
            (_index(u_labels, contracted), _index(v_labels, contracted)),
            (_index(u_labels, batch), _index(v_labels, batch)),
        ),
        out_sharding=out_sharding([*batch, *free]),
        **params,
    )
    return out, [*batch, *free]


def arrange(x, labels: Labels, out_labels: Labels):
    """`x` with its axes in the order of `out_labels`."""
    if list(labels) == list(out_labels):
        return x
    return quax.quaxify(lax.transpose)(x, _index(labels, out_labels))


def _index(labels: Labels, which: Labels) -> tuple[int, ...]:
    labels = list(labels)
    return tuple(labels.index(label) for label in which)
