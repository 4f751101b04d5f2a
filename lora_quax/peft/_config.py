"""`adapter_config.json`: what of it decides what an adapter computes.

The rules by which PEFT matches names are its own, and are followed to the letter: see
`check_target_module_exists` and `get_pattern_key` in PEFT 0.21.
"""

import dataclasses
import functools as ft
import hashlib
import json
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from .._disk.files import AdapterError, read_json
from ._initial import INITIALISATIONS
from ._patterns import compiled, Ends, Table, Whole


FILE = "adapter_config.json"
MARK = "lora_quax_config"  # In the metadata of the tensors.
_PEFT = "0.21.0"  # The version whose format is written.

EMBEDDINGS = "embed_tokens", "lm_head"  # That PEFT knows, by the ends of their names.

# What these say does not change what a finished adapter computes.
_HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    # What an initialisation was told, and may be left of it after a conversion.
    "corda_config",
    "eva_config",
    "loftq_config",
    "lora_ga_config",
    "inference_mode",
    "megatron_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
_MOST = 1000  # Patterns that are tried one by one.
# These leave the base as it is; others take the first update out of it.
_KEEP_THE_BASE = (True, False, "gaussian", "orthogonal", "eva", "mica")
# These PEFT knows by any case.
_ANY_CASE = "gaussian", "olora", "mica"


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of PEFT's `LoraConfig` that decide what an adapter computes."""

    r: int
    lora_alpha: int | float
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, int | float] = dataclasses.field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None
    fan_in_fan_out: bool = False
    init_lora_weights: bool | str | None = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    ensure_weight_tying: bool = False
    lora_dropout: int | float = 0.0
    trainable_token_indices: Any = None  # a list, or one for each module

    def rank(self, name: str) -> int:
        """The rank of the update of a module or, for `target_parameters`, an array."""
        return self._tables["rank_pattern"].find(name, self.r)

    def alpha(self, name: str) -> float:
        """The scaling of the update of a module or an array, times its rank."""
        alpha = self._tables["alpha_pattern"].find(name, self.lora_alpha)
        # With rsLoRA the scaling is alpha / √rank: Kalajdzievski, arXiv 2312.03732.
        return float(alpha * math.sqrt(self.rank(name)) if self.use_rslora else alpha)

    def scaling(self, name: str) -> float:
        """The scaling of the update of a module or an array."""
        return self.alpha(name) / self.rank(name)

    def targets(self, module: str) -> bool:
        """Whether PEFT gives this module an update, if it is of a kind that can."""
        if self._is_named("exclude_modules", module):
            return False
        saved = self.modules_to_save or []
        if any(compiled(_saved_regex(name)).match(module) for name in saved):
            return False
        if not self._is_named("target_modules", module):
            return False
        if isinstance(self.target_modules, str):
            return True
        return self._is_chosen_layer(module)

    def targets_parameter(self, name: str) -> bool:
        """Whether PEFT gives this array an update, by `target_parameters`."""
        return self._is_named("target_parameters", name)

    def _is_named(self, field: str, path: str) -> bool:
        """A list has names or the ends of names, a string is a regular expression."""
        return self._tables[field].match(path)

    @ft.cached_property
    def _tables(self) -> dict[str, Any]:
        """What each of the fields that name modules matches.

        **Raises:** `AdapterError` for a pattern that is none.
        """
        out: dict[str, Any] = {}
        for field in ("rank_pattern", "alpha_pattern"):
            out[field] = _read(field, Table, getattr(self, field))
        for field in ("target_modules", "exclude_modules", "target_parameters"):
            names = getattr(self, field) or []
            kind = Whole if isinstance(names, str) else Ends
            out[field] = _read(field, kind, names)
        return out

    @property
    def ties(self) -> bool:
        """Whether PEFT adapts the head as it does the embedding that it is tied to: it
        does if it is told to, and knows one of the modules by its name."""
        names = self.target_modules or []
        if isinstance(names, str):
            known = any(self._is_named("target_modules", x) for x in EMBEDDINGS)
        else:
            known = any(name.split(".")[-1] in EMBEDDINGS for name in names)
        saved = (name.split(".")[-1] for name in self.modules_to_save or [])
        return self.ensure_weight_tying and (
            known or not {*EMBEDDINGS}.isdisjoint(saved)
        )

    def _is_chosen_layer(self, module: str) -> bool:
        layers = self.layers_to_transform
        if layers is None or layers == []:
            return True
        regexes = map(_layer_regex, _listed(self.layers_pattern))
        for regex in [*regexes] or [r".*?\.[^.]*\.(?P<idx>\d+)\."]:
            if match := compiled(regex).match(module):
                index = match["idx"]
                return index is not None and int(index) in _listed(layers)
        return False


