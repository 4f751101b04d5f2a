"""PEFT's files of other forms than LoRA, without PyTorch: what PEFT would compute from
their tensors, written out in NumPy, is what the model computes.

That PEFT itself does is tested elsewhere.
"""

import functools as ft
import json
import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import safetensors.numpy
from files import bits, contents
from helpers import assert_close, dense, densify

from lora_quax import (
    Adapt,
    IA3,
    LoHa,
    LoKr,
    loraify,
    LowRankArray,
    partition,
    peft,
    Rows,
    VeRA,
)
from lora_quax._arrays.base import replace


PREFIX = "base_model.model."
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class _Net(eqx.Module):
    tokens: eqx.nn.Embedding
    plane: eqx.nn.Conv2d
    up: dict[str, eqx.nn.Linear]
    blocks: eqx.nn.Linear

    def __init__(self, use_bias=False):
        line = ft.partial(eqx.nn.Linear, use_bias=use_bias)
        self.tokens = eqx.nn.Embedding(10, 4, key=jr.key(0))
        self.plane = eqx.nn.Conv2d(4, 6, 3, use_bias=use_bias, key=jr.key(1))
        self.up = {
            "line": line(4, 9, key=jr.key(2)),
            "more": line(6, 5, key=jr.key(5)),
        }
        blocks = [line(6, 6, key=jr.key(i)) for i in (3, 4)]
        self.blocks = jax.tree.map(lambda *x: jnp.stack(x), *blocks)


NAMES = {"blocks": "blocks.{}"}
WHERE = {
    "tokens": lambda net: net.tokens.weight,
    "plane": lambda net: net.plane.weight,
    "up.line": lambda net: net.up["line"].weight,
    "up.more": lambda net: net.up["more"].weight,
    "blocks.0": lambda net: net.blocks.weight[0],
    "blocks.1": lambda net: net.blocks.weight[1],
}


def _uneven(model):
    """With numbers in what trains, and a scaling in each of the parts of an update."""
    params, rest = partition(model)
    leaves, treedef = jax.tree.flatten(params)
    leaves = [0.5 * jnp.cos(i + jnp.arange(x.size)) for i, x in enumerate(leaves)]
    shapes = [x.shape for x in jax.tree.leaves(params)]
    leaves = [x.reshape(shape) for x, shape in zip(leaves, shapes)]
    model = eqx.combine(jax.tree.unflatten(treedef, leaves), rest)
    is_part = lambda x: isinstance(x, LowRankArray)
    scaled = lambda x: replace(x, alpha=2.5 * x.rank) if is_part(x) else x
    return jax.tree.map(scaled, model, is_leaf=is_part)


# What PEFT makes of the tensors of a module, given the weight and its scaling.


def _loha(w, t, s):
    pair = [t[f"hada_w{i}_a"] @ t[f"hada_w{i}_b"] for i in (1, 2)]
    return w + s * (pair[0] * pair[1]).reshape(w.shape)


def _lokr(w, t, s):
    w1, w2 = (
        t[f"lokr_w{i}"] if f"lokr_w{i}" in t else t[f"lokr_w{i}_a"] @ t[f"lokr_w{i}_b"]
        for i in (1, 2)
    )
    w1 = w1[..., None, None] if w2.ndim == 4 else w1
    return w + s * np.kron(w1, w2).reshape(w.shape)


def _vera(w, t, s):
    (out, n_in), A, B = w.shape, t["vera_A"], t["vera_B"]
    inner = t["vera_lambda_d"][:, None] * A[:, :n_in]
    return w + t["vera_lambda_b"][:, None] * (B[:out] @ inner)


def _ia3(w, t, s):
    scale = t["ia3_l"]
    if w.ndim == 2:
        return w * scale
    # Of a kernel the numbers are along the second axis, whichever side they are of.
    assert len(scale) == 1
    return w * (scale if scale.shape[1] == w.shape[1] else scale.swapaxes(0, 1))


def _tokens(w, t, s):
    if "token_adapter.trainable_tokens_delta" not in t:
        return w + s * t["lora_B.weight"] @ t["lora_A.weight"]
    out = np.array(w)
    out[[7, 0]] = t["token_adapter.trainable_tokens_delta"]
    return out


LINES = {"up": True, "blocks": True}
ALL = {"plane": True, **LINES}
_of_inputs = Adapt(update=ft.partial(IA3.init, feedforward=True))
_rows = Adapt(update=ft.partial(Rows.init, indices=[7, 0]))

