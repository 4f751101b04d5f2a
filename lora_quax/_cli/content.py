"""What an adapter holds, whichever of the two formats it is in."""

import math
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from .._arrays.base import AbstractDelta, is_adapted
from .._arrays.full import FullArray
from .._arrays.lora import LoraArray
from .._arrays.low_rank import LowRankArray
from .._disk.adapter import Adapter, differences, read_adapter, written
from .._disk.description import base_type, build, NONSENSE, said
from .._disk.files import AdapterError, refuse
from .._forms.dora import DoRA
from .._model.names import split
from .._model.paths import dotted, join, named
from ..peft._config import Config
from ..peft._layout import from_peft, Kind, refuse_groups
from ..peft._read import Factors, FILE, PeftAdapter, read


class Update(NamedTuple):
    """A low-rank update `scaling · b @ a`, of a weight or of a stack of weights."""

    weights: tuple[str, ...]  # the weight; several if the files leave it open which
    kind: str
    a: np.ndarray  # (*batch, rank, cols)
    b: np.ndarray  # (*batch, rows, rank)
    alpha: float
    shape: tuple[int, ...]  # of the weight: (*batch, *rows, *cols)
    has_base: bool = True  # or the weight is the product alone
    may_turn: bool = False  # whether a model may keep the weight transposed

    @property
    def rank(self) -> int:
        return self.b.shape[-1]

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    @property
    def dtype(self) -> str:
        return " and ".join(dict.fromkeys((self.a.dtype.name, self.b.dtype.name)))

    def sides(self, index: tuple[int, ...], turned: bool) -> tuple[Any, Any]:
        """The factors of one slice of its stack, as `(n, rows, rank)` and `(n, rank,
        cols)` for n weights in a row; with rows and columns swapped if it is turned."""
        a, b = self.a[index], self.b[index]
        if turned:
            a, b = b.swapaxes(-1, -2), a.swapaxes(-1, -2)
        return b.reshape(-1, *b.shape[-2:]), a.reshape(-1, *a.shape[-2:])

    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """Two factors in float64, whose product is the update, scaling and all."""
        return self.a.astype(np.float64), self.scaling * self.b.astype(np.float64)


class Added(NamedTuple):
    """What is added to a bias: `scaling · x`."""

    x: np.ndarray
    scaling: float


class Content(NamedTuple):
    """What an adapter holds."""

    path: Path
    format: Literal["lora_quax", "PEFT"]
    # By where they stand: the path of the weight, for an adapter on an adapter with
    # `.base` for each adapter above it.
    updates: dict[str, Update]
    values: dict[str, np.ndarray]  # weight -> what it is, before updates
    added: dict[str, Added]  # bias -> what is added to it
    fan_in_fan_out: bool = False
    initialisation: bool | str | None = True  # by PEFT's names; it may change the base
    ties: bool = False  # whether what adapts the embedding adapts the head
    base: Any = None  # the fingerprint of what was adapted, of a file of ours
    magnitudes: dict[str, np.ndarray] = {}  # weight -> its norms, of DoRA


def read_content(path: Path) -> Content:
    """The content of a file of ours, or of a folder of PEFT's.

    **Raises:** `FileNotFoundError`; `AdapterError` if it is no adapter.
    """
    return content_of_peft(read(path)) if is_peft(path) else _of_ours(path)


def is_peft(path: Path) -> bool:
    """Whether it is an adapter of PEFT's, rather than a file of ours.

    **Raises:** `FileNotFoundError`; `AdapterError` for one of PEFT's two files.
    """
    if not path.exists():
        raise FileNotFoundError(f"There is no file or folder {path}.")
    if path.name == FILE and not path.is_dir():
        raise AdapterError(
            f"{path} is half of an adapter of PEFT; give its folder, {path.parent}, "
            "which has the configuration as well."
        )
    return path.is_dir()


class Totals(NamedTuple):
    parameters: int
    bytes: int


def totals(content: Content) -> Totals:
    arrays = arrays_of(content).values()
    sizes = [math.prod(x.shape) for x in arrays]
    return Totals(sum(sizes), sum(x.nbytes for x in arrays))


def arrays_of(content: Content) -> dict[str, np.ndarray]:
    """Every array of an adapter, by what it is for."""
    out = {}
    for name, update in content.updates.items():
        out |= {f"{name}, a": update.a, f"{name}, b": update.b}
    out |= content.values
    out |= {f"{name}, magnitude": x for name, x in content.magnitudes.items()}
    return out | {f"{name}, added": added.x for name, added in content.added.items()}


def is_finite(x: np.ndarray) -> bool:
    # NumPy tells this of its own types of number alone: bfloat16 is none of them.
    wide = x if x.dtype.kind in "biufc" else x.astype(np.float32)
    return bool(np.isfinite(wide).all())


