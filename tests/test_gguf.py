"""Models of llama.cpp: the numbers are its own, and the blocks stay as small."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import quax
from helpers import adapted, assert_close, drawn

from lora_quax import (
    AdapterError,
    dequantise,
    load_gguf,
    QuantisedArray,
    save_model,
)


gguf = pytest.importorskip("gguf")
TYPES = ["Q4_0", "Q4_1", "Q8_0", "Q6_K"]
# Bytes of a number: those of the file, but for six bits that are kept in eight.
BYTES = {"Q4_0": 0.5625, "Q4_1": 0.625, "Q8_0": 1.0625, "Q6_K": 1.25}


def blocks(kind: str, shape, seed=0) -> np.ndarray:
    """A tensor as bytes of blocks."""
    of = gguf.GGMLQuantizationType[kind]
    if kind != "Q6_K":
        return gguf.quants.quantize(np.asarray(drawn(shape, seed), np.float32), of)
    size, n_bytes = gguf.GGML_QUANT_SIZES[of]
    rng = np.random.default_rng(seed)
    out = rng.integers(0, 256, (*shape[:-1], shape[-1] // size, n_bytes), np.uint8)
    scales = rng.normal(size=(*out.shape[:-1], 1)).astype(np.float16)
    out[..., -2:] = scales.view(np.uint8)  # So that none is infinite.
    return out.reshape(*shape[:-1], -1)


def write(path, tensors, architecture="other", **fields):
    """`tensors`: arrays, or pairs of a type and of its blocks."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, n in fields.items():
        writer.add_uint32(f"{architecture}.attention.{name}", n)
    for name, x in tensors.items():
        if isinstance(x, tuple):
            kind = gguf.GGMLQuantizationType[x[0]]
            writer.add_tensor(name, x[1], raw_dtype=kind)
        else:
            writer.add_tensor(name, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def like(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize("kind", TYPES)
def test_its_numbers_are_those_of_llama_cpp(kind, tmp_path):
    x = blocks(kind, (6, 512))
    path = write(tmp_path / "m.gguf", {"w": (kind, x)})
    out = load_gguf(path, {"w": like(6, 512)})["w"]
    assert isinstance(out, QuantisedArray) and out.kind == kind.lower()
    expected = gguf.quants.dequantize(x, gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(dequantise(out), expected)
    held = sum(leaf.on_device_size_in_bytes() for leaf in jax.tree.leaves(out))
    assert held == BYTES[kind] * out.size


def test_a_model_of_several_types(tmp_path):
    """Stacked layers, tied weights, plain vectors, another type of number."""
    names = {"layers": "blk.{}.ffn", "embed": "token_embd", "head": "token_embd"}
    layers = [blocks("Q4_1", (32, 64), seed) for seed in range(3)]
    tensors: dict = {f"blk.{i}.ffn": ("Q4_1", x) for i, x in enumerate(layers)}
    tensors["token_embd"] = "Q8_0", blocks("Q8_0", (11, 64))
    tensors["norm"] = np.arange(3, dtype=np.float32)
    tensors["half"] = np.arange(3, dtype=np.float16)
    path = write(tmp_path / "m.gguf", tensors)
    model = dict(
        layers=like(3, 32, 64, dtype=jnp.bfloat16),
        embed=like(11, 64),
        head=like(11, 64),
        norm=like(3),
        half=like(3),
        rate=0.5,
    )
    out = load_gguf(path, model, names=names)
    assert out["layers"].shape == (3, 32, 64) and out["layers"].dtype == jnp.bfloat16
    decode = lambda x: gguf.quants.dequantize(x, gguf.GGMLQuantizationType.Q4_1)
    expected = jnp.stack([decode(x) for x in layers]).astype(jnp.bfloat16)
    np.testing.assert_array_equal(dequantise(out["layers"]), expected)
    assert out["embed"] is out["head"]
    np.testing.assert_array_equal(out["norm"], tensors["norm"])
    assert out["half"].dtype == jnp.float32 and out["rate"] == 0.5


def test_rows_of_a_llama_are_in_the_order_of_hugging_face(tmp_path):
    """Two heads of q, one of k, of four rows each: the halves that RoPE turns lie one
    after the other, and in the file by turns."""
    q, k = np.arange(8.0), np.arange(4.0)
    tensors = {
        f"blk.0.attn_{name}.weight": np.broadcast_to(x[:, None], (len(x), 32))
        for name, x in {"q": q, "k": k, "v": k}.items()
    }
    tensors = {k: np.array(x, np.float32) for k, x in tensors.items()}
    tensors["blk.0.attn_q.bias"] = q.astype(np.float32)
    heads = dict(head_count=2, head_count_kv=1)
    path = write(tmp_path / "m.gguf", tensors, "llama", **heads)
    out = load_gguf(path, {name: like(*x.shape) for name, x in tensors.items()})
    bias = out.pop("blk.0.attn_q.bias")
    assert [*map(int, bias)] == [0, 2, 1, 3, 4, 6, 5, 7]
    rows = {name[11]: [*map(int, x[:, 0])] for name, x in out.items()}
    assert rows == {"q": [0, 2, 1, 3, 4, 6, 5, 7], "k": [0, 2, 1, 3], "v": [0, 1, 2, 3]}


def test_it_is_a_base_like_any_other(tmp_path):
    linear = eqx.nn.Linear(64, 8, key=jr.key(0))
    tensors = {"weight": ("Q4_1", blocks("Q4_1", (8, 64))), "bias": linear.bias}
    tensors["bias"] = np.asarray(linear.bias)
    path = write(tmp_path / "m.gguf", tensors)
    model = adapted(load_gguf(path, linear))
    plain = eqx.tree_at(lambda m: m.weight.base, model, replace_fn=dequantise)
    x = drawn((64,), 1, jnp.float32)
    out = [quax.quaxify(m)(x) for m in (model, plain)]
    assert_close(*out, rtol=1e-6, atol=1e-6)


GOOD = {"w": ("Q8_0", blocks("Q8_0", (4, 32))), "b": np.ones(4, np.float32)}
LIKE = {"w": like(4, 32), "b": like(4)}
WRONG = {
    "missing": ({"w": GOOD["w"]}, LIKE, "`b` is missing"),
    "unexpected": ({**GOOD, "more": GOOD["b"]}, LIKE, "`more` is unexpected"),
    "shape": (
        GOOD,
        {**LIKE, "w": like(5, 32)},
        r"`w` has shape \(4, 32\); the model has \(5, 32\)",
    ),
    "a type": (
        {**GOOD, "w": ("Q5_0", blocks("Q5_0", (4, 32)))},
        LIKE,
        "`w` is of type Q5_0; Q4_0, Q4_1, Q8_0, Q6_K and F32, .* are known here",
    ),
    "integers": (GOOD, {**LIKE, "b": like(4, dtype=jnp.int32)}, "`b` is no floating-p"),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_named(case, tmp_path):
    tensors, model, message = case
    path = write(tmp_path / "m.gguf", tensors)
    with pytest.raises(AdapterError, match=message):
        load_gguf(path, model)


def test_layers_of_several_types_are_no_stack(tmp_path):
    tensors = {f"blk.{i}": (k, blocks(k, (4, 32))) for i, k in enumerate(TYPES[:2])}
    path = write(tmp_path / "m.gguf", tensors)
    with pytest.raises(AdapterError, match="`w` is a stack .* types Q4_0 and Q4_1"):
        load_gguf(path, {"w": like(2, 4, 32)}, names={"w": "blk.{}"})


@pytest.mark.parametrize("keep", [0, 3, 30, 150, -40])
def test_a_damaged_file(keep, tmp_path):
    path = write(tmp_path / "m.gguf", GOOD)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(AdapterError, match="is no sound GGUF file"):
        load_gguf(path, LIKE)


def test_another_file(tmp_path):
    (tmp_path / "x").write_bytes(b"PK\3\4" + bytes(100))
    with pytest.raises(AdapterError, match="is no sound GGUF file"):
        load_gguf(tmp_path / "x", LIKE)
    with pytest.raises(FileNotFoundError, match="There is no file"):
        load_gguf(tmp_path / "y", LIKE)


@pytest.mark.parametrize("heads", [0, 4, 5])
def test_heads_that_the_rows_are_not_of(heads, tmp_path):
    """Four heads would have an odd number of rows each."""
    tensors = {"blk.0.attn_q.weight": np.zeros((12, 4), np.float32)}
    path = write(tmp_path / "m.gguf", tensors, "llama", head_count=heads)
    with pytest.raises(AdapterError, match="has not the rows of the heads that the"):
        load_gguf(path, {"blk.0.attn_q.weight": like(12, 4)})


def test_a_model_that_is_quantised_is_no_pattern(tmp_path):
    path = write(tmp_path / "m.gguf", GOOD)
    model = load_gguf(path, LIKE)
    with pytest.raises(ValueError, match="`w` is quantised, and here are plain arrays"):
        load_gguf(path, model)
    with pytest.raises(ValueError, match="`w` is quantised, and here are plain arrays"):
        save_model(tmp_path / "x", model)
