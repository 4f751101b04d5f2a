"""How the tests are run: flags of JAX, the order, seeds, and what is switched on.

Of the environment, `ORDER_SEED` sets the order in which programs are run, `GETKEY_SEED`
and `FUZZ_SEED` what is drawn; `KILLS` and `KILL_SEED`, how often and when a run of
`test_survivor` is killed. `LORA_QUAX_CANARY` is a list, with commas, of what JAX
and Quax may do next: `jax_remat3` and other flags of JAX, or `leafwise_custom_vjp`.
"""

import importlib
import os
import random


# Before JAX is imported: meshes are tested on eight devices, wherever the tests run.
# A program of a test runs once or twice, so what counts is how fast it compiles.
_flags = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true"
)
os.environ["XLA_FLAGS"] = f"{_flags} {os.environ.get('XLA_FLAGS', '')}".strip()

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402


# The annotations of shapes and types are checked whenever a function is called.
jaxtyping.install_import_hook("lora_quax", "beartype.beartype")

# What is coming is there before lora_quax is imported, as if it had always been.
CANARY = [name for name in os.environ.get("LORA_QUAX_CANARY", "").split(",") if name]
for _name in CANARY:
    if _name.startswith("jax_"):
        jax.config.update(_name, True)
    else:
        importlib.import_module(_name).install()

# Set here, they are the same in every process of pytest-xdist.
for _name in ("ORDER_SEED", "FUZZ_SEED"):
    os.environ.setdefault(_name, str(random.randrange(10**6)))
_ORDER = f"ORDER_SEED={os.environ['ORDER_SEED']}"


def pytest_report_header():
    return [
        "-m 'not slow' takes about ten minutes on two cores, and all of it 25",
        f"programs run in the order of {_ORDER}",
        f"canary: {', '.join(CANARY) or 'none'}",
    ]


_PROGRAMS = ("test_canary", "test_more_programs", "test_programs", "test_rules")


def pytest_collection_modifyitems(items):
    """One program must not change what another one does, in whatever order they run."""
    places = [i for i, item in enumerate(items) if item.path.stem in _PROGRAMS]
    programs = [items[i] for i in places]
    random.Random(os.environ["ORDER_SEED"]).shuffle(programs)
    for i, item in zip(places, programs):
        items[i] = item


@pytest.fixture(scope="session")
def net():
    """The model that adapters on the command line are of."""
    from cli import Net

    return Net(jax.random.key(0))


@pytest.fixture
def folder(tmp_path):
    """The files that the least configuration of `finetune` names."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model.gguf").touch()
    (tmp_path / "train.jsonl").write_text('{"text": "abc"}\n')
    return tmp_path


@pytest.fixture
def x64():
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
        self.calls += 1
        return jax.random.fold_in(jax.random.key(self.seed), self.calls)


@pytest.fixture
def getkey():
    return _GetKey()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    get = getattr(item, "funcargs", {}).get("getkey")
    if get is not None and report.failed:
        report.sections.append(("random keys", repr(get)))
    if item.path.stem in _PROGRAMS and report.failed:
        report.sections.append(("order of the programs", _ORDER))
    return report


_TESTS_PER_CACHE = 80
_finished = 0


def pytest_runtest_teardown(item):
    """Every program compiled stays in memory, mapped, until JAX's caches are cleared,
    and a process may map only so much: after a thousand tests it dies."""
    global _finished
    del item
    _finished += 1
    if _finished % _TESTS_PER_CACHE == 0:
        jax.clear_caches()
