"""What several processes do together: `python tests/on_processes.py FOLDER`, and what
`started` adds. Each writes what it has seen to `FOLDER/INDEX.json`."""

import json
import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import quax
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from processes import join

import lora_quax
from lora_quax._disk import adapter as adapters, model as models
from lora_quax.peft import _save as peft_save


RULES = {"weight": P("d"), "bias": P("d")}
OPTIM = optax.adam(1e-2)
STEPS = 5


def plain(seed: int = 0):
    return eqx.nn.MLP(8, 8, 32, 1, key=jr.key(seed))


def mesh_of(devices=None):
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((4,), ("d",), (AxisType.Auto,), devices=devices)


@eqx.filter_jit
def _update(model, opt_state, x):
    @lora_quax.filter_value_and_grad
    def loss(model, x):
        return jnp.mean((jax.vmap(quax.quaxify(model))(x) - jnp.sin(x)) ** 2)

    value, grads = loss(model, x)
    updates, opt_state = OPTIM.update(grads, opt_state)
    return value, eqx.apply_updates(model, updates), opt_state


def train(model, mesh) -> tuple[Any, list[float]]:
    split = NamedSharding(mesh, P("d"))
    opt_state, losses = OPTIM.init(lora_quax.partition(model)[0]), []
    for i in range(STEPS):
        rows = np.random.default_rng(i).normal(size=(16, 8)).astype(np.float32)
        x = jax.make_array_from_callback(rows.shape, split, rows.__getitem__)
        value, model, opt_state = _update(model, opt_state, x)
        losses.append(float(value))
    return model, losses


def _counted(calls: list, module, name: str, measure):
    """Has a function of a module say what it has been called for."""
    function = getattr(module, name)

    def counting(*args):
        out = function(*args)
        calls.append(measure(args, out))
        return out

    setattr(module, name, counting)


# What the processes are given that is not the same, and what is said of it on each.
def wrong(i: int, folder: Path, model, adapted, mesh) -> dict[str, Any]:
    adapt, key = lora_quax.loraify, jr.key(1)
    base, like = folder / "base.safetensors", abstract(mesh)
    out = {
        "another call": lambda: (
            lora_quax.shard(plain(), mesh, RULES) if i else adapt(model, 4, key)
        ),
        "another key": lambda: adapt(model, 4, jr.key(i)),
        "another rank": lambda: adapt(model, 4 + i, key),
        "another alpha": lambda: adapt(model, 4, key, alpha=1 + i),
        "other targets": lambda: adapt(model, 4, key, targets=f"layers.{i % 2}"),
        "another initialiser": lambda: adapt(
            model, 4, key, init_b=jax.nn.initializers.constant(i)
        ),
        "wrong on one": lambda: adapt(model, 4 if i else 0, key),
        "another model": lambda: lora_quax.shard(plain(i), mesh, RULES),
        "other rules": lambda: lora_quax.shard(
            plain(), mesh, {"weight": P("d") if i else P()}
        ),
        "rules in another order": lambda: lora_quax.shard(
            plain(), mesh, dict(list({".*": P(), **RULES}.items())[:: 1 if i else -1])
        ),
        "another mesh": lambda: lora_quax.shard(
            plain(), mesh_of(jax.devices()[:: 1 if i else -1]), RULES
        ),
        "rules wrong on one": lambda: lora_quax.shard(
            plain(), mesh, {"weight": P("d") if i else P("e")}
        ),
        "another file": lambda: lora_quax.load_adapter(
            folder / f"adapter.{i % 2}", model
        ),
        "no file on one": lambda: lora_quax.load_adapter(
            folder / ("none" if i == 1 else "adapter.0"), model
        ),
        "another adapter of PEFT": lambda: lora_quax.peft.load(
            folder / f"peft.{i % 2}", model
        ),
        "nowhere to write": lambda: lora_quax.save_adapter(
            folder / "none" / "adapter", adapted
        ),
        "nowhere to write for PEFT": lambda: lora_quax.peft.save(
            folder / "adapter.0", adapted
        ),
        "nowhere to write a model": lambda: lora_quax.save_model(
            folder / "none" / "model.safetensors", model
        ),
        "a type on one": lambda: lora_quax.save_model(
            folder / "typed", model, dtype=jnp.bfloat16 if i else jnp.float32
        ),
        "adapted on one": lambda: lora_quax.save_adapter(
            folder / "half", adapted if i else model
        ),
        "a base on one": lambda: lora_quax.save_adapter(
            folder / "half", adapted, base=model if i else None
        ),
        "a base on one for PEFT": lambda: lora_quax.peft.save(
            folder / "half", adapted, base=model if i else None
        ),
        "no model on one": lambda: lora_quax.load_model(
            folder / "none" if i == 1 else base, like
        ),
        "a model of another type": lambda: lora_quax.load_model(
            base, like, dtype=jnp.bfloat16 if i else jnp.float32
        ),
    }
    if jax.process_count() > 2:
        some = jax.make_mesh((2,), ("d",), (AxisType.Auto,), devices=jax.devices()[:2])
        out["a mesh of some"] = lambda: lora_quax.shard(plain(), some, RULES)
    return out


def abstract(mesh):
    return lora_quax.shard(eqx.filter_eval_shape(plain), mesh, RULES)


def rebased(model, base):
    first = lora_quax.initialise(model, "pissa")
    return lora_quax.rebase(first, first, base)


def lies(model) -> list[str]:
    return [str(x.sharding) for x in jax.tree.leaves(eqx.filter(model, eqx.is_array))]


def main(folder: Path) -> dict[str, Any]:
    i, mesh = jax.process_index(), mesh_of()
    read, written = [], []
    _counted(read, models, "_part", lambda args, out: out.nbytes)
    for module in (adapters, models, peft_save):
        _counted(written, module, "write_tensors", lambda args, out: args[0].name)
    model = lora_quax.load_model(folder / "base.safetensors", abstract(mesh))
    n_read = sum(read)
    first = lora_quax.loraify(model, 4, jr.key(1))
    put = lora_quax.loraify(lora_quax.shard(plain(), mesh, RULES), 4, jr.key(1))
    adapted, losses = train(first, mesh)
    lora_quax.save_adapter(folder / "adapter", adapted, base=model)
    lora_quax.peft.save(folder / "peft", adapted)
    lora_quax.save_model(folder / "merged", lora_quax.merge(adapted))
    again = [
        lora_quax.load_adapter(folder / "adapter", model, same_base=True),
        lora_quax.peft.load(folder / "peft", model),
    ]

    def same(model, other) -> bool:
        trees = [eqx.filter(x, eqx.is_array) for x in (model, other)]
        gathered = process_allgather(trees, tiled=True)
        return bool(eqx.tree_equal(*gathered))

    errors = {}
    for name, call in wrong(i, folder, model, adapted, mesh).items():
        try:
            call()
        except Exception as e:
            errors[name] = f"{type(e).__name__}: {e}"
    # After all this they are still in step.
    lora_quax.save_adapter(folder / "after", adapted)
    return dict(
        losses=losses,
        read=n_read,
        written=written,
        put_as_read=same(first, put),
        again=[same(adapted, x) for x in again],
        found_later=lies(rebased(first, model)) == lies(first),
        errors=errors,
    )


if __name__ == "__main__":
    folder, *others = sys.argv[1:]
    join(*others)
    said = main(Path(folder))
    Path(folder, f"{jax.process_index()}.json").write_text(json.dumps(said))
