"""The steps of training that are compiled, and what their programs say. None is run.

The batch grows with the devices: a row of tokens for each. So with a split of rows each
device has as many as ever, and with a split of the weights alone it has all of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from lora_quax._cli.plan.compiled import compiled, Program
from lora_quax._cli.plan.run import mesh_of
from lora_quax._cli.plan.sizes import Sizes
from lora_quax._cli.plan.step import Job, llama_of, Step, step_between, step_of


LORA, FULL, QLORA = "LoRA", "full fine-tuning", "LoRA, nf4"
# A base is sent along fsdp alone, and so its kind matters there.
STEPS = {LORA: ("dp", "fsdp", "tp"), FULL: ("dp", "fsdp", "tp"), QLORA: ("fsdp",)}
DEVICES, LAYERS, WIDTHS = (1, 2, 4, 8), (2, 4, 8), (512, 1024, 2048)
RANK, TOKENS, WORDS, HEAD = 16, 128, 512, 64
HIDDEN = 3  # Times the width, of the perceptron.


MIDDLE = dict(devices=8, layers=4, width=512)


@dataclass(frozen=True)
class Cell:
    """A step of training, how it is split, and how large it is."""

    step: str
    split: str
    devices: int
    layers: int
    width: int


@dataclass(frozen=True)
class Figures:
    """In bytes, of one device."""

    sent: dict[str, int]  # By kind of collective: what comes out of it, in all turns.
    arguments: int  # Weights, factors, Adam's state, and a batch.
    besides: int  # The most that is there besides them.


def cells() -> Iterator[Cell]:
    """One number at a time differs from those of the middle."""
    swept = dict(devices=DEVICES, layers=LAYERS, width=WIDTHS)
    sizes = [MIDDLE | {size: n} for size, ns in swept.items() for n in ns]
    sizes = [x for i, x in enumerate(sizes) if x not in sizes[:i]]
    for step, splits in STEPS.items():
        for split in splits:
            yield from (Cell(step, split, **x) for x in sizes)


def job_of(cell: Cell) -> Job:
    heads = cell.width // HEAD
    return Job(
        sizes=Sizes(
            layers=cell.layers,
            width=cell.width,
            hidden=HIDDEN * cell.width,
            heads=heads,
            kv_heads=heads,
            head=HEAD,
            words=WORDS,
            tied=False,
        ),
        axes={cell.split: cell.devices},
        base="nf4" if cell.step == QLORA else "float32",
        rank=RANK,
        batch=cell.devices,
        tokens=TOKENS,
        checkpoint="nothing_saveable",
        targets=("all-linear",),
    )


def figures(cell: Cell) -> Figures:
    """Compiles the step."""
    job = job_of(cell)
    mesh = mesh_of(job.axes)
    if cell.step == FULL:
        model = llama_of(job, mesh)
        trained = eqx.partition(model, lambda x: hasattr(x, "shape"))
        step = step_between(*trained, job, mesh)
    else:
        step = step_of(job, mesh)
    program = compiled(_with_adam(step, mesh), mesh, donated=True)
    memory = program.memory_analysis()
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Figures(
        sent=Program(program.as_text()).traffic(),
        arguments=memory.argument_size_in_bytes,
        besides=memory.temp_size_in_bytes + new,
    )


def _with_adam(step: Step, mesh: Any) -> Step:
    """A step whose parameters are those of a training step: with Adam's state."""
    optim = optax.adam(1e-3)
    everywhere = NamedSharding(mesh, PartitionSpec())
    laid = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    state = optax.tree.map_params(
        optim,
        lambda x, like: laid(x, like.sharding),
        jax.eval_shape(optim.init, step.params),
        step.params,
        transform_non_params=lambda x: laid(x, everywhere),
    )

    def run(trained, frozen, batch):
        params, state = trained
        loss, grads = step.run(params, frozen, batch)
        updates, state = optim.update(grads, state, params)
        return loss, (optax.apply_updates(params, updates), state)

    return Step(run, (step.params, state), step.frozen, step.batch)
