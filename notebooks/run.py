"""Executes the notebooks in this folder afresh and shows what each one closes with.

`python notebooks/run.py` leaves the files alone; `--save` writes the new outputs back.
Progress is shown on a terminal, and neither in a log nor in what is saved.
"""

import argparse
import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient


HERE = Path(__file__).parent


class LiveClient(NotebookClient):
    """Shows what the cells print, progress bars included, while they run."""

    def process_message(self, msg, cell, cell_index):
        if msg["msg_type"] == "stream":
            stream = getattr(sys, msg["content"]["name"])
            stream.write(msg["content"]["text"])
            stream.flush()
        return super().process_message(msg, cell, cell_index)


def as_text(output) -> str:
    """An output of a cell, as a terminal can show it."""
    if output.output_type == "stream":
        return output.text
    return output.get("data", {}).get("text/plain", "")


def run(path: Path, save: bool) -> str:
    """Executes one notebook; an error in a cell is raised here.

    **Returns:** what its last cell of code shows.
    """
    notebook = nbformat.read(path, as_version=4)
    LiveClient(
        notebook,
        timeout=600,
        resources={"metadata": {"path": str(path.parent)}},
        coalesce_streams=True,
        record_timing=False,
        extra_arguments=["--log-level=ERROR"],
    ).execute()
    if save:
        # Which interpreter ran it is no part of the notebook.
        notebook.metadata.get("language_info", {}).pop("version", None)
        nbformat.write(notebook, path)
    closing = [cell for cell in notebook.cells if cell.cell_type == "code"][-1]
    return "\n".join(map(as_text, closing.outputs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", action="store_true", help="write the outputs back")
    save = parser.parse_args().save
    if save or not sys.stdout.isatty():
        # tqdm reads it, in the kernel as well.
        os.environ.setdefault("TQDM_DISABLE", "1")
    for path in sorted(HERE.glob("*.ipynb")):
        print(f"Running {path.name}", flush=True)
        print(f"\n{run(path, save)}", flush=True)


if __name__ == "__main__":
    main()
