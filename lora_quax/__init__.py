"""Low-rank adaptation for Equinox, as an array."""

from . import _init as init, _quax_gaps as _quax_gaps, _rules as _rules, peft as peft
from ._adapter import load_adapter as load_adapter, save_adapter as save_adapter
from ._array import (
    LoraArray as LoraArray,
    LowRankArray as LowRankArray,
    MaterialiseError as MaterialiseError,
)
from ._files import AdapterError as AdapterError
from ._full import FullArray as FullArray
from ._loraify import loraify as loraify
from ._merge import merge as merge, unload as unload
from ._summary import summary as summary
from ._targets import Adapt as Adapt
from ._training import (
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
