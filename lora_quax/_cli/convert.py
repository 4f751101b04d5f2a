"""`convert`: from our format to PEFT's, or from PEFT's to ours.

The exporter and the importer are those of `lora_quax.peft`. They want a model, and get
the skeleton of one: the layers that the adapter names, around types in place of bases.
"""

from collections.abc import Sequence
from pathlib import Path

import jax

from .._disk.adapter import save_adapter
from ..peft._load import put_around
from ..peft._read import read
from ..peft._save import save
from .console import namer, read_names, refuse_existing
from .content import content_of_peft, is_peft, refuse_state, refuse_ties
from .skeleton import skeleton_of_ours, skeleton_of_peft


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
    with jax.enable_x64(True):  # Or JAX would narrow float64 without a word.
        if is_peft(source):
            _to_ours(source, goal, names, transposed)
        else:
            refuse_state(source)
            refuse_ties(source)
            model = skeleton_of_ours(source)
            save(
                goal,
                model,
                names=read_names(names),
                transposed=transposed,
                fan_in_fan_out=fan_in_fan_out,
            )
    return 0


def _to_ours(
    source: Path, goal: Path, names: Path | None, transposed: Sequence[str]
) -> None:
    if goal.is_dir():
        raise IsADirectoryError(f"{goal} is a folder; a file is to be written.")
    adapter = read(source)
    content = content_of_peft(adapter)
    called = namer(names, [*content.updates, *content.values])
    skeleton = skeleton_of_peft(content, called, transposed)
    in_peft = skeleton.names.__getitem__
    model = put_around(adapter, skeleton.tree, names=in_peft, transposed=transposed)
    save_adapter(goal, model)
