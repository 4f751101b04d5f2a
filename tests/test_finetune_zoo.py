"""`finetune` and `generate` on models of eqx-zoo, from a folder and from a file of
llama.cpp."""

import io
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import quax
from files import bits, contents, listing
from safetensors.numpy import load_file, save_file

from lora_quax import (
    filter_value_and_grad,
    init,
    load_adapter,
    loraify,
    peft,
)
from lora_quax.__main__ import main
from lora_quax._cli.finetune.base import read_base
from lora_quax._cli.finetune.batches import batches
from lora_quax._cli.finetune.config import Base
from lora_quax._cli.finetune.data import Tokens
from lora_quax._cli.finetune.gguf import NAMES
from lora_quax._cli.finetune.loss import Loss
from lora_quax._cli.finetune.run import finetune
from lora_quax._cli.finetune.tokens import read_encoder


for _name in ("eqx_zoo", "gguf", "jinja2", "optax", "qwix", "tokenizers"):
    pytest.importorskip(_name)
EXAMPLES = Path(__file__).parents[1] / "examples"
PROMPT = "What is the colour of snow?"
CONFIG = """\
[model]
path = "{model}"
{more}
[data]
train = "{examples}/train.jsonl"
valid = "{examples}/valid.jsonl"
max_length = 128
[lora]
rank = 4
alpha = 8
[train]
steps = {steps}
batch = 4
accumulate = 2
learning_rate = 2e-2
warmup = 1
[output]
folder = "run"
checkpoint_every = 2
"""


def configuration(folder: Path, model: Path, steps=4, more="") -> Path:
    path = folder / "config.toml"
    fields = dict(model=model, examples=EXAMPLES, steps=steps, more=more)
    path.write_text(CONFIG.format(**fields))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    runpy.run_path(str(EXAMPLES / "tiny_model.py"))["write"](folder)
    return folder


def interleaved(x: np.ndarray, heads: int) -> np.ndarray:
    """The rows of each head in the order of llama.cpp."""
    halves = x.reshape(heads, 2, -1, *x.shape[1:])
    return halves.swapaxes(1, 2).reshape(x.shape)


