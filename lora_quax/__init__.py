"""Low-rank adaptation for Equinox, as an array."""

from . import _init as init, _quax_gaps as _quax_gaps, _rules as _rules
from ._array import (
    LoraArray as LoraArray,
    LowRankArray as LowRankArray,
    MaterialiseError as MaterialiseError,
)


__all__ = ["LoraArray", "LowRankArray", "MaterialiseError", "init"]
