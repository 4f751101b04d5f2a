"""The table of `guide/plan.md`: what a step takes of models that nobody has here.

    python docs/plans.py

writes it, in some minutes, and needs no more than the sizes of the models.
"""

import argparse
import json
import re
import tempfile
from pathlib import Path

import jax

from lora_quax._cli.plan.run import job_of, Plan, with_program
from lora_quax._cli.plan.step import Job


PAGE = Path(__file__).parent / "guide" / "plan.md"
# Width, of the perceptron, layers, heads: those of Llama 3.1.
MODELS = {
    "8B": (4096, 14336, 32, 32),
    "70B": (8192, 28672, 80, 64),
    "405B": (16384, 53248, 126, 128),
}
MESHES = {8: "fsdp=8", 32: "fsdp=8,tp=4", 128: "fsdp=16,tp=8", 512: "fsdp=64,tp=8"}
CELLS = [(model, "nf4", devices) for model in MODELS for devices in MESHES]
TOKENS = 2048
HEAD = (
    "| model | base | devices | mesh | base | trains | activations | temporaries | in "
    "all | sent | TFLOPs |\n|---|---|--:|---|--:|--:|--:|--:|--:|--:|--:|"
)


def config(model: str) -> dict:
    width, hidden, layers, heads = MODELS[model]
    return dict(
        model_type="llama",
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        vocab_size=128256,
    )


def job(model: str, base: str, devices: int) -> Job:
    """One row of tokens for each device."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config(model)))
        return job_of(
            argparse.Namespace(
                model=path,
                mesh=MESHES[devices],
                rank=16,
                base=base,
                batch=devices,
                tokens=TOKENS,
                checkpoint="nothing_saveable",
                targets=None,
            )
        )


def exact(model: str, base: str, devices: int, plan: Plan) -> str:
    """The columns that shapes alone say."""
    trains = plan.factors + plan.gradients + plan.optimiser
    mesh = MESHES[devices]
    return f"| {model} | {base} | {devices} | {mesh} | {gb(plan.base)} | {gb(trains)} |"


def row(model: str, base: str, devices: int, plan: Plan) -> str:
    compiled = plan.activations or 0, plan.temporaries or 0, plan.total
    numbers = *map(gb, compiled), gb(sum(plan.sent.values()))
    tflops = f"{float(f'{plan.flops / devices / 1e12:.3g}'):,g}"
    return f"{exact(model, base, devices, plan)} {' | '.join(numbers)} | {tflops} |"


def gb(n: int) -> str:
    return f"{n / 1e9:.3g}"


def main() -> None:
    jax.config.update("jax_num_cpu_devices", max(MESHES))
    jax.devices()  # With so many JAX begins.
    rows = []
    for cell in CELLS:
        rows.append(row(*cell, with_program(job(*cell))))
        print(rows[-1], flush=True)
    table = "\n".join([HEAD, *rows, ""])
    text = re.sub(
        r"^\| model \|(.*\n\|)*.*\n", lambda _: table, PAGE.read_text(), flags=re.M
    )
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