def write_gguf(path: Path, folder: Path, kind="F32", **other) -> Path:
    """The model of a folder as a file of llama.cpp."""
    import gguf

    writer = gguf.GGUFWriter(path, other.pop("architecture", "llama"))
    config = json.loads((folder / "config.json").read_text())
    about = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    special = [x["content"] for x in tokenizer["added_tokens"]]
    words = [*tokenizer["model"]["vocab"], *special]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(other.pop("pre", "gpt-2"))
    writer.add_token_list(words)
    writer.add_token_types([3 if word in special else 1 for word in words])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_chat_template(about["chat_template"])
    for key, value in other.items():
        writer.add_string(key.replace("__", "."), value)
    theirs = {x.replace("{}", "0"): y.replace("{}", "0") for x, y in NAMES.items()}
    for name, x in load_file(folder / "model.safetensors").items():
        end = name.replace("layers.1.", "layers.0.").removesuffix(".weight")
        called = f"{theirs[end]}.weight"
        if "layers.1." in name:
            called = called.replace("blk.0", "blk.1")
        heads = {"q_proj": 4, "k_proj": 2}.get(end.split(".")[-1])
        x = interleaved(x, heads) if heads else x
        of = gguf.GGMLQuantizationType[kind if x.ndim > 1 else "F32"]
        if of.name == "F32":
            writer.add_tensor(called, np.ascontiguousarray(x))
        else:
            writer.add_tensor(called, gguf.quants.quantize(x, of), raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def losses(folder: Path) -> list[float]:
    lines = (folder / "run" / "log.jsonl").read_text().splitlines()
    return [x["loss"] for x in map(json.loads, lines) if "loss" in x]


def logits(model, ids) -> np.ndarray:
    return np.asarray(eqx.filter_jit(quax.quaxify(model))(jnp.asarray(ids))[0])


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """The folder of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    path = configuration(folder, model, steps=16)
    assert main(["finetune", str(path)]) == 0
    return folder


def said(capsys, model, *more: str) -> str:
    assert main(["generate", str(model), *more]) == 0
    return capsys.readouterr().out


def test_it_learns(whole, model):
    found = losses(whole)
    assert found[-1] < 0.6 * found[0]
    base = read_base(Base(model))
    checkpoint = whole / "run/checkpoints/step-00000016/adapter.safetensors"
    trained = load_adapter(checkpoint, base.model, same_base=True)
    again = peft.load(whole / "run" / "adapter", base.model)
    ids = read_encoder(model).prompt(PROMPT)
    np.testing.assert_array_equal(logits(trained, ids), logits(again, ids))
    about = json.loads((whole / "run/adapter/adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == str(model)
    assert about["task_type"] == "CAUSAL_LM" and (about["r"], about["lora_alpha"]) == (
        4,
        8,
    )


def test_what_is_generated(whole, model, capsys):
    adapter = str(whole / "run" / "adapter")
    ask = (PROMPT, "--max-tokens", "12")
    base, adapted = (
        said(capsys, model, *ask),
        said(capsys, model, *ask, "--adapter", adapter),
    )
    assert base != adapted
    # Token by token it is what the model says of all of them at once.
    encoder, causal = read_encoder(model), read_base(Base(model))
    trained = peft.load(adapter, causal.model)
    ids = [*encoder.prompt(PROMPT)]
    start = len(ids)
    while len(ids) < start + 12 and ids[-1] not in encoder.ends:
        ids.append(int(logits(trained, np.array(ids))[-1].argmax()))
    ids = [i for i in ids if i not in encoder.ends]
    assert adapted == encoder.tokenizer.decode(ids[start:]) + "\n"
    # So it is with the adapter of a checkpoint, and in a chat with other words.
    ours = whole / "run/checkpoints/step-00000016/adapter.safetensors"
    assert said(capsys, model, *ask, "--adapter", str(ours)) == adapted
    assert said(capsys, model, *ask, "--adapter", adapter, "--chat") != adapted


def test_what_is_drawn_is_of_the_seed(model, capsys, monkeypatch):
    ask = (PROMPT, "--max-tokens", "12", "--temperature", "2")
    one, again = said(capsys, model, *ask), said(capsys, model, *ask)
    assert one == again != said(capsys, model, *ask, "--seed", "1")
    # The likeliest alone, whatever the temperature is.
    greedy = said(capsys, model, PROMPT, "--max-tokens", "12")
    assert said(capsys, model, *ask, "--top-p", "1e-6") == greedy != one
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
    assert said(capsys, model, "-", *ask[1:]) == one


def test_it_ends_where_the_context_does(model, tmp_path, capsys):
    n = len(read_encoder(model).prompt(PROMPT))
    folder = copied(model, tmp_path / "model")
    edit(folder / "config.json", max_position_embeddings=n + 3)
    six, three = (said(capsys, model, PROMPT, "--max-tokens", x) for x in "63")
    assert three != six
    assert main(["generate", str(folder), PROMPT, "--max-tokens", "6"]) == 0
    out = capsys.readouterr()
    assert out.out == three and f"The context of {n + 3} tokens is full" in out.err
    assert main(["generate", str(folder), PROMPT, "--max-tokens", "3"]) == 0
    assert "is full" not in capsys.readouterr().err
    edit(folder / "config.json", max_position_embeddings=n)
    assert main(["generate", str(folder), PROMPT]) == 2
    message = f"The prompt has {n} tokens, and the context of the model is {n}"
    assert message in capsys.readouterr().err


WRONG_OPTIONS = {
    "--max-tokens=0": "--max-tokens has to be 1 or more, and less than 2**31: 0",
    f"--max-tokens={2**31}": "--max-tokens has to be 1 or more, and less than 2**31",
    "--system=x": "--system is for a chat: give --chat with it",
    "--temperature=-1": "--temperature has to be 0 or more: -1.0",
    "--top-p=0": r"--top-p has to be in (0, 1]: 0.0",
    "--seed=-1": "--seed has to be 0 or more: -1",
    "--adapter=nowhere": "There is no file or folder nowhere",
    "--tile=7": "Give a `tile` that divides it",
    "--tokenizer=nowhere": "There is no file nowhere",
}


@pytest.mark.parametrize("option", WRONG_OPTIONS)
def test_an_option_that_is_wrong_is_named(option, model, capsys):
    more = ["--quantise", "nf4"] if "tile" in option else []
    assert main(["generate", str(model), PROMPT, option, *more]) == 2
    out = capsys.readouterr()
    assert WRONG_OPTIONS[option] in out.err and not out.out
    assert main(["generate", str(model / "x"), PROMPT]) == 2
    assert "There is no model at" in capsys.readouterr().err
    assert main(["generate", str(model / "config.json"), PROMPT]) == 2
    assert (
        "config.json is neither a folder nor a file *.gguf" in capsys.readouterr().err
    )
    assert main(["generate", str(model), "a\udcff"]) == 2
    assert "The prompt is not UTF-8" in capsys.readouterr().err


def test_killed_from_outside_it_goes_on_bit_for_bit(whole, model, tmp_path):
    """At whatever moment that is."""
    path = configuration(tmp_path, model, steps=16)
    command = [sys.executable, "-m", "lora_quax", "finetune", str(path), "--resume"]
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    log = tmp_path / "run" / "log.jsonl"
    while process.poll() is None and not (
        log.is_file() and log.read_text().count("\n") > 5
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, process.stderr and process.stderr.read()
    assert main(["finetune", str(path), "--resume"]) == 0
    assert contents(tmp_path / "run") == contents(whole / "run")


def test_resuming_with_another_configuration_says_in_what(whole, model, capsys):
    path = whole / "other.toml"
    text = (whole / "config.toml").read_text()
    path.write_text(text.replace("rank = 4", "rank = 5").replace("128", "120"))
    before = listing(whole / "run")
    assert main(["finetune", str(path), "--resume"]) == 2
    error = capsys.readouterr().err
    assert "configuration.lora.rank was 4, and is 5" in error
    assert "configuration.data.max_length was 128, and is 120" in error
    assert listing(whole / "run") == before


QUANTISED = {"nf4": 'quantise = "nf4"\ntile = 32', "bfloat16": 'dtype = "bfloat16"'}


@pytest.mark.parametrize("kind", QUANTISED)
def test_other_bases(kind, model, tmp_path, capsys):
    path = configuration(tmp_path, model, steps=6, more=QUANTISED[kind])
    if kind == "bfloat16":  # And all that can be said of a step.
        text = path.read_text().replace("[lora]", "[lora]\ndropout = 0.1")
        path.write_text(text.replace("[train]", "[train]\ncheckpoint = true"))
    assert main(["finetune", str(path)]) == 0
    found = losses(tmp_path)
    assert found[-1] < found[0]
    about = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert about["lora_dropout"] == (0.1 if kind == "bfloat16" else 0)
    options = (
        ["--quantise", "nf4", "--tile", "32"] if kind == "nf4" else ["--dtype", kind]
    )
    adapter = str(tmp_path / "run" / "adapter")
    assert said(
        capsys, model, PROMPT, *options, "--adapter", adapter, "--max-tokens", "3"
    )


def test_a_file_of_llama_cpp_is_the_same_model(model, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", model)
    one, other = read_base(Base(path)), read_base(Base(model))
    assert bits(one.model) == bits(other.model)
    ours, theirs = read_encoder(path), read_encoder(model)
    assert (ours.ends, ours.template) == (theirs.ends, theirs.template)
    for text in (PROMPT, "Ü 12 <|end|>\n", ""):
        np.testing.assert_array_equal(ours.text(text), theirs.text(text))
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert ours.chat(turns) == theirs.chat(turns)


def test_its_blocks_are_a_base(model, tmp_path, capsys):
    gguf_file = write_gguf(tmp_path / "m.gguf", model, "Q8_0")
    path = configuration(tmp_path, gguf_file)
    assert main(["finetune", str(path)]) == 0
    found = losses(tmp_path)
    assert found[-1] < found[0]
    adapter = str(tmp_path / "run" / "adapter")
    ask = (PROMPT, "--chat", "--adapter", adapter, "--max-tokens", "3")
    assert said(capsys, gguf_file, *ask)


def test_an_embedding_that_is_the_head_is_adapted_as_both(model, tmp_path):
    path = configuration(tmp_path, model, steps=2)
    targets = '[lora]\ntargets = ["embed_tokens", "q_proj"]'
    path.write_text(path.read_text().replace("[lora]", targets))
    assert main(["finetune", str(path)]) == 0
    about = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert about["ensure_weight_tying"]
    base = read_base(Base(model)).model
    ours = tmp_path / "run/checkpoints/step-00000002/adapter.safetensors"
    trained, again = load_adapter(ours, base), peft.load(tmp_path / "run/adapter", base)
    ids = read_encoder(model).prompt(PROMPT)
    np.testing.assert_array_equal(logits(trained, ids), logits(again, ids))


def of_loss(model, **settings):
    """The loss of two texts, its gradients, and the bytes that these take meanwhile."""
    rows = [np.arange(n, dtype=np.int32) for n in (60, 90)]
    examples = [Tokens(ids, np.ones(len(ids), bool)) for ids in rows]
    (batch,) = batches(examples, 2, 128)
    f: Any = eqx.filter_jit(filter_value_and_grad(Loss(**settings)))
    compiled = f.lower(model, batch).compile()
    return compiled(model, batch), compiled.compiled.memory_analysis()


KINDS: dict[str, dict[str, Any]] = {
    "tied": {},
    "a head": dict(tie_word_embeddings=False),
    "experts": dict(
        architectures=["Qwen3MoeForCausalLM"],
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
    ),
}


def adapted(folder: Path, layers: int, **more):
    import eqx_zoo  # pyright: ignore

    about = json.loads((folder / "config.json").read_text()) | more
    config = eqx_zoo.Config.from_hf(about | {"num_hidden_layers": layers})
    base = eqx_zoo.CausalLM(config, key=jr.key(0))
    return loraify(base, 4, jr.key(1), init_b=init.gaussian(0.1))


def assert_close(expected, found) -> None:
    for x, y in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(y, x, rtol=2e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_what_saves_memory_changes_no_number(kind, model):
    trained = adapted(model, 1, **KINDS[kind])
    plain = dict(one_by_one=kind == "experts")
    expected, _ = of_loss(trained, **plain)
    found, _ = of_loss(trained, **plain, checkpoint=True, most_scores=258 * 50)
    assert_close(expected, found)


@pytest.mark.parametrize("more", [dict(checkpoint=True), dict(most_scores=258 * 32)])
def test_what_saves_memory_saves_it(more, model):
    trained = adapted(model, 4)
    _, before = of_loss(trained)
    _, after = of_loss(trained, **more)
    assert after.temp_size_in_bytes < before.temp_size_in_bytes


# What does not fit.


def copied(model: Path, folder: Path) -> Path:
    return Path(shutil.copytree(model, folder / "copy"))


def edit(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def drop_shard(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {
        name: f"model-0000{1 + i % 2}-of-00002.safetensors"
        for i, name in enumerate(tensors)
    }
    first = {k: x for k, x in tensors.items() if where[k].startswith("model-00001")}
    save_file(first, folder / "model-00001-of-00002.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors")


def smaller_vocabulary(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    rows = tensors["model.embed_tokens.weight"][:200].copy()
    save_file(
        tensors | {"model.embed_tokens.weight": rows}, folder / "model.safetensors"
    )
    edit(folder / "config.json", vocab_size=200)


FOLDERS = {
    "no configuration": (
        lambda x: (x / "config.json").unlink(),
        "There is no config.json in ",
    ),
    "no tokenizer": (
        lambda x: (x / "tokenizer.json").unlink(),
        "There is no file .*tokenizer.json. Name another by `tokenizer`",
    ),
    "a broken tokenizer": (
        lambda x: (x / "tokenizer.json").write_text("{}"),
        "tokenizer.json is no tokenizer: ",
    ),
    "no weights": (
        lambda x: (x / "model.safetensors").unlink(),
        "There is no model.safetensors in .*, and no model.safetensors.index.json",
    ),
    "a shard that is not there": (
        drop_shard,
        "There is no file .*model-00002-of-00002.safetensors",
    ),
    "a tensor that is not there": (
        drop_tensor,
        "is not what its config.json says: checkpoint is missing parameter 'model.norm",
    ),
    "another width": (
        lambda x: edit(x / "config.json", hidden_size=32),
        r"is not what its config.json says: .*: checkpoint shape \(.*64.*\) != model",
    ),
    "a text for a width": (
        lambda x: edit(x / "config.json", hidden_size="64"),
        "config.json has what no model has:\n  - `hidden_size` is '64', and no integer",
    ),
    "a text for what is used late": (
        lambda x: edit(x / "config.json", rms_norm_eps="a", rope_theta=0),
        "`rms_norm_eps` is 'a', .*\n  - `rope_theta` is 0, and no number above 0",
    ),
    "more layers": (
        lambda x: edit(x / "config.json", num_hidden_layers=10**9),
        "is to have 1,000,000,000 layers, and there are weights of 2",
    ),
    "a list for RoPE": (
        lambda x: edit(x / "config.json", rope_scaling=["x"]),
        "is of a model that eqx-zoo has not: 'list' object has no attribute 'get'",
    ),
    "a short context": (
        lambda x: edit(x / "config.json", max_position_embeddings=64),
        "train.jsonl has an example of .* tokens, and the context of the model is 64: ",
    ),
    "another architecture": (
        lambda x: edit(x / "config.json", architectures=["GPT2LMHeadModel"]),
        "is of a model that eqx-zoo has not: unsupported architecture 'GPT2",
    ),
    "no width": (
        lambda x: (x / "config.json").write_text('{"architectures": ["LlamaModel"]}'),
        "config.json does not say its '",
    ),
    "a smaller vocabulary": (
        smaller_vocabulary,
        "does not fit the model: it has tokens up to 257, .* embeddings for 200,",
    ),
    "no template": (
        lambda x: (x / "tokenizer_config.json").unlink(),
        "line 1: .* has no chat template, which chats need",
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_does_not_fit_is_named(case, model, tmp_path):
    spoil, message = FOLDERS[case]
    folder = copied(model, tmp_path)
    spoil(folder)
    path = configuration(tmp_path, folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        finetune(path, resume=False)
    assert main(["finetune", str(path)]) == 2
    assert not (tmp_path / "run").exists()


FILES = {
    "architecture": (
        dict(architecture="gpt2"),
        "is of the architecture 'gpt2', not 'llama'",
    ),
    "type": (dict(kind="Q5_0"), "is of type Q5_0; Q4_0, .* are known here"),
    "tokenizer": (
        dict(pre="other"),
        "a tokenizer of the kind 'gpt2', 'other'; the kind 'gpt2' .*tokenizer.json",
    ),
    "rope": (dict(llama__rope__scaling__type="yarn"), "scales RoPE"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_of_llama_cpp_that_is_not_known_is_named(case, model, tmp_path, capsys):
    fields, message = FILES[case]
    path = write_gguf(tmp_path / "m.gguf", model, **fields)
    assert main(["finetune", str(configuration(tmp_path, path))]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_a_target_that_is_not_there(model, tmp_path, capsys):
    path = configuration(tmp_path, model)
    path.write_text(path.read_text().replace("[lora]", '[lora]\ntargets = ["q_porj"]'))
    assert main(["finetune", str(path)]) == 2
    assert "q_porj" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_reader_that_has_enough_is_no_error(model):
    command = [sys.executable, "-m", "lora_quax", "generate", str(model), PROMPT]
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent)}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.wait() == 141 and not process.stderr.read()
