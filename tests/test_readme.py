"""README and the notebooks say what is so. That its programs run is in test_docs."""

import base64
import json
import re
import tomllib
from pathlib import Path

import pytest

import lora_quax
from benchmarks import _markdown


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CI = (ROOT / ".ci/run").read_text()
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def section(title: str) -> str:
    return re.split(r"^## ", README.split(f"## {title}\n")[1], flags=re.M)[0]


def test_it_is_short():
    assert len(README.splitlines()) < 150


def test_versions_agree():
    assert lora_quax.__version__ == PROJECT["version"]
    lowest = PROJECT["requires-python"].removeprefix(">=")
    assert f"Python {lowest} or later" in README
    classifiers = [f"Programming Language :: Python :: {lowest}"]
    assert set(classifiers) <= set(PROJECT["classifiers"])


def test_commands_name_what_exists():
    extras = set(PROJECT["optional-dependencies"])
    text = README + (ROOT / "CONTRIBUTING.md").read_text()
    lists = re.findall(r"pip install -e '\.\[(.*?)\]'", text)
    used = {extra for names in lists for extra in names.split(",")}
    assert used and used <= extras
    for path in re.findall(
        r"\b(?:notebooks|lora_quax|tests|benchmarks|docs|\.ci)/[\w./-]+", text
    ):
        assert (ROOT / path).exists(), path


def test_the_figures_of_speed_are_those_measured():
    table = [line for line in section("Speed").splitlines() if line.startswith("|")]
    assert table == _markdown.readme_table(ROOT / "benchmarks/results")


def test_the_figures_of_minilm_are_those_of_its_notebook():
    notebook = ROOT / "notebooks" / "finetune_minilm.ipynb"
    cells = json.loads(notebook.read_text())["cells"]
    text = section("A pretrained model")

    [closing] = cells[-1]["outputs"]
    lines = "".join(closing["data"]["text/plain"]).splitlines()
    shown = [line.strip() for line in lines if line.strip()]
    assert [line for line in text.splitlines() if line.startswith("|")] == shown

    [tagged] = [cell for cell in cells if "readme" in cell["metadata"].get("tags", [])]
    [output] = tagged["outputs"]
    picture = ROOT / "docs" / "finetune_minilm.png"
    assert "(docs/finetune_minilm.png)" in text
    assert picture.read_bytes() == base64.b64decode(output["data"]["image/png"])


def test_ci_runs_the_commands_of_the_readme():
    # `.ci/run` finds them by how they end; each must be found, once.
    patterns = re.findall(r"readme_command '(.*?)'", CI)
    assert len(patterns) == 3
    for pattern in patterns:
        assert len(re.findall(f"^.*&& .*{pattern}$", README, re.M)) == 1, pattern


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_outputs_are_committed(path):
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    # Run from top to bottom, in a fresh kernel, without an error.
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
    outputs = [output for cell in code for output in cell["outputs"]]
    assert "error" not in {output["output_type"] for output in outputs}
    assert code[-1]["outputs"], "the notebook closes with a table"
