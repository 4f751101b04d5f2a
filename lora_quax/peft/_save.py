"""From an adapted model to the files of PEFT."""

import collections
import json
import math
import os
import warnings
from collections.abc import Sequence

from jaxtyping import PyTree

from .._arrays.base import is_adapted
from .._arrays.full import FullArray
from .._disk.exchange import refuse_changed, refuse_non_finite
from .._disk.files import write_tensors
from .._disk.state import state_paths
from .._disk.whole import folder_whole
from .._forms.dora import DoRA
from .._model.dropout import without_key
from .._model.merge import refuse_partial
from .._model.names import is_in, Names, split
from .._model.paths import leaves_of, named
from .._model.together import described, in_step, is_shared, once
from . import _config, _read
from ._consumers import check_consumer, for_consumer, refuse_for
from ._forms import form_of
from ._layout import MAGNITUDE, SUFFIXES
from ._places import Place, places_of, wrappers
from ._read import folder_of, PREFIX, TOKENS
from ._save_form import of_form
from ._targets import ends_of, most_common, target_modules
from ._tied import ensured, of_alias
from ._tokens import is_rows, write_rows
from ._update import ParameterUpdate, UNCHANGED, updates_of
from ._whole import has_own_base, value_of, Whole, whole


def save(
    directory: str | os.PathLike,
    model: PyTree,
    *,
    names: Names = None,
    transposed: Sequence[str] = (),
    adapter_name: str = "default",
    base: PyTree = None,
    initial: PyTree = None,
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
    lora_dropout: float | None = None,
    fan_in_fan_out: bool = False,
    use_rslora: bool = False,
    ensure_weight_tying: bool | None = None,
    consumer: str = "peft",
    check_finite: bool = True,
) -> None:
    """Writes the adapter of a model as PEFT writes one.

    ```python
    names = {"blocks.{}.q": "model.layers.{}.self_attn.q_proj"}
    lora_quax.peft.save("my-adapter", model, names=names)
    ```

    ```python
    model = peft.PeftModel.from_pretrained(torch_model, "my-adapter")
    ```

    Low-rank updates are written as such, and those of LoHa, LoKr, VeRA and IA³ as
    these; an adapter is of one form. `Rows` of an embedding are written beside LoRA. An
    array trained in full is written with the module that it is part of, among
    `modules_to_save`; a bias alone by PEFT's modes `bias="lora_only"` or `"all"`. In
    these an array that was not trained is written as it is. Each tensor has the dtype
    that it has in the model.

    A matrix of no known layer is taken for the weight of an `nn.Linear` if its name
    ends in `weight`, and for a parameter of its own (`target_parameters`) otherwise;
    an array with an axis of experts in front is always the latter. Of several such
    parameters of one module the order must be that of the PyTorch module.

    **Arguments:**

    - `directory`: is made if need be. The files in it of other names are left alone.
    - `model`: a model with adapted weights.
    - `names`: what arrays are called in PyTorch, where that differs from their paths
        here: a function from a path to a name, or a mapping from the beginnings of
        paths. The entry that says most of a path decides. In a path `{}` stands for any
        segment, and what it stands for is put in the place of `{}` in the name; for
        layers stacked along a leading axis `{}` in the name is the index:
        `{"blocks": "model.layers.{}"}`. Two such axes need two `{}`.
    - `transposed`: arrays of no known layer that are kept as `(in, out)`, where PEFT
        would have a weight `(out, in)`; by the ends of their paths or as regular
        expressions, as for `targets` of `loraify`.
    - `adapter_name`: one that is not `"default"` gets a folder below.
    - `base`: the model that was adapted, as for `lora_quax.save_adapter`.
    - `initial`: the model as it was before training, if its initialisation took the
        first update out of the base, as PiSSA and OLoRA do. The adapter is then written
        with twice the rank and works on the untouched base. It takes the place of
        `base`.
    - `base_model_name_or_path`, `task_type`, `lora_dropout`, `fan_in_fan_out`: what the
        configuration says. PEFT knows one dropout, by default the greatest in the
        model. `fan_in_fan_out` is true for a GPT-2, whose `Conv1D` keeps its weight as
        `(in, out)` in PyTorch; here it is `(out, in)` all the same.
    - `use_rslora`: whether to write the scaling as `alpha / √rank`.
    - `ensure_weight_tying`: whether what adapts an embedding adapts the head that is
        tied to it as well. By default that is so for what `equinox.nn.Shared` ties, and
        not so otherwise, unless there is reason for doubt, which is an error: arrays
        that are one object, or a base model in a folder whose configuration says that
        it ties them. `True` is for a program that uses the embedding as its head, which
        is called `lm_head` then; `False` writes an adapter for each module by itself,
        as is right for a model that ties nothing. Note that PEFT 0.21 adds the update
        of a tied embedding twice when it merges; unmerged it computes what is computed
        here, and so does `lora_quax.merge`.
    - `consumer`: who is to read it: `"peft"`, or `"vllm"` or `"llama.cpp"`, which know
        one rank and one alpha for all modules: where these differ, factors are filled
        up with zeros and scalings go into B, in float32 at least. What they do not take
        at all is refused: see the page on consumers in the documentation.
    - `check_finite`: whether numbers that are not finite are an error.

    PEFT's files have no place for the state of a model (`eqx.nn.State`); a warning says
    where there is one.

    **Raises:** `ValueError` if there is no low-rank update, if a leaf is missing, if
    `names` or `transposed` matches nothing, if `base` differs in what would not be
    written, or if an array has no counterpart in PEFT, with the reason; `TypeError` if
    the model is abstract or traced. Nothing is written then. `OSError` if the files
    cannot be written.
    """
    options = dict(
        lora_dropout=lora_dropout,
        fan_in_fan_out=fan_in_fan_out,
        use_rslora=use_rslora,
        ensure_weight_tying=ensure_weight_tying,
    )
    shared = is_shared(model)
    with in_step("peft.save", shared) as said:
        check_consumer(consumer)
        if shared:
            said |= described(model)
            said |= described({"the base": base, "the initial model": initial})
            said |= {name: str(x) for name, x in options.items()}
            said |= dict(consumer=consumer, check_finite=str(check_finite))
    if use_rslora and consumer != "peft":
        raise ValueError(f"`use_rslora` is not known to {consumer}; leave it out.")
    refuse_partial(model)
    model = without_key(model)
    before = base if initial is None else initial
    if before is not None:
        refuse_changed(model, before)
    places = places_of(model, names, transposed)
    form = form_of(places)
    if form is not None:
        given = dict(options, initial=initial)
        fields, tensors = of_form(form, places, given, consumer)
        fields |= dict(
            base_model_name_or_path=base_model_name_or_path, task_type=task_type
        )
        return _write(model, directory, adapter_name, fields, tensors, check_finite)
    tokens, rows = write_rows(places)
    if tokens and consumer != "peft":
        raise ValueError(f"{consumer} takes no adapter of which chosen rows train.")
    updates = _updates(places, initial)
    aliases, tying = ensured(places, ensure_weight_tying, base_model_name_or_path)
    updates |= {
        x.name: of_alias(updates[x.source], x) for x in aliases if x.source in updates
    }
    updates = for_consumer(consumer, updates)
    parameters = [
        name
        for name, update in updates.items()
        if split(name)[1] != "weight" or update.kind == "experts"
    ]
    if parameters and lora_dropout is None:
        lora_dropout = 0.0  # Of what trains them PEFT has none.
    if parameters and (lora_dropout or fan_in_fan_out):
        raise ValueError(
            f"PEFT adapts `{parameters[0]}`, a single parameter, with neither "
            "`lora_dropout` nor `fan_in_fan_out`."
        )
    wrapped = wrappers(places, parameters)
    rest = whole(places, {split(name)[0] for name in updates})
    saved = {x for x in aliases if any(is_in(x.source, m) for m in rest.modules)}
    modules = {*rest.modules, *(split(x.name)[0] for x in saved)}
    fields = dict(
        peft_type="LORA",
        **_settings(updates, parameters, use_rslora),
        target_modules=target_modules(places, updates.keys() - parameters),
        target_parameters=_target_parameters(places, parameters),
        modules_to_save=sorted(modules) or None,
        bias=rest.bias,
        **({"ensure_weight_tying": True} if tying else {}),
        **({"trainable_token_indices": tokens} if tokens else {}),
        base_model_name_or_path=base_model_name_or_path,
        fan_in_fan_out=fan_in_fan_out,
        inference_mode=True,
        # A number that is not said, PEFT would choose.
        init_lora_weights=True,
        lora_bias=False,
        lora_dropout=_dropout(places) if lora_dropout is None else float(lora_dropout),
        task_type=task_type,
        use_dora=_use_dora(updates, parameters),
        use_rslora=use_rslora,
    )
    tensors = _factors(updates, wrapped)
    tensors |= {f"{PREFIX}{module}.{TOKENS}": x for module, x in rows.items()}
    if initial is not None:  # What it took out of the base is in the updates.
        places = [place for place in places if not _is_update(place)]
    tensors |= _values(places, updates, wrapped, rest, fan_in_fan_out)
    for x in aliases:
        for infix in ("", "base_layer."):
            module, name = split(x.source)
            key = f"{PREFIX}{module}.{infix}{name}"
            if key in tensors:
                module, name = split(x.name)
                tensors[f"{PREFIX}{module}.{infix}{name}"] = tensors[key]
    refuse_for(consumer, updates, fields, tensors)
    _write(model, directory, adapter_name, fields, tensors, check_finite)


