"""`python -m benchmarks.growth`: compiles every step, and leaves what it says.

Nothing is timed, and nothing run: the same versions of JAX give the same figures on any
machine. They are left in `benchmarks/results/growth.json`, and what is fitted to them
in `docs/guide/sharding.md`.
"""

import dataclasses
import json
from pathlib import Path

import jax

from .. import _report
from .page import write
from .programs import cells, DEVICES, figures


RESULTS = Path(__file__).parents[1] / "results" / "growth.json"


def main() -> None:
    jax.config.update("jax_num_cpu_devices", max(DEVICES))
    facts = _report.facts()
    found = []
    for cell in cells():
        found.append(dataclasses.asdict(cell) | dataclasses.asdict(figures(cell)))
        print(found[-1], flush=True)
    kept = {key: facts[key] for key in ("device", "python", "packages")}
    lines = ",\n".join(f"  {json.dumps(x)}" for x in found)
    RESULTS.write_text(
        f'{{\n "facts": {json.dumps(kept)},\n "programs": [\n{lines}\n ]\n}}\n'
    )
    write(found)


if __name__ == "__main__":
    main()
