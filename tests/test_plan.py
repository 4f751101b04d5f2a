"""`plan` says what a step takes, and a compiled step takes that."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from lora_quax.__main__ import main
from lora_quax._cli.plan.compiled import compiled, Program
from lora_quax._cli.plan.run import mesh_of, on_paper, Plan, with_program
from lora_quax._cli.plan.sizes import Sizes
from lora_quax._cli.plan.split import read_mesh
from lora_quax._cli.plan.step import BASES, Job, step_of


SMALL = dict(
    model_type="llama",
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=4,
    vocab_size=1024,
)
SIZES = Sizes(3, 256, 768, 8, 4, 32, 1024, tied=False)
RANK = 16


def job(
    mesh: str, base: str = "float32", checkpoint="nothing_saveable", **sizes
) -> Job:
    return Job(
        sizes=dataclasses.replace(SIZES, **sizes),
        axes=read_mesh(mesh),
        base=base,
        rank=RANK,
        batch=8,
        tokens=64,
        checkpoint=checkpoint,
        targets=("all-linear",),
    )


def linears(sizes: Sizes) -> list[tuple[int, int]]:
    """(out, in) of those of a layer."""
    width, queries, keys = (
        sizes.width,
        *(n * sizes.head for n in (sizes.heads, sizes.kv_heads)),
    )
    attention = [(queries, width), (keys, width), (keys, width), (width, queries)]
    return [*attention, *[(sizes.hidden, width)] * 2, (width, sizes.hidden)]


# What is planned may ask JAX for more devices, before it is started. Here it has eight,
# which other tests in this process need as well.
jax.devices()


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL))
    return path


def shapes(sizes: Sizes) -> list[tuple[int, int]]:
    """Of the linear layers, the norms and the ends: all that is kept."""
    per_layer = [*linears(sizes), (2, sizes.width)]
    ends = [(sizes.words, sizes.width)] * (1 if sizes.tied else 2)
    return [*per_layer * sizes.layers, *ends, (1, sizes.width)]


MESHES = ("dp=8", "fsdp=4", "tp=4", "fsdp=2,tp=4", "dp=2,fsdp=2,tp=2")


# On paper.


@pytest.mark.parametrize("base", BASES)
def test_bytes_of_all_devices_together(base):
    paper = on_paper(job("fsdp=4", base))
    width = {"float32": 4, "nf4": 0.5, "int4": 0.5, "int8": 1}.get(base, 2)
    of_linears = SIZES.layers * sum(m * n for m, n in linears(SIZES))
    rest = sum(m * n for m, n in shapes(SIZES)) - of_linears
    scales = of_linears // 64 * 4 if base in ("nf4", "int4", "int8") else 0
    wanted = of_linears * width + rest * (4 if base == "float32" else 2) + scales
    norms = (2 * SIZES.layers + 1) * SIZES.width * (4 if base == "float32" else 2)
    # What lies along no axis every device has.
    assert 4 * (paper.base - norms) == wanted - norms


def test_factors_lie_as_their_weights():
    got = {mesh: on_paper(job(mesh)) for mesh in MESHES}
    of_pairs = sum(4 * RANK * (m + n) for m, n in linears(SIZES)) * SIZES.layers
    assert got["dp=8"].factors == of_pairs
    for mesh, plan in got.items():
        assert plan.factors == plan.gradients, mesh
        params = jax.ShapeDtypeStruct((plan.factors // 4,), jnp.float32)
        state = jax.tree.leaves(jax.eval_shape(optax.adam(1e-3).init, params))
        moments = [x for x in state if x.ndim]  # And a counter.
        assert sum(x.size * 4 for x in moments) == plan.optimiser, mesh


@pytest.mark.parametrize("checkpoint", ["none", "nothing_saveable"])
def test_flops(checkpoint):
    """As on paper: of each weight a product forward, and one back; of the factors two
    and four; and once more but for what `down` makes, where nothing is kept."""
    rows, tokens = 8 * 64, 64
    weights = sum(m * n for m, n in linears(SIZES))
    pairs = RANK * sum(m + n for m, n in linears(SIZES))
    scores = tokens * SIZES.heads * SIZES.head  # As many again for what they weigh.
    layer = 2 * weights + 3 * pairs + 6 * scores
    if checkpoint == "nothing_saveable":
        layer += weights + pairs + 2 * scores
        layer -= SIZES.width * (SIZES.hidden + RANK)
    head = 2 * SIZES.words * SIZES.width
    got = on_paper(job("fsdp=2,tp=4", checkpoint=checkpoint)).flops
    assert got == 2 * rows * (SIZES.layers * layer + head)


def test_a_large_model_on_many_devices():
    sizes = Sizes(126, 16384, 53248, 128, 8, 128, 128256, tied=False)
    small = job("dp=2,fsdp=32,tp=8", "nf4")
    large = dataclasses.replace(small, sizes=sizes, batch=64)
    plan = on_paper(large)
    assert plan.devices == 512
    n = 126 * sum(m * k for m, k in linears(large.sizes))
    whole = 2 * (2 * 128256 + 126 * 2 * 128 + 128) * 16384
    assert n * (1 / 2 + 4 / 64) / 256 < plan.base < (n * 0.5625 + whole) / 256 * 1.1


# The command.


def run(capsys, config, *more: str) -> tuple[int, str, str]:
    arguments = ["plan", "--model", str(config), "--batch", "8", "--tokens", "64"]
    code = main([*arguments, *more])
    return code, *capsys.readouterr()


def test_a_table_at_once(config, capsys):
    code, out, _ = run(capsys, config, "--mesh", "fsdp=64,tp=4", "--no-compile")
    assert code == 2  # Eight rows are not for 64.
    code, out, _ = run(capsys, config, "--mesh", "fsdp=8,tp=4", "--no-compile")
    assert code == 0
    paper = on_paper(job("fsdp=8,tp=4", "bfloat16"))
    for n in (paper.base, paper.factors, paper.optimiser, paper.flops // 32):
        assert f"{n:,}" in out
    assert "activations  " not in out.replace("sent: activations", "")


def test_for_a_program_to_read(config, capsys):
    more = "--mesh", "fsdp=4,tp=4", "--base", "nf4", "--no-compile", "--json"
    code, out, _ = run(capsys, config, *more)
    paper = on_paper(job("fsdp=4,tp=4", "nf4"))
    assert code == 0 and json.loads(out)["base"] == paper.base
    adapted = run(capsys, config, *more, "--targets", "q_proj", "--targets", "v_proj")
    few = json.loads(adapted[1])["factors"]
    assert few < json.loads(out)["factors"] / 2


TROUBLE = {
    "no file": (None, (), "There is no file"),
    "no Llama": (dict(model_type="bert"), (), "its model_type is 'bert', and is to be"),
    "no type": (dict(model_type=None), (), "its model_type is None"),
    "biases": (dict(attention_bias=True), (), "its attention_bias is True"),
    "no width": (dict(hidden_size=None), (), "its hidden_size is None"),
    "no layers": (dict(num_hidden_layers=0), (), "its num_hidden_layers is 0, and is"),
    "words": (dict(vocab_size="many"), (), "its vocab_size is 'many'"),
    "shared heads": (dict(num_key_value_heads=3), (), "a divisor of 8 heads"),
    "heads": (
        dict(num_attention_heads=7, num_key_value_heads=7),
        (),
        "a divisor of 256 features",
    ),
    "odd heads": (dict(head_dim=31), (), "its head_dim is 31, and is to be even"),
    "tied": (dict(tie_word_embeddings="yes"), (), "'yes', and is to be true or false"),
    "axis": ({}, ("--mesh", "pp=2"), "has the axis 'pp' in 'pp=2'. The axes are dp"),
    "axis twice": ({}, ("--mesh", "dp=2,dp=2"), "the axis 'dp' twice"),
    "no size": ({}, ("--mesh", "dp"), "'dp', and the size of an axis is to be"),
    "size": ({}, ("--mesh", "dp=0"), "'dp=0', and the size of an axis is to be"),
    "tp": ({}, ("--mesh", "tp=3"), "tp=3, which is to divide num_attention_heads, and"),
    "tp of keys": ({}, ("--mesh", "tp=8"), "num_key_value_heads, and that is 4"),
    "fsdp": ({}, ("--mesh", "fsdp=3"), "fsdp=3, which is to divide hidden_size, and"),
    "rows": ({}, ("--mesh", "dp=2,fsdp=8"), "--batch is 8, which 16 parts do not"),
    "tiles": (
        {},
        ("--mesh", "fsdp=8", "--base", "nf4"),
        "8 parts do not divide 4",
    ),
    "base": ({}, ("--base", "int2"), "--base is 'int2', and is to be one of float32,"),
    "checkpoint": ({}, ("--checkpoint", "all"), "--checkpoint is 'all', and is to be"),
    "rest of tiles": (
        dict(intermediate_size=800),
        ("--base", "nf4"),
        "--base nf4 is in tiles of 64, which are to divide intermediate_size",
    ),
    "many words": (dict(vocab_size=2**60), (), "of 2,147,483,647 at most"),
    "wide heads": (dict(head_dim=2**30), (), "268435455 at most, with 8 heads"),
    "many tokens": ({}, ("--tokens", str(10**12)), "above 0, and 2,147,483,647 at"),
    "rank": ({}, ("--rank", "0"), "--rank is 0, and is to be above 0"),
    "batch": ({}, ("--batch", "-1"), "--batch is -1"),
    "tokens": ({}, ("--tokens", "0"), "--tokens is 0"),
    "target": ({}, ("--targets", "qkv"), "'qkv'"),
}


@pytest.mark.parametrize("case", TROUBLE)
def test_trouble(case, config, capsys):
    changes, more, reason = TROUBLE[case]
    if changes is None:
        config.unlink()
    else:
        config.write_text(json.dumps(SMALL | changes))
    code, out, err = run(capsys, config, "--mesh", "dp=2", "--no-compile", *more)
    assert (code, out) == (2, "")
    assert reason in err and len(err.splitlines()) == 1


def test_a_mesh_of_more_devices_than_jax_has_begun_with(config, capsys):
    code, _, err = run(capsys, config, "--mesh", "dp=4,fsdp=2,tp=4")
    assert code == 2
    assert "is of 32 devices, and JAX has begun with 8" in err
    many = "--mesh", "dp=999999999", "--batch", "999999999"
    code, _, err = run(capsys, config, *many)
    assert code == 2
    assert "999,999,999 devices, and a program is compiled for 4,096 at most" in err
    assert run(capsys, config, *many, "--no-compile")[0] == 0


def test_spaces_in_a_mesh():
    assert read_mesh(" dp = 2, tp=4 ") == dict(dp=2, tp=4)


# What is compiled.


def training_step(planned: Job):
    """A step with Adam, compiled: what is measured."""
    mesh = mesh_of(planned.axes)
    step, optim = step_of(planned, mesh), optax.adam(1e-3)

    def run(params, state, frozen, batch):
        loss, grads = step.run(params, frozen, batch)
        updates, state = optim.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    def laid(x, like):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=like.sharding)

    adam, *rest = jax.eval_shape(optim.init, step.params)
    mu, nu = (jax.tree.map(laid, x, step.params) for x in (adam.mu, adam.nu))
    state = adam._replace(mu=mu, nu=nu), *rest
    args = step.params, state, step.frozen, step.batch
    shardings = [jax.tree.map(lambda x: x.sharding, x) for x in (step.params, mu)]
    of_state = adam._replace(mu=shardings[1], nu=shardings[1], count=None), *rest
    out = shardings[0], of_state, None
    return jax.jit(run, donate_argnums=(0, 1), out_shardings=out).lower(*args).compile()


# The larger a small model is, the less of it is of no account.
COMPILED = [
    ("dp=8", "float32", "nothing_saveable"),
    ("fsdp=4", "nf4", "nothing_saveable"),
    ("tp=4", "bfloat16", "nothing_saveable"),
    ("fsdp=2,tp=4", "float32", "none"),
    ("fsdp=2,tp=4", "int8", "nothing_saveable"),
]


@pytest.mark.slow
@pytest.mark.parametrize("mesh, base, checkpoint", COMPILED)
def test_a_compiled_step_takes_what_is_planned(mesh, base, checkpoint):
    planned = job(mesh, base, checkpoint)
    plan, step = with_program(planned), training_step(planned)
    memory: Any = step.memory_analysis()
    rows = 8 // math.prod(n for axis, n in planned.axes.items() if axis != "tp")
    tokens = rows * planned.tokens * 4
    counter = 4
    exact = plan.base + plan.factors + plan.optimiser + tokens + counter
    assert memory.argument_size_in_bytes == exact
    taken = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    taken += memory.output_size_in_bytes - memory.alias_size_in_bytes
    assert plan.total == pytest.approx(taken, rel=0.1)
    if checkpoint == "nothing_saveable":  # What comes into each layer.
        width = 4 if base == "float32" else 2
        assert plan.activations == SIZES.layers * tokens // 4 * SIZES.width * width
    check_traffic(planned, plan)


def check_traffic(planned: Job, plan: Plan) -> None:
    """XLA for CPUs sends bfloat16 as float32, and adds up what q, k, v, and what gate
    and up send back, each by itself."""
    found, wanted, axes = plan.collectives, plan.sent, planned.axes
    assert found is not None
    labels = 8 * planned.tokens * 2 * 4  # Where the right ones are.
    if "fsdp" in axes:
        head = SIZES.words * SIZES.width // axes.get("tp", 1)
        wider = 2 * head if planned.base in ("nf4", "int8") else 0
        gathered = wanted["weights"] + wider
        assert found["all-gather"] == pytest.approx(gathered + labels, rel=0.01)
    if "tp" not in axes:
        assert found["all-reduce"] == wanted["gradients"] + 4 * bool(wanted)
        return
    wider = 1 if planned.base == "float32" else 2
    again = 4 if planned.checkpoint == "none" else 5
    apart = wider * (again + 3) / again
    reduced = wanted["activations"] * apart + wanted["gradients"]
    assert found["all-reduce"] == pytest.approx(reduced, rel=0.1)


@pytest.mark.slow
def test_flops_of_a_compiled_step():
    """XLA counts what is in a loop once: here it turns once. It leaves out what the
    inputs of the only q, k and v would be sent back."""
    planned = job("tp=1", checkpoint="none", layers=1)
    program = compiled(step_of(planned, mesh := mesh_of(planned.axes)), mesh)
    assert on_paper(planned).flops == pytest.approx(
        program.cost_analysis()["flops"], rel=0.1
    )


LOOPS = """
%body (p: (s32[], f32[2,3,4], f32[3,8])) -> (s32[], f32[2,3,4], f32[3,8]) {
  %p = (s32[], f32[3,4], f32[3,8]) parameter(0)
  %w = f32[3,8] get-tuple-element(%p), index=2
  %g = bf16[4,8]{1,0} all-gather(%w), dimensions={0}
  ROOT %t = (s32[], f32[3,4]{1,0}, f32[3,8]{1,0}) tuple(%n, %updated, %w)
}

