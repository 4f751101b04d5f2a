"""A sum that is stored once, and not formed again by everything that reads it.

`x · W + (x · aᵀ) · bᵀ` is cheap to add once both products are there, so XLA's CPU
backend adds it again in every fusion that reads it, and keeps both products alive
until the backward pass for that. So it does with the cotangent of `x`, also such a sum,
all along the residual stream: a step of many layers then takes time that grows with the
square of their number. Stored, the step needs less memory and less time.

On other platforms a barrier would keep a product from being fused with what follows
it. A primitive is the identity there.
"""

import jax
from jax import lax
from jax.experimental import jet
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


stored_p = Primitive("stored")


def stored(x):
    """`x`, an array or a `quax.Value`, and not what it was made of.

    Of what depends on it linearly the same holds: a cotangent is stored as well.
    """
    return jax.tree.map(stored_p.bind, x)


stored_p.def_impl(lambda x: x)
stored_p.def_abstract_eval(lambda x: x)
ad.deflinear2(stored_p, lambda ct, _: [stored(ct)])
batching.defvectorized(stored_p)
jet.deflinear(stored_p)
mlir.register_lowering(stored_p, mlir.lower_fun(lambda x: x, multiple_results=False))


# For fewer numbers, as in decoding one token, a pass more costs more than it saves.
SMALL = 4096


def _on_cpu(x):
    known = all(isinstance(n, int) for n in x.shape)  # Or symbols of `jax.export`.
    small = known and x.size < SMALL
    return x if small else lax.optimization_barrier(x)


mlir.register_lowering(
    stored_p, mlir.lower_fun(_on_cpu, multiple_results=False), platform="cpu"
)