def _write(model, directory, adapter_name: str, fields, tensors, check_finite: bool):
    if check_finite:
        refuse_non_finite(tensors)
    if paths := state_paths(model):
        warnings.warn(
            f"The model has a state, at {paths}, for which the files of PEFT have no "
            "place: what training changed of it is not written.",
            stacklevel=3,
        )
    folder = folder_of(directory, adapter_name)
    fields, mark = _config.marked(fields)
    metadata = {"format": "pt", _config.MARK: mark}

    def write():
        with folder_whole(folder, (_read.FILE, _config.FILE)) as (weights, config):
            write_tensors(weights, tensors, metadata)
            config.write_text(json.dumps(fields, indent=2, sort_keys=True))

    once("peft.save", is_shared(model), write)


def _updates(places: list[Place], initial: PyTree) -> dict[str, ParameterUpdate]:
    """All updates, by the parameter that they are of."""
    first = {leaf.path: leaf.value for leaf in leaves_of(initial)}
    out, rows = {}, any(is_rows(place.leaf.value) for place in places)
    for place in places:
        if _is_update(place):
            start = UNCHANGED if initial is None else first.get(place.path)
            out |= updates_of(place, start)
    if not out:
        beside = " Rows of an embedding PEFT trains beside one." if rows else ""
        raise ValueError(
            f"The model has no low-rank update that could be written.{beside}"
        )
    return out


