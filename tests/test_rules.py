"""Every rule, on every kind of array, under every transform, against dense weights."""

import equinox as eqx
import jax
import jax.ad_checkpoint
import jax.numpy as jnp
import pytest
import quax
from forms import FORMS, SCALED
from helpers import (
    assert_close,
    check,
    check_all,
    check_derivative,
    densify,
    DERIVATIVES,
    equations,
    formed,
    KINDS,
    lora,
    Scaled,
    some_of,
    TRANSFORMS,
    x,
)
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from lora_quax import MaterialiseError
from lora_quax._arrays.base import replace


pytestmark = pytest.mark.usefixtures("x64")


def _dot(contract, batch=((), ())):
    return lambda u, v: lax.dot_general(u, v, (contract, batch))


def _conv(**kwargs):
    kwargs = {"window_strides": (2, 1), "padding": ((1, 2), (0, 1)), **kwargs}
    return lambda w, x: lax.conv_general_dilated(x, w, **kwargs)


_ids = [[1, 2], [0, 4]]
_name = jax.ad_checkpoint.checkpoint_name

# name: (program of a weight and another array, the weight's shape and axes, and the
# other's)
MATRIX = dict(shape=(5, 3))
STACK = dict(shape=(2, 5, 3))
KERNEL = dict(cols=3)
PROGRAMS = {
    # dot_general
    "w @ x": (lambda w, x: w @ x, MATRIX, (3,)),
    "w @ X": (lambda w, x: w @ x, MATRIX, (3, 4)),
    "x @ w": (lambda w, x: x @ w, MATRIX, (4, 5)),
    "x @ w.T": (lambda w, x: x @ w.T, MATRIX, (4, 3)),
    "many tokens": (lambda w, x: jnp.einsum("oi,bti->bto", w, x), MATRIX, (2, 4, 3)),
    "features first": (lambda w, x: jnp.einsum("oi,ib->ob", w, x), MATRIX, (3, 4)),
    "everything contracted": (lambda w, x: jnp.sum(w * 2.0 @ x), MATRIX, (3,)),
    "both axes": (lambda w, x: jnp.einsum("oi,boi->b", w, x), MATRIX, (2, 5, 3)),
    "batched over rows": (_dot(((1,), (1,)), ((0,), (0,))), MATRIX, (5, 3)),
    "batched over columns": (_dot(((0,), (0,)), ((1,), (1,))), MATRIX, (5, 3)),
    "outer": (lambda w, x: jnp.einsum("oi,k->oik", w, x), MATRIX, (2,)),
    "ensemble": (lambda w, x: jnp.einsum("eoi,ebi->ebo", w, x), STACK, (2, 4, 3)),
    "ensemble, one input": (
        lambda w, x: jnp.einsum("eoi,bi->ebo", w, x),
        STACK,
        (4, 3),
    ),
    "ensemble, summed": (
        lambda w, x: jnp.einsum("eoi,ebi->bo", w, x),
        STACK,
        (2, 4, 3),
    ),
    "ensemble, transposed": (
        lambda w, x: x @ w.transpose(0, 2, 1),
        STACK,
        (2, 4, 3),
    ),
    "heads out": (
        lambda w, x: jnp.einsum("hdi,bi->bhd", w.reshape(2, 3, 4), x),
        dict(shape=(6, 4)),
        (5, 4),
    ),
    "heads in": (
        lambda w, x: jnp.einsum("bhd,hdi->bi", x, w.T.reshape(2, 3, 5)),
        dict(shape=(5, 6)),
        (4, 2, 3),
    ),
    "heads in, order unsorted": (
        lambda w, x: lax.dot_general(
            x, w.reshape(2, 3, 5), (((2, 1), (1, 0)), ((), ()))
        ),
        dict(shape=(6, 5)),
        (4, 2, 3),
    ),
    "heads batched": (
        lambda w, x: jnp.einsum("bhd,hdi->bhi", x, w.reshape(2, 3, 5)),
        dict(shape=(6, 5)),
        (4, 2, 3),
    ),
    "rows of two axes": (
        lambda w, x: jnp.einsum("hdi,bi->bhd", w, x),
        dict(shape=(2, 3, 4), rows=2),
        (5, 4),
    ),
    "columns of two axes": (
        lambda w, x: jnp.einsum("ihd,bi->bhd", w, x),
        dict(shape=(4, 2, 3), cols=2),
        (5, 4),
    ),
    "one output": (lambda w, x: w @ x, dict(shape=(1, 3), rank=1), (3,)),
    # convolutions
    "conv 1d": (
        _conv(window_strides=(1,), padding="SAME"),
        dict(shape=(4, 3, 3), cols=2),
        (2, 3, 7),
    ),
    "conv 2d": (
        _conv(rhs_dilation=(1, 2)),
        dict(shape=(4, 3, 3, 2), **KERNEL),
        (2, 3, 7, 6),
    ),
    "conv 3d": (
        _conv(window_strides=(1, 1, 1), padding="SAME"),
        dict(shape=(4, 3, 3, 2, 2), cols=4),
        (2, 3, 4, 5, 4),
    ),
    "conv, feature groups": (
        _conv(feature_group_count=2),
        dict(shape=(16, 3, 3, 2), rank=1, **KERNEL),
        (2, 6, 7, 6),
    ),
    "conv, batch groups": (
        _conv(batch_group_count=2),
        dict(shape=(6, 3, 3, 2), **KERNEL),
        (4, 3, 7, 6),
    ),
    "conv, depthwise": (
        _conv(feature_group_count=4),
        dict(shape=(8, 1, 3, 2), rank=1, **KERNEL),
        (2, 4, 7, 6),
    ),
    "conv, depthwise, one each": (
        _conv(feature_group_count=4),
        dict(shape=(4, 1, 3, 2), rank=1, **KERNEL),
        (2, 4, 7, 6),
    ),
    "conv, transposed": (
        _conv(lhs_dilation=(2, 3)),
        dict(shape=(4, 3, 3, 2), **KERNEL),
        (2, 3, 7, 6),
    ),
    "conv, channels last": (
        _conv(dimension_numbers=("NHWC", "OIHW", "NHWC")),
        dict(shape=(4, 3, 3, 2), **KERNEL),
        (2, 7, 6, 3),
    ),
    "conv, HWIO kernel, groups": (
        _conv(dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2),
        dict(shape=(3, 2, 2, 4), rows=3),
        (2, 7, 6, 4),
    ),
    "conv, HWIO of an OIHW": (
        lambda w, x: _conv(dimension_numbers=("NCHW", "HWIO", "NCHW"))(
            w.transpose(2, 3, 1, 0), x
        ),
        dict(shape=(4, 3, 3, 2), **KERNEL),
        (2, 3, 7, 6),
    ),
    "conv, inputs first": (
        _conv(dimension_numbers=("NCHW", "IOHW", "NCHW")),
        dict(shape=(3, 4, 3, 2), **KERNEL),
        (2, 3, 7, 6),
    ),
    "conv, inputs first, groups": (
        _conv(dimension_numbers=("NCHW", "IOHW", "NCHW"), feature_group_count=2),
        dict(shape=(3, 4, 3, 2), **KERNEL),
        (2, 6, 7, 6),
    ),
    # lookups
    "w[ids]": (lambda w, x: w[jnp.array(_ids)] * x, MATRIX, (3,)),
    "w[id]": (lambda w, x: w[1] * x, MATRIX, (3,)),
    "w[-1]": (lambda w, x: w[-1] * x, MATRIX, (3,)),
    "w[traced id]": (lambda w, x: w[jnp.argmax(x)] * x, MATRIX, (3,)),
    "w[:, ids]": (lambda w, x: w[:, jnp.array([2, 0])] @ x, MATRIX, (2,)),
    "w[i, j]": (lambda w, x: w[jnp.arange(3), jnp.array([2, 1, 1])] * x, MATRIX, (3,)),
    "w[slice]": (lambda w, x: w[1:4:2, :2] @ x, MATRIX, (2,)),
    "take": (lambda w, x: jnp.take(w, jnp.array(_ids), 0) @ x, MATRIX, (3,)),
    "take, clip": (
        lambda w, x: jnp.take(w, jnp.array([9, 2]), 1, mode="clip").sum() * x,
        MATRIX,
        (3,),
    ),
    "get, fill": (
        lambda w, x: w.at[jnp.array([1, 9])].get(mode="fill", fill_value=2.0) * x,
        MATRIX,
        (3,),
    ),
    "get, fill, all of the axes": (
        lambda w, x: (
            lax.gather(
                w,
                jnp.array([[1], [0]]),
                lax.GatherDimensionNumbers((1, 2), (), (0,)),
                (5, 3),
                mode="fill",
                fill_value=2.0,
            )
            @ x
        ),
        MATRIX,
        (3,),
    ),
    "get, promise": (
        lambda w, x: w.at[jnp.array([1, 0])].get(mode="promise_in_bounds") * x,
        MATRIX,
        (3,),
    ),
    "take_along_axis": (
        lambda w, x: jnp.take_along_axis(w, jnp.array([[0, 1, 4]]), 0) * x,
        MATRIX,
        (3,),
    ),
    "experts[ids]": (
        lambda w, x: jnp.einsum("boi,bi->bo", w[jnp.array([0, 1, 1, 0])], x),
        STACK,
        (4, 3),
    ),
    "experts, rows of them": (
        lambda w, x: w[jnp.array([0, 1]), jnp.array([4, 2])] * x,
        STACK,
        (3,),
    ),
    "dynamic_slice": (
        lambda w, x: lax.dynamic_slice(w, (1, 1), (2, 2)) @ x,
        MATRIX,
        (2,),
    ),
    "layer of a stack": (lambda w, x: w[1] @ x, STACK, (3,)),
    "tied head": (lambda w, x: (w[jnp.array([1, 3])] * x) @ w.T, MATRIX, (3,)),
    # layout
    "reshape, rows": (lambda w, x: w.reshape(2, 3, 4)[1] @ x, dict(shape=(6, 4)), (4,)),
    "reshape, merged": (
        lambda w, x: w.reshape(6, 4) @ x,
        dict(shape=(2, 3, 4), rows=2),
        (4,),
    ),
    "w[None]": (lambda w, x: (w[None] @ x)[0], MATRIX, (3,)),
    "w[:, None]": (lambda w, x: (w[:, None] @ x)[:, 0], MATRIX, (3,)),
    "w[..., None]": (lambda w, x: (w[..., None] * 1.0)[..., 0] @ x, MATRIX, (3,)),
    "broadcast": (
        lambda w, x: jnp.broadcast_to(w, (2, 5, 3)) @ x,
        MATRIX,
        (3,),
    ),
    "rev": (lambda w, x: w[::-1, ::-1] @ x, MATRIX, (3,)),
    "repeat": (lambda w, x: jnp.repeat(w, 2, 0) @ x, MATRIX, (3,)),
    "tile": (lambda w, x: jnp.tile(w, (2, 1)) @ x, MATRIX, (3,)),
    "split": (lambda w, x: jnp.split(w, (2, 3))[2] @ x, MATRIX, (3,)),
    "unstack": (lambda w, x: jnp.unstack(w)[1] @ x, STACK, (3,)),
    "unstack, rows": (lambda w, x: jnp.unstack(w)[1] * x, MATRIX, (3,)),
    "pad": (
        lambda w, x: jnp.pad(w, ((1, 2), (0, 1)), constant_values=2.0) @ x,
        MATRIX,
        (4,),
    ),
    "one by one": (lambda w, x: x @ w.T, dict(shape=(1, 1), rank=1), (4, 1)),
    "a kernel of one": (
        lambda w, x: _conv(dimension_numbers=("NHWC", "HWIO", "NHWC"))(
            w.transpose(2, 3, 1, 0), x
        ),
        dict(shape=(1, 1, 3, 2), rank=1, cols=3),
        (2, 7, 6, 1),
    ),
    "no rows": (lambda w, x: x @ w.T, dict(shape=(0, 3)), (4, 3)),
    "sum": (lambda w, x: w.sum(1) * w.sum() + x, MATRIX, (5,)),
    "mean": (lambda w, x: w.mean(0) * x, MATRIX, (3,)),
    # joins
    "w + x": (lambda w, x: (w + x) @ x.T, MATRIX, (5, 3)),
    "x - w": (lambda w, x: (x - w) @ x.T, MATRIX, (5, 3)),
    "w + 1": (lambda w, x: (w + 1.0) @ x, MATRIX, (3,)),
    "concatenate [w, x]": (
        lambda w, x: jnp.concatenate([w, x]) @ jnp.arange(3.0),
        MATRIX,
        (2, 3),
    ),
    "concatenate columns": (
        lambda w, x: jnp.concatenate([x, w, w], 1) @ jnp.arange(21.0),
        dict(shape=(12, 10), rank=1),
        (12, 1),
    ),
    "stack [w, w]": (
        lambda w, x: jnp.einsum("eoi,i->eo", jnp.stack([w, w]), x),
        MATRIX,
        (3,),
    ),
    "stack [w, x] inside": (
        lambda w, x: jnp.einsum("oei,i->eo", jnp.stack([w, x], 1), jnp.arange(3.0)),
        MATRIX,
        (5, 3),
    ),
    "select": (
        lambda w, x: lax.select_n(x[0] > 0, w, -2.0 * w) @ x,
        MATRIX,
        (3,),
    ),
    # scalars and the rest
    "scalars": (lambda w, x: (-w * x[0] * 2 / x[1]) @ x, MATRIX, (3,)),
    "0.5 * w": (lambda w, x: (0.5 * w) @ x, MATRIX, (3,)),
    "cast": (
        lambda w, x: w.astype(jnp.float32) @ x.astype(jnp.float32),
        MATRIX,
        (3,),
    ),
    "cast to complex": (
        lambda w, x: jnp.real(w.astype(jnp.complex128) @ (x + 1j)),
        MATRIX,
        (3,),
    ),
    "device_put of both": (
        lambda w, x: (lambda wx: wx[0] @ wx[1])(jax.device_put((w, x))),
        MATRIX,
        (3,),
    ),
    "copy": (lambda w, x: jnp.copy(w) @ x, MATRIX, (3,)),
    "name": (lambda w, x: _name(w, "w") @ x, MATRIX, (3,)),
    "stop_gradient": (lambda w, x: lax.stop_gradient(w) @ x, MATRIX, (3,)),
    "barrier": (
        lambda w, x: (lambda wx: wx[0] @ wx[1])(lax.optimization_barrier((w, x))),
        MATRIX,
        (3,),
    ),
    "device_put": (lambda w, x: jax.device_put(w, jax.devices()[0]) @ x, MATRIX, (3,)),
}
SINGLE = {"cast": dict(rtol=2e-5, atol=2e-5)}


