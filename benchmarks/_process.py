"""A peer that lives in another environment, driven one step at a time."""

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree


class Process:
    """A script that takes a step for every line it is sent.

    It is started as `interpreter script inputs.npz`. It prints a line of JSON when it
    is ready, and then for every line on its standard input another, with the `time`
    and the `loss` of a step.

    ```python
    inputs = dict(model=model, x=x, y=y)
    with Process(interpreter, script, inputs, write=save_adapter) as peer:
        time, loss = peer.step()
    ```
    """

    def __init__(
        self,
        interpreter: str | Path,
        script: Path,
        inputs: PyTree,
        write: Callable[[Path], None],
    ):
        """**Arguments:**

        - `interpreter`: the Python to run the script with.
        - `script`: the script.
        - `inputs`: what it computes with: arrays and numbers, which it finds in the
            file under their paths, such as `model.norm.weight`.
        - `write`: leaves what else it needs in the folder of that file.

        What the script says when it is ready is kept as `ready`.

        **Raises:** `RuntimeError` if the script ends instead; so does `step`.
        """
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        np.savez(folder / "inputs.npz", **_by_path(inputs))
        write(folder)
        # In a file, which cannot fill up as a pipe does.
        self._errors = folder / "stderr"
        with self._errors.open("wb") as errors:
            self._child = subprocess.Popen(
                [str(interpreter), str(script), str(folder / "inputs.npz")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        try:
            self.ready = self._answer()
        except BaseException:
            self.close()
            raise

    def step(self) -> tuple[float, float]:
        """Takes a step, and returns its time, as the script took it, and its loss."""
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `_answer` says what happened.
            print(file=self._child.stdin, flush=True)
        answer = self._answer()
        return answer["time"], answer["loss"]

    def close(self) -> None:
        """Ends the script."""
        self._child.communicate()  # Closes its input, which is how it is told.
        self._folder.cleanup()

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _answer(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            code, errors = self._child.wait(), self._errors.read_text()
            raise RuntimeError(
                f"{self._child.args} ended with status {code}:\n{errors}"
            )
        return json.loads(line)


def _by_path(inputs: PyTree) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(inputs)
    }


def check_imports(interpreter: str | Path, *modules: str) -> None:
    """That an interpreter is there, and can import what a script needs.

    **Raises:** `ImportError` if not, as an import in this process would.
    """
    command = [str(interpreter), "-c", f"import {', '.join(modules)}"]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except OSError as e:
        raise ImportError(f"{interpreter} cannot be run: {e}") from e
    except subprocess.CalledProcessError as e:
        # The last line of a traceback is the error itself.
        reason = e.stderr.strip().rpartition("\n")[2]
        raise ImportError(
            f"{interpreter} cannot import {', '.join(modules)}: {reason}"
        ) from e
