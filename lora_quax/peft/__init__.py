"""Exchange of adapters with Hugging Face PEFT, both ways, without PyTorch or PEFT."""

from ._load import load as load
from ._save import save as save


__all__ = ["load", "save"]
