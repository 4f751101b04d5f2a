"""A training run that may be killed at any moment: it goes on from what orbax kept.

`python tests/survivor.py FOLDER UNTIL [PORT PROCESSES INDEX]` takes steps until there
are that many, on a mesh of all devices, those of the other processes too, and writes
the loss of each to `FOLDER/losses.INDEX`. What is kept is what trains, the state of the
optimiser, the key, the step, and the position in the data; never the base.
"""

import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import orbax.checkpoint as ocp
import quax
from jax.sharding import NamedSharding, PartitionSpec as P
from processes import join

import lora_quax


WIDTH, BATCH, EXAMPLES = 128, 8, 56
OPTIM = optax.adam(1e-2)
DATA = np.random.default_rng(0).normal(size=(EXAMPLES, 16)).astype(np.float32)


def start(mesh):
    """The base, split over the devices, and the state of a run that has not begun."""
    plain = eqx.nn.MLP(16, 8, WIDTH, 2, key=jr.key(0))
    plain = lora_quax.shard(plain, mesh, {"weight": P("d")})
    model = lora_quax.loraify(plain, rank=4, key=jr.key(1), dropout=0.1)
    params, frozen = lora_quax.partition(model)
    everywhere = NamedSharding(mesh, P())
    state = dict(
        params=params,
        opt_state=_on_mesh(OPTIM.init(params), everywhere),
        key=_on_mesh(jr.key_data(jr.key(2)), everywhere),
        step=0,
        position=0,
    )
    return state, frozen


def _on_mesh(tree, sharding):
    """What has no place on the mesh, such as the count of steps, is put everywhere."""

    def put(x):
        if isinstance(x.sharding, NamedSharding):
            return x
        host = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda at: host[at])

    return jax.tree.map(put, tree)


@eqx.filter_jit
def _update(params, opt_state, key, frozen, x):
    new_key, key = jr.split(jr.wrap_key_data(key))

    @lora_quax.filter_value_and_grad
    def loss(model, x):
        model = quax.quaxify(lora_quax.with_dropout_key(model, key))
        return jnp.mean((jax.vmap(model)(x) - jnp.sin(x[:, :8])) ** 2)

    value, grads = loss(eqx.combine(params, frozen), x)
    updates, opt_state = OPTIM.update(grads, opt_state)
    params = eqx.apply_updates(params, updates)
    return value, params, opt_state, jr.key_data(new_key)


def train(folder: Path, until: int, devices=None) -> dict[str, Any]:
    """Trains from the last step that was kept. **Returns:** the last state."""
    devices = jax.devices() if devices is None else devices
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((len(devices),), ("d",), auto, devices=devices)
    split = NamedSharding(mesh, P("d"))
    state, frozen = start(mesh)
    names = "params", "opt_state", "key"
    layout = [jax.tree.map(lambda x: x.sharding, state[name]) for name in names]
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    folder.mkdir(exist_ok=True)
    with (
        ocp.CheckpointManager((folder / "kept").resolve(), options=options) as manager,
        open(folder / f"losses.{jax.process_index()}", "a") as losses,
    ):
        if (last := manager.latest_step()) is not None:
            state = manager.restore(last, args=ocp.args.StandardRestore(state))
        for step in range(state["step"], until):
            at = state["position"]
            rows = DATA[np.arange(at, at + BATCH) % EXAMPLES]
            x = jax.make_array_from_callback(rows.shape, split, rows.__getitem__)
            trained = [state[name] for name in names]
            value, *trained = _update(*trained, frozen, x)
            # Each step finds everything where the one before it did.
            state = dict(zip(names, jax.device_put(trained, layout)))
            state |= dict(step=step + 1, position=(at + BATCH) % EXAMPLES)
            losses.write(f"{state['step']} {float(value).hex()}\n")
            losses.flush()
            manager.save(state["step"], args=ocp.args.StandardSave(state))
    return state


if __name__ == "__main__":
    folder, until, *others = sys.argv[1:]
    if others:
        join(*others)
    train(Path(folder), int(until))
