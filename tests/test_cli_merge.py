"""`merge`: an adapter into the files of a model."""

import json
import tracemalloc
from pathlib import Path

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import safetensors.numpy
from cli import (
    base_of,
    cast,
    equal_bits,
    expected,
    fails,
    model,
    nested,
    read_folder,
    run,
    stacked,
    tensors_of,
    trained,
    write_base,
)
from helpers import adapted
from peft_files import draw, OF_PEFT, pair, write_peft

import lora_quax
from lora_quax import peft


EPS = {"float64": 1e-12, "float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}


@pytest.mark.parametrize("n_shards", [1, 3])
@pytest.mark.parametrize("form", ["ours", "PEFT"])
@pytest.mark.parametrize("dtype", EPS)
def test_merge(dtype, form, n_shards, net, x64, tmp_path):
    net = cast(net, dtype)
    first = trained(model(net, "everything"))
    save = lora_quax.save_adapter if form == "ours" else peft.save
    save(tmp_path / "adapter", first)
    tensors = base_of(first)
    write_base(tmp_path / "base", tensors, n_shards)
    out = tmp_path / "out"
    assert run("merge", tmp_path / "base", tmp_path / "adapter", out) == 0
    merged, wanted = read_folder(out), expected(first)
    assert merged.keys() == tensors.keys() == wanted.keys()
    for name, x in merged.items():
        assert x.dtype == tensors[name].dtype and x.shape == tensors[name].shape
        np.testing.assert_allclose(
            x.astype(float), wanted[name], rtol=EPS[dtype], atol=EPS[dtype]
        )
    sources = {file.name for file in (tmp_path / "base").iterdir()}
    assert {file.name for file in out.iterdir()} == sources - {"pytorch_model.bin"}


def test_merge_of_a_file(net, tmp_path):
    """Into a file of that name, or an empty folder; what does not change stays."""
    first = trained(model(net, "linear"))
    lora_quax.save_adapter(tmp_path / "a", first)
    (tmp_path / "folder").mkdir()
    base = tmp_path / "base.safetensors"
    tensors = base_of(first) | {"index": np.arange(3)}
    safetensors.numpy.save_file(tensors, base, metadata={"some": "thing"})
    assert run("merge", base, tmp_path / "a", tmp_path / "out") == 0
    assert run("merge", base, tmp_path / "a", tmp_path / "folder") == 0
    merged = tensors_of(tmp_path / "out")
    assert (
        merged.pop("layers.0.weight").tobytes()
        != tensors.pop("layers.0.weight").tobytes()
    )
    assert equal_bits(merged, tensors)
    in_folder = tmp_path / "folder" / "base.safetensors"
    assert in_folder.read_bytes() == (tmp_path / "out").read_bytes()


def test_an_update_of_zero_changes_no_bit(tmp_path):
    weight = draw(5, 4)
    weight[0, 0] = -0.0
    update = {"q.lora_A.weight": draw(2, 4), "q.lora_B.weight": draw(5, 2) * 0}
    adapter = write_peft(tmp_path / "p", update, target_modules=["q"])
    safetensors.numpy.save_file({"q.weight": weight}, tmp_path / "base")
    assert run("merge", tmp_path / "base", adapter, tmp_path / "out") == 0
    assert equal_bits(tensors_of(tmp_path / "out"), {"q.weight": weight})


def test_merge_of_stacked_layers(tmp_path):
    tree = stacked(jr.key(0))
    lora_quax.save_adapter(tmp_path / "a", tree)
    weight = np.asarray(tree["layers"].weight.base)
    base = {f"model.layers.{i}.q.weight": x for i, x in enumerate(weight)}
    safetensors.numpy.save_file(base, tmp_path / "base")
    names = tmp_path / "names.json"
    names.write_text('{"layers": "model.layers.{}.q"}')
    arguments = tmp_path / "base", tmp_path / "a", tmp_path / "out"
    assert run("merge", *arguments, "--names", names) == 0
    wanted = expected(tree)["layers.weight"]
    for name, x in tensors_of(tmp_path / "out").items():
        np.testing.assert_allclose(x, wanted[int(name.split(".")[2])], rtol=1e-5)


def test_merge_of_an_adapter_on_an_adapter(tmp_path):
    tree = nested(jr.key(0))
    tree = eqx.tree_at(
        lambda x: x["layer"].weight.delta.b, tree, replace_fn=lambda x: x + 1
    )
    lora_quax.save_adapter(tmp_path / "a", tree)
    outer = tree["layer"].weight
    base = {"layer.weight": np.asarray(outer.base.base)}
    safetensors.numpy.save_file(base, tmp_path / "base")
    assert run("merge", tmp_path / "base", tmp_path / "a", tmp_path / "out") == 0
    wanted = np.asarray(lora_quax.merge(tree)["layer"].weight)
    merged = tensors_of(tmp_path / "out")["layer.weight"]
    np.testing.assert_allclose(merged, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", OF_PEFT)
def test_merge_of_what_peft_writes(case, tmp_path):
    tensors, config, base, deltas = case()
    adapter = write_peft(tmp_path / "p", tensors, **config)
    safetensors.numpy.save_file(base, tmp_path / "base")
    assert run("merge", tmp_path / "base", adapter, tmp_path / "out") == 0
    merged = tensors_of(tmp_path / "out")
    assert merged.keys() == base.keys()
    for name, x in merged.items():
        wanted = base[name].astype(float) + deltas[name]
        np.testing.assert_allclose(x, wanted, rtol=1e-6, atol=1e-6)


def test_square_experts(tmp_path, capsys):
    adapter = write_peft(tmp_path / "p", pair("m", 4, 4, 6), target_parameters=["m.up"])
    safetensors.numpy.save_file({"m.up": draw(3, 4, 4)}, tmp_path / "base")
    error = fails(capsys, "merge", tmp_path / "base", adapter, tmp_path / "out")
    assert "`m.up` is square, and nothing says whether" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_how_a_square_weight_lies_the_fingerprint_says(turned, dtype, tmp_path, capsys):
    """Of a name too by which GPT-2 has a weight the other way round."""
    model = adapted({"c_proj": eqx.nn.Linear(4, 4, key=jr.key(0))})
    lora_quax.save_adapter(tmp_path / "a", model)
    base, merged = base_of(model), base_of(lora_quax.merge(model))
    turn = (lambda x: x.T.copy()) if turned else lambda x: x
    write = lambda x: {"c_proj.weight": turn(x["c_proj.weight"].astype(dtype))}
    safetensors.numpy.save_file(write(base), tmp_path / "base")
    run("merge", tmp_path / "base", tmp_path / "a", tmp_path / "out")
    assert capsys.readouterr().err == ""
    atol = 1e-6 if dtype is np.float32 else 2e-2
    found = tensors_of(tmp_path / "out")["c_proj.weight"].astype(np.float32)
    wanted = write(merged)["c_proj.weight"].astype(np.float32)
    np.testing.assert_allclose(found, wanted, rtol=atol, atol=atol)


def test_another_base_is_said_to_be_one(tmp_path, capsys):
    model = adapted({"q": eqx.nn.Linear(4, 3, key=jr.key(0))})
    lora_quax.save_adapter(tmp_path / "a", model)
    other = draw(3, 4)
    safetensors.numpy.save_file({"q.weight": other}, tmp_path / "base")
    assert run("merge", tmp_path / "base", tmp_path / "a", tmp_path / "out") == 0
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("lora_quax: The adapter ")
    assert err.endswith(
        "was trained on another base:\n  - `q.weight` has other numbers\n"
    )


GOOD = pair("q", 5, 4)


UNFIT: dict[str, tuple[dict, dict, dict, str]] = {
    "missing": ({}, {}, {}, "the base has no `q.weight`"),
    "shape": ({}, {}, {"q.weight": draw(5, 3)}, "has shape (5, 3) in the base"),
    "type": (
        {},
        {},
        {"q.weight": np.zeros((5, 4), np.int8)},
        "`q.weight` is of type I8 in the base",
    ),
    "not finite": (
        {"q.lora_A.weight": GOOD["q.lora_A.weight"] * np.nan},
        {},
        {"q.weight": draw(5, 4)},
        "`q.weight, a` is not finite",
    ),
    "missing module": (
        {"n.weight": draw(4)},
        {"modules_to_save": ["n"]},
        {"q.weight": draw(5, 4)},
        "the base has no `n.weight`",
    ),
    "too large": (
        {"q.lora_A.weight": GOOD["q.lora_A.weight"] * np.float32(1e6)},
        {},
        {"q.weight": draw(5, 4, dtype=np.float16)},
        "is not finite in the type of the base, float16",
    ),
    "mixed": (
        pair("r", 4, 4) | pair("s", 6, 4),
        {"target_modules": ["q", "r", "s"]},
        {"q.weight": draw(5, 4), "r.weight": draw(4, 4), "s.weight": draw(4, 6)},
        "`r.weight` is square, and nothing says",
    ),
}


@pytest.mark.parametrize("n_shards", [1, 2])
@pytest.mark.parametrize("is_there", [False, True])
@pytest.mark.parametrize("case", UNFIT)
def test_what_does_not_fit_leaves_no_trace(case, is_there, n_shards, tmp_path, capsys):
    tensors, config, base, reason = UNFIT[case]
    config = {"target_modules": ["q"], **config}
    adapter = write_peft(tmp_path / "p", GOOD | tensors, **config)
    write_base(tmp_path / "base", base | {"z": draw(3), "zz": draw(3)}, n_shards)
    out = tmp_path / "out"
    if is_there:
        out.mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert reason in fails(capsys, "merge", tmp_path / "base", adapter, out)
    assert sorted(tmp_path.rglob("*")) == before


def test_all_that_does_not_fit_is_listed(tmp_path, capsys):
    tensors = pair("q", 5, 4) | pair("r", 5, 4)
    adapter = write_peft(tmp_path / "p", tensors, target_modules=["q", "r"])
    safetensors.numpy.save_file({"z": draw(3)}, tmp_path / "base")
    error = fails(capsys, "merge", tmp_path / "base", adapter, tmp_path / "out")
    assert "no `q.weight`" in error and "no `r.weight`" in error


def test_a_merge_takes_some_rows_at_a_time(tmp_path, monkeypatch):
    from lora_quax._cli import merge

    base = draw(1024, 2048)
    adapter = write_peft(tmp_path / "p", factors(base.shape), target_modules=["q"])
    safetensors.numpy.save_file({"q.weight": base}, tmp_path / "b.safetensors")
    assert run("merge", tmp_path / "b.safetensors", adapter, tmp_path / "one") == 0
    monkeypatch.setattr(merge, "_BLOCK", 1 << 14)
    tracemalloc.start()
    try:
        assert run("merge", tmp_path / "b.safetensors", adapter, tmp_path / "two") == 0
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < base.nbytes / 2
    one, two = (
        safetensors.numpy.load_file(tmp_path / name)["q.weight"]
        for name in ("one", "two")
    )
    np.testing.assert_allclose(one, two, rtol=0, atol=1e-5)
    assert np.abs(one - base).max() > 0.1


def factors(shape):
    start = "q"
    return {
        f"{start}.lora_A.weight": draw(2, shape[1]),
        f"{start}.lora_B.weight": draw(shape[0], 2),
    }


def tied_base(folder: Path, **config) -> Path:
    folder.mkdir()
    tensors = {"embed_tokens.weight": draw(7, 4), "q.weight": draw(4, 4)}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    about = {"tie_word_embeddings": True, "vocab_size": 7, **config}
    (folder / "config.json").write_text(json.dumps(about))
    return folder


def embedding_and_head(scale=1.0):
    A, B = draw(2, 7), draw(4, 2)
    head = {"lora_A.weight": scale * B.T, "lora_B.weight": A.T}
    head = {name: np.ascontiguousarray(x) for name, x in head.items()}
    table = {"lora_embedding_A": A, "lora_embedding_B": B}
    return (
        {f"embed_tokens.{name}": x for name, x in table.items()},
        {f"lm_head.{name}": x for name, x in head.items()},
    )


TIED = {
    "said by the adapter": (True, True, {}, (), True),
    "said, with no factors for the head": (True, False, {}, (), True),
    "equal factors": (False, True, {}, (), True),
    "said by the user": (False, False, {}, ("--tied",), True),
    "not said": (False, False, {}, (), False),
    "not tied": (False, False, {"tie_word_embeddings": False}, (), True),
    "tied below": (
        False,
        False,
        {"tie_word_embeddings": None, "text_config": {"tie_word_embeddings": True}},
        (),
        False,
    ),
}


@pytest.mark.parametrize("case", TIED.values(), ids=TIED)
def test_a_base_whose_head_is_its_embedding(tmp_path, capsys, case):
    ensures, has_head, config, flags, merges = case
    base = tied_base(tmp_path / "base", **config)
    table, head = embedding_and_head()
    tensors = table | (head if has_head else {})
    adapter = write_peft(
        tmp_path / "p",
        tensors,
        target_modules=["embed_tokens", "lm_head"],
        ensure_weight_tying=ensures,
    )
    arguments = "merge", base, adapter, tmp_path / "out", *flags
    if not merges:
        assert "says that the head of the base is its embedding" in fails(
            capsys, *arguments
        )
        assert not (tmp_path / "out").exists()
        return
    assert run(*arguments) == 0
    merged = tensors_of(tmp_path / "out" / "model.safetensors")
    before = tensors_of(base / "model.safetensors")
    A, B = table.values()
    settings = json.loads((adapter / "adapter_config.json").read_text())
    scaling = settings["lora_alpha"] / settings["r"]
    want = before["embed_tokens.weight"] + scaling * (B @ A).T
    np.testing.assert_allclose(merged["embed_tokens.weight"], want, atol=1e-6)
    assert equal_bits({"q": merged["q.weight"]}, {"q": before["q.weight"]})
