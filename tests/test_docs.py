"""The pages of `docs/` and README say what is so: their programs run, and more."""

import dataclasses
import functools as ft
import re
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import quax
from helpers import lora as lora64
from jax.sharding import AxisType, PartitionSpec as P
from safetensors.numpy import save_file

import lora_quax
from lora_quax._arrays.base import replace
from lora_quax._model.together import _refuse


ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
lora = ft.partial(lora64, dtype=jnp.float32)


def blocks(text: str, language: str) -> str:
    """The blocks of a page, as a reader would type them: in order, in one file."""
    return "\n".join(re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S))


def cells(text: str, title: str) -> list[list[str]]:
    """The rows of the first table below a heading."""
    below = text.split(f"{title}\n", 1)[1]
    table = re.search(r"(?:^\|.*\n)+", below, re.M)
    assert table, title
    rows = table[0].splitlines()[2:]
    return [[cell.strip() for cell in row.split(" | ")] for row in rows]


def code(cell: str) -> list[str]:
    return re.findall("`(.*?)`", cell)


PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in (ROOT / "README.md", *sorted(DOCS.rglob("*.md")))
}
BESIDE = ("CHANGELOG.md", "CONTRIBUTING.md", "UPSTREAM.md", "benchmarks/README.md")
PROGRAMS = {name: blocks(text, "python") for name, text in PAGES.items()}


@pytest.mark.parametrize("page", [name for name, text in PROGRAMS.items() if text])
def test_programs_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(PROGRAMS[page], page, "exec"), {"__name__": page})


@pytest.mark.parametrize("page", [*PAGES, *BESIDE])
def test_links_lead_somewhere(page):
    path = ROOT / page
    for link in re.findall(r"(?<=\]\()(?!\w+:)[^)#\s]+", path.read_text()):
        assert (path.parent / link).exists(), link


def test_commands_run(tmp_path, monkeypatch, capsys):
    from lora_quax.__main__ import main

    page = "docs/guide/command-line.md"
    monkeypatch.chdir(tmp_path)
    exec(compile(PROGRAMS[page], page, "exec"), {"__name__": page})
    for line in blocks(PAGES[page], "bash").splitlines():
        assert main(line.removeprefix("python -m lora_quax ").split()) == 0, line
    assert "layers.0.weight" in capsys.readouterr().out


def test_the_reference_has_all_that_is_public():
    text = "".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    shown = set(re.findall(r"^::: ([\w.]+)$", text, re.M))
    public = {f"lora_quax.{name}" for name in lora_quax.__all__}
    for module in (lora_quax.init, lora_quax.peft):
        public |= {f"{module.__name__}.{name}" for name in module.__all__}
    assert public - shown == {"lora_quax.init.Initialiser"}
    assert shown <= public


def test_the_picture_is_that_which_is_drawn(tmp_path):
    draw: dict[str, Any] = {"__file__": str(DOCS / "draw.py"), "__name__": "draw"}
    exec((DOCS / "draw.py").read_text(), draw)
    draw["draw"](tmp_path / "picture.svg")
    # How letters are placed may depend on the version of matplotlib.
    texts = lambda path: re.findall(r"<text.*?>(.*?)</text>", path.read_text())
    committed = texts(DOCS / "picture.svg")
    assert "never summed" in committed
    assert committed == texts(tmp_path / "picture.svg")


def test_layout_lists_every_file():
    rows = cells(PAGES["docs/how-it-works.md"], "## Layout")
    listed = {code(row[0])[0] for row in rows}
    package = ROOT / "lora_quax"
    folders = {name for name in listed if name.endswith("/")}
    assert all((package / folder).is_dir() for folder in folders)
    found = {path.relative_to(package).as_posix() for path in package.rglob("*.py")}
    files = {name for name in found if not name.startswith(tuple(folders))}
    assert listed - folders == files - {"__init__.py", "__main__.py"}


# Targets.


