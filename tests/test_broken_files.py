"""Files that are damaged or hostile: refused with `AdapterError`, or read as they are.

Whatever a file holds, loading it raises nothing else, allocates no more than the file
is large, and changes neither the folder nor the model.
"""

import contextlib
import copy
import functools as ft
import itertools
import json
import math
import os
import re
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from files import bits, listing

from lora_quax import AdapterError, load_adapter, loraify, peft, save_adapter
from lora_quax._disk.adapter import read_adapter
from lora_quax.peft._read import read


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@ft.cache
def model():
    """One low-rank update, a bias and a small module that train in full."""
    key = jr.key(0)
    base = {"h": [{"q": eqx.nn.Linear(2, 2, key=key)}], "n": eqx.nn.LayerNorm(2)}
    targets = {eqx.nn.Linear: True, "bias": "full", "n": "full"}
    return loraify(base, 1, key, alpha=2.0, targets=targets)


class Format(NamedTuple):
    """A kind of adapter: how it is written, read without a model, and loaded."""

    save: Callable[[Path], None]
    parse: Callable[[Path], Any]
    load: Callable[[Path], Any]


OURS = Format(
    lambda folder: save_adapter(folder / WEIGHTS, model()),
    lambda folder: read_adapter(folder / WEIGHTS),
    lambda folder: load_adapter(folder / WEIGHTS, model()),
)
PEFT = Format(
    lambda folder: peft.save(folder, model()),
    read,
    lambda folder: peft.load(folder, model()),
)
FILES = {
    "ours": (OURS, WEIGHTS),
    "PEFT's": (PEFT, WEIGHTS),
    "PEFT's configuration": (PEFT, CONFIG),
}


@contextlib.contextmanager
def corpus(form: Format, folder: Path):
    """A folder with a sound adapter; at the end nothing but that is in it, and the
    model is what it was."""
    form.save(folder)
    assert is_sound(form.load(folder))
    state = lambda: (set(listing(folder)), bits(model()))
    before = state()
    yield
    assert state() == before


@pytest.fixture(params=FILES)
def file(request, tmp_path):
    """A format, the folder of a sound adapter, and a file of it."""
    form, name = FILES[request.param]
    with corpus(form, tmp_path):
        yield form, tmp_path, tmp_path / name


def is_sound(loaded) -> bool:
    """Whether a load gave a model that is whole."""
    leaves = jax.tree.leaves(loaded)
    return len(leaves) >= len(jax.tree.leaves(model())) and all(
        isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating)
        for x in leaves
    )


def survives(form: Format, folder: Path) -> bool:
    """Whether an adapter loads, as a whole model; if not, it must be refused."""
    try:
        loaded = form.load(folder)
    except AdapterError:
        return False
    assert is_sound(loaded)
    return True


# Bytes.


def test_every_truncation_is_refused(file):
    form, folder, path = file
    whole = path.read_bytes()
    for n in range(len(whole)):
        path.write_bytes(whole[:n])
        with pytest.raises(AdapterError, match="truncated|cannot be read|is not JSON"):
            form.parse(folder)
        assert path.read_bytes() == whole[:n]


@pytest.mark.slow
@pytest.mark.parametrize("first, mask", enumerate([0x01, 0x20, 0xFF]))
def test_flipped_bits_of_a_header(first, mask, file):
    """Every byte, with one of the masks."""
    form, folder, path = file
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    end = end if path.name == WEIGHTS else len(whole)
    places = range(first, end, 3)
    sound = 0
    for i in places:
        path.write_bytes(whole[:i] + bytes([whole[i] ^ mask]) + whole[i + 1 :])
        sound += survives(form, folder)
    assert sound < len(places) / 2


def test_bytes_after_the_end(file):
    form, folder, path = file
    path.write_bytes(path.read_bytes() + b"\0" * 8)
    assert not survives(form, folder)


# Values in the place of others.

