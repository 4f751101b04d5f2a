"""The model that is adapted: one of eqx-zoo's, from its folder or from a file of
llama.cpp."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import PyTree

from ..._arrays.base import is_adapted
from ..._arrays.low_rank import LowRankArray
from ..._disk.files import AdapterError, read_json, refuse
from ..._disk.gguf import load_gguf
from ..._disk.shards import open_model
from ..._forms.loha import LoHa
from ..._forms.lokr import LoKr
from ..._forms.vera import VeRA
from ..._model.loraify import loraify
from ..._model.quantise import quantise
from ...peft._save import save
from .config import Base, is_gguf, Lora
from .extra import needs
from .gguf import HEAD, llama_config, NAMES, refuse_layers


_HEAD = ("lm_head", "freeze")
_UPDATES = {"lora": LowRankArray, "loha": LoHa, "lokr": LoKr, "vera": VeRA}


class Causal(NamedTuple):
    """A model that, called with tokens and maybe a cache, gives `(logits, cache)`."""

    model: PyTree
    vocabulary: int
    has_head: bool = False  # Or the embedding is the head.
    has_experts: bool = False
    source: Path | None = None  # As Hugging Face has it.
    context: int | None = None  # How many tokens it has been trained on at once.

    @property
    def names(self) -> dict[str, str] | None:
        """What PEFT calls its arrays, where that is not their paths."""
        experts = "model.layers.{}.mlp.experts"
        return {experts: f"{experts}.{{}}"} if self.has_experts else None


def read_base(config: Base) -> Causal:
    """**Raises:** `AdapterError` if the files are not those of a model that is known
    here; `FileNotFoundError`; `ValueError` if `tile` does not divide a weight;
    `ImportError`."""
    dtype, path = jnp.dtype(config.dtype), config.path
    if is_gguf(path):
        return _of_gguf(path, dtype)
    out = _of_folder(path, dtype)
    if config.quantise is None:
        return out
    targets: list[Any] = [eqx.nn.Linear, *([_HEAD] if out.has_head else [])]
    model = quantise(out.model, config.quantise, targets=targets, tile=config.tile)
    return out._replace(model=model)


def adapt(base: Causal, config: Lora, seed: int) -> PyTree:
    """The model with an update, still zero, of each target. A head is none of all
    linears, as in PEFT.

    **Raises:** `ValueError` if a target is not there.
    """
    named = any("lm_head" in target for target in config.targets)
    frozen = [_HEAD] if base.has_head and not named else []
    targets = [*config.targets, *frozen]
    key = jr.key(seed)
    return loraify(
        base.model,
        config.rank,
        key,
        alpha=config.alpha,
        targets=targets,
        update=_UPDATES[config.update],
        dropout=config.dropout,
        use_dora=config.use_dora,
        use_rslora=config.use_rslora,
    )


def write_adapter(folder: Path, model: PyTree, base: Causal) -> None:
    """Writes what trains as PEFT does.

    **Raises:** `ValueError` for what PEFT has not; `OSError`.
    """
    # An embedding that is the head is adapted as both.
    ties = not base.has_head and is_adapted(model.model.embed_tokens.weight)
    save(
        folder,
        model,
        names=base.names,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base.source and str(base.source.resolve()),
        ensure_weight_tying=True if ties else None,
    )


def _of_folder(path: Path, dtype) -> Causal:
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"There is no config.json in {path}.")
    found = read_json(path / "config.json")
    config = _config(path / "config.json", found)
    with open_model(path) as tensors:  # Or a shard is missing, or is truncated.
        refuse_layers(path, config.num_hidden_layers, tensors, "model.layers.")
    try:
        model = needs("eqx_zoo").CausalLM.from_pretrained(path, dtype=dtype)
    except (KeyError, ValueError) as e:
        raise AdapterError(
            f"{path} is not what its config.json says: {e.args[0]}."
        ) from e
    return _causal(model, config, found)._replace(source=path)


def _of_gguf(path: Path, dtype) -> Causal:
    found = llama_config(path)
    config = _config(path, found)
    zoo = needs("eqx_zoo")
    make = zoo.CausalLM
    like = eqx.filter_eval_shape(make, config, key=jr.key(0), dtype=dtype)
    names = NAMES if config.tie_word_embeddings else NAMES | HEAD
    return _causal(load_gguf(path, like, names=names), config, found)


def _config(path: Path, found: dict[str, Any]) -> Any:
    try:
        out = needs("eqx_zoo").Config.from_hf(found)
    except KeyError as e:
        raise AdapterError(f"{path} does not say its {e}.") from e
    except (
        ArithmeticError,
        AttributeError,
        NotImplementedError,
        TypeError,
        ValueError,
    ) as e:
        raise AdapterError(f"{path} is of a model that eqx-zoo has not: {e}.") from e
    refuse(f"{path} has what no model has", _odd(out), in_order=True)
    return out


def _odd(config: Any) -> Iterator[str]:
    """eqx-zoo takes the numbers as they are, and fails where they are used."""
    for field in dataclasses.fields(config):
        x = getattr(config, field.name)
        # A model may have no experts.
        least = 1 if field.default is dataclasses.MISSING else 0
        if field.type is int and (type(x) is not int or x < least):
            yield f"`{field.name}` is {x!r:.40}, and no integer of at least {least}"
        elif field.type is float and not (type(x) in (int, float) and 0 < x < 1e30):
            yield f"`{field.name}` is {x!r:.40}, and no number above 0"
        elif field.type is bool and type(x) is not bool:
            yield f"`{field.name}` is {x!r:.40}, and neither true nor false"


def _causal(model, config, found: dict[str, Any]) -> Causal:
    context = found.get("max_position_embeddings")
    return Causal(
        model,
        config.vocab_size,
        has_head=model.lm_head is not None,
        has_experts=bool(config.moe_layers),
        context=context if type(context) is int else None,
    )