class Block(eqx.Module):
    q_proj: eqx.nn.Linear
    v_proj: eqx.nn.Linear

    def __init__(self, key):
        self.q_proj = eqx.nn.Linear(4, 4, key=key)
        self.v_proj = eqx.nn.Linear(4, 4, key=key)


class Model(eqx.Module):
    blocks: list[dict[str, Block]]
    head: eqx.nn.Linear

    def __init__(self, key):
        self.blocks = [{"attn": Block(key)}]
        self.head = eqx.nn.Linear(4, 2, key=key)


def rows_of_targets() -> list[str]:
    rows = cells(PAGES["docs/guide/targets.md"], "## What a target is")
    return [source for row in rows for source in code(row[0])]


@pytest.mark.parametrize("source", rows_of_targets())
def test_rows_of_the_targets_table(source):
    model = Model(jr.key(0))
    adapted = lora_quax.loraify(model, 2, jr.key(1), targets=eval(source, {"eqx": eqx}))
    assert isinstance(adapted.blocks[0]["attn"].q_proj.weight, lora_quax.LoraArray)


# Coming from PEFT: its parameters are there, and so is what is named beside them.


class Layer(eqx.Module):
    attn: Block
    experts: dict[str, jax.Array]

    def __init__(self, key):
        self.attn = Block(key)
        self.experts = {"gate_up_proj": jr.normal(key, (2, 4, 8))}


class Transformer(eqx.Module):
    layers: list[Layer]
    head: eqx.nn.Linear

    def __init__(self, key):
        self.layers = [Layer(key), Layer(key)]
        self.head = eqx.nn.Linear(4, 2, key=key)


def rows_of_peft() -> list[list[str]]:
    return cells(PAGES["docs/coming-from.md"], "## PEFT: LoraConfig")


def test_parameters_of_peft_are_there():
    config = pytest.importorskip("peft").LoraConfig
    fields = {field.name for field in dataclasses.fields(config)}
    named = {re.match(r"\w+", code(row[0])[0]) for row in rows_of_peft()}
    assert {match[0] for match in named if match} <= fields


@pytest.mark.parametrize(
    "source",
    [c for row in rows_of_peft() for c in code(row[1]) if c.startswith("targets=")],
)
def test_what_is_named_beside_them_is_there(source):
    source = source.replace("...", "eqx.nn.Linear: True")
    targets = eval(f"dict({source})", {"eqx": eqx, "lora_quax": lora_quax})
    adapted = _loraify(Transformer(jr.key(0)), **targets)
    assert not eqx.tree_equal(adapted, lora_quax.unload(adapted))


# Nesting.


def adapted_linear():
    return eqx.tree_at(
        lambda l: l.weight, eqx.nn.Linear(3, 2, key=jr.key(0)), lora((2, 3), rank=1)
    )


def test_quaxify_does_not_see_into_a_closure():
    linear, x = adapted_linear(), jnp.ones((4, 3))
    assert jax.vmap(quax.quaxify(linear))(x).shape == (4, 2)
    with pytest.warns(UserWarning, match="JAX-transformed"):
        hidden = quax.quaxify(jax.vmap(linear))
    with pytest.raises(RuntimeError, match=r"LoraArray outside of `quax\.quaxify`"):
        hidden(x)


def test_gradient_inside_is_that_of_the_dense_weight():
    f = lambda linear, x: linear(x).sum()
    linear, x = adapted_linear(), jnp.arange(3.0)
    inside = quax.quaxify(jax.grad(f))(linear, x).weight
    dense = jax.grad(f)(lora_quax.merge(linear), x).weight
    assert jnp.allclose(inside, dense)
    outside = lora_quax.filter_grad(quax.quaxify(f))(linear, x).weight
    assert outside.base is None
    assert outside.b.shape == (2, 1)


# What is refused.


@jax.custom_vjp
def half(w):
    return w / 2


half.defvjp(lambda w: (w / 2, None), lambda _, ct: (ct / 2,))


