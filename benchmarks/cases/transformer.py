"""A training step of the transformer, against every peer."""

import importlib
from pathlib import Path

import jax.random as jr

import lora_quax

from .. import _work, peers
from .._process import check_imports, Process
from .._transformer import factors, loss_fn, make, Size, Transformer
from .._work import (
    Absent,
    at_most,
    Case,
    Claim,
    External,
    INSIDE,
    OUTSIDE,
    Row,
    training,
)


# In other libraries: the module here, and what it is called.
PEERS = {
    "by_hand": "by hand, Equinox",
    "plain": "by hand, plain JAX",
    "quax_example": "quax.examples.lora",
    "nnx": "flax nnx.LoRALinear",
    "nnx_qwix": "qwix",
}
ADAPT = {"by_hand", "quax_example"}  # The Equinox model as it is.
TORCH = "PEFT, torch"


def case(name: str, size: Size, torch: str) -> Case:
    """`torch` is an interpreter that has PyTorch and PEFT."""

    def best_peer(peers):
        def value(points):
            rows = points["step"]
            if not all(peer in rows for peer in peers):
                return None
            return max(rows[OUTSIDE].ratio(rows[peer]) for peer in peers)

        return value

    def excess(points):
        """Bytes of gradients and optimiser state over those of the factors."""
        facts = points["step"][OUTSIDE].facts
        needed = 4 * factors(size)
        moments = 2 * needed + 4  # And a counter.
        return facts["gradient"] - needed + facts["optimiser"] - moments

    return Case(
        name,
        f"A training step: {size.layers} layers, width {size.width}, "
        f"{size.batch} × {size.tokens} tokens, rank {size.rank}",
        {"step": lambda: rows(size, torch)},
        [
            at_most("quaxify(vmap(f)) ÷ floor", 1.10, OUTSIDE, "floor"),
            at_most("vmap(quaxify(f)) ÷ floor", 1.12, INSIDE, "floor"),
            Claim(
                "÷ the best peer in JAX",
                best_peer(PEERS.values()),
                1 / 1.35,
            ),
            Claim(
                "÷ the best peer of all, PyTorch's included",
                best_peer([*PEERS.values(), TORCH]),
                1 / 1.35,
            ),
            Claim("bytes of gradients and optimiser beyond the factors'", excess, 0),
        ],
    )


def rows(size: Size, torch: str) -> list[Row | External | Absent]:
    """Every way of taking the step, on the same weights, factors and data.

    All train by Adam; the LoRA rows hand only their factors to it, whichever library
    they come from.
    """
    model, adapted, data = make(size, jr.key(0))
    return [
        _work.floor(model, loss_fn, data),
        *(_peer(file, name, model, adapted, data) for file, name in PEERS.items()),
        _torch(torch, size, model, adapted, data),
        _work.full(model, loss_fn, data),
        *_work.ours(adapted, loss_fn, data),
    ]


def _peer(file: str, name: str, model, adapted, data) -> Row | Absent:
    try:
        module = importlib.import_module(f"{peers.__name__}.{file}")
    except ImportError as e:
        return Absent(name, str(e))
    # Those that adapt a model take its loss; the others are models themselves.
    loss = [loss_fn] if file in ADAPT else []
    return training(name, module.program(model, adapted, *loss), data, adapted=True)


def _torch(
    interpreter: str, size: Size, model: Transformer, adapted: Transformer, data
) -> External | Absent:
    try:
        check_imports(interpreter, "torch", "peft")
    except ImportError as e:
        return Absent(TORCH, str(e))
    inputs = dict(
        model=model,
        factors=lora_quax.partition(adapted)[0],
        x=data[0],
        y=data[1],
        heads=size.heads,
        rank=size.rank,
        learning_rate=_work.LEARNING_RATE,
        cores=_work.cores(),
    )
    script = Path(peers.__file__).parent / "torch_peft.py"
    return External(TORCH, lambda: Process(interpreter, script, inputs), adapted=True)