def _case(program, kind="lora", **kwargs):
    fn, weight, other = PROGRAMS[program]
    weight = {**weight, **kwargs}
    return fn, (KINDS[kind](weight.pop("shape"), **weight), x(*other))


# What some kinds cannot do without the dense weight, with what the error says. The
# factors of `w` and of `-2 w` are no longer the same ones, in arrays this small.
_RANK = "a selection takes a rank at which the factors would have"
_SCALE = "the scale of a kernel varies along more than outputs, or inputs"
REFUSED = {
    **{k: {"select": _RANK} for k in ("vera", "loha", "lokr", "chosen")},
    **{k: {"conv, HWIO kernel, groups": _SCALE} for k in SCALED},
}


# A value that has a rule for `dot_general` alone meets the other primitives densely,
# which is that value's affair.
@pytest.mark.parametrize("program", PROGRAMS)
def test_programs(program):
    fn, args = _case(program)
    check(TRANSFORMS["Q(f)"].ours(fn), fn, args, **SINGLE.get(program, {}))


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_kinds(program):
    cases, ours = {}, TRANSFORMS["Q(f)"].ours
    for kind in [*KINDS][1:]:
        reason = REFUSED.get(kind, {}).get(program)
        fn, args = _case(program, kind, allow_materialise=reason is not None)
        cases[kind] = ours(fn), fn, args
        if reason is not None:
            fn, args = _case(program, kind)
            with pytest.raises(MaterialiseError, match=reason):
                quax.quaxify(fn)(*args)
    check_all(cases, **SINGLE.get(program, {}))


