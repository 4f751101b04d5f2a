"""How PEFT keeps the forms of adaptation that are not LoRA: a table.

Each form has its fields of the configuration and its tensors by their names. What is
written and read here is of one parameter, with no axes of batch, in the layout of the
Equinox model, which is PyTorch's.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .._arrays.base import AdaptedArray, is_adapted, make
from .._arrays.full import FullArray
from .._arrays.lora import LoraArray
from .._arrays.low_rank import LowRankArray
from .._forms.ia3 import IA3
from .._forms.loha import LoHa
from .._forms.lokr import divided, LoKr
from .._forms.vera import VeRA
from ._places import Place


Tensors = Mapping[str, np.ndarray]


class Written(NamedTuple):
    """The update of a parameter, as PEFT has it."""

    tensors: dict[str, Any]  # by what follows the name of the module
    rank: int = 1
    alpha: float = 1.0


class About(NamedTuple):
    """What has to be known to read the update of a parameter."""

    shape: tuple[int, ...]
    rank: int
    alpha: float
    shared: Tensors  # those of the whole model
    feedforward: bool  # whether IA³ scales what goes into the module


class Exchange(NamedTuple):
    """How a form is exchanged."""

    cls: type[AdaptedArray]
    dims: tuple[int, ...]  # of the kernels that it may be of; 0 for linear layers
    suffixes: tuple[str, ...]
    write: Callable[[Any], Written]
    read: Callable[[Tensors, "About"], Any]
    fields: Mapping[str, Any]  # of the configuration, and what is written for them
    shared: tuple[str, ...] = ()  # tensors of the whole model
    ranked: bool = True  # whether a module may have a rank and an alpha of its own

    def is_of(self, x: Any) -> bool:
        return isinstance(update_of(x), self.cls)


def update_of(x: Any) -> Any:
    """What an adapted array is adapted by."""
    return x.delta if isinstance(x, LoraArray) else x


def form_of(places: list[Place]) -> str | None:
    """The form that weights are adapted in, by PEFT's name; `None` for LoRA.

    **Raises:** `ValueError` if there are several.
    """
    found: dict[str, str] = {}
    for place in places:
        x = place.leaf.value
        if is_adapted(x) and not isinstance(x, FullArray):
            names = [name for name, form in EXCHANGED.items() if form.is_of(x)]
            found.setdefault(names[0] if names else "LORA", place.path)
    if len(found) > 1:
        said = ", ".join(f"{path!r} ({name})" for name, path in found.items())
        raise ValueError(
            "An adapter of PEFT is of one form, and the model has weights adapted in "
            f"{len(found)}: {said}. `lora_quax.save_adapter` writes them all."
        )
    name = next(iter(found), "LORA")
    return None if name == "LORA" else name


def check_layer(form: Exchange, place: Place) -> None:
    """**Raises:** `ValueError` if PEFT has no such form of this weight."""
    layer: Any = place.leaf.layer[1] if place.leaf.layer else None
    name, is_conv = form.cls.__name__, isinstance(layer, eqx.nn.Conv)
    if place.transposed:
        raise ValueError(f"it is `transposed`, which is known for LoRA, not for {name}")
    if is_conv and layer.padding_mode != "ZEROS":
        raise ValueError(
            f"it is a convolution of padding mode {layer.padding_mode!r}, which PEFT "
            "leaves out of the update"
        )
    dims = layer.num_spatial_dims if is_conv else 0
    is_linear = isinstance(layer, eqx.nn.Linear) or layer is None
    if dims not in form.dims or not (is_conv or is_linear):
        kind = "an array of no known layer" if layer is None else type(layer).__name__
        kind = f"{kind} of {dims} dimensions" if is_conv else kind
        raise ValueError(f"PEFT has no {name} of {kind}")
    if len(place.shape) != 2 + dims:
        raise ValueError(
            f"without the axes that `{{}}` in its name stands for it has "
            f"{len(place.shape)} axes, and {2 + dims} are wanted"
        )


def _low_rank(a, b, cols: tuple[int, ...], scaling: float = 1.0) -> LowRankArray:
    """Of `a`, whose columns are one axis in PEFT's files."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise ValueError(f"factors of shapes {b.shape} and {a.shape} do not fit")
    rank = a.shape[0]
    return make(
        LowRankArray,
        a=a.reshape(rank, *cols),
        b=b,
        rank=rank,
        alpha=scaling * rank,
        rows=1,
        cols=len(cols),
        allow_materialise=False,
    )


def _flat(x: LowRankArray) -> tuple[Any, Any]:
    return x.b, x.a.reshape(len(x.a), -1)


# LoHa.


