"""`plan`: what a step of LoRA takes of each device of a mesh, as a table."""

import contextlib
import dataclasses
import json
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh
from rich.box import SIMPLE
from rich.table import Table

from ..console import show
from .compiled import compiled, Program
from .sizes import MOST, read_sizes
from .split import check_divides, check_tiles, read_mesh
from .step import BASES, CHECKPOINTS, Job, QUANTISED, step_of
from .work import bytes_of, flops, sent


@dataclasses.dataclass(frozen=True)
class Plan:
    """Of one device bytes, in a step; of all together the operations of products."""

    devices: int
    base: int
    factors: int
    gradients: int
    optimiser: int
    flops: int
    sent: dict[str, int]  # What the split has to send, by what it is for.
    # Of the program that XLA makes of it, where it was asked:
    compiled_for: str | None = None
    activations: int | None = None
    temporaries: int | None = None
    collectives: dict[str, int] | None = None  # by kind

    @property
    def total(self) -> int:
        kinds = self.base, self.factors, self.gradients, self.optimiser
        return sum(kinds) + (self.activations or 0) + (self.temporaries or 0)


def plan(args: Any) -> int:
    """Prints the plan. **Returns:** 0.

    **Raises:** `ValueError` for what cannot be planned; as `read_sizes`; `ImportError`.
    """
    job = job_of(args)
    out = on_paper(job) if args.no_compile else with_program(job)
    if args.json:
        print(json.dumps({**dataclasses.asdict(out), "total": out.total}, indent=2))
    else:
        show(_table(job, out))
    return 0


def job_of(args: Any) -> Job:
    """**Raises:** as `plan`."""
    for name in ("rank", "batch", "tokens"):
        if not 1 <= getattr(args, name) <= MOST:
            raise ValueError(
                f"--{name} is {getattr(args, name)}, and is to be above 0, and "
                f"{MOST:,} at most."
            )
    for name, known in dict(base=BASES, checkpoint=CHECKPOINTS).items():
        if getattr(args, name) not in known:
            raise ValueError(
                f"--{name} is {getattr(args, name)!r}, and is to be one of "
                f"{', '.join(known)}."
            )
    axes, sizes = read_mesh(args.mesh), read_sizes(args.model)
    check_divides(axes, sizes, args.batch)
    if args.base in QUANTISED:
        check_tiles(args.base, sizes)
    return Job(
        sizes=sizes,
        axes=axes,
        base=args.base,
        rank=args.rank,
        batch=args.batch,
        tokens=args.tokens,
        checkpoint=args.checkpoint,
        targets=tuple(args.targets or ["all-linear"]),
    )


def on_paper(job: Job) -> Plan:
    """By shapes alone, on a mesh of any size.

    **Raises:** as `step_of`.
    """
    types = (AxisType.Auto,) * len(job.axes)
    mesh = AbstractMesh((*job.axes.values(),), (*job.axes,), axis_types=types)
    step = step_of(job, mesh)
    factors = bytes_of(step.params)
    return Plan(
        devices=math.prod(job.axes.values()),
        base=bytes_of(step.frozen),
        factors=factors,
        gradients=factors,
        optimiser=2 * factors,  # Adam's two moments.
        flops=flops(step),
        sent=sent(job, step),
    )


def with_program(job: Job) -> Plan:
    """The same, and what XLA says of the program.

    **Raises:** `ValueError` if there are too few devices; as `step_of`.
    """
    mesh = mesh_of(job.axes)  # First: with what comes next JAX begins.
    paper = on_paper(job)
    executable = compiled(step_of(job, mesh), mesh)
    program = Program(executable.as_text())
    # The loops over layers write what the layers keep, and the gradients.
    kept = max(0, program.stacks(job.sizes.layers) - paper.gradients)
    temporary = executable.memory_analysis().temp_size_in_bytes
    return dataclasses.replace(
        paper,
        compiled_for=mesh.devices.flat[0].platform,
        activations=kept,
        temporaries=max(0, temporary - kept),
        collectives=program.traffic(),
    )


_MOST_DEVICES = 4096  # That are not there.


def mesh_of(axes: dict[str, int]) -> Mesh:
    """Of this machine's devices, or else of CPU devices that are not there: a program
    is compiled for them, and never run."""
    n = math.prod(axes.values())
    with contextlib.suppress(RuntimeError):  # JAX has begun, with those that it has.
        jax.config.update("jax_num_cpu_devices", min(n, _MOST_DEVICES))
    devices = jax.devices()
    if len(devices) < n:
        devices = jax.devices("cpu")
    if len(devices) < n > _MOST_DEVICES:
        raise ValueError(
            f"The mesh is of {n:,} devices, and a program is compiled for "
            f"{_MOST_DEVICES:,} at most. --no-compile says what shapes alone say."
        )
    if len(devices) < n:
        raise ValueError(
            f"The mesh is of {n} devices, and JAX has begun with {len(devices)}. In a "
            "process of its own, `python -m lora_quax plan` has as many as it needs."
        )
    types = (AxisType.Auto,) * len(axes)
    shape = np.array(devices[:n]).reshape(*axes.values())
    return Mesh(shape, (*axes,), axis_types=types)


_MEANINGS = dict(
    base="the weights that do not train, as they are kept",
    factors="what trains, in float32",
    gradients="of the factors",
    optimiser="Adam's two moments",
    activations="what the layers keep until the way back",
    temporaries="the most that is there besides, for a while",
)


def _table(job: Job, plan: Plan) -> Table:
    mesh = " x ".join(f"{name}={n}" for name, n in job.axes.items())
    table = Table(box=SIMPLE, title_justify="left", show_footer=True)
    table.title = (
        f"A step of LoRA of rank {job.rank} on {plan.devices:,} devices, {mesh}: base "
        f"{job.base}, {job.batch:,} rows of {job.tokens:,} tokens, checkpoint "
        f"{job.checkpoint}"
    )
    total = f"{plan.total:,}" if plan.compiled_for else ""
    table.add_column("of one device", footer="in all" if total else "")
    table.add_column("bytes", justify="right", footer=total)
    table.add_column("", footer=_size(plan.total) if total else "", justify="right")
    table.add_column("")
    for name, meaning in _MEANINGS.items():
        n = getattr(plan, name)
        if n is not None:
            table.add_row(name, f"{n:,}", _size(n), meaning)
    table.add_section()
    for name, n in plan.sent.items():
        table.add_row(f"sent: {name}", f"{n:,}", _size(n), "what the split has to send")
    for name, n in (plan.collectives or {}).items():
        of = f"in the program that XLA makes for {plan.compiled_for}"
        table.add_row(name, f"{n:,}", _size(n), of)
    table.add_section()
    share = plan.flops // plan.devices
    table.add_row("FLOPs", f"{share:,}", f"{share / 1e12:.3g} T", "of products")
    return table


def _size(n: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n} B"