# Where a transform, inside `quaxify`, does to the weight what has no low rank, or one
# so high that the factors would be larger than the weight.
DENSE = {
    "Q(grad f)": {
        "conv, batch groups",
        "conv, depthwise",
        "conv, HWIO kernel, groups",
        "scalars",
    },
    "Q(vmap f) of weights": {
        "a kernel of one",
        "conv, inputs first",
        "conv, inputs first, groups",
        "select",
    },
    "Q(vmap f)": {"select"},
}


# `jit` and `checkpoint` bring the rules nothing new; whole programs go through them.
_NESTINGS = [t for t in TRANSFORMS if "vmap" in t or "grad" in t]


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_transforms(program):
    fn, weight, other = PROGRAMS[program]
    cases = {}
    for name in _NESTINGS:
        dense = program in DENSE.get(name, ())
        transform = TRANSFORMS[name]
        args = transform.arguments([lora(**weight, allow_materialise=dense), x(*other)])
        cases[name] = transform.ours(fn), transform.plain(fn), args
        if dense:
            args = transform.arguments([lora(**weight), x(*other)])
            with pytest.raises(MaterialiseError, match="needs the dense weight"):
                transform.ours(fn)(*args)
    check_all(cases, **SINGLE.get(program, {}))


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_forward_over_reverse(program):
    fn, args = _case(program)
    check_derivative(DERIVATIVES["hvp"], fn, args, **SINGLE.get(program, {}))


