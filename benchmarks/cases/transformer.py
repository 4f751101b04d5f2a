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
    FROZEN,
    INSIDE,
    OUTSIDE,
    Row,
    STRICT,
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

    def against(peer):
        def value(points):
            (rows,) = points.values()
            return rows[OUTSIDE].ratio(rows[peer]) if peer in rows else None

        return value

    def excess(points):
        """Bytes of gradients and optimiser state over those of the factors."""
        (rows,) = points.values()
        facts = rows[OUTSIDE].facts
        needed = 4 * factors(size)
        moments = 2 * needed + 4  # And a counter.
        return facts["gradient"] - needed + facts["optimiser"] - moments

    return Case(
        name,
        _title(size),
        {"step": lambda: rows(size, torch)},
        [
            *_bars(size),
            Claim(f"÷ {PEERS['nnx']}", against(PEERS["nnx"]), 1 / 1.35),
            Claim(f"÷ {PEERS['nnx_qwix']}", against(PEERS["nnx_qwix"])),
            Claim(f"÷ {TORCH}", against(TORCH), 1 / 1.05),
            Claim("bytes of gradients and optimiser beyond the factors'", excess, 0),
        ],
    )


def many_tokens(name: str, size: Size) -> Case:
    """The same step against its floors alone, with more tokens."""
    return Case(
        name,
        _title(size),
        {"step": lambda: _without_peers(size)},
        _bars(size),
        rounds=5,
    )


def _title(size: Size) -> str:
    return (
        f"A training step: {size.layers} layers, width {size.width}, "
        f"{size.batch} × {size.tokens} tokens, rank {size.rank}"
    )


def _bars(size: Size) -> list[Claim]:
    tokens = f"{size.batch * size.tokens} tokens"
    return [
        at_most(f"{tokens}, {nesting} ÷ {floor}", bound, row, floor)
        for floor, bound in ((FROZEN, 1.04), (STRICT, 1.10))
        for nesting, row in (
            ("quaxify(vmap(f))", OUTSIDE),
            ("vmap(quaxify(f))", INSIDE),
        )
    ]


def _without_peers(size: Size) -> list[Row]:
    model, adapted, data = make(size, jr.key(0))
    return [
        _work.frozen(model, loss_fn, data),
        _work.strict_floor(model, loss_fn, data),
        *_work.ours(adapted, loss_fn, data),
    ]


def rows(size: Size, torch: str) -> list[Row | External | Absent]:
    """Every way of taking the step, on the same weights, factors and data.

    All train by Adam; the LoRA rows hand only their factors to it, whichever library
    they come from.
    """
    model, adapted, data = make(size, jr.key(0))
    return [
        _work.frozen(model, loss_fn, data),
        _work.strict_floor(model, loss_fn, data),
        *(_peer(file, name, model, adapted, data) for file, name in PEERS.items()),
        torch_row(TORCH, torch, size, model, adapted, data),
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


def torch_row(
    name: str,
    interpreter: str,
    size: Size,
    model: Transformer,
    adapted: Transformer,
    data,
    *,
    alike: bool | str = True,
) -> External | Absent:
    """The step in PEFT, with the updates of an adapted model in a file of PEFT's.

    `alike` is the `adapted` of the row.
    """
    try:
        check_imports(interpreter, "torch", "peft")
    except ImportError as e:
        return Absent(name, str(e))
    inputs = dict(
        model=model,
        x=data[0],
        y=data[1],
        heads=size.heads,
        learning_rate=_work.LEARNING_RATE,
        cores=_work.cores(),
    )

    def write(folder: Path) -> None:
        lora_quax.peft.save(folder / "adapter", adapted)

    script = Path(peers.__file__).parent / "torch_peft.py"
    start = lambda: Process(interpreter, script, inputs, write)
    return External(name, start, alike)
