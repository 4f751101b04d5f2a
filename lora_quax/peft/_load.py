"""From the files of PEFT to an adapted model."""

import os
from collections.abc import Collection, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import quax
from jaxtyping import PyTree

from .._arrays.base import make
from .._arrays.check import aval_of, check_float_dtype, read_alpha
from .._arrays.full import FullArray
from .._arrays.lora import unsummed
from .._arrays.low_rank import LowRankArray
from .._disk.exchange import refuse_misfit, too_wide
from .._forms.dora import DoRA
from .._model.names import Names, split
from .._model.paths import is_value, join, named
from .._model.placed import all_beside_bases
from .._model.together import described, in_step, is_shared
from ._config import EMBEDDINGS
from ._initial import INITIALISATIONS, reduced
from ._layout import (
    from_peft,
    Kind,
    kind_of,
    magnitude_shape,
    peft_shapes,
    per_of,
)
from ._load_form import form_in, read_form
from ._places import Place, places_of, wrappers
from ._read import Factors, folder_of, Parts, PeftAdapter, read
from ._tied import without_aliases
from ._tokens import with_rows


def load(
    directory: str | os.PathLike,
    model: PyTree,
    *,
    names: Names = None,
    transposed: Sequence[str] = (),
    adapter_name: str = "default",
    dtype: Any = None,
    allow_materialise: bool = False,
    ignore: Collection[str] = (),
) -> PyTree:
    """Puts an adapter that PEFT wrote around the weights of a model.

    ```python
    names = {"blocks.{}.q": "model.layers.{}.self_attn.q_proj"}
    model = lora_quax.peft.load("my-adapter", model, names=names)
    ```

    Low-rank updates of linear layers, embeddings, convolutions and single parameters
    become `LoraArray`s, or with `use_dora` `DoRA`s; modules saved whole, and biases,
    become `FullArray`s. Adapters of LoHa, LoKr, VeRA and IA³ become these.

    **Arguments:**

    - `directory`: with `adapter_config.json` and `adapter_model.safetensors`.
    - `model`: the base model. What it has of another adapter is replaced. Its arrays
        may be `jax.ShapeDtypeStruct`s.
    - `names`, `transposed`: as for `save`.
    - `adapter_name`: of an adapter in a folder below, which PEFT makes for any name but
        `"default"`.
    - `dtype`: of the factors; by default as in the file.
    - `allow_materialise`: as for `LoraArray`.
    - `ignore`: fields of the configuration that are not known here, and change nothing.

    **Returns:** the adapted model. The model passed is not changed.

    **Raises:** `AdapterError`, which lists everything that is wrong, if the files are
    not an adapter or are damaged, if a tensor was meant for nothing in the model or
    does not fit, if an array that the configuration targets got no tensors, or if the
    adapter has a feature that cannot be taken over exactly. `FileNotFoundError` if
    there is no such adapter. `ValueError` if `names` or `transposed` matches nothing.
    `TypeError` if `dtype` is no floating-point type.
    """
    shared = is_shared(model)
    with in_step("peft.load", shared) as said:
        if dtype is not None:
            dtype = check_float_dtype(dtype)
        folder = folder_of(directory, adapter_name)
        form = form_in(folder)
        adapter = (
            read(directory, adapter_name, ignore)
            if form is None
            else read_form(form, folder, ignore)
        )
        if shared:
            said |= described(model) | described({"the file": adapter[2:6]})
            said |= dict(dtype=str(dtype), allow_materialise=str(allow_materialise))
    return put_around(
        adapter,
        model,
        names=names,
        transposed=transposed,
        dtype=dtype,
        allow_materialise=allow_materialise,
    )


def put_around(
    adapter: PeftAdapter,
    model: PyTree,
    *,
    names: Names,
    transposed: Sequence[str],
    dtype: Any = None,
    allow_materialise: bool = False,
) -> PyTree:
    """As `load`, of an adapter that has been read."""
    places = places_of(model, names, transposed)
    adapter, problems = without_aliases(adapter, places)
    fit = _Fit(adapter, places, dtype, allow_materialise)
    changed = {place.position: fit.adapted(place) for place in places}
    refuse_misfit(adapter.path, [*problems, *fit.problems, *fit.unused()])
    leaves, treedef = jax.tree.flatten(model, is_leaf=is_value)
    adapted = [changed.get(i, leaf) for i, leaf in enumerate(leaves)]
    return all_beside_bases(jax.tree.unflatten(treedef, adapted))