ENTRY %main (w: f32[3,8]) -> f32[] {
  %r = (f32[5]{0}, pred[2]{0}) all-reduce(%a, %b), to_apply=%add
  %l = (s32[], f32[3,4], f32[3,8]) while(%init), condition=%until, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
}
"""


def test_the_text_of_a_program():
    program = Program(LOOPS.replace("\\\n", ""))
    assert program.traffic() == {"all-gather": 3 * 64, "all-reduce": 22}
    assert program.stacks(3) == 3 * 4 * 4


@pytest.mark.slow
def test_in_a_process_of_its_own(config):
    """Which has as many devices as it needs: importing begins nothing of JAX."""
    out = subprocess.run(
        [
            *(sys.executable, "-m", "lora_quax", "plan", "--model", str(config)),
            *("--mesh", "dp=2,fsdp=4,tp=4", "--base", "nf4", "--json"),
            *("--batch", "8", "--tokens", "64"),
        ],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert (out.returncode, out.stderr) == (0, "")
    plan = json.loads(out.stdout)
    assert plan["devices"] == 32 and plan["compiled_for"] == "cpu"
    assert plan["activations"] == SIZES.layers * 64 * SIZES.width * 2


ROOT = Path(__file__).parents[1]
TABLE: dict[str, Any] = {"__file__": str(ROOT / "docs/plans.py"), "__name__": "plans"}
exec((ROOT / "docs/plans.py").read_text(), TABLE)
PAGE = (ROOT / "docs/guide/plan.md").read_text()


def test_the_table_has_a_row_for_each():
    rows = [line for line in PAGE.splitlines() if line.startswith("|")]
    assert rows[:2] == TABLE["HEAD"].splitlines()
    starts = [[model, base, str(n)] for model, base, n in TABLE["CELLS"]]
    assert [row.strip("| ").split(" | ")[:3] for row in rows[2:]] == starts


@pytest.mark.parametrize("model", TABLE["MODELS"])
def test_the_table_says_what_shapes_say(model):
    cell = model, "nf4", 128
    assert TABLE["exact"](*cell, on_paper(TABLE["job"](*cell))) in PAGE


@pytest.mark.slow
def test_the_table_says_what_is_compiled():
    cell = "8B", "nf4", 8
    got = TABLE["row"](*cell, with_program(TABLE["job"](*cell)))
    (said,) = (x for x in PAGE.splitlines() if x.startswith("| 8B | nf4 | 8 |"))
    read = lambda text: float(text.replace(",", ""))
    numbers = [
        [read(x) for x in row.strip("| ").split(" | ")[4:]] for row in (got, said)
    ]
    assert numbers[0] == pytest.approx(numbers[1], rel=0.1)
