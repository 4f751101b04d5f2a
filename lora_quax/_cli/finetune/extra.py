"""What the commands of language models have of other packages."""

import importlib
import sys
from typing import Any


def needs(name: str) -> Any:
    """**Raises:** `ImportError`, which says what to install."""
    try:
        return importlib.import_module(name)
    except ImportError as e:
        package = name.split(".")[0].replace("_", "-")
        old = package == "eqx-zoo" and sys.version_info < (3, 12)
        why = ", which is for Python 3.12 or later" if old else ""
        raise ImportError(
            f"This command needs {package}{why}: `pip install 'lora_quax[finetune]'`."
        ) from e