HOSTILE = {
    "nothing": None,
    "true": True,
    "false": False,
    "zero": 0,
    "minus one": -1,
    "one": 1,
    "large": 2**31,
    "larger": 2**62,
    "largest": 2**64,
    "beyond floats": 10**400,
    "a fraction": 0.5,
    "a large float": 1e308,
    "infinite": math.inf,
    "not a number": math.nan,
    "no text": "",
    "a digit": "1",
    "a path": "../../x",
    "an absolute path": "/etc/passwd",
    "a null": "a\0b",
    "unicode": "β\u202e\U0001f600",
    "half a character": "\ud800",
    "long": "a." * 20_000,
    "no list": [],
    "a list": [1],
    "a list of texts": ["q"],
    "a list of lists": [[[]]],
    "many axes": [1] * 100,
    "huge axes": [2**62, 2**62],
    "no object": {},
    "an object": {"q": 1},
    "an object of objects": {"q": {"q": {}}},
}


def nodes(tree, path=()) -> Iterator[tuple]:
    """The path of every part of a JSON tree, and of the whole."""
    yield path
    items = tree.items() if isinstance(tree, dict) else ()
    items = enumerate(tree) if isinstance(tree, list) else items
    for key, child in items:
        yield from nodes(child, (*path, key))


def replaced(tree, path: tuple, value):
    """A JSON tree with another part at a path."""
    if not path:
        return value
    out = copy.copy(tree)
    out[path[0]] = replaced(tree[path[0]], path[1:], value)
    return out


def removed(tree, path: tuple):
    out = copy.deepcopy(tree)
    holder = ft.reduce(lambda x, key: x[key], path[:-1], out)
    del holder[path[-1]]
    return out


def disassembled(path: Path) -> tuple[dict, bytes]:
    """The header and the data of a safetensors file."""
    whole = path.read_bytes()
    n = 8 + int.from_bytes(whole[:8], "little")
    return json.loads(whole[8:n]), whole[n:]


def assemble(path: Path, header: str, data: bytes) -> None:
    text = header.encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


# Fields that the configuration of the corpus leaves out or empty.
FIELDS = {
    "rank_pattern": {"q": 1},
    "alpha_pattern": {"q": 2},
    "modules_to_save": ["n"],
    "exclude_modules": ["x"],
    "layers_to_transform": [0],
    "layers_pattern": ["h"],
    "target_parameters": ["x"],
}


class Part(NamedTuple):
    """JSON in an adapter, as a tree that can be changed."""

    form: Format
    get: Callable[[Path], Any]
    put: Callable[[Path, str], None]  # As text, which need not be of that tree.


def _get_header(folder: Path):
    return disassembled(folder / WEIGHTS)[0]


def _put_header(folder: Path, text: str) -> None:
    _, data = disassembled(folder / WEIGHTS)
    assemble(folder / WEIGHTS, text, data)


def _get_description(folder: Path):
    header, _ = disassembled(folder / WEIGHTS)
    return json.loads(header["__metadata__"]["lora_quax"])


def _put_description(folder: Path, text: str) -> None:
    header, data = disassembled(folder / WEIGHTS)
    header["__metadata__"]["lora_quax"] = text
    assemble(folder / WEIGHTS, json.dumps(header), data)


def _get_configuration(folder: Path):
    return json.loads((folder / CONFIG).read_text()) | FIELDS


def _put_configuration(folder: Path, text: str) -> None:
    (folder / CONFIG).write_text(text)


PARTS = {
    "our header": Part(OURS, _get_header, _put_header),
    "our description": Part(OURS, _get_description, _put_description),
    "PEFT's header": Part(PEFT, _get_header, _put_header),
    "PEFT's configuration": Part(PEFT, _get_configuration, _put_configuration),
}


@pytest.fixture(params=PARTS)
def part(request, tmp_path):
    """A JSON tree of a sound adapter, and what tells whether one survives with a text
    in its place."""
    part = PARTS[request.param]
    with corpus(part.form, tmp_path):
        sound = {path: path.read_bytes() for path in tmp_path.iterdir()}

        def run(text: str) -> bool:
            for path, whole in sound.items():
                path.write_bytes(whole)
            part.put(tmp_path, text)
            return survives(part.form, tmp_path)

        yield part.get(tmp_path), run


def test_a_field_that_is_missing(part):
    tree, run = part
    for path in filter(None, nodes(tree)):
        run(json.dumps(removed(tree, path)))