class _Fit:
    """Finds the tensors of each array, and remembers what does not fit."""

    def __init__(self, adapter: PeftAdapter, places: list[Place], dtype, materialise):
        self.adapter = adapter
        self.dtype = dtype
        self.allow_materialise = materialise
        self.problems: list[str] = []
        self.used: set[str] = set()
        names = {name for place in places for name in place.names.values()}
        targeted = set(filter(adapter.config.targets_parameter, names))
        self.wrappers = wrappers(places, targeted)

    def adapted(self, place: Place):
        """The array with what the files have for it."""
        updates = {
            index: self._update(name, place) for index, name in place.names.items()
        }
        value = self._value(place)
        rows = self._rows(place)
        try:
            if rows is not None:
                if value is not None or any(x is not None for x in updates.values()):
                    raise ValueError("it has rows that train alone, and is adapted")
                field = self.adapter.config.trainable_token_indices
                base = _array(place.origin)
                return with_rows(base, place, field, rows, self.allow_materialise)
            if all(update is None for update in updates.values()):
                return place.origin if value is None else _full(place, value)
            base = self._base(place, updates, value)
            if (other := self.adapter.other) is not None:
                return other.around(
                    base, place, updates, self.dtype, self.allow_materialise
                )
            delta = self._delta(place, updates)
            magnitude = self._magnitude(place, updates)
        except ValueError as e:
            self.problems.append(f"{named(place.path)} cannot be adapted: {e}")
            return place.origin
        rate = float(self.adapter.config.lora_dropout)
        lora = unsummed(base, delta, dropout=rate)
        if magnitude is None:
            return lora
        per = per_of(_kind_of(place), place.transposed)
        return DoRA.from_parts(lora, magnitude, per=per)

    def unused(self) -> list[str]:
        """What nothing in the model asked for."""
        x = self.adapter
        held = x.updates, x.biases, x.values, x.tokens
        kinds = "factors", "bias of `lora_B`", "value", "rows"
        return [
            f"the {kind} of `{name}` has no place in the model"
            for names, kind in zip(held, kinds)
            for name in names
            if f"{kind} {name}" not in self.used
        ]

    def _take(self, kind: str, held: dict[str, Any], name: str):
        if name in held:
            self.used.add(f"{kind} {name}")
        return held.get(name)

    def _update(self, name: str, place: Place) -> Factors | Parts | None:
        """The factors of a parameter, if there are any."""
        config, other = self.adapter.config, self.adapter.other
        module, parameter = split(name)
        if other is not None and other.is_scaled_bias(name):
            return self.adapter.updates.get(module)
        if name in self.wrappers:
            module = self.wrappers[name]
        elif parameter != "weight" or module in self.wrappers.values():
            return None
        update = self._take("factors", self.adapter.updates, module)
        layer = place.leaf.layer
        if layer is not None:
            is_weight = place.path == join(layer[0], "weight")
        else:  # One of the user's own, or a dictionary of arrays.
            is_weight = parameter == "weight" and place.is_matrix
        targeted = name in self.wrappers or is_weight and config.targets(module)
        if update is None and targeted:
            self.problems.append(
                f"{named(place.path)} is targeted as `{name}`, for which there are no "
                "tensors"
            )
        # A head that is tied PEFT targets by itself; without any targets the model's
        # architecture says which they are.
        tied = config.ensure_weight_tying and module.split(".")[-1] in EMBEDDINGS
        known = targeted or tied
        if update is not None and not known and config.target_modules is not None:
            self.problems.append(
                f"there are factors of `{name}`, which the configuration does not "
                "target, so that PEFT would leave them out"
            )
        return update

    def _delta(self, place: Place, updates: dict[tuple, Any]) -> LowRankArray:
        """The update of an array, of each of its slices if it is stacked.

        **Raises:** `ValueError` if the factors do not fit it.
        """
        kind = _kind_of(place)
        factors = {}
        for index, update in updates.items():
            if update is None:
                continue
            name = self._pattern_name(place.names[index])
            rank = self.adapter.config.rank(name)
            wanted = peft_shapes(kind, place.shape, rank, place.transposed)
            if update.is_embedding != (kind == "embedding"):
                raise ValueError("the tensors are of an embedding, or it is one")
            if wanted != (update.A.shape, update.B.shape):
                raise ValueError(
                    f"for its shape {place.shape} and rank {rank} A and B must have "
                    f"the shapes {wanted[0]} and {wanted[1]}; those of `{name}` have "
                    f"{update.A.shape} and {update.B.shape}"
                )
            pair = from_peft(kind, update.A, update.B, rank, place.transposed)
            factors[index] = *pair, rank, self.adapter.config.alpha(name)
        a, b, alpha = _stacked(factors, place, kind == "experts")
        rank = b.shape[-1]
        for side, x in ("A", a), ("B", b):
            dtype = jnp.dtype(self.dtype or x.dtype)
            self.problems += too_wide(f"{place.path}, {side}", dtype)
        return make(
            LowRankArray,
            a=jnp.asarray(a, self.dtype),
            b=jnp.asarray(b, self.dtype),
            rank=rank,
            alpha=read_alpha(alpha, rank),
            rows=1,
            cols=len(place.shape) - 1 if kind == "conv" else 1,
            allow_materialise=self.allow_materialise,
        )

    def _magnitude(self, place: Place, updates: dict[tuple, Any]):
        """The magnitudes of DoRA of an array, of each of its slices if it is stacked.

        **Raises:** `ValueError` if there are some and they do not fit it.
        """
        if not self.adapter.config.use_dora:
            return None
        wanted = magnitude_shape(_kind_of(place), place.shape, place.transposed)
        found = []
        for index, update in updates.items():
            x = None if update is None else update.magnitude
            if x is None:
                raise ValueError(
                    f"with DoRA all layers of a stack have to be adapted, and "
                    f"`{place.names[index]}` is not"
                )
            if x.shape != wanted:
                raise ValueError(
                    f"for its shape {place.shape} the magnitudes must have the shape "
                    f"{wanted}; those of `{place.names[index]}` have {x.shape}"
                )
            found.append(x.ravel())
        dtype = jnp.dtype(self.dtype or np.result_type(*found))
        self.problems += too_wide(f"{place.path}, its magnitudes", dtype)
        lead = aval_of(place.origin).shape[: -len(place.shape)]
        return jnp.asarray(np.stack(found).reshape(*lead, -1), dtype)

    def _base(self, place: Place, updates, value: np.ndarray | None):
        """What the update is added to: a base that an initialisation has reduced, one
        that the files bring along, or that of the model.

        **Raises:** `ValueError` if the initialisation is not known for the array.
        """
        config = self.adapter.config
        if config.init_lora_weights in INITIALISATIONS:
            kind = _kind_of(place)
            slices = []
            for index, update in updates.items():
                x = self._origin(place, index)
                if update is not None:
                    name = self._pattern_name(place.names[index])
                    setting = config.rank(name), config.scaling(name), place.transposed
                    x = reduced(config.init_lora_weights, x, kind, *setting)
                slices.append(x)
            value = np.stack(slices).reshape(aval_of(place.origin).shape)
        # PEFT saves embeddings that it adapts, changed or not.
        return _unless_equal(place, value)

    def _rows(self, place: Place) -> np.ndarray | None:
        """What some rows of an embedding are to be, if the files say so."""
        if not place.is_embedding or [*place.names] != [()]:
            return None
        return self._take("rows", self.adapter.tokens, split(place.names[()])[0])

    def _pattern_name(self, name: str) -> str:
        """What the patterns for ranks and alphas are matched with."""
        return name if name in self.wrappers else split(name)[0]

    def _value(self, place: Place) -> np.ndarray | None:
        """What an array is to be, in its own layout; `None` if nothing is said."""
        slices = {i: self._value_of(name, place, i) for i, name in place.names.items()}
        if all(x is None for x in slices.values()):
            return None
        try:
            for index, x in slices.items():
                slices[index] = self._origin(place, index) if x is None else x
        except ValueError as e:
            self.problems.append(str(e))
            return None
        return np.stack([*slices.values()]).reshape(aval_of(place.origin).shape)

    def _value_of(self, name: str, place: Place, index) -> np.ndarray | None:
        """What one parameter is to be."""
        module, parameter = split(name)
        given = self._take("value", self.adapter.values, name)
        of_lora = None
        if parameter == "bias":
            of_lora = self._take("bias of `lora_B`", self.adapter.biases, module)
        if given is None and of_lora is None:
            return None
        try:
            if given is not None and not jnp.issubdtype(given.dtype, jnp.floating):
                raise ValueError(f"it is of type {given.dtype.name}, no floating point")
            if given is None:
                x = self._origin(place, index)
            else:
                x = place.from_torch(given, self._is_conv1d(name, place, given.shape))
            if of_lora is not None:
                wide = jnp.promote_types(x.dtype, of_lora.dtype)
                delta = self.adapter.config.scaling(module) * of_lora.astype(wide)
                x = x.astype(wide) + place.from_torch(delta)
        except ValueError as e:
            self.problems.append(f"`{name}` does not fit: {e}")
            return None
        # As PEFT does: an array keeps the type of number that it has in the model.
        return x.astype(aval_of(place.origin).dtype)

    def _is_conv1d(self, name: str, place: Place, shape: tuple[int, ...]) -> bool:
        """Whether PyTorch has this parameter as `(in, out)`."""
        module, parameter = split(name)
        if not (
            self.adapter.config.fan_in_fan_out
            and place.is_matrix
            and parameter == "weight"
        ):
            return False
        if module in self.adapter.updates:
            return True
        if shape[0] == shape[1]:
            raise ValueError(
                "it is square, so that there is no telling whether it is transposed, "
                "as `fan_in_fan_out` has it for some layers"
            )
        return shape != place.to_torch(np.broadcast_to(0, place.shape)).shape

    def _origin(self, place: Place, index) -> np.ndarray:
        """The numbers of the model itself, where the files have none."""
        if isinstance(place.origin, jax.ShapeDtypeStruct):
            raise ValueError(
                f"{named(place.path)} is abstract, and the files do not say all of it"
            )
        if isinstance(place.origin, quax.Value):
            raise ValueError(
                f"{named(place.path)} is a {type(place.origin).__name__}, and PEFT "
                "would have to change what it holds"
            )
        return np.asarray(place.origin)[index]


