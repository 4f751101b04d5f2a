"""Solvers: primitives that carry functions, which are differentiated implicitly.

Their functions are traced again on the leaves; what they say of derivatives is then
said of these.
"""

import jax.tree_util as jtu
from jax.extend.core.primitives import linear_solve_p

from .._arrays.dropout import refuse_dropout
from .traced import call, call_rule, own_plain, trace_on


_UNKNOWNS = "what a linear solve is given and gives must be plain arrays"


def _run(consts, vector, jaxpr):
    out = call(jaxpr, (*consts, *vector))
    return tuple(own_plain(x, linear_solve_p, _UNKNOWNS) for x in out)


@call_rule(linear_solve_p)
def custom_linear_solve(*args, const_lengths, jaxprs):
    refuse_dropout(args, "custom_linear_solve")
    consts, rest = [], list(args)
    for n in const_lengths:
        consts.append(rest[:n])
        rest = rest[n:]
    vector = [own_plain(x, linear_solve_p, _UNKNOWNS) for x in rest]
    new = [
        None if jaxpr is None else trace_on(_run, (of_it, vector), jaxpr)[0]
        for of_it, jaxpr in zip(consts, jaxprs)
    ]
    return linear_solve_p.bind(
        *jtu.tree_leaves((consts, vector)),
        const_lengths=type(const_lengths)(*(len(jtu.tree_leaves(c)) for c in consts)),
        jaxprs=type(jaxprs)(*new),
    )
