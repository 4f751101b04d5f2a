"""Programs of several processes on this machine, none of which outlives its time."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
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
        heartbeat_timeout_seconds=30,
    )


class Process(subprocess.Popen):
    """One that prints to a file: a pipe that nobody reads fills up, and holds it up."""

    def __init__(self, command: list[str], env: dict[str, str]):
        self._output = tempfile.TemporaryFile("w+")
        out, err = self._output, subprocess.STDOUT
        super().__init__(command, env=env, stdout=out, stderr=err)

    def said(self) -> str:
        self._output.seek(0)
        return self._output.read()


@contextlib.contextmanager
def started(
    script: str, *args, processes: int = 1, devices: int = 8
) -> Iterator[list[Process]]:
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
    command = [sys.executable, "-X", "faulthandler", str(TESTS / script)]
    command += map(str, args)
    port = str(_free_port())
    running = []
    with contextlib.ExitStack() as stack:
        for i in range(processes):
            which = [port, str(processes), str(i)] if processes > 1 else []
            one = stack.enter_context(Process(command + which, env))
            stack.callback(one.kill)
            running.append(one)
        yield running


def finish(running: list[Process], timeout: float = 600) -> None:
    """Waits until all have ended well."""
    end = time.monotonic() + timeout
    try:
        codes = [one.wait(timeout=end - time.monotonic()) for one in running]
    except subprocess.TimeoutExpired as e:
        raise AssertionError(f"not done in {timeout} s: {where(running)}") from e
    assert not any(codes), where(running)


def where(running: list[Process]) -> str:
    """What each has printed, and where it is if it still runs, which ends it."""
    for one in running:
        one.send_signal(signal.SIGABRT)  # By `faulthandler` it prints that.
    for one in running:
        one.wait()
    return "\n".join(f"process {i}:\n{one.said()}" for i, one in enumerate(running))


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
