"""PEFT on PyTorch, in a process of its own: `python torch_peft.py inputs.npz`.

JAX is not imported here: the two libraries may live in different environments, and
their pools of threads do not share a process. `_process.Process` is the other end.

The file holds `x`, `y`, `heads`, `learning_rate`, `cores`, and the leaves of the
Equinox model under their paths, such as `model.blocks.0.q.weight`. Beside it is a
folder `adapter`, in PEFT's format. A line of JSON says what runs; from then on, every
line read is answered by a step, with its time and loss.
"""

# It may not be installed.
# pyright: reportMissingImports=false

import json
import platform
import sys
import time
from pathlib import Path

import numpy as np
import peft
import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    """The Equinox model's block, for batches."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.o = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.heads = heads

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        # q, k, v: (batch, heads, tokens, width / heads)
        q, k, v = (
            linear(x).reshape(batch, tokens, self.heads, -1).transpose(1, 2)
            for linear in (self.q, self.k, self.v)
        )
        out = F.scaled_dot_product_attention(q, k, v)
        return self.o(out.transpose(1, 2).reshape(batch, tokens, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        # JAX's default, too, is the approximation.
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class Transformer(nn.Module):
    """The Equinox model, for batches."""

    def __init__(self, layers: int, width: int, heads: int):
        super().__init__()
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def adapt(inputs: dict[str, np.ndarray], adapter: Path) -> peft.PeftModel:
    """The model, with the updates that a folder has, which train."""
    weights = {
        name.removeprefix("model."): torch.from_numpy(value)
        for name, value in inputs.items()
        if name.startswith("model.")
    }
    layers = 1 + max(int(k.split(".")[1]) for k in weights if k.startswith("blocks."))
    model = Transformer(layers, len(weights["norm.weight"]), int(inputs["heads"]))
    model.load_state_dict(weights)  # The names, and the order (out, in), are Equinox's.
    return peft.PeftModel.from_pretrained(model, adapter, is_trainable=True).train()


def _say(**answer) -> None:
    print(json.dumps(answer), flush=True)


def main() -> None:
    """Answers lines until there are no more."""
    # Denormal numbers are slow, and XLA flushes them to zero on the CPU.
    torch.set_flush_denormal(True)
    with np.load(sys.argv[1]) as file:
        inputs = dict(file)
    torch.set_num_threads(int(inputs["cores"]))
    x, y = torch.from_numpy(inputs["x"]), torch.from_numpy(inputs["y"])
    model = adapt(inputs, Path(sys.argv[1]).parent / "adapter")
    optim = torch.optim.Adam(
        [p for p in model.parameters() if p.requires_grad],
        lr=float(inputs["learning_rate"]),
        betas=(0.9, 0.999),
        eps=1e-8,
        fused=True,  # The fastest of PyTorch's; the others compute the same.
    )

    def step() -> float:
        optim.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optim.step()
        return loss.item()

    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "peft": peft.__version__,
        "numpy": np.__version__,
    }
    _say(versions=versions)
    for _ in sys.stdin:
        start = time.perf_counter()
        loss = step()
        _say(time=time.perf_counter() - start, loss=loss)


if __name__ == "__main__":
    main()