# A lookup is an activation, and dense; this one looks up all of the weight, twice.
_LOOKS_UP_ALL = "get, fill, all of the axes"


# What is joined is a new array anyway, and a scale is multiplied out before.
_JOINS = ["pad", "w + x", "x - w", "w + 1", "concatenate [w, x]", "concatenate columns"]
_JOINS += ["stack [w, w]", "stack [w, x] inside", "select"]
_FACTORED = [p for p in PROGRAMS if p != _LOOKS_UP_ALL]


@pytest.mark.parametrize(
    "kind, program",
    [*some_of(["lora", "low_rank"], _FACTORED, quick=2), *some_of(FORMS, _FACTORED)],
)
def test_never_formed(kind, program):
    if program in REFUSED.get(kind, {}):
        return
    if kind == "dora" and program in ("no rows", "one by one"):
        return  # Of which the norms are as large as the weight.
    if (kind, program) == ("lokr", "conv, HWIO kernel, groups"):
        return  # Its factor `c ⊗ b`, once for each group, is as large as the weight.
    fn, args = _case(program, kind)
    joined = program in _JOINS and kind in SCALED
    assert bool(formed(quax.quaxify(fn), args)) == joined


def test_that_formed_would_see_it():
    fn = lambda w, x: w.dense() @ x
    assert "dot_general" in " ".join(formed(fn, (lora((5, 3)), x(3))))
    for kind in FORMS.keys() - {"rows"}:  # Of which one factor is no numbers.
        assert formed(fn, (KINDS[kind]((5, 3)), x(3)))
    allowed = lora((5, 3), allow_materialise=True)
    assert formed(quax.quaxify(lambda w, x: jnp.exp(w) @ x), (allowed, x(3)))


