"""Low-rank adaptation for Equinox, as an array."""

from . import _rules as _rules, init as init, peft as peft
from ._arrays.array import (
    LoraArray as LoraArray,
    LowRankArray as LowRankArray,
    MaterialiseError as MaterialiseError,
)
from ._arrays.full import FullArray as FullArray
from ._disk.adapter import load_adapter as load_adapter, save_adapter as save_adapter
from ._disk.files import AdapterError as AdapterError
from ._model.loraify import loraify as loraify
from ._model.merge import merge as merge, unload as unload
from ._model.summary import summary as summary
from ._model.targets import Adapt as Adapt
from ._model.training import (
    filter_grad as filter_grad,
    filter_value_and_grad as filter_value_and_grad,
    labels as labels,
    partition as partition,
    trainable as trainable,
)


__version__ = "0.1.0"

__all__ = [
    "Adapt",
    "AdapterError",
    "FullArray",
    "LoraArray",
    "LowRankArray",
    "MaterialiseError",
    "filter_grad",
    "filter_value_and_grad",
    "init",
    "labels",
    "load_adapter",
    "loraify",
    "merge",
    "partition",
    "peft",
    "save_adapter",
    "summary",
    "trainable",
    "unload",
]