def norm_of_product(a: np.ndarray, b: np.ndarray) -> float:
    """The Frobenius norm of `b @ a`, which is not formed."""
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("nan")
    # ‖b @ a‖ = ‖R_b @ R_aᵀ‖ for b = Q_b R_b and aᵀ = Q_a R_a. A Gram matrix would have
    # the squares, and half of the digits, where two updates nearly cancel.
    r_a = np.linalg.qr(np.swapaxes(a, -1, -2), mode="r")
    r_b = np.linalg.qr(b, mode="r")
    return float(np.linalg.norm(r_b @ np.swapaxes(r_a, -1, -2)))


# Our own format.

_KINDS_OF_LAYERS = {
    "Linear": "linear",
    "Embedding": "embedding",
    "Conv": "convolution",
    "ConvTranspose": "transposed convolution",
}


def _of_ours(path: Path) -> Content:
    """**Raises:** as `read_adapter` and `arrays_in`."""
    adapter = read_adapter(path)
    out = Content(path, "lora_quax", {}, {}, {}, base=adapter.base, magnitudes={})
    for name, (x, layer) in arrays_in(path, adapter).items():
        kind = "array" if layer is None else _KINDS_OF_LAYERS[layer["type"]]
        if layer is not None and layer.get("groups", 1) > 1:
            kind += f" of {layer['groups']} groups"
        _gather(out, name, name, x, kind)
    return out


def _gather(out: Content, weight: str, name: str, x, kind: str) -> None:
    if isinstance(x, DoRA):
        out.magnitudes[name] = np.asarray(x.magnitude)
        _gather(out, weight, name, x.lora, kind)
    elif isinstance(x, LoraArray):
        out.updates[name] = _update_of_ours(weight, x.delta, kind)
        _gather(out, weight, join(name, "base"), x.base, kind)
    elif isinstance(x, AbstractDelta):
        out.updates[name] = _update_of_ours(weight, x, kind)._replace(has_base=False)
    elif isinstance(x, FullArray):
        out.values[weight] = np.asarray(x.value)
    elif is_adapted(x):  # Of any other form, what is in the file, leaf by leaf.
        for keys, leaf in _leaves(x):
            out.values[join(weight, dotted(keys))] = np.asarray(leaf)
    elif isinstance(x, np.ndarray):  # A base that trains; one that does not is a type.
        out.values[weight] = x


def _update_of_ours(weight: str, delta: AbstractDelta, kind: str) -> Update:
    x = _factors(delta)
    a, b = np.asarray(x.a), np.asarray(x.b)
    batch = a.shape[: a.ndim - x.cols - 1]
    shape = *b.shape[:-1], *a.shape[a.ndim - x.cols :]
    a = a.reshape(*batch, x.rank, -1)
    b = b.reshape(*batch, -1, x.rank)
    # Equinox keeps its layers as (out, in); the base may be another library's.
    turns = kind in ("linear", "array") and a.ndim == 2
    return Update((weight,), kind, a, b, x.alpha, shape, may_turn=turns)


def _factors(delta: AbstractDelta) -> LowRankArray:
    if isinstance(delta, LowRankArray):
        return delta
    # What a form of one's own computes its factors with is JAX.
    with jax.enable_x64(True):
        return jax.tree.map(jnp.asarray, delta).lower()


def arrays_in(
    path: Path, adapter: Adapter
) -> dict[str, tuple[Any, dict[str, Any] | None]]:
    """The adapted weights of a file, around abstract bases, with their layers.

    **Raises:** `AdapterError`, which lists everything that is wrong, if its tensors are
    not those that it describes.
    """
    problems, skeletons, expected = [], {}, {}
    for name in adapter.weights:
        try:
            about = adapter.about(name)
            skeletons[name] = build(about, base_type(about)), _known_layer(about)
        except NONSENSE as e:
            why = f"its description makes no sense: {said(e)}"
            problems.append(f"{named(name)}: {why}")
            continue
        for keys, x in _leaves(skeletons[name][0]):
            expected[join(name, dotted(keys))] = tuple(x.shape), jnp.dtype(x.dtype)
    found = {name: (x.shape, x.dtype) for name, x in adapter.tensors.items()}
    if not problems:
        problems = differences("its description", expected, found)
    refuse(f"The adapter {path} is not sound", problems)

    def filled(name: str, skeleton):
        params, frozen = written(skeleton)
        params = jtu.tree_map_with_path(
            lambda keys, _: adapter.tensors[join(name, dotted(keys))], params
        )
        return eqx.combine(params, frozen)

    return {name: (filled(name, x), layer) for name, (x, layer) in skeletons.items()}


def refuse_state(path: Path) -> None:
    """**Raises:** `AdapterError` if a file has the state of a model, for which nothing
    but a file of ours has a place."""
    if not is_peft(path) and (state := read_adapter(path).state):
        raise AdapterError(
            f"{path} has the state of a model as well, with {named(min(state))}, which "
            "would be lost: load it with `lora_quax.load_adapter`."
        )