_MIXED = {
    "bfloat16 base": (jnp.bfloat16, jnp.float32, jnp.bfloat16),
    "bfloat16 all": (jnp.bfloat16, jnp.bfloat16, jnp.bfloat16),
    "float16 base": (jnp.float16, jnp.float32, jnp.float16),
    "float32 all": (jnp.float32, jnp.float32, jnp.float32),
    "float64 factors": (jnp.float32, jnp.float64, jnp.float32),
    "narrow factors": (jnp.float32, jnp.bfloat16, jnp.float32),
}
_DTYPE_PROGRAMS = [
    "w @ X",
    "x @ w.T",
    "many tokens",
    "conv 2d",
    "conv, feature groups",
    "w[ids]",
    "tied head",
    "stack [w, w]",
    "concatenate [w, x]",
    "heads out",
    "0.5 * w",
]


@pytest.mark.parametrize("dtypes", _MIXED)
@pytest.mark.parametrize("program", _DTYPE_PROGRAMS)
def test_dtypes(program, dtypes):
    fn, weight, other = PROGRAMS[program]
    base, factors, activations = _MIXED[dtypes]
    narrowest = min(jnp.finfo(d).nmant for d in _MIXED[dtypes])
    tolerance = 2.0 ** (4 - narrowest)
    w = lora(**weight)
    cast = lambda tree, dtype: jax.tree.map(lambda x: x.astype(dtype), tree)
    w = replace(w, base=cast(w.base, base), delta=cast(w.delta, factors))
    out = eqx.filter_jit(quax.quaxify(fn))(w, x(*other).astype(activations))
    # The reference: the very same numbers, in double precision.
    wide = replace(w, base=cast(w.base, float), delta=cast(w.delta, float))
    expected = fn(densify(wide), x(*other).astype(activations).astype(float))
    assert out.dtype == fn(w.base, x(*other).astype(activations)).dtype
    scale = float(jnp.abs(expected).max())
    assert_close(
        out.astype(float), expected, rtol=tolerance, atol=2 * tolerance * scale
    )


