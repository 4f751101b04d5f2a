"""README and the notebooks say what is so."""

import json
import re
import tomllib
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
import quax

import lora_quax
from benchmarks import _markdown
from lora_quax._arrays.base import replace


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


def section(title: str) -> str:
    return re.split(r"^## ", README.split(f"## {title}\n")[1], flags=re.M)[0]


def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # In order and in one namespace, as a reader would type them.
    source = "\n".join(blocks("python"))
    exec(compile(source, "README.md", "exec"), {})


def test_versions_agree():
    assert lora_quax.__version__ == PROJECT["version"]
    lowest = PROJECT["requires-python"].removeprefix(">=")
    assert f"Python {lowest} or later" in README
    classifiers = [f"Programming Language :: Python :: {lowest}"]
    assert set(classifiers) <= set(PROJECT["classifiers"])


def test_commands_name_what_exists():
    extras = set(PROJECT["optional-dependencies"])
    lists = re.findall(r"pip install -e '\.\[(.*?)\]'", README)
    used = {extra for names in lists for extra in names.split(",")}
    assert used and used <= extras
    for path in re.findall(
        r"\b(?:notebooks|lora_quax|tests|benchmarks|\.ci)/[\w./-]+", README
    ):
        assert (ROOT / path).exists(), path


def test_the_figures_of_speed_are_those_measured():
    table = [line for line in section("Speed").splitlines() if line.startswith("|")]
    assert table == _markdown.readme_table(ROOT / "benchmarks/results")


def test_ci_runs_the_commands_of_the_readme():
    # `.ci/run` finds them by how they end; each must be found, once.
    patterns = re.findall(r"readme_command '(.*?)'", (ROOT / ".ci/run").read_text())
    assert len(patterns) == 2
    for pattern in patterns:
        assert len(re.findall(f"^.*&& .*{pattern}$", README, re.M)) == 1, pattern


def test_layout_lists_every_file():
    listed = re.findall(r"^\| `([\w/]+\.py|[\w]+/)`", section("Layout"), re.M)
    package = ROOT / "lora_quax"
    folders = [name for name in listed if name.endswith("/")]
    found = {p.relative_to(package).as_posix() for p in package.rglob("*.py")}
    found = {name for name in found if not name.startswith(tuple(folders))}
    assert all((package / folder).is_dir() for folder in folders)
    files = {
        name for name in found if "__init__" not in name and "__main__" not in name
    }
    assert set(listed) == files | set(folders)


def adapted_linear():
    linear = lora_quax.loraify(eqx.nn.Linear(3, 2, key=jr.key(0)), 1, jr.key(1))
    b = jnp.ones_like(linear.weight.b)
    return eqx.tree_at(lambda l: l.weight.delta.b, linear, b)


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


@jax.custom_vjp
def half(w):
    return w / 2


half.defvjp(lambda w: (w / 2, None), lambda _, ct: (ct / 2,))


@pytest.mark.parametrize(
    "f",
    [jax.nn.relu, lambda w: w * w, jnp.sort],
    ids=["relu", "square", "sort"],
)
def test_the_refusals_that_are_named(f):
    weight = adapted_linear().weight
    with pytest.raises(lora_quax.MaterialiseError, match=r"allow_materialise=True"):
        quax.quaxify(f)(weight)
    weight = replace(weight, delta=replace(weight.delta, allow_materialise=True))
    assert jnp.allclose(quax.quaxify(f)(weight), f(weight.dense()))


def test_the_derivative_that_is_refused():
    loss = lambda w: quax.quaxify(lambda w: half(w) @ jnp.ones(3))(w).sum()
    weight = adapted_linear().weight
    assert jnp.allclose(loss(weight), (weight.dense() / 2 @ jnp.ones(3)).sum())
    with pytest.raises(lora_quax.MaterialiseError, match="custom_vjp"):
        eqx.filter_grad(loss)(weight)


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


def targets_of_the_table() -> list[str]:
    first = re.findall(r"^\| (`.*?`) \|", section("Choosing targets"), re.M)
    cells = [code for cell in first for code in re.findall("`(.*?)`", cell)]
    return [code for code in cells if code != "targets="]


@pytest.mark.parametrize("source", targets_of_the_table())
def test_rows_of_the_targets_table(source):
    model = Model(jr.key(0))
    adapted = lora_quax.loraify(model, 2, jr.key(1), targets=eval(source, {"eqx": eqx}))
    assert isinstance(adapted.blocks[0]["attn"].q_proj.weight, lora_quax.LoraArray)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_outputs_are_committed(path):
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    # Run from top to bottom, in a fresh kernel, without an error.
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
    outputs = [output for cell in code for output in cell["outputs"]]
    assert "error" not in {output["output_type"] for output in outputs}
    assert code[-1]["outputs"], "the notebook closes with a table"
