"""What a configuration says: each table a dataclass, each key a field."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .toml import number, read_toml, Wrong


@dataclass(frozen=True)
class Base:
    """The table [model]."""

    path: Path  # A folder as on Hugging Face, or a file of llama.cpp.
    tokenizer: Path | None = None  # By default that of the model.
    dtype: Literal["float32", "bfloat16"] = "float32"
    quantise: Literal["nf4", "int4", "int8"] | None = None
    tile: int = number(64, least=1)


@dataclass(frozen=True)
class Data:
    train: Path
    valid: Path | None = None
    max_length: int = number(512, least=2)


@dataclass(frozen=True)
class Lora:
    rank: int = number(8, least=1)
    alpha: float | None = number(None, above=0)  # By default the rank.
    targets: tuple[str, ...] = ("all-linear",)
    dropout: float = number(0.0, least=0)
    update: Literal["lora", "loha", "lokr", "vera"] = "lora"
    use_dora: bool = False
    use_rslora: bool = False


@dataclass(frozen=True)
class Train:
    steps: int | None = number(None, least=1)
    epochs: int | None = number(None, least=1)  # 1, if there are no steps.
    batch: int = number(4, least=1)
    accumulate: int = number(1, least=1)
    learning_rate: float = number(2e-4, above=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: int = number(0, least=0)
    weight_decay: float = number(0.0, least=0)
    clip: float | None = number(1.0, above=0)  # The norm of the gradient.
    seed: int = number(0, least=0)
    checkpoint: bool = False  # Layers are computed again for their gradients.


@dataclass(frozen=True)
class Output:
    folder: Path
    evaluate_every: int = number(100, least=1)
    checkpoint_every: int = number(100, least=1)
    keep: int = number(2, least=1)  # How many checkpoints.


@dataclass(frozen=True)
class Config:
    model: Base
    data: Data
    lora: Lora
    train: Train
    output: Output


def read_config(path: Path) -> Config:
    """**Raises:** as `read_toml`."""
    return read_toml(path, Config, _check)


def decides(config: Config) -> dict[str, dict[str, Any]]:
    """What of a configuration decides the numbers of a run. What is in the files that
    it names, the run compares itself."""
    out = dataclasses.asdict(config)
    for table in out.values():
        for key in [key for key, x in table.items() if isinstance(x, Path)]:
            del table[key]
    out["model"].pop("tokenizer", None)
    out["data"].pop("valid", None)
    out["lora"]["targets"] = list(config.lora.targets)
    del out["output"]
    return out


def _check_lora(lora: Lora) -> Iterator[Wrong]:
    if lora.dropout >= 1:
        yield Wrong("lora", "dropout", f"`dropout` has to be below 1: {lora.dropout}")
    if lora.update == "lora":
        return
    what = f"`update` is {lora.update!r}"
    if lora.use_dora:
        yield Wrong("lora", "use_dora", f"DoRA is of LoRA, and {what}")
    if lora.dropout:
        yield Wrong("lora", "dropout", f"PEFT has it of LoRA, and {what}")
    if lora.update == "vera":
        for key in ("alpha", "use_rslora"):
            if getattr(lora, key):
                yield Wrong("lora", key, f"{what}, which has no alpha; leave it out")


def is_gguf(path: Path) -> bool:
    return path.suffix.lower() == ".gguf"


def _check(config: Config) -> Iterator[Wrong]:
    model, train = config.model, config.train
    if is_gguf(model.path):
        if not model.path.is_file():
            yield Wrong("model", "path", f"there is no file {model.path}")
        if model.quantise is not None:
            why = "a GGUF file is quantised as it is; leave `quantise` out"
            yield Wrong("model", "quantise", why)
    elif not model.path.is_dir():
        why = f"there is no folder {model.path}, and it is no *.gguf"
        yield Wrong("model", "path", why)
    if model.tokenizer is not None and not model.tokenizer.exists():
        yield Wrong("model", "tokenizer", f"there is nothing at {model.tokenizer}")
    yield from _check_lora(config.lora)
    for key in ("train", "valid"):
        path = getattr(config.data, key)
        if path is not None and not path.is_file():
            yield Wrong("data", key, f"there is no file {path}")
    if train.steps is not None and train.epochs is not None:
        yield Wrong("train", "epochs", "give `steps` or `epochs`, and not both")
    if train.steps is not None and train.warmup >= train.steps:
        why = f"`warmup` has to be less than the {train.steps} steps"
        yield Wrong("train", "warmup", f"{why}, and is {train.warmup}")
