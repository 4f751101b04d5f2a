"""`convert`: from our files to PEFT's and back, with no model and no PyTorch."""

import json
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from cli import (
    cast,
    equal_bits,
    Experts,
    fails,
    model,
    nested,
    run,
    same_leaves,
    stacked,
    TARGETS,
    tensors_of,
    trained,
)
from helpers import adapted
from peft_files import (
    conv1d,
    draw,
    flat_parameter,
    one_parameter,
    pair,
    rank_stabilised,
    saved_embedding,
    write_peft,
)

import lora_quax
from lora_quax import peft


def there_and_back(first, net, folder: Path) -> tuple[Path, Path, Path]:
    """The files of an adapter: ours, PEFT's of it, and ours of that."""
    ours, theirs, again = folder / "a.safetensors", folder / "p", folder / "b"
    lora_quax.save_adapter(ours, first)
    assert run("convert", ours, theirs) == 0
    assert same_leaves(peft.load(theirs, net), first)
    assert run("convert", theirs, again) == 0
    assert same_leaves(lora_quax.load_adapter(again, net), first)
    return ours, theirs, again


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "targets",
    [
        "everything",
        *(
            pytest.param(x, marks=pytest.mark.slow)
            for x in TARGETS
            if x != "everything"
        ),
    ],
)
def test_there_and_back(targets, dtype, net, tmp_path):
    net = cast(net, dtype)
    first = trained(model(net, targets))
    ours, _, again = there_and_back(first, net, tmp_path)
    assert equal_bits(tensors_of(ours), tensors_of(again))
    assert run("diff", ours, again) == 0


def test_dora(net, tmp_path, capsys):
    """Its magnitudes are converted, shown and compared, and no base is needed."""
    targets = {eqx.nn.Linear: True, "embed": 3, "conv": 1}
    first = trained(adapted(net, targets=targets, use_dora=True))
    ours, theirs, again = there_and_back(first, net, tmp_path)
    assert run("diff", ours, again) == 0 == run("diff", ours, theirs)
    capsys.readouterr()
    assert run("inspect", theirs) == 0
    assert capsys.readouterr().out.count("magnitude") == 5
    lora_quax.save_adapter(tmp_path / "c", trained(first))
    assert run("diff", ours, tmp_path / "c") == 1
    assert "head.weight (magnitude): relative difference 0.2" in capsys.readouterr().out
    lora_quax.save_model(tmp_path / "base", net)
    for adapter in ours, theirs:
        said = fails(capsys, "merge", tmp_path / "base", adapter, tmp_path / "merged")
        assert "`head.weight` is adapted by DoRA" in said
        assert not (tmp_path / "merged").exists()


def test_names_of_pytorch_and_back(net, tmp_path):
    first = trained(model(net, "everything"))
    ours, theirs, again = tmp_path / "a.safetensors", tmp_path / "p", tmp_path / "b"
    there = {"layers.{}": "model.blocks.{}.q_proj", "embed": "model.tokens"}
    back = {"model.blocks.{}.q_proj": "layers.{}", "model.tokens": "embed"}
    for name, names in ("there", there), ("back", back):
        (tmp_path / name).write_text(json.dumps(names))
    lora_quax.save_adapter(ours, first)
    assert run("convert", ours, theirs, "--names", tmp_path / "there") == 0
    key = "base_model.model.model.blocks.1.q_proj.lora_A.weight"
    assert key in tensors_of(theirs / "adapter_model.safetensors")
    assert run("convert", theirs, again, "--names", tmp_path / "back") == 0
    assert equal_bits(tensors_of(ours), tensors_of(again))


def test_the_bias_of_a_convolution_alone_is_a_vector_in_peft(net, tmp_path):
    """Its files do not say that it is one of a convolution: there is no way back."""
    targets = {"layers.0": True, "conv.bias": "full"}
    first = trained(adapted(net, targets=targets))
    lora_quax.save_adapter(tmp_path / "a", first)
    assert run("convert", tmp_path / "a", tmp_path / "p") == 0
    assert same_leaves(peft.load(tmp_path / "p", net), first)


def test_experts_kept_as_in_out(tmp_path):
    first = adapted(Experts((3, 4, 5), jr.key(0)), targets="up")
    tree = {"moe": first}
    ours, theirs, again = tmp_path / "a.safetensors", tmp_path / "p", tmp_path / "b"
    lora_quax.save_adapter(ours, tree)
    assert run("convert", ours, theirs, "--transposed", "up") == 0
    A = tensors_of(theirs / "adapter_model.safetensors")[
        "base_model.model.moe.lora_A.weight"
    ]
    assert A.shape == (3 * 2, 4)
    assert run("convert", theirs, again, "--transposed", "up") == 0
    assert equal_bits(tensors_of(ours), tensors_of(again))