def _write_loha(x: LoHa) -> Written:
    if x.w1.rank != x.w2.rank:
        raise ValueError(f"its arrays are of ranks {x.w1.rank} and {x.w2.rank}")
    sides = _flat(x.w1), _flat(x.w2)
    tensors = {
        f"hada_w{i}_{side}": y
        for i, pair in enumerate(sides, 1)
        for side, y in zip("ab", pair)
    }
    return Written(tensors, x.w1.rank, x.w1.scaling * x.w2.scaling * x.w1.rank)


def _refuse_rank(w: Any, rank: int) -> None:
    if isinstance(w, LowRankArray) and w.rank != rank:
        raise ValueError(f"its tensors are of rank {w.rank}, and not {rank}")


def _read_loha(tensors: Tensors, about: About) -> LoHa:
    cols = about.shape[1:]
    pair = [(tensors[f"hada_w{i}_b"], tensors[f"hada_w{i}_a"]) for i in (1, 2)]
    w1 = _low_rank(*pair[0], cols, about.alpha / about.rank)
    w2 = _low_rank(*pair[1], cols)
    for w in (w1, w2):
        _refuse_rank(w, about.rank)
    return make(LoHa, w1=w1, w2=w2, allow_materialise=False)


# LoKr.


def _write_lokr(x: LoKr) -> Written:
    tensors, scaling = {}, x.scaling
    for i, w in enumerate((x.w1, x.w2), 1):
        if not isinstance(w, LowRankArray):
            if i == 2 and x.cols == 2:
                raise ValueError(
                    "its `w2` is a plain array, of which PEFT takes another product "
                    "with that of a one-dimensional convolution; give it a lower rank"
                )
            tensors[f"lokr_w{i}"] = w
            continue
        if w.rank != x.rank:
            raise ValueError(f"its `w{i}` is of rank {w.rank}, and not {x.rank}")
        scaling *= w.scaling
        tensors |= dict(zip((f"lokr_w{i}_a", f"lokr_w{i}_b"), _flat(w)))
    return Written(tensors, x.rank, scaling * x.rank)


def _read_lokr(tensors: Tensors, about: About) -> LoKr:
    shape, parts = about.shape, []
    for i, cols in (1, ()), (2, shape[2:]):
        if (plain := tensors.get(f"lokr_w{i}")) is not None:
            if i == 2 and len(shape) == 3:
                raise ValueError("PEFT takes another product with a plain `lokr_w2`")
            parts.append(plain)
            continue
        a, b = tensors[f"lokr_w{i}_b"], tensors[f"lokr_w{i}_a"]
        size = a.shape[-1] // math.prod(cols)
        parts.append(_low_rank(a, b, (size, *cols)))
    w1, w2 = parts
    for w in parts:
        _refuse_rank(w, about.rank)
    fields = dict(rows=1, cols=len(shape) - 1, w1=w1, w2=w2, allow_materialise=False)
    return make(LoKr, rank=about.rank, alpha=about.alpha, **fields)


def lokr_options(updates: list[LoKr]) -> dict[str, Any]:
    """The two fields by which PEFT finds the sizes and the kinds of the factors.

    **Raises:** `ValueError` if no two of them do for all weights.
    """
    sizes = [[*zip(*(_sides(w) for w in (x.w1, x.w2)))] for x in updates]
    factors = {-1, *(n for pairs in sizes for n, _ in pairs)}
    for factor in sorted(factors):
        for both in False, True:
            if all(
                _is_like(x, pairs, factor, both) for x, pairs in zip(updates, sizes)
            ):
                return dict(decompose_factor=factor, decompose_both=both)
    raise ValueError(
        "PEFT finds the sizes of the factors of LoKr by one `decompose_factor` and one "
        "`decompose_both` for all weights, and those of this model differ."
    )


def _sides(w) -> tuple[int, int]:
    """The first axis of rows and the first of columns."""
    return (w.b.shape[0], w.a.shape[1]) if is_adapted(w) else w.shape[:2]


def _is_like(x: LoKr, pairs, factor: int, both: bool) -> bool:
    (p, o), (q, i) = pairs
    return (
        divided(p * o, factor) == (p, o)
        and divided(q * i, factor) == (q, i)
        and is_adapted(x.w1) == (both and 2 * x.rank < max(p, q))
        and is_adapted(x.w2) == (2 * x.rank < max(o, i))
    )


# VeRA.


def _write_vera(x: VeRA) -> Written:
    # PEFT has no scaling.
    b = x.lambda_b * np.asarray(x.shared.scaling, x.lambda_b.dtype)
    tensors = dict(vera_lambda_d=x.lambda_d, vera_lambda_b=b)
    return Written(tensors, x.shared.rank, x.shared.rank)


