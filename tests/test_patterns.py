"""What files may ask of a reader is bounded: patterns, JSON, what messages quote."""

import json
import re
import struct

import equinox as eqx
import hypothesis as hp
import hypothesis.strategies as st
import jax.random as jr
import pytest
import safetensors.numpy
from helpers import adapted

from lora_quax import AdapterError, load_adapter, peft
from lora_quax._disk import files
from lora_quax.peft._config import Config
from lora_quax.peft._patterns import Table, Whole


names = st.lists(st.sampled_from(["a", "b", "q_proj", "0", "10", "a-b"]), min_size=1)
paths = names.map(".".join)
patterns = st.one_of(
    paths,
    paths.map(re.escape),
    paths.map(lambda x: f"^{re.escape(x)}"),
    st.sampled_from([".*", "a.b", r"a\.\d+", "(a|b)", "[ab]", "^a", "a|b", "", "."]),
)


def by_re(table, name, default):
    """The rule of PEFT, as it is written there."""
    for pattern, value in table.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


@hp.given(st.dictionaries(patterns, st.integers(), max_size=6), paths)
def test_the_first_pattern_that_matches_decides(table, name):
    assert Table(table).find(name, "none") == by_re(table, name, "none")


@hp.given(st.lists(patterns, min_size=1, max_size=3).map("|".join), paths)
def test_a_pattern_for_whole_paths(pattern, name):
    assert Whole(pattern).match(name) == (re.fullmatch(pattern, name) is not None)


@pytest.mark.parametrize("escape", [re.escape, str, lambda x: f"^{re.escape(x)}"])
def test_there_may_be_a_pattern_for_each_layer(escape):
    """Each is looked up: a search for each would take minutes."""
    modules = [f"model.layers.{i}.self_attn.q_proj" for i in range(20_000)]
    ranks = {escape(name): i for i, name in enumerate(modules)}
    config = Config(7, 1, target_modules="|".join(map(re.escape, modules)))
    config = Config(7, 1, target_modules=config.target_modules, rank_pattern=ranks)
    assert [config.rank(name) for name in modules] == [*range(20_000)]
    assert all(map(config.targets, modules))
    assert config.rank("lm_head") == 7 and not config.targets("lm_head")


@pytest.fixture
def adapter(tmp_path):
    model = {"q_proj": eqx.nn.Linear(3, 3, key=jr.key(0))}
    peft.save(tmp_path, adapted(model, targets={"q_proj": 2}))
    return tmp_path