@pytest.mark.parametrize("preferred", [None, jnp.float32, jnp.float64])
@pytest.mark.parametrize("side", ["left", "right"])
def test_dot_parameters_reach_the_right_product(side, preferred):
    w = lora((5, 3), dtype=jnp.float32)
    u = x(4, 3).astype(jnp.float32)
    precision = (lax.Precision.HIGHEST, lax.Precision.DEFAULT)

    def fn(w, u):
        operands = (w, u) if side == "left" else (u, w)
        return lax.dot_general(
            *operands,
            (((1,), (1,)), ((), ())),
            precision=precision,
            preferred_element_type=preferred,
        )

    out = quax.quaxify(fn)(w, u)
    plain = fn(densify(w), u)
    assert out.dtype == plain.dtype
    assert_close(out, plain, rtol=1e-5, atol=1e-5)
    jaxpr = jax.make_jaxpr(quax.quaxify(fn))(w, u)
    dots = [e for e in equations(jaxpr) if "dot_general" in str(e.primitive)]
    # Activations come first whatever the side, and so does their precision.
    of_u, of_w = precision[::-1] if side == "left" else precision
    assert [e.params["precision"] for e in dots] == [(of_u, of_w)] * 3
    if preferred is not None:
        assert all(e.params["preferred_element_type"] == preferred for e in dots)