@pytest.mark.slow
@pytest.mark.parametrize("value", HOSTILE)
def test_hostile_values(value, part):
    tree, run = part
    for path in nodes(tree):
        run(json.dumps(replaced(tree, path, HOSTILE[value])))


# Numbers of other types, and other tensors.

# Type of safetensors: its bits, and its name in NumPy.
TYPES = {
    "BOOL": (8, "bool"),
    "U8": (8, "uint8"),
    "I8": (8, "int8"),
    "I16": (16, "int16"),
    "U16": (16, "uint16"),
    "I32": (32, "int32"),
    "U32": (32, "uint32"),
    "I64": (64, "int64"),
    "U64": (64, "uint64"),
    "C64": (64, "complex64"),
    "F4": (4, "float4_e2m1fn"),
    "F6_E2M3": (6, "float6_e2m3fn"),
    "F6_E3M2": (6, "float6_e3m2fn"),
    "F8_E8M0": (8, "float8_e8m0fnu"),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "F8_E5M2": (8, "float8_e5m2"),
    "F16": (16, "float16"),
    "BF16": (16, "bfloat16"),
    "F64": (64, "float64"),
    "X9": (8, "x9"),
}
# Those that an update may have, and JAX has without more ado.
FLOATS = {"F16", "BF16"}


def retyped(folder: Path, kind: str, dtype: str) -> None:
    """The tensors whose names contain `kind`, as zeros of another type."""
    header, _ = disassembled(folder / WEIGHTS)
    end = 0
    for name, x in header.items():
        if name == "__metadata__":
            continue
        x["dtype"] = dtype if kind in name else x["dtype"]
        bits = TYPES[dtype][0] if kind in name else 32
        n = math.ceil(math.prod(x["shape"]) * bits / 8)
        x["data_offsets"] = [end, end + n]
        end += n
    assemble(folder / WEIGHTS, json.dumps(header), bytes(end))


# Which tensors: of which format, and a part of their names.
KINDS = {
    "our factors": (OURS, ".delta."),
    "our values": (OURS, ".value"),
    "PEFT's factors": (PEFT, ".lora_"),
    "PEFT's biases": (PEFT, "base_layer.bias"),
    "PEFT's values": (PEFT, "n.weight"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TYPES)
def test_numbers_of_other_types(dtype, kind, tmp_path):
    form, name = KINDS[kind]
    with corpus(form, tmp_path):
        retyped(tmp_path, name, dtype)
        if form is OURS:
            # The description says the same as the tensors.
            about = json.dumps(_get_description(tmp_path))
            new = about.replace('"float32"', f'"{TYPES[dtype][1]}"')
            _put_description(tmp_path, new)
        sound = survives(form, tmp_path)
        assert not sound or dtype in FLOATS or dtype.startswith("F")


NAMES = [
    "",
    ".",
    "..",
    "../../x",
    "/etc/passwd",
    "a\0b",
    "a\nb",
    "β\u202e\U0001f600",
    "x" * 100_000,
    "." * 10_000,
    "__metadata__.x",
    "lora_A.weight",
    ".lora_A.weight",
    "lora_magnitude_vector",
    "h.0.q.lora_magnitude_vector",
    "h.0.q.lora_embedding_A",
    "h.0.q.lora_B.bias",
    "h.0.q.lora_A.default.weight",
    "h.0.q.base_layer.lora_A.weight",
    "h.0.q.weight.delta.c",
    "h.0.q.weight.base",
]


@pytest.mark.parametrize("prefix", ["", "base_model.model.", "base_model.model.h.0.q."])
@pytest.mark.parametrize("form", [OURS, PEFT], ids=["ours", "PEFT's"])
def test_tensors_that_nothing_asked_for(form, prefix, tmp_path):
    with corpus(form, tmp_path):
        header, data = disassembled(tmp_path / WEIGHTS)
        for name in NAMES:
            end = len(data)
            one = dict(dtype="F32", shape=[1], data_offsets=[end, end + 4])
            more = header | {prefix + name: one}
            assemble(tmp_path / WEIGHTS, json.dumps(more), data + bytes(4))
            with pytest.raises(AdapterError, match=re.escape(str(tmp_path))):
                form.load(tmp_path)


def twins(tree) -> Iterator[str]:
    """A JSON tree as text, with one of its names there twice."""
    for path in nodes(tree):
        if path and isinstance(path[-1], str):
            other = copy.deepcopy(tree)
            holder = ft.reduce(lambda x, key: x[key], path[:-1], other)
            holder["twin"] = holder[path[-1]]
            yield json.dumps(other).replace('"twin"', json.dumps(path[-1]))


def test_names_that_are_there_twice(part):
    tree, run = part
    for text in twins(tree):
        assert not run(text), text


# Sizes that are declared, and nesting.

AXES = [[2**62], [2**32, 2**32], [2**64], [0, 2**62], [2**62, 0], [1] * 65, [0] * 200]


@pytest.fixture
def little_memory():
    """As much as a small file can need, whatever it says of its size."""
    tracemalloc.start()
    yield
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50_000_000


@pytest.mark.parametrize("form", [OURS, PEFT], ids=["ours", "PEFT's"])
def test_huge_tensors(form, tmp_path, little_memory):
    with corpus(form, tmp_path):
        header, data = disassembled(tmp_path / WEIGHTS)
        names = [name for name in header if name != "__metadata__"]
        for shape, name in itertools.product(AXES, names):
            n = 4 * math.prod(shape)
            for end in {n, header[name]["data_offsets"][1]}:
                start = min(header[name]["data_offsets"][0], end)
                huge = dict(dtype="F32", shape=shape, data_offsets=[start, end])
                text = json.dumps(header | {name: huge})
                assemble(tmp_path / WEIGHTS, text, data)
                assert not survives(form, tmp_path)
            # Among others that are sound.
            huge = dict(dtype="F32", shape=shape, data_offsets=[len(data)] * 2)
            text = json.dumps(header | {"x": huge})
            assemble(tmp_path / WEIGHTS, text, data)
            assert not survives(form, tmp_path)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**40, 100_000_000, 99_999_999])
