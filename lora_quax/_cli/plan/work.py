"""What a step takes on paper: operations, and bytes that have to be sent."""

import math
from typing import Any

import jax

from ..._compat import core
from .split import row_axes
from .step import Job, Step


def flops(step: Step) -> int:
    """Of the products of a step, on all devices together: a multiplication and an
    addition for each pair of numbers, as often as the loops turn."""
    jaxpr = jax.make_jaxpr(step.run)(step.params, step.frozen, step.batch)
    return _flops(jaxpr.jaxpr)


def _flops(jaxpr: Any) -> int:
    out = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "thin_dot_general"):
            (contracted, _), _ = eqn.params["dimension_numbers"]
            left, (result,) = eqn.invars[0].aval.shape, eqn.outvars
            out += 2 * math.prod([*result.aval.shape, *(left[i] for i in contracted)])
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        out += times * sum(map(_flops, core.jaxprs_in_params(eqn.params)))
    return out


def bytes_of(tree: Any) -> int:
    """Of what one device has of all its arrays."""
    return sum(math.prod(_shard(x)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _shard(x: Any) -> tuple[int, ...]:
    return x.sharding.shard_shape(x.shape)


def _gathered(tree: Any) -> int:
    """The bytes of those of its arrays that lie along `fsdp`, whole along it."""
    divided = [x for x in jax.tree.leaves(tree) if "fsdp" in _axes(x)]
    return sum(bytes_of(x) * x.sharding.mesh.shape["fsdp"] for x in divided)


def _axes(x: Any) -> list[str | None]:
    entries = [e if isinstance(e, tuple) else (e,) for e in x.sharding.spec]
    return [axis for entry in entries for axis in entry]


def sent(job: Job, step: Step) -> dict[str, int]:
    """The bytes that a step has to give to one device, by what it gives them for.

    - weights: along `fsdp` each layer's are gathered, on the way forward and on that
      back, as they are kept: of a quantised one the codes. The head is gathered once.
    - activations: along `tp` a layer adds up what o and down make, on the way back what
      q, k, v, and what gate and up send, and what o makes once more if it is computed
      again. So do, once, the embedding and the head.
    - gradients: those of the factors are added up over the rows of the batch.
    """
    axes, sizes, frozen = job.axes, job.sizes, step.frozen
    out = dict(weights=0, activations=0, gradients=0)
    rows = math.prod(axes[name] for name in row_axes(axes))
    if axes.get("fsdp", 1) > 1:
        head = frozen.embed_tokens if sizes.tied else frozen.lm_head
        layers = _gathered(frozen.layers) + _gathered(step.params.layers)
        out["weights"] = 2 * layers + _gathered(head)
    if axes.get("tp", 1) > 1:
        width = sizes.width * frozen.norm.weight.dtype.itemsize
        x = job.batch // rows * job.tokens * width
        per_layer = 5 if job.checkpoint == "nothing_saveable" else 4
        out["activations"] = (per_layer * sizes.layers + 2) * x
    if rows > 1:
        whole = [x for x in jax.tree.leaves(step.params) if "fsdp" not in _axes(x)]
        out["gradients"] = bytes_of(whole) + _gathered(step.params)
    return out