@pytest.mark.parametrize("preferred", [None, jnp.float32])
@pytest.mark.parametrize("kernel", ["OIHW", "IOHW"])
def test_convolution_parameters_reach_the_right_product(kernel, preferred):
    # Rows alone, and columns alone: the product at each point is last, and first.
    w = lora((4, 3, 2, 2), cols=3, dtype=jnp.float32)
    w = jax.tree.map(lambda y: y.astype(jnp.bfloat16), w)
    u = x(2, 3 if kernel == "OIHW" else 4, 5, 5).astype(jnp.bfloat16)
    precision = (lax.Precision.HIGHEST, lax.Precision.DEFAULT)

    def fn(w, u):
        return lax.conv_general_dilated(
            u,
            w,
            (1, 1),
            "SAME",
            dimension_numbers=("NCHW", kernel, "NCHW"),
            precision=precision,
            preferred_element_type=preferred,
        )

    out, plain = quax.quaxify(fn)(w, u), fn(densify(w), u)
    assert out.dtype == plain.dtype
    assert_close(out.astype(float), plain.astype(float), rtol=0.1, atol=0.5)
    jaxpr = jax.make_jaxpr(quax.quaxify(fn))(w, u)
    products = [e for e in equations(jaxpr) if "precision" in e.params]
    found = {str(e.primitive): e.params["precision"] for e in products}
    assert found["conv_general_dilated"] == precision
    assert found["thin_dot_general"] == precision[::-1]  # The weight comes first.


class Lazy(Scaled):
    """A value of which products are again values."""


@quax.register(lax.dot_general_p)
def _(w: Lazy, x: jax.Array, **params):
    return Lazy(lax.dot_general_p.bind(w.array, x, **params), w.scale)


@quax.register(lax.dot_general_p)
def _(x: jax.Array, w: Lazy, **params):
    return Lazy(lax.dot_general_p.bind(x, w.array, **params), w.scale)


@quax.register(lax.add_p)
def _(u: Lazy, v: jax.Array):
    return Lazy(u.array + v / u.scale, u.scale)


def test_a_base_whose_products_are_values():
    w = lora((5, 3))
    base = jnp.asarray(w.base)
    lazy = replace(w, base=Lazy(base, jnp.array(2.0)))
    fn = lambda w, x: lax.dot_general(x, w, (((1,), (1,)), ((), ())))
    out = quax.quaxify(fn)(lazy, x(4, 3))
    assert isinstance(out, Lazy)
    plain = densify(replace(w, base=2.0 * base))
    assert_close(out.materialise(), fn(plain, x(4, 3)))


@pytest.mark.parametrize("side", ["left", "right"])
def test_out_sharding(side):
    mesh = jax.make_mesh((2,), ("i",), axis_types=(AxisType.Explicit,))
    w, u = lora((4, 3)), x(6, 3)

    def fn(w, u):
        left = side == "left"
        spec = P("i", None) if left else P(None, "i")
        return lax.dot_general(
            *((w, u) if left else (u, w)),
            (((1,), (1,)), ((), ())),
            out_sharding=NamedSharding(mesh, spec),
        )

    with jax.set_mesh(mesh):
        out = jax.jit(quax.quaxify(fn))(w, u)
        plain = jax.jit(fn)(densify(w), u)
        assert out.sharding.spec == plain.sharding.spec
        assert_close(out, plain)


def test_shardings_of_the_factors():
    mesh = jax.make_mesh((2,), ("i",), axis_types=(AxisType.Auto,))
    w = lora((4, 6))
    for spec, a, b in [
        (P("i", None), P(None, None), P("i", None)),
        (P(None, "i"), P(None, "i"), P(None, None)),
    ]:
        sharding = NamedSharding(mesh, spec)
        put = quax.quaxify(lambda w, s=sharding: jax.device_put(w, s))(w)
        specs = [y.sharding.spec for y in (put.base, put.a, put.b)]
        assert specs == [spec, a, b]
        assert_close(put, w)