def vera_shared(updates: list[VeRA]) -> dict[str, np.ndarray]:
    """The factors that all modules share, of which each has a part.

    **Raises:** `ValueError` if they do not share them.
    """
    a, b = (
        max((np.asarray(getattr(x.shared, side)) for x in updates), key=np.size)
        for side in "ab"
    )
    for x in updates:
        rows, cols = len(x.shared.b), x.shared.a.shape[1]
        if not (
            len(x.shared.a) == len(a)
            and np.array_equal(a[:, :cols], x.shared.a)
            and np.array_equal(b[:rows], x.shared.b)
        ):
            raise ValueError(
                "The weights of an adapter of PEFT share the factors of VeRA, and have "
                "one rank; those of this model differ. Adapt them by one `loraify`."
            )
    return {"vera_A": a, "vera_B": b}


def _read_vera(tensors: Tensors, about: About) -> VeRA:
    A, B = about.shared["vera_A"], about.shared["vera_B"]
    (rows, cols), rank = about.shape, about.rank
    if A.shape[0] != rank or A.shape[1] < cols or B.shape[0] < rows:
        raise ValueError(
            f"for its shape {about.shape} and rank {rank} `vera_A` of shape {A.shape} "
            f"and `vera_B` of shape {B.shape} do not do"
        )
    return make(
        VeRA,
        shared=_low_rank(A[:, :cols], B[:rows], (cols,)),
        lambda_d=tensors["vera_lambda_d"],
        lambda_b=tensors["vera_lambda_b"],
        allow_materialise=False,
    )


# IA³.


def _write_ia3(x: IA3) -> Written:
    # PEFT's scale of a kernel has its numbers along the second axis.
    scale = x.scale
    if scale.ndim > 2 and not x.feedforward:
        scale = scale.swapaxes(0, 1)
    return Written({"ia3_l": scale})


def _read_ia3(tensors: Tensors, about: About) -> np.ndarray:
    """The scale. An array of this form is made around a base."""
    x, shape = tensors["ia3_l"], about.shape
    axis = 1 if about.feedforward and len(shape) > 1 else 0
    if x.size != shape[axis]:
        raise ValueError(
            f"for its shape {shape} `ia3_l` must have {shape[axis]} numbers; it has "
            f"{x.size}"
        )
    return x.reshape([n if i == axis else 1 for i, n in enumerate(shape)])


_LYCORIS = dict(init_weights=True, rank_dropout=0.0, module_dropout=0.0)
_LYCORIS |= dict(use_effective_conv2d=False)

EXCHANGED = {
    "LOHA": Exchange(
        LoHa,
        (0, 1, 2),
        ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
        _write_loha,
        _read_loha,
        _LYCORIS,
    ),
    "LOKR": Exchange(
        LoKr,
        (0, 1, 2),
        (*(f"lokr_w{i}{side}" for i in (1, 2) for side in ("", "_a", "_b")),),
        _write_lokr,
        _read_lokr,
        _LYCORIS
        | dict(decompose_factor=-1, decompose_both=False, rank_dropout_scale=False),
    ),
    "VERA": Exchange(
        VeRA,
        (0,),
        ("vera_lambda_b", "vera_lambda_d"),
        _write_vera,
        _read_vera,
        dict(
            init_weights=True,
            d_initial=0.1,
            projection_prng_key=0,
            save_projection=True,
            vera_dropout=0.0,
        ),
        shared=("vera_A", "vera_B"),
        ranked=False,
    ),
    "IA3": Exchange(
        IA3,
        (0, 2, 3),
        ("ia3_l",),
        _write_ia3,
        _read_ia3,
        dict(init_ia3_weights=True, feedforward_modules=[]),
        ranked=False,
    ),
}


def one_of(x: Any, index: tuple[int, ...]) -> Any:
    """The update of one of the parameters that a stack of them stands for."""
    return jax.tree.map(lambda leaf: np.asarray(leaf)[index], x)


def stacked(updates: list[Any], lead: tuple[int, ...], dtype: Any) -> Any:
    """The updates of all parameters of a stack, as one."""
    if any(jax.tree.structure(x) != jax.tree.structure(updates[0]) for x in updates):
        raise ValueError("its layers differ in rank, in alpha or in how they factor")
    shapes = [[leaf.shape for leaf in jax.tree.leaves(x)] for x in updates]
    if any(x != shapes[0] for x in shapes):
        raise ValueError("the tensors of its layers differ in shape")
    return jax.tree.map(
        lambda *xs: jnp.asarray(np.stack(xs).reshape(*lead, *xs[0].shape), dtype),
        *updates,
    )
