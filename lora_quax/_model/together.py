"""What several processes do together: the same, or nothing.

Each process of `jax.distributed` has a part of the devices, and runs the same program.
Where an array lies on devices of several, a step that one process takes and another
does not would have the first one wait. So they first tell each other what they are
about to do.
"""

import contextlib
import functools as ft
import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.core import Tracer
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import AbstractMesh, Mesh, Sharding
from jaxtyping import PyTree

from .paths import dotted


_LINES = 8  # Of a message.
_CALL = "the call"


def is_shared(tree: PyTree) -> bool:
    """Whether the processes hold arrays of a tree together.

    **Raises:** as `is_on_all`.
    """
    leaves = jax.tree.leaves(tree)
    if any(isinstance(x, Tracer) for x in leaves):  # They are traced as one program.
        return False
    arrays = (x for x in leaves if isinstance(x, jax.Array))
    found = {x.sharding for x in arrays if not x.is_fully_addressable}
    return any([is_on_all(sharding) for sharding in found])


def is_on_all(sharding: Sharding) -> bool:
    """Whether something lies on devices of all processes, and not on those of one.

    **Raises:** `ValueError` if it lies on devices of some, of which nobody could tell
    whether they all call.
    """
    if sharding.is_fully_addressable:
        return False
    found, n = {d.process_index for d in sharding.device_set}, jax.process_count()
    if n > 1 and len(found) < n:
        raise ValueError(
            f"The mesh has devices of the processes {sorted(found)}, and there are {n} "
            "processes. What several hold has to lie on a mesh with devices of all of "
            "them, and what one holds, on its own devices alone."
        )
    return True


def whole(x: Any) -> np.ndarray:
    """All numbers of an array, on each process; all of them have to ask for it."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        x = process_allgather(x, tiled=True)
    return np.asarray(x)


def described(tree: PyTree) -> dict[str, str]:
    """What there is to compare of a tree, by path: types, shapes, and where an array is
    split; and a digest of the numbers of each that a process has by itself."""
    leaves, _ = jtu.tree_flatten_with_path(tree)
    return {dotted(keys): _described(x) for keys, x in leaves if hasattr(x, "dtype")}


def _described(x: Any) -> str:
    out = f"{x.dtype.name}[{','.join(map(str, x.shape))}]"
    sharding = getattr(x, "sharding", None)
    if isinstance(sharding, jax.sharding.NamedSharding):
        out += f" split as {sharding.spec} on {said_of(sharding.mesh)}"
    if isinstance(x, jax.ShapeDtypeStruct) or is_shared(x):
        return out
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return f"{out} with the digest {digest(np.asarray(x).tobytes())}"


@ft.cache
def said_of(mesh: Mesh | AbstractMesh) -> str:
    """The axes of a mesh, and its devices, if they are in an order of their own."""
    out = str(dict(mesh.shape))
    ids = [d.id for d in mesh.devices.flat] if isinstance(mesh, Mesh) else []
    if ids == sorted(ids):
        return out
    order = f"{ids}" if len(ids) <= _LINES else digest(str(ids).encode())
    return f"{out} of devices in the order {order}"


def digest(x: bytes) -> str:
    return hashlib.sha256(x).hexdigest()[:12]


@contextlib.contextmanager
def in_step(doing: str, shared: bool) -> Iterator[dict[str, str]]:
    """Has an error of one process be one of all, and one if they are not about to do
    the same. What is done within must need no other process.

    **Arguments:**

    - `doing`: the name of the function that all processes have called.
    - `shared`: whether there is more than one process to it.

    **Returns:** what this process has to say of what it is about to do, which is filled
    in, and compared in the end, if it is shared.

    **Raises:** what was raised within; on the other processes `RuntimeError`, which
    quotes it. `ValueError`, on all, if they differ.
    """
    said = {_CALL: doing}
    if not shared:
        yield said
        return
    try:
        yield said
    except Exception as e:
        _exchange(json.dumps({"": f"{type(e).__name__}: {e}"}))
        raise
    texts = _exchange(json.dumps(said, sort_keys=True))
    if len(set(texts)) > 1:
        _refuse(doing, [json.loads(text) for text in texts])


def _exchange(text: str) -> list[str]:
    """What each process says. As long as all say the same, little is sent."""
    mine = text.encode()
    head = hashlib.sha256(mine).digest() + len(mine).to_bytes(8, "little")
    heads = [bytes(row) for row in _rows(head)]
    if len(set(heads)) == 1:
        return [text] * len(heads)
    sizes = [int.from_bytes(head[-8:], "little") for head in heads]
    rows = _rows(mine.ljust(max(sizes)))
    return [bytes(row)[:n].decode() for row, n in zip(rows, sizes)]


def _rows(x: bytes) -> np.ndarray:
    return process_allgather(np.frombuffer(x, np.uint8))


def _refuse(doing: str, said: list[dict[str, str]]) -> None:
    failed = [(i, x[""]) for i, x in enumerate(said) if "" in x]
    if failed:
        i, why = failed[0]
        raise RuntimeError(
            f"`{doing}` has failed on process {i}, and so on all of them, with {why}"
        )
    i = next(i for i, x in enumerate(said) if x != said[0])
    one, other = said[0], said[i]
    if one.get(_CALL) != other.get(_CALL):
        raise ValueError(
            f"The processes disagree: process 0 has called `{one[_CALL]}`, and process "
            f"{i} `{other[_CALL]}`."
        )
    names = sorted(x for x in one.keys() | other.keys() if one.get(x) != other.get(x))
    lines = [
        f"\n  - `{name}`: on process 0 {one.get(name, 'nothing')}, on process {i} "
        f"{other.get(name, 'nothing')}"
        for name in names[:_LINES]
    ]
    if len(names) > _LINES:
        lines.append(f"\n  - and {len(names) - _LINES} more")
    raise ValueError(
        f"The processes disagree, and each has to call `{doing}` with the same:"
        + "".join(lines)
    )


def once(doing: str, shared: bool, write: Callable[[], None]) -> None:
    """Has one process write, and the others wait until it has.

    **Raises:** as `in_step`.
    """
    with in_step(doing, shared):
        if is_writer(shared):
            write()


def is_writer(shared: bool) -> bool:
    return not shared or jax.process_index() == 0
