"""Low-rank adaptation for Equinox, as an array."""

from . import _rules as _rules, init as init, peft as peft
from ._arrays.base import (
    AbstractDelta as AbstractDelta,
    AdaptedArray as AdaptedArray,
    MaterialiseError as MaterialiseError,
    role as role,
)
from ._arrays.dropout import DropoutArray as DropoutArray
from ._arrays.full import FullArray as FullArray
from ._arrays.lora import LoraArray as LoraArray
from ._arrays.low_rank import LowRankArray as LowRankArray
from ._arrays.misuse import UnquaxifiedError as UnquaxifiedError
from ._arrays.quantised import QuantisedArray as QuantisedArray
from ._arrays.scaled import ScaledArray as ScaledArray
from ._disk.adapter import load_adapter as load_adapter, save_adapter as save_adapter
from ._disk.files import AdapterError as AdapterError
from ._disk.gguf import load_gguf as load_gguf
from ._disk.model import load_model as load_model, save_model as save_model
from ._forms.dora import DoRA as DoRA
from ._forms.ia3 import IA3 as IA3
from ._forms.loha import LoHa as LoHa
from ._forms.lokr import LoKr as LoKr
from ._forms.rows import Rows as Rows
from ._forms.vera import VeRA as VeRA
from ._model.branch import LoraBranch as LoraBranch
from ._model.dropout import with_dropout_key as with_dropout_key
from ._model.initialise import initialise as initialise
from ._model.loftq import loftq as loftq
from ._model.loraify import loraify as loraify
from ._model.merge import merge as merge, unload as unload
from ._model.moments import input_moments as input_moments, Moments as Moments
from ._model.quantise import dequantise as dequantise, quantise as quantise
from ._model.rebase import rebase as rebase
from ._model.shard import shard as shard
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
    "AbstractDelta",
    "Adapt",
    "AdaptedArray",
    "AdapterError",
    "DoRA",
    "DropoutArray",
    "FullArray",
    "IA3",
    "LoHa",
    "LoKr",
    "LoraArray",
    "LoraBranch",
    "LowRankArray",
    "MaterialiseError",
    "Moments",
    "QuantisedArray",
    "Rows",
    "ScaledArray",
    "UnquaxifiedError",
    "VeRA",
    "dequantise",
    "filter_grad",
    "filter_value_and_grad",
    "init",
    "initialise",
    "input_moments",
    "labels",
    "load_adapter",
    "load_gguf",
    "load_model",
    "loftq",
    "loraify",
    "merge",
    "partition",
    "peft",
    "quantise",
    "rebase",
    "role",
    "save_adapter",
    "save_model",
    "shard",
    "summary",
    "trainable",
    "unload",
    "with_dropout_key",
]
