"""Programs of several processes on this machine, none of which outlives its time."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax


TESTS = Path(__file__).parent
_DEVICES = re.compile(r"--xla_force_host_platform_device_count=\d+")


def join(port: str, processes: str, index: str) -> None:
    """Makes this process one of several, over loopback."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        f"127.0.0.1:{port}",
        int(processes),
        int(index),
        initialization_timeout=90,
        heartbeat_timeout_seconds=30,
    )


@contextlib.contextmanager
def started(
    script: str, *args, processes: int = 1, devices: int = 8
) -> Iterator[list[subprocess.Popen]]:
    """A script of `tests/`, in several processes with so many devices each; of more
    than one each is told the port, how many there are, and which it is. What still
    runs in the end is killed."""
    flags = _DEVICES.sub("", os.environ.get("XLA_FLAGS", ""))
    flags += f" --xla_force_host_platform_device_count={devices}"
    env = {
        **os.environ,
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
    }
    command = [sys.executable, str(TESTS / script), *map(str, args)]
    port = str(_free_port())
    running = []
    with contextlib.ExitStack() as stack:
        for i in range(processes):
            which = [port, str(processes), str(i)] if processes > 1 else []
            one = subprocess.Popen(
                command + which,
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            stack.enter_context(one)
            stack.callback(one.kill)
            running.append(one)
        yield running


def finish(running: list[subprocess.Popen], timeout: float = 240) -> list[str]:
    """What each has printed, once all have ended well."""
    end = time.monotonic() + timeout
    said = [one.communicate(timeout=end - time.monotonic())[0] for one in running]
    for one, text in zip(running, said):
        assert one.returncode == 0, text
    return said


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