def _is_update(place: Place) -> bool:
    """Whether an array has more to it than a value of its own."""
    x = place.leaf.value
    return is_adapted(x) and not isinstance(x, FullArray) and not is_rows(x)


def _dropout(places: list[Place]) -> float:
    """The rate of all updates, or the greatest."""
    arrays = (place.leaf.value for place in places)
    loras = (x.lora if isinstance(x, DoRA) else x for x in arrays)
    return max((getattr(x, "dropout", 0.0) for x in loras), default=0.0)


def _settings(
    updates: dict[str, ParameterUpdate], parameters, use_rslora: bool
) -> dict:
    """The ranks and alphas."""
    ranks, alphas = {}, {}
    for name, update in updates.items():
        key = name if name in parameters else split(name)[0]
        ranks[key] = update.rank
        alphas[key] = _alpha(update, use_rslora)
    rank, rank_pattern = most_common(ranks)
    alpha, alpha_pattern = most_common(alphas)
    return dict(
        r=rank,
        rank_pattern=rank_pattern,
        lora_alpha=alpha,
        alpha_pattern=alpha_pattern,
    )


def _use_dora(updates: dict[str, ParameterUpdate], parameters: list[str]) -> bool:
    """**Raises:** `ValueError` if some are of DoRA and some are not."""
    dora = {name for name, update in updates.items() if update.magnitude is not None}
    without = sorted(updates.keys() - dora)
    if dora and without:
        raise ValueError(
            f"`{min(dora)}` is adapted by DoRA and `{without[0]}` is not, which PEFT "
            "has for all of an adapter or for none of it."
        )
    if dora and parameters:
        raise ValueError(
            f"PEFT has no DoRA of `{parameters[0]}`, a single parameter of a module."
        )
    return bool(dora)