@pytest.mark.parametrize(
    "f",
    [jax.nn.relu, lambda w: w * w, jnp.sort, jnp.linalg.norm, jnp.linalg.svd],
    ids=["relu", "square", "sort", "norm", "svd"],
)
def test_the_refusals_that_are_named(f):
    weight = adapted_linear().weight
    with pytest.raises(lora_quax.MaterialiseError, match=r"allow_materialise=True"):
        quax.quaxify(f)(weight)
    weight = replace(weight, delta=replace(weight.delta, allow_materialise=True))
    for ours, dense in zip(
        jax.tree.leaves(quax.quaxify(f)(weight)), jax.tree.leaves(f(weight.dense()))
    ):
        assert jnp.allclose(ours, dense)


def test_the_derivative_that_is_refused():
    loss = lambda w: quax.quaxify(lambda w: half(w) @ jnp.ones(3))(w).sum()
    weight = adapted_linear().weight
    assert jnp.allclose(loss(weight), (weight.dense() / 2 @ jnp.ones(3)).sum())
    with pytest.raises(lora_quax.MaterialiseError, match="custom_vjp"):
        eqx.filter_grad(loss)(weight)


# Errors: a program for each message of the table.


def _mlp(width: int = 16):
    return eqx.nn.MLP(8, 2, width, 1, key=jr.key(0))


def _loraify(model, **kwargs):
    return lora_quax.loraify(model, 2, jr.key(1), **kwargs)


def _loss(model, x=jnp.ones(8)):
    return quax.quaxify(model)(x).sum()


def _mesh():
    return jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,))


def _load_other(path: Path):
    lora_quax.save_adapter(path, _loraify(_mlp()))
    lora_quax.load_adapter(path, _mlp(width=32))


def _load_model(path: Path):
    save_file({"weight": np.ones(3)}, path)
    lora_quax.load_adapter(path, _mlp())


ERRORS = {
    "It stands for a weight, and only": lambda _: _loraify(_mlp())(jnp.ones(3)),
    "needs the dense weight": lambda _: quax.quaxify(lambda w: jnp.sort(w))(
        lora((3, 3))
    ),
    "Nothing in the model trains": lambda _: lora_quax.filter_grad(_loss)(_mlp()),
    "must be given by position": lambda _: lora_quax.filter_grad(_loss)(
        model=_loraify(_mlp())
    ),
    "matched nothing": lambda _: _loraify(_mlp(), targets="head"),
    "is already adapted": lambda _: _loraify(_loraify(_mlp())),
    "has None for its": lambda _: lora_quax.merge(
        lora_quax.partition(_loraify(_mlp()))[0]
    ),
    "vmap got inconsistent sizes": lambda _: jax.vmap(
        quax.quaxify(lambda row: row @ jnp.ones(3))
    )(lora((4, 3))),
    "does not fit the model": _load_other,
    "cannot lie as": lambda _: lora_quax.shard(_mlp(), _mesh(), {"bias": P("d", "d")}),
    "lies on no mesh": lambda _: _loraify(
        _mlp(), targets={eqx.nn.Linear: lora_quax.Adapt(spec=P())}
    ),
    "means no array": lambda _: lora_quax.shard(_mlp(), _mesh(), {"head": P()}),
    "The processes disagree": lambda _: _refuse("loraify", [{"x": "1"}, {"x": "2"}]),
    "has failed on process": lambda _: _refuse("shard", [{}, {"": "OSError: x"}]),
    "but no adapter of lora_quax": _load_model,
}


def test_the_table_of_errors_is_complete():
    rows = cells(PAGES["docs/errors.md"], "# Errors")
    assert [code(row[0])[0] for row in rows] == list(ERRORS)


@pytest.mark.parametrize("message", ERRORS)
def test_rows_of_the_table_of_errors(message, tmp_path):
    with pytest.raises(Exception, match=re.escape(message)):
        ERRORS[message](tmp_path / "adapter.safetensors")
