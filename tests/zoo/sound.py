"""Silero's detector of voices, which comes for PyTorch and ONNX, in Equinox."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from safetensors.numpy import load_file

from .made import folder, Made


class _Voice(eqx.Module):
    stft: eqx.nn.Conv1d
    convs: list[eqx.nn.Conv1d]
    lstm: eqx.nn.LSTMCell
    final: eqx.nn.Conv1d

    def chunk(self, state, x):
        """Of 64 + 512 samples at 16 kHz: how likely somebody speaks."""
        x = self.stft(jnp.pad(x, (0, 64), mode="reflect")[None])
        x = jnp.sqrt(x[:129] ** 2 + x[129:] ** 2)
        for conv in self.convs:
            x = jax.nn.relu(conv(x))
        state = self.lstm(x[:, 0], state)
        x = self.final(jax.nn.relu(state[0])[:, None])
        return state, jax.nn.sigmoid(x[0, 0])

    def __call__(self, chunks):
        start = (jnp.zeros(128), jnp.zeros(128))
        return jax.lax.scan(lambda s, x: self.chunk(s, x), start, chunks)[1]


def silero() -> Made:
    path = folder("silero_vad") / "data" / "silero_vad_16k.safetensors"
    w = {k: jnp.asarray(x) for k, x in load_file(path).items()}

    def conv(name, stride=1, padding=1):
        weight, bias = w[f"{name}.weight"], w.get(f"{name}.bias")
        out, into, size = weight.shape
        layer = eqx.nn.Conv1d(
            into, out, size, stride, padding, use_bias=bias is not None, key=jr.key(0)
        )
        layer = eqx.tree_at(lambda l: l.weight, layer, weight)
        return (
            layer
            if bias is None
            else eqx.tree_at(lambda l: l.bias, layer, bias[:, None])
        )

    # The same order of gates: input, forget, cell, output.
    lstm = eqx.tree_at(
        lambda l: (l.weight_ih, l.weight_hh, l.bias),
        eqx.nn.LSTMCell(128, 128, key=jr.key(0)),
        (
            w["lstm_cell.weight_ih"],
            w["lstm_cell.weight_hh"],
            w["lstm_cell.bias_ih"] + w["lstm_cell.bias_hh"],
        ),
    )
    convs = [conv("conv1"), conv("conv2", 2), conv("conv3", 2), conv("conv4")]
    model = _Voice(conv("stft_conv", 128, 0), convs, lstm, conv("final_conv", 1, 0))
    time = jnp.arange(4 * 576).reshape(4, 576) / 16000
    tone = sum(jnp.sin(2 * jnp.pi * f * time) for f in (120, 240, 700, 1100))
    return Made(model, (0.1 * tone,))
