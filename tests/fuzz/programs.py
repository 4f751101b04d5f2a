"""A random program, written out.

from tests.fuzz.programs import *
def g(w, x0): ...                  # steps, and one or two uses of the weight
def f(w, x0): return g(w, x0)      # or in a loop, a branch, a transformation
verify(f, [Weight(...), Input(...)], transform="Q(vmap f)")
"""

import math
from typing import Any, NamedTuple

import hypothesis.strategies as st
from helpers import DERIVATIVES, KINDS, TRANSFORMS
from hypothesis import reject

from .arrays import Input, UNSTACKED, UNTRAINABLE, Weight
from .drawing import Draft, NAMES
from .flow import ADJOINTS, DOUBLES, FLOWS, ONLY_FORWARD
from .oracle import verify
from .steps import step
from .uses import use


_NARROW = ["float32", "bfloat16", "float16"]


class Program(NamedTuple):
    """The functions, and the call that checks them, as text."""

    functions: str
    call: str

    def __str__(self):
        return f"{self.functions}\n{self.call}\n"

    def run(self) -> str | None:
        """Checks it: as `verify`."""
        scope: dict[str, Any] = dict(NAMES, Weight=Weight, Input=Input, verify=verify)
        exec(self.functions, scope)
        return eval(self.call, scope)


@st.composite
def programs(draw, kind: str | None = None):
    kernel = draw(st.integers(0, 3)) == 0
    d = Draft(draw, draw(_weights(kind, kernel)))
    for _ in range(d.integer(0, 3)):
        step(d)
    uses = [f"y{i}" for i in range(d.integer(1, 2))]
    for i, name in enumerate(uses):
        if i:
            step(d)
        use(d, name, kernel)
    whole = d.returns_weight and len(uses) == 1
    if not any(isinstance(x, Input) for x in d.arguments.values()):
        reject()
    derivative = d.one(["grad"] * 8 + [*DERIVATIVES])
    only_forward = derivative == "jvp" and not whole and d.flag()
    table = ONLY_FORWARD if only_forward else FLOWS
    # XLA of JAX 0.12 aborts on some of these, batched; of dense kernels as well.
    flows = [f for f in table if not (d.is_dilated and f in DOUBLES)]
    flow = d.one(flows) if not whole else "none"
    expression = (FLOWS | ONLY_FORWARD)[flow]
    weight = d.arguments["w"]
    # Every argument but the first is stacked by a `vmap`, and by some that one too.
    unstacked = weight.kind in UNSTACKED
    second = sum(isinstance(x, Weight) for x in d.arguments.values()) > 1
    stacks = lambda name: "weights" in name or (second and "vmap" in name)
    transform = d.one(
        [
            name
            for name in ["Q(f)", *TRANSFORMS]
            if not (unstacked and stacks(name) or d.is_dilated and "weights" in name)
        ]
    )
    if (only_forward or whole) and "grad" in transform:
        transform = "Q(f)"

    weights = [n for n, x in d.arguments.items() if isinstance(x, Weight)]
    inputs = [n for n, x in d.arguments.items() if isinstance(x, Input)]
    # The last input is what is differentiated inside, so it should be of the last use.
    names = ", ".join([*weights, *inputs])
    # Unlike `tanh`, `arctan` keeps digits of its slope where it has become flat.
    bent = "jnp.sum({})" if d.returns_weight else "jnp.sum(jnp.arctan({}))"
    total = " + ".join(map(bent.format, uses))
    result = f"jnp.arctan({uses[0]})" if len(uses) == 1 and d.flag() else total
    if whole:
        result = uses[0]
    lines = "".join(f"    {line}\n" for line in d.lines)
    body = expression.replace("{g}", f"g({names})").replace("{last}", inputs[-1])
    functions = (
        f"def g({names}):\n{lines}    return {result}\n\n"
        f"def f({names}):\n    return {body}\n"
    )
    arrays = [d.arguments[name] for name in (*weights, *inputs)]
    options: dict[str, Any] = {}
    if transform != "Q(f)":
        options["transform"] = transform
    if derivative != "grad":
        options["derivative"] = derivative
    if d.casts:
        options["casts"] = d.casts
    # A `vmap` doubles what is looked up: at a branch by input, even that of one weight.
    looked_up = d.looked_up * (1 + (flow in DOUBLES)) * (1 + ("vmap" in transform))
    adjoint = flow in ADJOINTS or "grad" in transform
    if adjoint or looked_up >= math.prod(weight.shape):
        options["formed_nothing"] = False
    written = "".join(f", {name}={value!r}" for name, value in options.items())
    return Program(functions, f"verify(f, {arrays!r}{written})")


@st.composite
def _weights(draw, kind: str | None, kernel: bool):
    """A weight; or one that is fit for a convolution, with rows or columns of one axis
    and no batch."""
    kind = draw(st.sampled_from(list(KINDS))) if kind is None else kind
    ndim = draw(st.sampled_from([3, 4] if kernel else [2, 2, 3, 4]))
    shape = tuple(draw(st.sampled_from([2, 3, 4, 6])) for _ in range(ndim))
    if kernel:
        rows, cols = draw(
            st.sampled_from([(1, ndim - 1), (1, ndim - 1), (ndim - 1, 1)])
        )
    else:
        rows = draw(st.integers(1, ndim - 1))
        cols = draw(st.integers(1, ndim - rows))
    dtype, factors = "float64", "float64"
    if draw(st.integers(0, 3)) == 0:
        dtype = draw(st.sampled_from(_NARROW))
        factors = draw(st.sampled_from([*_NARROW, "float64"]))
    trains = kind not in UNTRAINABLE and draw(st.integers(0, 3)) == 0
    rank = draw(st.integers(1, 2))
    return Weight(
        kind, shape, rows, cols, rank, dtype=dtype, factors=factors, trains=trains
    )
