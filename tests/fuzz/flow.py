"""Control flow, and transformations inside the program, around a function `g`.

Each is an expression with `{w}` and `{x}` for what becomes of the weight and the last
input, in `g(...)`; the other arguments are closed over.
"""

# `S` stands for two numbers in the type of the last input.
_S = "jnp.asarray([1.0, 0.5], {last}.dtype)"
_TOTAL = "jnp.sum(jnp.sin({g}))"

FLOWS = {
    "none": "{g}",
    "jit": "jax.jit(lambda w, {last}: {g})(w, {last})",
    "jit of a closure": "jax.jit(lambda {last}: {g})({last})",
    "checkpoint": "jax.checkpoint(lambda w, {last}: {g})(w, {last})",
    "quaxify": "quax.quaxify(lambda w, {last}: {g})(w, {last})",
    "cond": "lax.cond({last}.sum() > 0, lambda w: {g}, lambda w: -{g}, w)",
    "cond of closures": "lax.cond({last}.sum() > 0, lambda: {g}, lambda: 2.0 * {g})",
    "switch": "lax.switch(jnp.int32(1), [lambda w: {g}, lambda w: 0.5 * {g}], w)",
    "map": "lax.map(lambda s: (lambda {last}: {g})({last} * s), " + _S + ")",
    "scan": "lax.scan(lambda c, s: (c, (lambda {last}: {g})({last} * s)), 0.0, "
    + _S
    + ")[1]",
    "scan, weight as carry": "lax.scan(lambda w, _: (0.5 * w, {g}), w, None, "
    "length=2)[1]",
    "scan over weights": "lax.scan(lambda c, w: (c, {g}), 0.0, jnp.stack([w, -w]))[1]",
    "fori_loop": "lax.fori_loop(0, 2, lambda i, c: 0.5 * c + {g}, jnp.zeros_like({g}))",
    "vmap": "jax.vmap(lambda {last}: {g})(jnp.stack([{last}, -{last}]))",
    "vmap of weights": "jax.vmap(lambda w: {g})(jnp.stack([w, 0.5 * w]))",
    "grad": "jax.grad(lambda {last}: " + _TOTAL + ")({last})",
    "jvp": "jax.jvp(lambda {last}: {g}, ({last},), (jnp.ones_like({last}),))[1]",
    "linearize": "jax.linearize(lambda {last}: {g}, {last})[1]({last})",
    "vjp": "jax.vjp(lambda {last}: {g}, {last})[1](jnp.ones_like({g}))[0]",
}
# These differentiate: what they compute from a weight alone is not a dense weight.
ADJOINTS = {"grad", "jvp", "linearize", "vjp"}
# These run `g` on two weights.
DOUBLES = {"scan over weights", "vmap of weights"}
# Only forward: JAX does not take the gradient of a loop of unknown length.
ONLY_FORWARD = {
    "while_loop": "lax.while_loop(lambda c: c[0] < 2, "
    "lambda c: (c[0] + 1, c[1] + {g}), (0, jnp.zeros_like({g})))[1]",
}
