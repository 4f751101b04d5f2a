"""The programs of UPSTREAM.md still show what Quax lacks, without `lora_quax`."""

import json
import pathlib
import re
import subprocess
import sys

import pytest


_TEXT = (pathlib.Path(__file__).parents[1] / "UPSTREAM.md").read_text()
_PARTS = re.split(r"^## ", _TEXT, flags=re.MULTILINE)


def _program(part: str) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", part, re.DOTALL))


_PROGRAMS = {part.splitlines()[0]: _program(part) for part in _PARTS[1:]}
_RUN = """
import json, sys, traceback
import quax
setup, programs = json.load(sys.stdin)
errors = {}
for name, program in programs.items():
    namespace = {}
    quax._dispatch._dispatch_cache.clear()  # As in a process of its own.
    try:
        exec(setup, namespace)
        exec(program, namespace)
    except Exception:
        errors[name] = traceback.format_exc()
assert "lora_quax" not in sys.modules
print(json.dumps(errors))
"""


@pytest.fixture(scope="module")
def errors():
    done = subprocess.run(
        [sys.executable, "-c", _RUN],
        input=json.dumps([_program(_PARTS[0]), _PROGRAMS]),
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("part", _PROGRAMS)
def test_the_fault_is_still_there(part, errors):
    assert part not in errors, errors[part]