def read_config(
    folder: Path, ignore: Collection[str] = ()
) -> tuple[Config, str | None]:
    """The configuration, less the fields to ignore, and its mark, if it has one.

    **Raises:** `AdapterError` if it is no configuration of LoRA, or of a kind of it
    that is not known here; `FileNotFoundError`."""
    path = folder / FILE
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}. {_what_there_is(folder)}")
    return config_of(path, read_json(path), ignore)


def config_of(
    path: Path, fields: dict[str, Any], ignore: Collection[str] = ()
) -> tuple[Config, str | None]:
    """The same, of fields that have been read."""
    if fields.get("peft_type") != "LORA":
        raise AdapterError(
            f"{path}: `peft_type` must be 'LORA', got {fields.get('peft_type')!r:.80}."
        )
    for name, value in fields.items():
        if name in _KINDS:
            kind, is_kind = _KINDS[name]
            if value is not None and not is_kind(value):
                raise AdapterError(
                    f"{path}: `{name}` must be {kind}, got {value!r:.80}."
                )
        elif name not in (*_HARMLESS, *ignore) and not _is_off(value):
            raise AdapterError(
                f"{path}: `{name}` is {value!r:.80}. What an adapter with that "
                "computes is not known here. If it changes nothing, leave it out by "
                f"`lora_quax.peft.load(..., ignore=[{name!r:.80}])`."
            )
    # A field that is null is as good as absent.
    given = {name: x for name, x in fields.items() if name in _KINDS and x is not None}
    for name in ("r", "lora_alpha"):
        if name not in given:
            raise AdapterError(
                f"{path}: `{name}` is missing. PEFT would take a default, which may "
                "not be what the adapter was trained with."
            )
    config = Config(**given)
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower() in _ANY_CASE:
        config = dataclasses.replace(config, init_lora_weights=init.lower())
    _check(path, config)
    return config, _mark_of(fields)


