"""Several processes over loopback: the same steps as one, and one adapter; and where
they disagree an error on each of them."""

import json
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import on_processes
import pytest
from files import listing
from processes import finish, started

import lora_quax


pytestmark = pytest.mark.slow


def adapted_by(seed: int):
    init_b = jax.nn.initializers.normal()
    return lora_quax.loraify(on_processes.plain(), 4, jr.key(seed), init_b=init_b)


@pytest.fixture(scope="module", params=[2, 4])
def ran(request, tmp_path_factory):
    """What the processes have seen, and the folder that they wrote to."""
    folder = tmp_path_factory.mktemp("processes")
    lora_quax.save_model(folder / "base.safetensors", on_processes.plain())
    for i in range(2):
        lora_quax.save_adapter(folder / f"adapter.{i}", adapted_by(i))
        lora_quax.peft.save(folder / f"peft.{i}", adapted_by(i))
    n = request.param
    with started("on_processes.py", folder, processes=n, devices=4 // n) as running:
        finish(running)
    said = [json.loads((folder / f"{i}.json").read_text()) for i in range(n)]
    return said, folder


def test_the_same_steps_as_one_process(ran):
    said, folder = ran
    mesh = on_processes.mesh_of(jax.devices()[:4])
    model = lora_quax.shard(on_processes.plain(), mesh, on_processes.RULES)
    model = lora_quax.loraify(model, 4, jr.key(1))
    model, losses = on_processes.train(model, mesh)
    for one in said:
        assert one["losses"] == said[0]["losses"]
        assert one["losses"] == pytest.approx(losses, rel=1e-5)
    base = on_processes.plain()
    by_peft = lora_quax.peft.load(folder / "peft", base)
    by_us = lora_quax.load_adapter(folder / "adapter", base, same_base=True)
    assert eqx.tree_equal(by_peft, by_us)
    for x, y in zip(*map(jax.tree.leaves, (by_us, model)), strict=True):
        if eqx.is_array(x):
            assert jnp.allclose(x, jax.device_get(y), rtol=1e-5, atol=1e-6)
    merged = lora_quax.load_model(folder / "merged", base)
    for x, y in zip(*map(jax.tree.leaves, (merged, lora_quax.merge(by_us)))):
        if eqx.is_array(x):
            assert jnp.allclose(x, y, rtol=1e-5, atol=1e-6)


def test_each_reads_its_part_and_one_writes(ran):
    said, folder = ran
    arrays = eqx.filter(on_processes.plain(), eqx.is_array)
    size = sum(x.nbytes for x in jax.tree.leaves(arrays))
    first, *others = said
    assert [one["read"] for one in said] == [size // len(said)] * len(said)
    names = ["adapter", "adapter_model.safetensors", "model.safetensors", "after"]
    assert first["written"] == names
    assert [one["written"] for one in others] == [[]] * len(others)
    for one in said:
        assert one["put_as_read"] and one["again"] == [True, True]
        assert one["found_later"]
    assert (folder / "adapter").read_bytes() == (folder / "after").read_bytes()
    left = {path.name for path in folder.iterdir()}
    assert not left & {"none", "half", "typed"}
    assert not [path for path in listing(folder) if path.endswith(".lora_quax")]


def _disagree(function: str, what: str = "") -> str:
    said = f"The processes disagree, and each has to call `{function}` with the same:"
    return f"(?s)^ValueError: {said}.*{what}"


def _failed(function: str, one: str, process: int = 0) -> str:
    """On that process the error itself, and on the others that it has failed."""
    other = f"RuntimeError: `{function}` has failed on process {process}, .*with {one}"
    return f"(?s)^{one}|^{other}"


_WEIGHT = r"`layers\.0\.weight`: on process 0"
_RANKS = rf"{_WEIGHT} LowRankArray with .*'rank': 4.*, on process \d .*'rank': 5"
ERRORS = {
    "another call": "disagree: process 0 has called `loraify`, and process 1 `shard`",
    "another key": _disagree("loraify", r"`key`: on process 0 key<fry>\[\]"),
    "another rank": _disagree("loraify", _RANKS),
    "another alpha": _disagree("loraify", "'alpha': 1.*'alpha': 2"),
    "other targets": _disagree("loraify", f"{_WEIGHT} LowRank.*, on process 1 nothing"),
    "another initialiser": _disagree("loraify", r"weight\.b`: on process 0 float32"),
    "wrong on one": _failed("loraify", "ValueError: `rank`"),
    "another model": _disagree("shard", rf"{_WEIGHT} float32\[32,8\] with the digest"),
    "other rules": _disagree("shard", r"`rule 'weight'`: on process 0 P.*, on proc"),
    "rules in another order": _disagree("shard", r"the order of the rules`: on proc"),
    "another mesh": _disagree("shard", r"`mesh`: .* in the order \[.*\], on proc"),
    "rules wrong on one": _failed("shard", "ValueError: `layers.*no axis 'e'"),
    "another file": _disagree("load_adapter", r"`the file\.layers\.0.*: on process 0"),
    "no file on one": _failed("load_adapter", "FileNotFoundError: .*none", 1),
    "another adapter of PEFT": _disagree(r"peft\.load", "on process 0 float32"),
    "nowhere to write": _failed("save_adapter", "FileNotFoundError: .*none"),
    "nowhere to write for PEFT": _failed(r"peft\.save", "NotADirectoryError"),
    "nowhere to write a model": _failed("save_model", "FileNotFoundError: .*none"),
    "a type on one": _disagree("save_model", "`dtype`: on process 0 float32"),
    "adapted on one": _disagree("save_adapter", _WEIGHT),
    "a base on one": _disagree("save_adapter", r"`the base\..*: on process 0 nothing"),
    "a base on one for PEFT": _disagree(r"peft\.save", r"`the base\..*0 nothing"),
    "no model on one": _failed("load_model", "FileNotFoundError: .*none", 1),
    "a model of another type": _disagree("load_model", "float32.*process 1 bfloat16"),
}
OF_FOUR = {
    "a mesh of some": r"^ValueError: .*the processes \[0, 1\], and there are 4 proc"
}


def test_where_they_disagree_each_says_so(ran):
    expected = ERRORS | (OF_FOUR if len(ran[0]) == 4 else {})
    for one in ran[0]:
        assert one["errors"].keys() == expected.keys()
        for name, match in expected.items():
            assert re.search(match, one["errors"][name]), (name, one["errors"][name])
