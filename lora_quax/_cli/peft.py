"""The content of a folder that PEFT, or `lora_quax.peft.save`, wrote."""

import re
from pathlib import Path

import numpy as np

from .._disk.files import refuse
from .._model.paths import join
from ..peft import _read
from ..peft._config import Config
from ..peft._layout import from_peft, Kind
from ..peft._names import split
from .update import Added, Content, Update


def read_content(folder: Path) -> Content:
    """**Raises:** `FileNotFoundError`; `AdapterError` if it is no adapter, or the
    tensors are not those of its configuration."""
    adapter = _read.read(folder)
    config = adapter.config
    problems, updates, added = [], {}, {}
    wrapped = _wrapped(adapter)
    for module, update in adapter.updates.items():
        weights = wrapped.get(module, (join(module, "weight"),))
        try:
            out = _update(weights, config, update, module in wrapped)
        except ValueError as e:
            problems.append(f"`{module}`: {e}")
            continue
        # Which of several it is the order of the model says, which is not in the files.
        updates[weights[0] if len(weights) == 1 else module] = out
    for module, x in adapter.biases.items():
        added[join(module, "bias")] = Added(x, config.scaling(module))
    refuse(f"The adapter {folder} is not sound", problems)
    flags = config.fan_in_fan_out, config.init_lora_weights
    return Content(folder, "PEFT", updates, adapter.values, added, *flags)


def _wrapped(adapter: _read.PeftAdapter) -> dict[str, tuple[str, ...]]:
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


def _update(
    weights: tuple[str, ...], config: Config, update: _read.Update, wrapped: bool
) -> Update:
    """**Raises:** `ValueError` if the factors do not fit the configuration."""
    A, B, is_embedding = update
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
            groups = rank // B.shape[1]
            raise ValueError(
                f"it is a convolution of {groups} groups. PEFT gives that a dense A "
                "and a grouped B, which is no low-rank update of its kernel"
            )
        if B.shape[1] == rank and set(B.shape[2:]) <= {1}:
            return "embedding" if is_embedding else "conv" if A.ndim > 2 else "linear"
    raise ValueError(
        f"A of shape {A.shape} and B of shape {B.shape} are not of the rank {rank} "
        "that the configuration gives it"
    )
