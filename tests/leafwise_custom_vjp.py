"""`custom_vjp` in Quax, leaf by leaf: its own repository has this, and 0.4.6 has not.

Each leaf of a value is an operand; the function, its forward and its backward pass are
given values built from leaves. For a value that is linear in its leaves that is right.
For one that is bilinear in them it is not: the cotangent of a weight `b · a` is then
another `db · da`, and its negative is `(-db) · da`. So lora_quax must not leave its
arrays to it, and the tests are run with this installed too.
"""

import jax.extend.linear_util as lu
import jax.numpy as jnp
import jax.tree_util as jtu
import quax
from jax._src import core
from jax._src.ad_util import Zero
from jax.custom_derivatives import SymbolicZero
from quax import _trace as quax_trace


def install():
    """To be called before lora_quax is imported, as if Quax had brought it along."""
    quax_trace._QuaxTrace.process_custom_vjp_call = _process_custom_vjp_call


def _process_custom_vjp_call(
    self, primitive, fun, fwd, bwd, tracers, /, *, out_trees, symbolic_zeros
):
    values = [self.to_value(t) for t in tracers]
    leaves, treedef = jtu.tree_flatten(values)
    trees = {}  # Of what the functions return, known once they have been called.

    def under_quax(f, operands):
        with core.take_current_trace() as parent:
            trace = quax_trace._QuaxTrace(parent, self.tag)
            wrap = lambda x: (
                quax_trace._QuaxTracer(trace, x) if isinstance(x, quax.Value) else x
            )
            unwrap = lambda x: (
                x if isinstance(x, Zero | SymbolicZero) else trace.to_value(x)
            )
            with core.set_current_trace(trace):
                out = f.call_wrapped(*map(wrap, operands))
            if f is bwd and isinstance(out[0], list | tuple):
                # From JAX 0.12 on: the cotangents, and logs.
                return list(map(unwrap, out[0])), out[1]
            return list(map(unwrap, out))

    def on_leaves(*leaves):
        out = under_quax(fun, jtu.tree_unflatten(treedef, leaves))
        leaves, trees["out"] = jtu.tree_flatten(out)
        return leaves

    def fwd_on_leaves(*pairs):
        values = jtu.tree_unflatten(treedef, pairs[::2])
        moves = jtu.tree_unflatten(treedef, pairs[1::2])
        operands = []
        for value, moving in zip(values, moves):
            operands += [value, any(jtu.tree_leaves(moving))]
        out = under_quax(fwd, operands)
        _, res_tree, forwarded = out_trees()
        n = res_tree.num_leaves - sum(i is not None for i in forwarded)
        saved, out = iter(out[:n]), out[n:]
        residuals = [next(saved) if i is None else values[i] for i in forwarded]
        residual_leaves, trees["residuals"] = jtu.tree_flatten(residuals)
        out_leaves, trees["out"] = jtu.tree_flatten(out)
        return [*residual_leaves, *out_leaves]

    def bwd_on_leaves(*args):
        n = trees["residuals"].num_leaves
        residuals = jtu.tree_unflatten(trees["residuals"], args[:n])
        cotangents = jtu.tree_unflatten(trees["out"], args[n:])
        out = under_quax(bwd, [*residuals, *map(_whole, cotangents)])
        logs = ()
        if isinstance(out, tuple):
            out, *logs = out
        out_leaves = []
        for value, cotangent in zip(values, out, strict=True):
            if isinstance(cotangent, Zero | SymbolicZero):
                cotangent = jtu.tree_map(
                    lambda x: Zero(core.typeof(x).to_ct_aval()), value
                )
            mine, its = map(jtu.tree_structure, (value, cotangent))
            if mine.num_leaves != its.num_leaves:
                raise TypeError(f"A cotangent of {mine} is {its}.")
            out_leaves += jtu.tree_leaves(
                cotangent, is_leaf=lambda x: isinstance(x, Zero)
            )
        return (out_leaves, *logs) if logs else out_leaves

    def leaf_trees():
        n = trees["residuals"].num_leaves
        flat = lambda tree: jtu.tree_structure([0] * tree.num_leaves)
        return flat(trees["out"]), flat(trees["residuals"]), [None] * n

    out = primitive.bind_with_trace(
        self.parent_trace,
        tuple(leaves),
        tuple(map(core.typeof, leaves)),
        dict(
            subfuns=(
                lu.wrap_init(on_leaves, debug_info=fun.debug_info),
                lu.wrap_init(fwd_on_leaves, debug_info=fwd.debug_info),
                lu.wrap_init(bwd_on_leaves, debug_info=bwd.debug_info),
            ),
            out_trees=leaf_trees,
            symbolic_zeros=symbolic_zeros,
        ),
    )
    out = jtu.tree_unflatten(trees["out"], out)
    return [quax_trace._QuaxTracer(self, x) for x in out]


def _whole(cotangent):
    """A value, of which no leaf is a symbolic zero; or a symbolic zero."""
    is_zero = lambda x: isinstance(x, SymbolicZero)
    leaves = jtu.tree_leaves(cotangent, is_leaf=is_zero)
    if len(leaves) == 1 and is_zero(leaves[0]):
        return leaves[0]
    zeros = lambda x: jnp.zeros(x.aval.shape, x.aval.dtype) if is_zero(x) else x
    return jtu.tree_map(zeros, cotangent, is_leaf=is_zero)