def _alpha(update: ParameterUpdate, use_rslora: bool) -> int | float:
    root = math.sqrt(update.rank) if use_rslora else 1
    alpha = update.alpha / root
    # A whole number comes back as one.
    return round(alpha) if round(alpha) * root == update.alpha else alpha


def _target_parameters(places: list[Place], names: list[str]) -> list[str] | None:
    """The parameters adapted one by one."""
    others = {name for place in places for name in place.names.values()} - set(names)
    for other in others:
        for name in ends_of(other) & set(names):
            raise ValueError(
                f"`{name}` cannot be exchanged with PEFT, which would take it for "
                f"`{other}` as well, which is not adapted."
            )
    return names or None


def _factors(updates: dict[str, ParameterUpdate], wrapped: dict[str, str]):
    """The tensors of the updates, by key."""
    out = {}
    for name, update in updates.items():
        module = wrapped.get(name, split(name)[0])
        if name not in wrapped and module in wrapped.values():
            raise ValueError(
                f"`{name}` is adapted, and so is another parameter of its module: PEFT "
                "adapts a module or single parameters of it, not both."
            )
        for suffix, x in zip(SUFFIXES[update.kind], (update.A, update.B)):
            out[f"{PREFIX}{module}.{suffix}"] = x
        if update.magnitude is not None:
            out[f"{PREFIX}{module}.{MAGNITUDE}"] = update.magnitude
    return out


def _values(places: list[Place], updates, wrapped, rest: Whole, has_conv1d: bool):
    """The tensors that are written whole, by key."""
    # Module -> how many layers of PEFT there are around it.
    adapted = {split(name)[0]: 1 for name in updates}
    adapted |= collections.Counter(split(name)[0] for name in wrapped)
    out = {}
    for place in places:
        for index, name in place.names.items():
            module, parameter = split(name)
            if name in updates:
                is_wanted = has_own_base(place)
            else:
                is_wanted = name in rest.biases or any(
                    is_in(module, saved) for saved in rest.modules
                )
            if is_wanted:
                infix = "base_layer." * adapted.get(module, 0)
                conv1d = has_conv1d and _is_conv1d(name, place, name in updates)
                x = value_of(place, index, conv1d)
                out[f"{PREFIX}{module}.{infix}{parameter}"] = x
    return out


def _is_conv1d(name: str, place: Place, adapted: bool) -> bool:
    """Whether a weight is that of a `Conv1D`, as those are that are adapted.

    A module saved whole, such as a head, is taken for a linear layer. If it is none,
    PEFT finds out by its shape, unless that is square.
    """
    if not place.is_matrix or split(name)[1] != "weight":
        return False
    if not adapted and place.shape[0] == place.shape[1]:
        raise ValueError(
            f"{named(place.path)} would be written whole, and is square, so that there "
            "is no telling whether it is transposed, as `fan_in_fan_out` says of some."
        )
    return adapted
