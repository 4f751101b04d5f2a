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
_COLLECTIVE = re.compile(
    r"= (?P<types>\(.*?\)|\S+) (?P<kind>all-gather|all-reduce|reduce-scatter|"
    r"all-to-all|collective-permute)(?:-start)?\("
)


def compiled(step: Step, mesh: Any) -> Any:
    """The program of a step, its gradients laid out as the factors are."""
    shardings = jax.tree.map(lambda x: x.sharding, step.params)
    out = NamedSharding(mesh, PartitionSpec()), shardings
    lowered = jax.jit(step.run, out_shardings=out).lower(
        step.params, step.frozen, step.batch
    )
    is_cpu = mesh.devices.flat[0].platform == "cpu"
    return lowered.compile(compiler_options=_OPTIONS if is_cpu else None)


class _Computation(NamedTuple):
    sent: dict[str, int]  # bytes by kind
    calls: list[tuple[str, int]]  # others, and how often


def traffic(text: str) -> dict[str, int]:
    """The bytes that collectives of each kind give to one device, in all the turns of
    the loops that a program of XLA has."""
    computations, entry = _read(text)
    found: dict[str, dict[str, int]] = {}

    def total(name: str) -> dict[str, int]:
        if name not in found:
            out = dict(computations[name].sent)
            for callee, times in computations[name].calls:
                for kind, n in total(callee).items():
                    out[kind] = out.get(kind, 0) + times * n
            found[name] = out
        return found[name]

    return total(entry)


def _read(text: str) -> tuple[dict[str, _Computation], str]:
    computations: dict[str, _Computation] = {}
    entry, current = "", _Computation({}, [])
    for line in text.splitlines():
        if line.endswith("{") and line[:1] in ("%", "E"):
            name = line.removeprefix("ENTRY ").split()[0].lstrip("%")
            entry = name if line.startswith("ENTRY") else entry
            current = computations[name] = _Computation({}, [])
            continue
        if found := _COLLECTIVE.search(line):
            kind = found["kind"]
            current.sent[kind] = current.sent.get(kind, 0) + _bytes(found["types"])
            continue
        trips = _TRIPS.search(line)
        times = int(trips[1]) if trips else 1
        current.calls.extend((name, times) for name in _CALL.findall(line))
    return computations, entry


def _bytes(types: str) -> int:
    out = 0
    for dtype, sizes in re.findall(r"\b([a-z]\w+)\[([\d,]*)\]", types):
        bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
        out += math.prod(int(size) for size in sizes.split(",") if size) * bits // 8
    return out