CASES: dict[str, Any] = {
    "loha": (_loha, 3, LoHa, {**ALL, "up": Adapt(rank=2, alpha=7.0)}),
    "lokr": (_lokr, 1, LoKr, {**ALL, "up": Adapt(alpha=7.0)}),
    "lokr, plain": (_lokr, 9, LoKr, ALL),
    "lokr, both": (_lokr, 1, ft.partial(LoKr.init, both=True, factor=3), LINES),
    "vera": (_vera, 5, VeRA, LINES),
    "ia3": (_ia3, None, IA3, ALL),
    "ia3 of inputs": (_ia3, None, IA3, {**ALL, "plane": _of_inputs, "up": _of_inputs}),
    "rows": (_tokens, 2, LowRankArray, {**LINES, "tokens": _rows}),
}


def _adapted(name: str, base: _Net):
    _, rank, update, targets = CASES[name]
    # A name ends where a path does; `up` and `blocks` hold what is adapted.
    patterns = {rf"{target}(\..*)?": spec for target, spec in targets.items()}
    return _uneven(loraify(base, rank, jr.key(5), update=update, targets=patterns))


def _read(folder):
    config = json.loads((folder / CONFIG).read_text())
    return config, safetensors.numpy.load_file(folder / WEIGHTS)


def _by_module(tensors):
    shared = {
        k.removeprefix("base_model."): x
        for k, x in tensors.items()
        if not k.startswith(PREFIX)
    }
    out: dict[str, dict[str, Any]] = {}
    for name in WHERE:
        start = f"{PREFIX}{name}."
        own = {k.removeprefix(start): x for k, x in tensors.items() if start in k}
        if own:
            out[name] = own | shared
    return out


def _scaling(config, module: str) -> float:
    """As PEFT finds it: what a pattern says of the end of a name, or else of all."""

    def of(field: str) -> float:
        kind = {"r": "rank"}.get(field, field)
        patterns = config.get(f"{kind}_pattern", {}).items()
        said = [x for k, x in patterns if re.match(rf"(.*\.)?({k})$", module)]
        return (said or [config.get(field) or config.get(f"lora_{field}") or 1])[0]

    return of("alpha") / of("r")


@pytest.mark.parametrize("name", CASES)
def test_a_file_says_what_the_model_computes(name, tmp_path):
    compute, base = CASES[name][0], _Net()
    model = _adapted(name, base)
    peft.save(tmp_path / "a", model, names=NAMES)
    config, tensors = _read(tmp_path / "a")
    weights = densify(model)
    modules = _by_module(tensors)
    targets = CASES[name][3]
    assert [*modules] == [x for x in WHERE if x.partition(".")[0] in targets]
    for module, found in modules.items():
        expected = compute(WHERE[module](base), found, _scaling(config, module))
        np.testing.assert_allclose(
            WHERE[module](weights), expected, rtol=1e-5, atol=1e-6
        )

    loaded = peft.load(tmp_path / "a", base, names=NAMES)
    assert_close(loaded, weights, rtol=1e-5, atol=1e-6)
    peft.save(tmp_path / "b", loaded, names=NAMES)
    assert contents(tmp_path / "b") == contents(tmp_path / "a")


def test_a_bias_is_scaled_as_what_its_layer_gives(tmp_path):
    peft.save(tmp_path / "a", _adapted("ia3 of inputs", _Net()), names=NAMES)
    path, saved = tmp_path / "a" / CONFIG, (tmp_path / "a" / WEIGHTS).read_bytes()
    config = json.loads(path.read_text())
    assert config["feedforward_modules"] == ["plane", "up.line", "up.more"]
    # PEFT finds them by the ends of their names.
    path.write_text(
        json.dumps(config | {"feedforward_modules": ["ane", "line", "more"]})
    )
    base = _Net(use_bias=True)
    loaded = peft.load(tmp_path / "a", base, names=NAMES)
    assert bits(loaded.plane.bias) == bits(base.plane.bias)
    assert bits(loaded.up["line"].bias) == bits(base.up["line"].bias)
    scale = loaded.blocks.weight.scale[..., 0]
    np.testing.assert_allclose(dense(loaded.blocks.bias), scale * base.blocks.bias)
    peft.save(tmp_path / "b", loaded, names=NAMES)
    assert contents(tmp_path / "b")[f"/{WEIGHTS}"] == saved


def test_weights_of_one_shape_share_the_factors_of_vera(tmp_path):
    """Those of a stack have a copy for each layer, also where the layers are alike."""
    lines = [eqx.nn.Linear(6, 6, use_bias=False, key=jr.key(i)) for i in range(2)]
    base = {"lines": lines, "blocks": _Net().blocks}
    model = _uneven(loraify(base, 5, jr.key(1), update=VeRA))
    peft.save(tmp_path, model, names=NAMES)
    loaded = peft.load(tmp_path, base, names=NAMES)
    assert_close(loaded, densify(model), rtol=1e-5, atol=1e-6)
    first, second = (layer.weight.delta.shared for layer in loaded["lines"])
    assert first.a is second.a and first.b is second.b
