"""What XLA says of a program: its memory, and what its devices send each other."""

import math
import re
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec

from .step import Step


# How fast it runs does not matter, and code of that kind takes no longer to make.
_OPTIONS = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
_CALL = re.compile(r"\b(?:body|to_apply|calls|true_computation)=%?([\w.-]+)")
_TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')
_SHAPE = re.compile(r"\b([a-z]\w+)\[([\d,]*)\]")
_COLLECTIVE = re.compile(
    r"= (?P<types>\(.*?\)|\S+) (?P<kind>all-gather|all-reduce|reduce-scatter|"
    r"all-to-all|collective-permute)(?:-start)?\("
)


def compiled(step: Step, mesh: Any, donated: bool = False) -> Any:
    """The program of a step, its gradients laid out as the factors are.

    **Arguments:**

    - `donated`: whether what trains is given away, for what comes out.
    """
    shardings = jax.tree.map(lambda x: x.sharding, step.params)
    out = NamedSharding(mesh, PartitionSpec()), shardings
    run = jax.jit(step.run, out_shardings=out, donate_argnums=(0,) if donated else ())
    lowered = run.lower(step.params, step.frozen, step.batch)
    is_cpu = mesh.devices.flat[0].platform == "cpu"
    return lowered.compile(compiler_options=_OPTIONS if is_cpu else None)


class _Computation(NamedTuple):
    """A function of a program."""

    sent: dict[str, int]  # bytes by kind
    calls: list[tuple[str, int]]  # others, and how often
    loops: list[str]  # what it repeats
    reads: set[str]  # what it takes out of its argument
    root: list[str]  # the line of what it returns, if there is one


class Program:
    """The text of a program that XLA has compiled for one of many devices."""

    def __init__(self, text: str):
        self.computations: dict[str, _Computation] = {}
        current = _Computation({}, [], [], set(), [])
        for line in text.splitlines():
            if line.endswith("{") and line[:1] in ("%", "E"):
                name = line.removeprefix("ENTRY ").split()[0].lstrip("%")
                if line.startswith("ENTRY"):
                    self.entry = name
                current = _Computation({}, [], [], set(), [])
                self.computations[name] = current
            else:
                _read(line, current)

    def traffic(self) -> dict[str, int]:
        """The bytes that collectives of each kind give to a device, in all the turns of
        the loops."""
        found: dict[str, dict[str, int]] = {}

        def total(name: str) -> dict[str, int]:
            if name not in found:
                out = dict(self.computations[name].sent)
                for callee, times in self.computations[name].calls:
                    for kind, n in total(callee).items():
                        out[kind] = out.get(kind, 0) + times * n
                found[name] = out
            return found[name]

        return total(self.entry)

    def stacks(self, length: int) -> int:
        """The bytes of what loops write, a part in each of so many turns."""
        out = 0
        for name in {x for c in self.computations.values() for x in c.loops}:
            body = self.computations[name]
            for root in body.root:
                types, operands = root.rsplit(" tuple(", 1)
                names = re.findall(r"%([\w.-]+)", operands)
                shapes = _SHAPE.findall(types.split(" = ", 1)[1])
                out += sum(
                    _size(*shape)
                    for name, shape in zip(names, shapes, strict=True)
                    if name not in body.reads and shape[1].startswith(f"{length},")
                )
        return out


def _read(line: str, into: _Computation) -> None:
    if found := _COLLECTIVE.search(line):
        shapes = _SHAPE.findall(found["types"])
        n = sum(_size(*shape) for shape in shapes)
        into.sent[found["kind"]] = into.sent.get(found["kind"], 0) + n
        return
    trips = _TRIPS.search(line)
    times = int(trips[1]) if trips else 1
    called = _CALL.findall(line)
    into.calls.extend((name, times) for name in called)
    if " while(" in line:
        into.loops.extend(called)
    elif " get-tuple-element(" in line:
        into.reads.add(line.split(" = ")[0].split("%")[-1])
    elif line.lstrip().startswith("ROOT ") and " tuple(" in line:
        into.root.append(line)


def _size(dtype: str, sizes: str) -> int:
    bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
    return math.prod(int(size) for size in sizes.split(",") if size) * bits // 8
