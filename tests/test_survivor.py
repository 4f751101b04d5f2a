"""A run that is killed at any moment goes on as if it had not been.

`KILLS` in the environment says how often it is killed, and `KILL_SEED` when.
"""

import importlib
import os
import random
import time
from pathlib import Path

import jax
import pytest
from processes import finish, started, where


KILLS = int(os.environ.get("KILLS", "2"))
SEED = int(os.environ.get("KILL_SEED", random.randrange(10**6)))
_START = 6.0  # Seconds within which a process has begun, or not quite.


def losses(folder: Path) -> dict[int, set[str]]:
    """What each step was said to have lost, by any life of any process."""
    out: dict[int, set[str]] = {}
    for path in folder.glob("losses.*"):
        for line in path.read_text().splitlines(keepends=True):
            step, _, value = line.partition(" ")
            if value.endswith("\n"):  # Or it was killed as it wrote.
                out.setdefault(int(step), set()).add(value.strip())
    return out


def lines(folder: Path) -> int:
    return sum(len(path.read_bytes().splitlines()) for path in folder.glob("losses.*"))


def live(folder: Path, rng: random.Random, shape: dict) -> None:
    """One life of a run: until some moment, when it is killed."""
    before = lines(folder)
    steps, more = rng.randrange(0, 6), rng.uniform(0, 0.3)
    with started("survivor.py", folder, 10**6, **shape) as running:
        if rng.random() < 0.25:
            time.sleep(rng.uniform(0, _START))
        else:
            end = time.monotonic() + 300
            while lines(folder) - before <= steps * len(running):
                alive = all(one.poll() is None for one in running)
                assert alive, f"it ended by itself: {where(running)}"
                assert time.monotonic() < end, f"no step was taken: {where(running)}"
                time.sleep(0.01)
            time.sleep(more)
        for one in running if rng.random() < 0.5 else [rng.choice(running)]:
            one.kill()


def ends(folder: Path, until: int, shape: dict) -> None:
    with started("survivor.py", folder, until, **shape) as running:
        finish(running)


# How many processes, with how many devices; on how many of one it is taken up as well.
RUNS = {
    "alone": (dict(processes=1, devices=8), 4),
    "two processes": (dict(processes=2, devices=2), 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("shape, fewer", RUNS.values(), ids=RUNS)
def test_a_run_that_is_killed(shape, fewer, tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    survivor = importlib.import_module("survivor")
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    killed.mkdir()
    print(f"KILL_SEED={SEED}")
    rng = random.Random(SEED)
    for _ in range(KILLS):
        live(killed, rng, shape)
    until = max(losses(killed), default=0) + 2
    ends(killed, until, shape)
    if shape["processes"] == 1:
        survivor.train(whole, until + 3)
    else:
        ends(whole, until + 3, shape)
    expected = losses(whole)
    assert len(expected) == until + 3
    assert losses(killed) == {step: expected[step] for step in range(1, until + 1)}

    # Taken up on fewer devices, by one process.
    state = survivor.train(killed, until + 3, jax.devices()[:fewer])
    for step in range(until + 1, until + 4):
        (one,), (other,) = expected[step], losses(killed)[step]
        assert float.fromhex(one) == pytest.approx(float.fromhex(other), rel=1e-6)

    # What is kept is of the shapes of what trains, and of no other.
    with ocp.StandardCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(killed / "kept" / str(until + 3) / "default")
    kept = metadata.item_metadata.tree
    shapes = lambda tree: sorted(getattr(x, "shape", ()) for x in jax.tree.leaves(tree))
    assert shapes(kept) == shapes(state)
