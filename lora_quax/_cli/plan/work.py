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
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            left, (result,) = eqn.invars[0].aval.shape, eqn.outvars
            out += 2 * math.prod([*result.aval.shape, *(left[i] for i in contracted)])
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        out += times * sum(map(_flops, core.jaxprs_in_params(eqn.params)))
    return out


def bytes_of(tree: Any, without: tuple[str, ...] = ()) -> int:
    """Of what one device has of all its arrays, if they were not divided along the axes
    of the mesh `without`."""
    out = 0
    for x in jax.tree.leaves(tree):
        sizes = dict(x.sharding.mesh.shape)
        entries = [e if isinstance(e, tuple) else (e,) for e in x.sharding.spec]
        axes = [axis for entry in entries for axis in entry if axis is not None]
        parts = math.prod(sizes[axis] for axis in axes if axis not in without)
        out += x.size * x.dtype.itemsize // parts
    return out


def sent(job: Job, step: Step) -> dict[str, int]:
    """The bytes that a step has to give to one device, by what it gives them for.

    - weights: along `fsdp` each layer's are gathered, on the way forward and on that
      back, as they are kept: of a quantised one the codes. The head is gathered once.
    - activations: along `tp` a layer adds up what o and down make, on the way back what
      q, k, v, and what gate and up send, and what o makes once more if it is computed
      again. So do, once, the embedding and the head.
    - gradients: those of the factors are added up over the rows of the batch.
    """
    axes, sizes = job.axes, job.sizes
    ends = {id(x) for x in jax.tree.leaves(_ends(step.frozen))}
    layers = [x for x in jax.tree.leaves(step.frozen) if id(x) not in ends]
    dtype_size = step.frozen.norm.weight.dtype.itemsize
    out = dict(weights=0, activations=0, gradients=0)
    factors = bytes_of(step.params, ("fsdp",))
    if axes.get("fsdp", 1) > 1:
        out["weights"] = 2 * (bytes_of(layers, ("fsdp",)) + factors)
        head = step.frozen.lm_head or step.frozen.embed_tokens
        out["weights"] += bytes_of(head, ("fsdp",))
    rows = math.prod(axes[name] for name in row_axes(axes))
    if axes.get("tp", 1) > 1:
        x = job.batch // rows * job.tokens * sizes.width * dtype_size
        per_layer = 4 if job.checkpoint == "none" else 5
        out["activations"] = (per_layer * sizes.layers + 2) * x
    if rows > 1:
        out["gradients"] = factors
    return out


def _ends(frozen: Any) -> list[Any]:
    """What is no part of a layer."""
    return [frozen.embed_tokens, frozen.norm, frozen.lm_head]