def marked(fields: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """A configuration with a mark that tells it from others, and the mark.

    It is written with the tensors as well: the two files are moved one after the other,
    so that a reader beside two writers may find those of one with these of the other.
    PEFT's field for its version may have more behind an `@`, which it leaves out.
    """
    text = json.dumps(fields, sort_keys=True)
    mark = hashlib.sha256(text.encode()).hexdigest()[:16]
    return {**fields, "peft_version": f"{_PEFT}@lora_quax.{mark}"}, mark


def _mark_of(fields: dict[str, Any]) -> str | None:
    version = fields.get("peft_version")
    mark = str(version).partition("@lora_quax.")[2]
    return mark or None


def _what_there_is(folder: Path) -> str:
    if not folder.is_dir():
        folder = folder.parent
    adapters = sorted(path.parent.name for path in folder.glob(f"*/{FILE}"))
    if not adapters:
        return f"Nor is there an adapter in a folder in {folder}."
    return f"In {folder} are adapters of the names {', '.join(map(repr, adapters))}."


def _check(path: Path, config: Config) -> None:
    if config.r < 1 or any(rank < 1 for rank in config.rank_pattern.values()):
        raise AdapterError(f"{path}: a rank is not positive.")
    alphas = [config.lora_alpha, *config.alpha_pattern.values()]
    if not all(map(math.isfinite, alphas)):
        raise AdapterError(f"{path}: an alpha is not finite.")
    if config.bias not in ("none", "all", "lora_only"):
        raise AdapterError(f"{path}: `bias` is {config.bias!r:.80}.")
    init = config.init_lora_weights
    if init not in (*_KEEP_THE_BASE, *INITIALISATIONS):
        raise AdapterError(
            f"{path}: `init_lora_weights` is {init!r:.80}, by which PEFT changes the "
            "base when it loads the adapter, in a way that cannot be repeated here. "
            "Save it in a form that works on the untouched base, with PEFT's "
            "`path_initial_model_for_weight_conversion`."
        )
    if init == "olora" and config.fan_in_fan_out:
        raise AdapterError(
            f"{path}: `init_lora_weights` is 'olora' with `fan_in_fan_out`, where PEFT "
            "takes the update out of the transposed weight."
        )
    # As they are used: a flag, say, is allowed at the beginning alone.
    regexes = {x: _saved_regex(x) for x in config.modules_to_save or ()}
    regexes |= {x: _layer_regex(x) for x in _listed(config.layers_pattern)}
    if len(regexes) > _MOST:
        raise AdapterError(f"{path}: `modules_to_save` names more than {_MOST}.")
    try:
        for pattern, regex in regexes.items():
            _read(pattern, compiled, regex)
        assert config._tables  # What is wrong with the others is an error now.
    except ValueError as e:
        raise AdapterError(f"{path}: {e}") from e


def _read(field: str, kind: Callable, patterns: Any) -> Any:
    try:
        return kind(patterns)
    except ValueError as e:
        what = patterns if isinstance(patterns, str) else field
        raise ValueError(f"{what!r:.80} cannot be matched: {e}.") from e


def _is_off(x) -> bool:
    return x is None or x is False or x == {} or x == []


def _is_flag(x) -> bool:
    return isinstance(x, bool)


def _is_integer(x) -> bool:
    return type(x) is int


def _is_number(x) -> bool:
    return type(x) in (int, float)


def _is_part(x) -> bool:
    return _is_number(x) and 0 <= x < 1


def _is_list_of(is_kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda x: isinstance(x, list) and all(map(is_kind, x))


def _is_mapping_to(is_kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda x: isinstance(x, dict) and all(map(is_kind, x.values()))


def _is_mapping_to_lists(x) -> bool:
    is_list = _is_list_of(_is_integer)
    return isinstance(x, dict) and all(map(is_list, x.values()))


def _is_text(x) -> bool:
    return isinstance(x, str)


def _any_of(*kinds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda x: any(is_kind(x) for is_kind in kinds)


_is_names = _any_of(_is_text, _is_list_of(_is_text))
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "r": ("an integer", _is_integer),
    "lora_alpha": ("a number", _is_number),
    "target_modules": ("a string or a list of strings", _is_names),
    "exclude_modules": ("a string or a list of strings", _is_names),
    "layers_pattern": ("a string or a list of strings", _is_names),
    "target_parameters": ("a list of strings", _is_list_of(_is_text)),
    "modules_to_save": ("a list of strings", _is_list_of(_is_text)),
    "rank_pattern": ("a mapping to integers", _is_mapping_to(_is_integer)),
    "alpha_pattern": ("a mapping to numbers", _is_mapping_to(_is_number)),
    "lora_dropout": ("a number, at least 0 and less than 1", _is_part),
    "use_rslora": ("true or false", _is_flag),
    "use_dora": ("true or false", _is_flag),
    "lora_bias": ("true or false", _is_flag),
    "fan_in_fan_out": ("true or false", _is_flag),
    "ensure_weight_tying": ("true or false", _is_flag),
    "bias": ("a string", _is_text),
    "trainable_token_indices": (
        "a list of integers, or a mapping to such lists",
        _any_of(_is_list_of(_is_integer), _is_mapping_to_lists),
    ),
    "init_lora_weights": ("a string, true or false", _any_of(_is_text, _is_flag)),
    "layers_to_transform": (
        "an integer or a list of integers",
        _any_of(_is_integer, _is_list_of(_is_integer)),
    ),
}


def _saved_regex(pattern: str) -> str:
    return rf"(^|.*\.){pattern}($|\..*)"


def _layer_regex(pattern: str) -> str:
    return rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\."


def _listed(x) -> list:
    if x is None:
        return []
    return x if isinstance(x, list) else [x]
