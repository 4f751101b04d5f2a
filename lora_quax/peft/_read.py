"""The files of an adapter of PEFT, read without a model."""

import functools as ft
import os
import re
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from .._disk.files import AdapterError, read_tensors, refuse
from ._config import Config, FILE as CONFIG, MARK, read_config
from ._layout import MAGNITUDE


FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
TOKENS = "token_adapter.trainable_tokens_delta"
_MAGNITUDE = f".{MAGNITUDE}"
_TRIES, _PAUSE = 50, 0.01
_UPDATE = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<side>[AB])\.weight|lora_embedding_(?P<table>[AB]))",
    re.DOTALL,
)


class Factors(NamedTuple):
    """The factors of one module as they are in the file, and its magnitudes of DoRA."""

    A: np.ndarray
    B: np.ndarray
    is_embedding: bool
    magnitude: np.ndarray | None = None


class Parts(NamedTuple):
    """The tensors of one module, in a form that is not LoRA."""

    tensors: dict[str, np.ndarray]
    is_embedding: bool = False


class PeftAdapter(NamedTuple):
    """What the files hold, by the names of the PyTorch model."""

    path: Path
    config: Config
    updates: dict[str, Any]  # module -> its `Factors`, or its `Parts`
    biases: dict[str, np.ndarray]  # module -> the bias of its B
    values: dict[str, np.ndarray]  # parameter -> what it is to be
    tokens: dict[str, np.ndarray] = {}  # module -> what some of its rows are to be
    other: Any = None  # of a form that is not LoRA, what there is to it


def folder_of(directory: str | os.PathLike, adapter_name: str) -> Path:
    """Where an adapter lies: one that is not the default has a folder of its own."""
    if (
        not adapter_name.isprintable()
        or not adapter_name
        or {*adapter_name} & {*"./\\:"}
    ):
        raise ValueError(
            "`adapter_name` must be the name of a folder and of a module of PyTorch, "
            f"with no dots or slashes, got {adapter_name!r}."
        )
    return Path(directory) / ("" if adapter_name == "default" else adapter_name)


def read(
    directory: str | os.PathLike,
    adapter_name: str = "default",
    ignore: Collection[str] = (),
) -> PeftAdapter:
    """**Raises:** `FileNotFoundError`; `AdapterError` if the files are no adapter."""
    folder = folder_of(directory, adapter_name)
    if folder.is_file():
        raise AdapterError(
            f"{folder} is a file; an adapter of PEFT is a folder. What "
            "`lora_quax.save_adapter` wrote is read by `lora_quax.load_adapter`."
        )
    path = folder / FILE
    config, tensors = read_pair(folder, ft.partial(read_config, ignore=ignore))
    if not tensors:
        raise AdapterError(f"{path} holds no tensors.")
    problems = []
    sides: dict[tuple[str, bool], dict[str, np.ndarray]] = {}
    biases, values, tokens, magnitudes = {}, {}, {}, {}
    for key, x in tensors.items():
        name = key.removeprefix(PREFIX)
        if name == key:
            problems.append(f"`{key}` does not begin with `{PREFIX}`")
        elif match := _UPDATE.fullmatch(name):
            if not jnp.issubdtype(x.dtype, jnp.floating):
                problems.append(f"`{key}` is of type {x.dtype.name}, no floating point")
            side = match["side"] or match["table"]
            place = match["module"], match["table"] is not None
            sides.setdefault(place, {})[side] = x
        elif name.endswith(f".{TOKENS}"):
            tokens[name.removesuffix(f".{TOKENS}")] = x
        elif name.endswith(_MAGNITUDE):
            magnitudes[name.removesuffix(_MAGNITUDE)] = x
            if not jnp.issubdtype(x.dtype, jnp.floating):
                problems.append(f"`{key}` is of type {x.dtype.name}, no floating point")
        elif name.endswith(".lora_B.bias"):
            biases[name.removesuffix(".lora_B.bias")] = x
        elif not _is_copy(name, config):
            values[name] = x
    updates = {}
    for (module, is_embedding), pair in sides.items():
        if module in updates:
            problems.append(f"`{module}` has factors of a layer and of an embedding")
        elif len(pair) < 2:
            problems.append(f"`{module}` has no {'B' if 'A' in pair else 'A'}")
        else:
            magnitude = magnitudes.pop(module, None)
            updates[module] = Factors(pair["A"], pair["B"], is_embedding, magnitude)
            problems += _wrong_magnitude(module, magnitude, config)
    problems += [f"`{module}` has magnitudes alone" for module in magnitudes]
    problems += [f"`{module}` has a bias alone" for module in biases.keys() - updates]
    # The weight and bias of an adapted layer itself.
    plain = {_without_base_layer(name, updates): x for name, x in values.items()}
    if len(plain) < len(values):
        problems.append("a tensor is there with `base_layer` in its name and without")
    refuse(f"The adapter {path} is not sound", problems)
    return PeftAdapter(path, config, updates, biases, plain, tokens)


def read_pair(
    folder: Path, configuration: Callable[[Path], tuple[Config, str | None]]
) -> tuple[Config, dict[str, np.ndarray]]:
    """The configuration and the tensors, of one writing."""
    path = folder / FILE
    for _ in range(_TRIES):
        config, mark = configuration(folder)
        if not path.exists() and (pickled := folder / "adapter_model.bin").exists():
            raise AdapterError(
                f"{pickled} is a pickle, which can run any code, and is not read. "
                "Convert it with PEFT: `model.save_pretrained(..., "
                "safe_serialization=True)`."
            )
        tensors, metadata = read_tensors(path)
        # PEFT itself does not say which configuration its tensors are for.
        if metadata.get(MARK, mark) == mark:
            return config, tensors
        time.sleep(_PAUSE)  # Another program may be between its two moves.
    raise AdapterError(
        f"{path} was not written with the {CONFIG} beside it: a program that wrote "
        "both was stopped between them, or another has written one of them. Save the "
        "adapter again, or load and save it with PEFT, which does not compare them."
    )


def _wrong_magnitude(
    module: str, magnitude: np.ndarray | None, config: Config
) -> list[str]:
    if config.use_dora and magnitude is None:
        return [f"`{module}` has no `{MAGNITUDE}`, with `use_dora` in the {CONFIG}"]
    if magnitude is not None and not config.use_dora:
        return [f"`{module}` has a `{MAGNITUDE}`, without `use_dora` in the {CONFIG}"]
    return []


def _is_copy(name: str, config: Config) -> bool:
    """Whether it is the bias of a module that is saved whole, which PEFT with
    `bias="all"` writes again as it was, and as it is."""
    match = re.fullmatch(r"(.+)\.(?:original_module|modules_to_save)\..+", name)
    saved = tuple(config.modules_to_save or ())
    return match is not None and config.bias == "all" and match[1].endswith(saved)


def _without_base_layer(name: str, updates) -> str:
    module, _, parameter = name.rpartition(".")
    # One for each of the parameters of a module that are adapted one by one; and a
    # module may have this name itself.
    segments = module.split(".")
    n = next((i for i, x in enumerate(reversed(segments)) if x != "base_layer"), 0)
    for i in range(n, 0, -1):
        if (stripped := ".".join(segments[:-i])) in updates:
            return f"{stripped}.{parameter}"
    return name