@pytest.mark.parametrize("form", [OURS, PEFT], ids=["ours", "PEFT's"])
def test_huge_headers(form, length, tmp_path, little_memory):
    with corpus(form, tmp_path):
        path = tmp_path / WEIGHTS
        path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
        with pytest.raises(AdapterError, match="truncated|no safetensors file"):
            form.parse(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("n", [10, 100, 900, 10_000, 200_000])
@pytest.mark.parametrize(
    "level", ['["?"]', '{"x": "?"}', '{"form": "lora", "base": "?"}']
)
def test_deep_nesting(level, n, part):
    before, after = level.split('"?"')
    deep = before * n + "0" + after * n
    tree, run = part
    for path in nodes(tree):
        if len(path) < 3:
            run(json.dumps(replaced(tree, path, "deep")).replace('"deep"', deep))


@pytest.mark.parametrize("n", [1, 30, 300, 900, 3000])
def test_adapters_on_adapters_without_end(n, tmp_path):
    with corpus(OURS, tmp_path):
        about = _get_description(tmp_path)
        weight = about["weights"]["h.0.q.weight"]
        base = json.dumps(weight.pop("base"))
        before, after = json.dumps(weight | {"base": "?"}).split('"?"')
        about["weights"]["h.0.q.weight"] = "chain"
        chain = before * n + base + after * n
        text = json.dumps(about).replace('"chain"', chain)
        _put_description(tmp_path, text)
        assert survives(OURS, tmp_path) == (n == 1)


# Configurations that are well-formed, and yet not right.

PATTERNS = [
    "(",
    ")",
    "*",
    "[",
    "\\",
    "(?",
    "(?P<x",
    "(?P=x)",
    "\\1",
    "(?<=a*)b",
    "a{9" + "9" * 20 + "}",
    "(?i)x",
    "x(?i)",
    "(?x)q #",
    "a#",
    "(a)",
    "(a)?",
    "(?P<a>h)",
    "h|(x)",
    "^h",
    "h$",
    "",
    "|",
    "(" * 50 + ")" * 50,
    "(" * 90 + ")" * 90,
    "(" * 5000 + ")" * 5000,
    "β",
    "\0",
    "a" * 100_000,
]
# Where a configuration has patterns.
PATTERN_FIELDS = {
    "rank_pattern": lambda p: {"rank_pattern": {p: 1}},
    "alpha_pattern": lambda p: {"alpha_pattern": {p: 1}},
    "target_modules": lambda p: {"target_modules": p},
    "exclude_modules": lambda p: {"exclude_modules": p},
    "modules_to_save": lambda p: {"modules_to_save": [p]},
    "layers_pattern": lambda p: {"layers_pattern": [p], "layers_to_transform": [0]},
    "layers_pattern, one": lambda p: {"layers_pattern": p, "layers_to_transform": 0},
}


@pytest.mark.parametrize("field", PATTERN_FIELDS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=range(len(PATTERNS)))
def test_patterns(pattern, field, tmp_path):
    with corpus(PEFT, tmp_path):
        config = json.loads((tmp_path / CONFIG).read_text())
        config |= PATTERN_FIELDS[field](pattern)
        (tmp_path / CONFIG).write_text(json.dumps(config))
        survives(PEFT, tmp_path)


# Fields that are of the right type, and do not go together with the tensors.
CONFIGS = {
    "another rank": dict(r=2),
    "a rank beyond floats": dict(r=10**400),
    "a rank beyond floats, and its root": dict(r=10**400, use_rslora=True),
    "a pattern's rank": dict(rank_pattern={"q": 10**400}, use_rslora=True),
    "an alpha beyond floats": dict(lora_alpha=10**400),
    "a pattern's alpha": dict(alpha_pattern={"q": 10**400}),
    "an alpha that is not finite": dict(alpha_pattern={"q": math.inf}),
    "another mode for biases": dict(bias="some"),
    "another method": dict(peft_type="LOHA"),
    "DoRA": dict(use_dora=True),
    "a field of the future": dict(use_x=True),
    "LoftQ": dict(init_lora_weights="loftq"),
    "PiSSA": dict(init_lora_weights="pissa"),
    "a module that has no tensors": dict(target_modules=["h.0.q", "h.0"]),
}
SOUND = {"a module that has no tensors", "PiSSA"}


@pytest.mark.parametrize("with_bias", [False, True], ids=["", "with a bias of B"])
@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_that_do_not_fit(name, with_bias, tmp_path):
    with corpus(PEFT, tmp_path):
        config = json.loads((tmp_path / CONFIG).read_text())
        config |= CONFIGS[name] | {"lora_bias": with_bias}
        (tmp_path / CONFIG).write_text(json.dumps(config))
        if with_bias:
            header, data = disassembled(tmp_path / WEIGHTS)
            end = len(data)
            header["base_model.model.h.0.q.lora_B.bias"] = dict(
                dtype="F32", shape=[2], data_offsets=[end, end + 8]
            )
            assemble(tmp_path / WEIGHTS, json.dumps(header), data + bytes(8))
        assert survives(PEFT, tmp_path) == (name in SOUND)


# Things that are in the place of files.


def _link_to_itself(path: Path) -> None:
    path.symlink_to(path)


def _link_to_nothing(path: Path) -> None:
    path.symlink_to(path.with_name("nothing"))


def _empty(path: Path) -> None:
    path.write_bytes(b"")


INSTEAD = {
    "nothing": (lambda path: None, FileNotFoundError),
    "a folder": (Path.mkdir, (AdapterError, FileNotFoundError)),
    "a link to itself": (_link_to_itself, FileNotFoundError),
    "a link to nothing": (_link_to_nothing, FileNotFoundError),
    "a pipe": (os.mkfifo, (AdapterError, FileNotFoundError)),
    "no bytes": (_empty, AdapterError),
}


@pytest.mark.parametrize("name", INSTEAD)
def test_what_is_no_file(name, file):
    form, folder, path = file
    make, error = INSTEAD[name]
    whole = path.read_bytes()
    path.unlink()
    make(path)
    with pytest.raises(error, match=re.escape(str(path))):
        form.load(folder)
    path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
    path.write_bytes(whole)


def test_a_pickle_is_not_opened(tmp_path):
    with corpus(PEFT, tmp_path):
        (tmp_path / WEIGHTS).rename(tmp_path / "adapter_model.bin")
        with pytest.raises(AdapterError, match="is a pickle, which can run any code"):
            PEFT.load(tmp_path)
        (tmp_path / "adapter_model.bin").rename(tmp_path / WEIGHTS)