def _kind_of(place: Place) -> Kind:
    return kind_of(place.leaf, place.shape, place.transposed)


def _full(place: Place, value: np.ndarray) -> FullArray:
    if isinstance(place.origin, quax.Value):
        raise ValueError(
            f"{named(place.path)} is a {type(place.origin).__name__}, in whose place "
            "there would be a plain array"
        )
    return make(FullArray, base=_array(place.origin), value=jnp.asarray(value))


def _unless_equal(place: Place, value: np.ndarray | None):
    """The base of a weight: the model's own, unless the files have another one."""
    base = place.origin
    if value is None:
        return _array(base)
    concrete = eqx.is_array_like(base)
    if concrete and np.array_equal(np.asarray(base), value):
        return _array(base)
    return _full(place, value)


def _array(x):
    return jnp.asarray(x) if isinstance(x, np.ndarray) else x


def _stacked(factors: dict[tuple, tuple], place: Place, experts: bool):
    """The factors of all slices as one pair, and their alpha.

    A slice that has no update gets factors of zeros: their gradients are zero as well,
    so that it stays without one. Where ranks differ the smaller ones are filled up with
    zeros, and where scalings differ they go into `b`.
    """
    if () in factors:
        a, b, _, alpha = factors[()]
        return a, b, alpha
    settings = {(rank, alpha) for _, _, rank, alpha in factors.values()}
    alike = len(settings) == 1
    most = max(rank for rank, _ in settings)
    common = settings.pop()[1] if alike else float(most)
    some_a, some_b, *_ = next(iter(factors.values()))
    dtypes = [{x.dtype for x in xs} for xs in list(zip(*factors.values()))[:2]]
    # A product with a scaling would lose much in 16 bits.
    a_dtype, b_dtype = (jnp.result_type(*types) for types in dtypes)
    b_dtype = b_dtype if alike else jnp.promote_types(b_dtype, np.float32)
    lead = aval_of(place.origin).shape[: -len(place.shape)]
    # a: (*lead, *experts, rank, *cols), b: (*lead, *experts, rows, rank)
    axis = 1 if experts else 0
    a_shape = (*lead, *some_a.shape[:axis], most, *some_a.shape[axis + 1 :])
    all_a = np.zeros(a_shape, a_dtype)
    all_b = np.zeros((*lead, *some_b.shape[:-1], most), b_dtype)
    for index, (a, b, rank, alpha) in factors.items():
        all_a[(*index, *[slice(None)] * axis, slice(rank))] = a
        scaling = 1 if alike else alpha / rank
        all_b[(*index, ..., slice(rank))] = b.astype(b_dtype) * scaling
    return all_a, all_b, common
