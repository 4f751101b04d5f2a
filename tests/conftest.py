import os
import random


# Before JAX is imported: `shard_map` is tested on two devices, wherever the tests run.
# A program of a test runs once or twice, so what counts is how fast it compiles.
_flags = (
    "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true"
)
os.environ["XLA_FLAGS"] = f"{_flags} {os.environ.get('XLA_FLAGS', '')}".strip()

import jaxtyping  # noqa: E402
import pytest  # noqa: E402


# The annotations of shapes and types are checked whenever a function is called.
jaxtyping.install_import_hook("lora_quax", "beartype.beartype")


@pytest.fixture
def x64():
    import jax

    with jax.enable_x64(True):
        yield


class _GetKey:
    """A fresh random key for every call; its seed is printed when a test fails, and
    `GETKEY_SEED` in the environment sets it."""

    def __init__(self):
        self.seed = int(os.environ.get("GETKEY_SEED", random.randint(0, 2**31 - 1)))
        self.calls = 0

    def __repr__(self):
        return f"getkey(seed={self.seed})"

    def __call__(self):
        import jax.random as jr

        self.calls += 1
        return jr.fold_in(jr.key(self.seed), self.calls)


@pytest.fixture
def getkey():
    return _GetKey()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    get = getattr(item, "funcargs", {}).get("getkey")
    if get is not None and report.failed:
        report.sections.append(("random keys", repr(get)))
    return report


_TESTS_PER_CACHE = 100
_finished = 0


def pytest_runtest_teardown(item):
    """Every program compiled stays in memory, mapped, until JAX's caches are cleared,
    and a process may map only so much: after a thousand tests it dies."""
    global _finished
    del item
    _finished += 1
    if _finished % _TESTS_PER_CACHE == 0:
        import jax

        jax.clear_caches()
