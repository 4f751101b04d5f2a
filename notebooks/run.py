"""Executes notebooks in this folder afresh and shows what each one closes with.

`python notebooks/run.py` runs the quickstart, `python notebooks/run.py NAME` another.
The files are left alone; `--save` writes the new outputs back, and into README the
picture and the table of a notebook that it shows. Progress is shown on a terminal, and
neither in a log nor in what is saved. `LORA_QUAX_SHORT=1` in the environment cuts short
the notebooks that take long.
"""

import argparse
import base64
import os
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient


HERE = Path(__file__).parent
ROOT = HERE.parent
NAMES = sorted(path.stem for path in HERE.glob("*.ipynb"))


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


def closing(notebook) -> str:
    """What its last cell of code shows."""
    last = [cell for cell in notebook.cells if cell.cell_type == "code"][-1]
    return "\n".join(map(as_text, last.outputs))


def show_in_readme(name: str, notebook) -> None:
    """The picture of the cell with the tag `readme`, and the table it closes with."""
    readme, image = ROOT / "README.md", f"docs/{name}.png"
    for cell in notebook.cells:
        if "readme" in cell.metadata.get("tags", ()):
            shown = [output.get("data", {}) for output in cell.outputs]
            [data] = [data["image/png"] for data in shown if "image/png" in data]
            (ROOT / image).write_bytes(base64.b64decode(data))
            rows = [line.strip() for line in closing(notebook).splitlines()]
            table = "".join(f"{row}\n" for row in rows if row)
            # It stands below the picture.
            pattern = rf"(?<=\({re.escape(image)}\)\n\n)(\|.*\n)+"
            text, found = re.subn(pattern, lambda _: table, readme.read_text())
            assert found == 1, f"{readme} has no place for the table of {name}"
            readme.write_text(text)


def run(path: Path, save: bool) -> str:
    """Executes one notebook; an error in a cell is raised here.

    **Returns:** what its last cell of code shows.
    """
    notebook = nbformat.read(path, as_version=4)
    LiveClient(
        notebook,
        timeout=1800,
        resources={"metadata": {"path": str(path.parent)}},
        coalesce_streams=True,
        record_timing=False,
        extra_arguments=["--log-level=ERROR"],
    ).execute()
    if save:
        # Which interpreter ran it is no part of the notebook.
        notebook.metadata.get("language_info", {}).pop("version", None)
        nbformat.write(notebook, path)
        show_in_readme(path.stem, notebook)
    return closing(notebook)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--save", action="store_true", help="write the outputs back")
    given = parser.parse_args()
    names = given.names or ["quickstart"]
    if unknown := sorted(set(names) - set(NAMES)):
        parser.error(f"no notebook {unknown[0]!r} here; there are {', '.join(NAMES)}")
    if given.save and os.environ.get("LORA_QUAX_SHORT"):
        parser.error("LORA_QUAX_SHORT is set, and what it cuts short is not saved")
    if given.save or not sys.stdout.isatty():
        # tqdm reads it, in the kernel as well.
        os.environ.setdefault("TQDM_DISABLE", "1")
    for name in names:
        print(f"Running {name}.ipynb", flush=True)
        print(f"\n{run(HERE / f'{name}.ipynb', given.save)}", flush=True)


if __name__ == "__main__":
    main()
