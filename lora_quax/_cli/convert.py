"""`convert`: from our format to PEFT's, or from PEFT's to ours.

The exporter and the importer are those of `lora_quax.peft`. They want a model, and get
the skeleton of one: the layers that the adapter names, around types in place of bases.
"""

from collections.abc import Sequence
from pathlib import Path

import jax

from .._disk.adapter import save_adapter
from ..peft import load, save
from .content import read_content
from .from_ours import skeleton_of_ours
from .from_peft import skeleton_of_peft
from .names import namer, read_names
from .out import refuse_existing


def convert(
    source: Path,
    goal: Path,
    names: Path | None,
    transposed: Sequence[str],
    fan_in_fan_out: bool = False,
) -> int:
    """**Raises:** `AdapterError` or `ValueError`, with the reason, for what the other
    format does not have; `OSError`. Nothing is written then."""
    refuse_existing(goal)
    content = read_content(source)
    with jax.enable_x64(True):  # Or JAX would narrow float64 without a word.
        if content.format == "lora_quax":
            model = skeleton_of_ours(source)
            save(
                goal,
                model,
                names=read_names(names),
                transposed=transposed,
                fan_in_fan_out=fan_in_fan_out,
            )
            return 0
        if goal.is_dir():
            raise IsADirectoryError(f"{goal} is a folder; a file is to be written.")
        skeleton = skeleton_of_peft(content, namer(names), transposed)
        in_peft = skeleton.names.__getitem__
        model = load(source, skeleton.tree, names=in_peft, transposed=transposed)
        save_adapter(goal, model)
    return 0