def refuse_ties(path: Path) -> None:
    """**Raises:** `AdapterError` if a file has an update of a weight that is tied to
    another one, of which PEFT would know by the model alone."""
    if not is_peft(path) and (ties := read_adapter(path).ties):
        raise AdapterError(
            f"{path} adapts a weight that is tied to {named(str(min(ties)))}. "
            "`lora_quax.peft.save` of the model writes both."
        )


def _leaves(skeleton) -> list[tuple[Any, Any]]:
    return jtu.tree_flatten_with_path(written(skeleton)[0])[0]


def _known_layer(about: dict[str, Any]) -> dict[str, Any] | None:
    layer = about["layer"]
    if layer is not None and layer["type"] not in _KINDS_OF_LAYERS:
        raise ValueError(f"its layer {layer['type']!r:.40} is not known")
    groups = 1 if layer is None else layer.get("groups", 1)
    if type(groups) is not int or groups < 1:
        raise ValueError(f"its layer has {groups!r:.40} groups")
    return layer


# PEFT's format.


def content_of_peft(adapter: PeftAdapter) -> Content:
    """**Raises:** `AdapterError` if the tensors are not those of its configuration."""
    config = adapter.config
    problems, updates, added, magnitudes = [], {}, {}, {}
    wrapped = _wrapped(adapter)
    for module, update in adapter.updates.items():
        weights = wrapped.get(module, (join(module, "weight"),))
        try:
            out = _update_of_peft(weights, config, update, module in wrapped)
        except ValueError as e:
            problems.append(f"`{module}`: {e}")
            continue
        # Which of several it is the order of the model says, which is not in the files.
        name = weights[0] if len(weights) == 1 else module
        updates[name] = out
        if update.magnitude is not None:
            magnitudes[name] = update.magnitude.ravel()
    for module, x in adapter.biases.items():
        added[join(module, "bias")] = Added(x, config.scaling(module))
    refuse(f"The adapter {adapter.path.parent} is not sound", problems)
    flags = config.fan_in_fan_out, config.init_lora_weights, config.ties
    where = adapter.path.parent, "PEFT"
    parts = updates, adapter.values, added, *flags
    return Content(*where, *parts, magnitudes=magnitudes)


def _wrapped(adapter: PeftAdapter) -> dict[str, tuple[str, ...]]:
    """For the factors of single parameters, the parameters that they may be of."""
    out = {}
    for module in adapter.updates:
        holder = re.sub(r"(\.base_layer)+$", "", module)
        names = []
        for target in adapter.config.target_parameters or ():
            end, parameter = split(target)
            if f".{holder}".endswith(f".{end}" if end else ""):
                names.append(join(holder, parameter))
        if names and not adapter.config.targets(holder):
            out[module] = tuple(dict.fromkeys(names))
    return out


def _update_of_peft(
    weights: tuple[str, ...], config: Config, update: Factors, wrapped: bool
) -> Update:
    """**Raises:** `ValueError` if the factors do not fit the configuration."""
    A, B, is_embedding, _ = update
    # A pattern is matched with the name of a module or of a parameter.
    names = weights if wrapped else [split(weights[0])[0]]
    settings = {(config.rank(name), config.alpha(name)) for name in names}
    if len(settings) > 1:
        raise ValueError(
            f"its factors may be of {' or '.join(weights)}, which differ in rank or "
            "alpha"
        )
    ((rank, alpha),) = settings
    kind = _kind(A, B, rank, is_embedding, wrapped)
    a, b = from_peft(kind, A, B, rank, False)
    shape = *b.shape[:-1], *a.shape[1 if kind == "conv" else a.ndim - 1 :]
    a = a.reshape(*a.shape[:-1], -1) if kind != "conv" else a.reshape(rank, -1)
    name = "convolution" if kind == "conv" else kind
    name = "parameter" if wrapped and kind == "linear" else name
    # A parameter of two axes is never transposed, whatever the configuration says.
    may_turn = kind == "experts" or kind == "linear" and not wrapped
    return Update(weights, name, a, b, alpha, shape, may_turn=may_turn)


def _kind(
    A: np.ndarray, B: np.ndarray, rank: int, is_embedding: bool, wrapped: bool
) -> Kind:
    fits = A.ndim == B.ndim >= 2 and min(*A.shape, *B.shape) > 0
    if fits and wrapped and A.ndim == 2:
        experts, rest = divmod(A.shape[0], rank)
        if rest == 0 and B.shape[1] == A.shape[0]:
            return "experts" if experts > 1 else "linear"
    elif fits and A.shape[0] == rank:
        if A.ndim > 2 and B.shape[1] < rank and rank % B.shape[1] == 0:
            refuse_groups(rank // B.shape[1])
        if B.shape[1] == rank and set(B.shape[2:]) <= {1}:
            return "embedding" if is_embedding else "conv" if A.ndim > 2 else "linear"
    raise ValueError(
        f"A of shape {A.shape} and B of shape {B.shape} are not of the rank {rank} "
        "that the configuration gives it"
    )