def edited(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return lambda: peft.load(folder, {"q_proj": eqx.nn.Linear(3, 3, key=jr.key(0))})


HOSTILE = r"(([a-z_]+)+\.?)+!"
FIELDS = {
    "target_modules": lambda x: x,
    "exclude_modules": lambda x: x,
    "rank_pattern": lambda x: {x: 2},
    "alpha_pattern": lambda x: {x: 2},
    "modules_to_save": lambda x: [x],
    "layers_pattern": lambda x: x,
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_pattern_that_python_would_search_for_ever(adapter, field):
    name = "a_very_long_name_of_a_module" * 3
    config = Config(**{"r": 1, "lora_alpha": 1, field: FIELDS[field](HOSTILE)})
    assert config.rank(name) == 1 and config.alpha(name) == 1
    assert not config.targets(name)


UNBOUNDED = [
    r"(?=q)q_proj",
    r"(q)_\1",
    "((a{500}){500}){500}",
    "a{5000}",
    "[q]" * 50_000,
]
AMBIGUOUS = ["a{,3}b", "[[:alpha:]]"]


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("pattern", [*UNBOUNDED, *AMBIGUOUS], ids=lambda x: x[:20])
def test_a_pattern_without_bound_is_refused(adapter, field, pattern):
    load = edited(adapter, **{field: FIELDS[field](pattern)})
    with pytest.raises(AdapterError, match="cannot be matched: it"):
        load()


def test_too_many_patterns(adapter):
    many = {f"[ab]{i}": 2 for i in range(2000)}
    with pytest.raises(AdapterError, match="more than 1000"):
        edited(adapter, rank_pattern=many)()
    with pytest.raises(AdapterError, match="names more than 1000"):
        edited(adapter, rank_pattern={}, modules_to_save=[*many])()


JSON = {
    "brackets": "[" + "[]," * 700_000 + "[]]",
    "numbers": "[" + "1," * 2_000_001 + "1]",
    "levels": "[" * 100_000 + "]" * 100_000,
}


@pytest.mark.parametrize("text", JSON.values(), ids=JSON)
def test_json_of_any_size(tmp_path, adapter, text, monkeypatch):
    monkeypatch.setattr(files, "_MOST_VALUES", 1_000_000)
    loads = json.loads
    monkeypatch.setattr(
        files.json, "loads", lambda x, **k: loads(x, **k) if len(x) < 300_000 else 1 / 0
    )
    path = tmp_path / "file"
    path.write_bytes(struct.pack("<Q", len(text)) + text.encode())
    with pytest.raises(AdapterError, match="holds more than|nested too deeply"):
        load_adapter(path, {})
    (adapter / "adapter_config.json").write_text(text)
    with pytest.raises(AdapterError, match="holds more than|nested too deeply"):
        peft.load(adapter, {})


def test_a_file_too_large_for_json_is_not_read(adapter, monkeypatch):
    monkeypatch.setattr(files, "_LARGEST_HEADER", 10)
    with pytest.raises(AdapterError, match="too many for such a file"):
        peft.load(adapter, {})


@pytest.mark.parametrize("field", ["r", "target_modules", "bias", "peft_type", "new"])
def test_a_message_quotes_little(adapter, field):
    with pytest.raises(AdapterError) as e:
        edited(adapter, **{field: {"x" * 100_000: ["y" * 1_000_000]}})()
    assert len(str(e.value)) < 1000


def test_a_message_of_many_problems_ends(adapter):
    path = adapter / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    x = next(iter(tensors.values()))
    start = "base_model.model."
    tensors |= {f"{start}n{i}.{'long' * 100}.weight": x for i in range(300)}
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(AdapterError, match="and 250 more") as e:
        edited(adapter)()
    assert len(str(e.value)) < 25_000


def test_a_name_does_not_steer_the_terminal(adapter):
    path = adapter / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    x = next(iter(tensors.values()))
    safetensors.numpy.save_file(tensors | {"a\x1b[2J\x07b": x}, path)
    with pytest.raises(AdapterError, match=r"`a\\x1b\[2J\\x07b` does not begin"):
        edited(adapter)()


ACCEPTED = {
    "a conversion's leftovers": dict(
        corda_config={"x": 1}, loftq_config={"loftq_bits": 4}, lora_ga_config={"y": 2}
    ),
    "a name in another case": dict(init_lora_weights="Gaussian"),
    "mica": dict(init_lora_weights="mica"),
    "a name with a space": {},
}


@pytest.mark.parametrize("fields", ACCEPTED.values(), ids=ACCEPTED)
def test_what_changes_nothing_is_read(adapter, fields):
    edited(adapter, **fields)()


def test_a_new_field_that_changes_nothing(adapter):
    load = edited(adapter, brand_new="default")
    with pytest.raises(AdapterError, match=r"`brand_new` is .*ignore=\['brand_new'\]"):
        load()
    model = {"q_proj": eqx.nn.Linear(3, 3, key=jr.key(0))}
    peft.load(adapter, model, ignore=["brand_new"])


class Own(eqx.Module):
    """A linear layer of the user's own."""

    weight: eqx.nn.Linear


TARGETS = {
    "of Equinox": lambda x: x,
    "a dictionary": lambda x: {"weight": x.weight},
    "of one's own": lambda x: Own(x.weight),
}


@pytest.mark.parametrize("make", TARGETS.values(), ids=TARGETS)
def test_a_target_without_tensors(adapter, make):
    layer = make(eqx.nn.Linear(3, 3, key=jr.key(0)))
    edited(adapter, target_modules=["q_proj", "v_proj"])
    peft.load(adapter, {"q_proj": layer})
    with pytest.raises(AdapterError, match="`v_proj.weight` is targeted as"):
        peft.load(adapter, {"q_proj": layer, "v_proj": layer})


def test_a_file_of_no_tensors(adapter):
    safetensors.numpy.save_file({}, adapter / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="holds no tensors"):
        edited(adapter)()


def test_a_file_is_no_adapter_of_peft(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(AdapterError, match="is a file; an adapter of PEFT is a folder"):
        peft.load(tmp_path / "file", {})


def test_a_name_with_a_space(tmp_path):
    base = {"q_proj": eqx.nn.Linear(3, 3, key=jr.key(0))}
    peft.save(tmp_path, adapted(base, targets={"q_proj": 2}), adapter_name="two x")
    peft.load(tmp_path, base, adapter_name="two x")