def test_float64_is_not_narrowed(x64, net, tmp_path):
    net = cast(net, float)
    lora_quax.save_adapter(tmp_path / "a", model(net, "everything"))
    with jax.enable_x64(False):
        assert run("convert", tmp_path / "a", tmp_path / "p") == 0
        assert run("convert", tmp_path / "p", tmp_path / "b") == 0
    assert equal_bits(tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b"))


REFUSED = {
    "groups": (
        lambda key: {"conv": adapted(eqx.nn.Conv1d(4, 4, 3, groups=2, key=key))},
        "a convolution of 2 groups",
    ),
    "transposed": (
        lambda key: {"conv": adapted(eqx.nn.ConvTranspose1d(4, 4, 3, key=key))},
        "a transposed convolution",
    ),
    "nested": (nested, "an adapter on an adapter"),
    "stacked": (stacked, "Layers that are stacked need a name"),
    "product": (
        lambda key: {"m.w": lora_quax.LowRankArray.init((4, 5), rank=2, key=key)},
        "there is no `LoraArray`",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_peft_does_not_have(case, tmp_path, capsys):
    make, reason = REFUSED[case]
    lora_quax.save_adapter(tmp_path / "a", make(jr.key(0)))
    assert reason in fails(capsys, "convert", tmp_path / "a", tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_stacked_layers_have_names(tmp_path, capsys):
    tree = stacked(jr.key(0))
    lora_quax.save_adapter(tmp_path / "a", tree)
    names = tmp_path / "names.json"
    names.write_text('{"layers": "model.layers.{}.q"}')
    assert run("convert", tmp_path / "a", tmp_path / "p", "--names", names) == 0
    base = lora_quax.unload(tree)
    loaded = peft.load(tmp_path / "p", base, names={"layers": "model.layers.{}.q"})
    assert same_leaves(loaded, tree)
    # One by one they come back, and no two to one place.
    assert run("convert", tmp_path / "p", tmp_path / "b") == 0
    assert "model.layers.2.q.weight.delta.a" in tensors_of(tmp_path / "b")
    names.write_text('{"model.layers.{}.q": "layers"}')
    error = fails(capsys, "convert", tmp_path / "p", tmp_path / "c", "--names", names)
    assert "would both be `layers.weight`" in error


FROM_PEFT_REFUSED = {
    "order": (
        pair("m", 5, 4, 6) | pair("m.base_layer", 4, 5, 6),
        {"target_parameters": ["m.down", "m.up"]},
        "may be of m.down or m.up",
    ),
    "bias of B": (
        pair("q", 5, 4) | {"q.lora_B.bias": draw(5)},
        {"target_modules": ["q"], "lora_bias": True},
        "`q.bias` is added to, by `lora_bias`",
    ),
    "groups": (
        {"c.lora_A.weight": draw(2, 4, 3), "c.lora_B.weight": draw(4, 1, 1)},
        {"target_modules": ["c"]},
        "a convolution of 2 groups",
    ),
    "convolution saved whole": (
        pair("q", 5, 4) | {"c.weight": draw(4, 4, 3)},
        {"target_modules": ["q"], "modules_to_save": ["c"]},
        "may be of a transposed convolution",
    ),
    "statistics": (
        pair("q", 5, 4) | {"n.count": np.asarray([3])},
        {"target_modules": ["q"], "modules_to_save": ["n"]},
        "`n.count` is of type int64",
    ),
    "rank": (
        pair("q", 5, 4, rank=3),
        {"target_modules": ["q"]},
        r"A of shape (3, 4) and B of shape (5, 3) are not of the rank 2",
    ),
}


@pytest.mark.parametrize("case", FROM_PEFT_REFUSED)
def test_what_the_files_do_not_say(case, tmp_path, capsys):
    tensors, config, reason = FROM_PEFT_REFUSED[case]
    source = write_peft(tmp_path / "p", tensors, **config)
    assert reason in fails(capsys, "convert", source, tmp_path / "a")
    assert not (tmp_path / "a").exists()


CONVERTIBLE = [conv1d, rank_stabilised, saved_embedding, one_parameter, flat_parameter]


@pytest.mark.parametrize("case", CONVERTIBLE)
def test_from_peft_and_back(case, tmp_path):
    tensors, config, _, _ = case()
    source = write_peft(tmp_path / "p", tensors, **config)
    assert run("convert", source, tmp_path / "a") == 0
    assert run("convert", tmp_path / "a", tmp_path / "q") == 0
    file = "adapter_model.safetensors"
    assert equal_bits(tensors_of(source / file), tensors_of(tmp_path / "q" / file))
    assert run("diff", source, tmp_path / "q") == 0


def test_the_mapping_of_peft_serves_either_way(net, tmp_path):
    first = model(net, "linear of two ranks")
    lora_quax.save_adapter(tmp_path / "a", first)
    names = tmp_path / "names.json"
    names.write_text('{"layers.{}": "model.blocks.{}.q_proj"}')
    option = "--names", names
    assert run("convert", tmp_path / "a", tmp_path / "p", *option) == 0
    assert run("convert", tmp_path / "p", tmp_path / "b", *option) == 0
    assert equal_bits(tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b"))
    assert run("diff", tmp_path / "a", tmp_path / "b") == 0
    for one, other in ("a", "p"), ("p", "a"):
        assert run("diff", tmp_path / one, tmp_path / other) == 1
        assert run("diff", tmp_path / one, tmp_path / other, *option) == 0
    # A base as lora_quax.save_model writes it.
    lora_quax.save_model(tmp_path / "base", net)
    merge = "merge", tmp_path / "base", tmp_path / "p", tmp_path / "out", *option
    assert run(*merge) == 0
    got = lora_quax.load_model(tmp_path / "out", net)
    for x, y in zip(*map(jax.tree.leaves, (got, lora_quax.merge(first)))):
        np.testing.assert_allclose(x, y, atol=1e-5)
