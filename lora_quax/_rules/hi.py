"""The higher primitives of JAX: objects that hold what is to be run, and how it is
differentiated.

Quax's trace asks for them to be expanded before it sees them, which loses the latter.
Patched not to, it hands them here.
"""

import equinox as eqx
import jax
import jax.tree_util as jtu
import quax

from .._arrays.base import lower_all, materialise_or_refuse
from .._compat import as_closed, call_hi_primitive_p, detach_consts, eval_jaxpr_p
from .kinds import kind_of
from .leaves import slices, split_for_scan, step_of_scan
from .traced import call, call_rule, is_value, own_plain, run_call, trace_on, type_of


def _expand(*args, _prim):
    return quax.quaxify(call_hi_primitive_p.to_lojax)(*args, _prim=_prim)


def _call_hi_primitive(*args, _prim):
    """By the name of what is called: of these only some say how to differentiate."""
    rule = _RULES.get(type(_prim).__name__, _expand)
    return rule(*args, _prim=_prim)


def _remat(*args, _prim):
    """`jax.checkpoint`, with `jax_remat3`."""
    closed, out = trace_on(run_call, (args,), _prim.jaxpr)
    jaxpr, consts = detach_consts(closed)
    params = dict(_prim.params, jaxpr=as_closed(jaxpr))
    if isinstance(params.get("prevent_cse"), tuple):  # One per operand; now per leaf.
        flags = zip(args, _prim.prevent_cse)
        flags = [flag for x, flag in flags for _ in jtu.tree_leaves(x)]
        params["prevent_cse"] = (*(False for _ in consts), *flags)
    leaves = type(_prim)(**params)(*consts, *jtu.tree_leaves(args))
    return jtu.tree_unflatten(jtu.tree_structure(out), leaves)


def _run_scan(shared, sliced, jaxpr, extensives):
    operands = eqx.combine(sliced, shared)
    steps = [step_of_scan(x) if e else x for x, e in zip(operands, extensives)]
    return call(jaxpr, steps)


def _scan(*args, _prim):
    """`lax.scan` without its carry, with `jax_scan3`: that is held in references."""
    length, extensives = _prim.length, tuple(_prim.extensives)
    parts = [
        split_for_scan(lower_all(x), length) if e else (None, x)
        for x, e in zip(args, extensives)
    ]
    sliced, shared = [part[0] for part in parts], [part[1] for part in parts]
    operands = shared, slices(sliced, length)
    closed, out = trace_on(_run_scan, operands, _prim.jaxpr, extensives)
    jaxpr, consts = detach_consts(closed)
    fixed, moving = [*consts, *jtu.tree_leaves(shared)], jtu.tree_leaves(sliced)
    scan = type(_prim)(
        extensives=[False] * len(fixed) + [True] * len(moving),
        length=length,
        jaxpr=as_closed(jaxpr),
        reverse=_prim.reverse,
        unroll=_prim.unroll,
    )
    return jtu.tree_unflatten(jtu.tree_structure(out), scan([*fixed, *moving]))


def _root(*args, _prim):
    """`lax.custom_root`: its functions take the leaves for what they closed over."""
    solve_consts, guess, f_consts, tangent_consts = jtu.tree_unflatten(
        _prim.in_tree, args
    )
    why = "a root that is searched for must be a plain array"
    guess = jtu.tree_map(
        lambda x: own_plain(x, "custom_root", why), guess, is_leaf=is_value
    )
    operands = (solve_consts, guess, f_consts, tangent_consts)
    solve = quax.quaxify(_prim.solve)
    avals = jtu.tree_map(type_of, operands)
    root = type(_prim)(
        quax.quaxify(_prim.f),
        solve,
        quax.quaxify(_prim.tangent_solve),
        jax.jit(solve).trace(*kind_of((solve_consts, guess))),
        avals,
        _prim.has_aux,
    )
    return jtu.tree_leaves(root(*operands))


def _root_derivative(*args, _prim):
    """The derivative of the function of a `custom_root`, which waits for its vector."""
    operands = jtu.tree_unflatten(_prim.in_tree, args)
    linear_map = type(_prim)(
        quax.quaxify(_prim.f),
        jtu.tree_map(type_of, operands),
        _prim.out_aval,
        _prim.effects,
        _prim.transposed,
    )
    return jtu.tree_leaves(linear_map(*operands))


def _refuse(*args, _prim):
    name = type(_prim).__name__
    why = f"a `{name}` has a derivative of its own, and is given plain arrays alone"
    return materialise_or_refuse(call_hi_primitive_p, args, dict(_prim=_prim), why)


_RULES = {
    "RematTraced": _remat,
    "Scan3": _scan,
    "CustomRoot": _root,
    "_RootLinearMap": _root_derivative,
    "CustomJVPTraced": _refuse,
    "CustomVJPTraced": _refuse,
}

call_rule(call_hi_primitive_p, _expand)(_call_hi_primitive)

if eval_jaxpr_p is not None:

    @call_rule(eval_jaxpr_p)
    def _(*args, call_jaxpr):
        return call(call_jaxpr, args)
