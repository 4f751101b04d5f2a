"""The same adapter computes the same in PEFT and here, whichever of them wrote it."""

import functools as ft
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
import quax


_reason = "needs PyTorch and PEFT: pip install '.[interop]'"
torch: Any = pytest.importorskip("torch", reason=_reason)
pytest.importorskip("transformers", reason=_reason)
peft: Any = pytest.importorskip("peft", reason=_reason)

import interop_twins as twins  # noqa: E402
from interop_twins import (  # noqa: E402
    at,
    base_of,
    CALLED,
    example,
    FLIPPED,
    HEADLESS,
    LAYERS,
    LISTED,
    SAME,
    STACKED,
    twin_of,
    View,
)
from safetensors.torch import load_file  # noqa: E402

import lora_quax  # noqa: E402
from lora_quax import Adapt, DoRA  # noqa: E402
from lora_quax._arrays.base import is_adapted, replace  # noqa: E402


FILES = "adapter_model.safetensors", "adapter_config.json"
# What PEFT says of its dependencies, and of models rather than of adapters.
HARMLESS = (
    "`is_gradient_checkpointing`",
    "Model has `tie_word_embeddings=True`",
    "Setting `save_embedding_layers` to `True`",
    # The bias of B is a vector.
    "Adapter 'default'.*lora_B.bias",
    # It follows the pattern of a parameter, but looks for it among the modules.
    "The following alpha_pattern keys did not match .*inner.*matrix",
)
pytestmark = [
    pytest.mark.slow,
    *(pytest.mark.filterwarnings(f"ignore:{message}") for message in HARMLESS),
]


class Program(NamedTuple):
    """What a whole twin computes from one input of this shape."""

    forward: Callable[[Any, Any], Any]
    shape: tuple[int, ...]


CONV = Program(twins.conv_forward, (2, 8, 9, 7))
ENDS = "q", "block.q", "head", "lm_head"
MANY = tuple(f"block{i}.{name}" for i in range(12) for name in ("q", "k"))


class Case(NamedTuple):
    """A model, and how it is adapted, by the one side or by the other."""

    model: Callable[[], Any]
    adapter: dict[str, Any]  # for `LoraConfig`, or for `loraify`
    view: View = SAME
    program: Program | None = None
    transposed: tuple[str, ...] = ()
    name: str = "default"
    save: dict[str, Any] = {}  # for `lora_quax.peft.save`
    trained: Callable[[Any], None] = lambda model: None  # What else training changed.
    dtype: Any = torch.float32  # of PEFT's file


def _change_embedding(model) -> None:
    with torch.no_grad():
        model.get_input_embeddings().base_layer.weight.add_(0.5)


_attention = dict(target_modules=["q_proj", "v_proj"])
_mlps = dict(target_modules=["gate_proj", "down_proj"])
_gpt2 = dict(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
_bert = dict(target_modules=["query", "dense"])
_convs = dict(target_modules=["volume", "plane", "line", "0", "2"])

_dora_from_peft = {
    f"dora, {name}": case._replace(adapter={**case.adapter, "use_dora": True})
    for name, case in {
        "linear": Case(twins.llama(), _attention),
        "list of layers": Case(twins.llama(), _attention, LISTED),
        "stacked": Case(twins.llama(3), _attention, STACKED),
        "rslora, ranks": Case(
            twins.llama(),
            {**_attention, "use_rslora": True, "rank_pattern": {"q_proj": 3}},
            save={"use_rslora": True},
        ),
        "pissa": Case(twins.llama(), {**_attention, "init_lora_weights": "pissa"}),
        "bfloat16": Case(twins.llama(), _attention, dtype=torch.bfloat16),
        "embedding": Case(twins.llama(), dict(target_modules=["embed_tokens"])),
        "gpt2": Case(twins.gpt2(), _gpt2, save={"fan_in_fan_out": True}),
        "convolutions": Case(twins.conv_net(), _convs, program=CONV),
        "matrices, transposed": Case(
            twins.linears(ENDS),
            dict(target_modules=[*ENDS]),
            FLIPPED,
            program=Program(twins.linears_forward(ENDS), (4,)),
            transposed=("weight",),
        ),
    }.items()
}

FROM_PEFT = {
    "linear": Case(twins.llama(), _attention),
    "list of layers": Case(twins.llama(), _attention, LISTED),
    "all-linear": Case(twins.llama(), dict(target_modules="all-linear")),
    "regex": Case(
        twins.llama(), dict(target_modules=r".*\.[01]\.self_attn\.[qk]_proj")
    ),
    "exclude_modules": Case(
        twins.llama(), {**_attention, "exclude_modules": ["layers.0.self_attn.q_proj"]}
    ),
    "layers_to_transform": Case(
        twins.llama(3), {**_attention, "layers_to_transform": [0, 2]}
    ),
    "layers_pattern": Case(
        twins.llama(3),
        {**_attention, "layers_to_transform": 1, "layers_pattern": "layers"},
    ),
    "rank 1": Case(twins.llama(), {**_attention, "r": 1}),
    "rslora": Case(twins.llama(), {**_attention, "use_rslora": True}),
    "patterns": Case(
        twins.llama(),
        dict(
            **_attention,
            rank_pattern={"q_proj": 3, r"layers\.1\.self_attn\.v_proj": 2},
            alpha_pattern={r"^model\.layers\.0\.self_attn\.v_proj": 7, "q_proj": 5},
        ),
    ),
    "patterns, rslora": Case(
        twins.llama(),
        dict(**_attention, rank_pattern={"q_proj": 3}, use_rslora=True),
        save={"use_rslora": True},
    ),
    "stacked": Case(twins.llama(3), _attention, STACKED),
    "stacked, some layers": Case(
        twins.llama(3), {**_mlps, "layers_to_transform": [1]}, STACKED
    ),
    "stacked, several ranks": Case(
        twins.llama(3),
        dict(
            **_mlps,
            rank_pattern={r"layers\.1\.mlp\.gate_proj": 2},
            alpha_pattern={r"layers\.2\..*": 9},
        ),
        STACKED,
    ),
    "float16": Case(twins.llama(), _attention, dtype=torch.float16),
    "bfloat16": Case(twins.llama(), _attention, dtype=torch.bfloat16),
    "bfloat16, stacked": Case(
        twins.llama(),
        {**_attention, "rank_pattern": {r"layers\.1\..*": 2}},
        STACKED,
        dtype=torch.bfloat16,
    ),
    "dropout": Case(
        twins.llama(),
        {**_attention, "lora_dropout": 0.1, "init_lora_weights": "orthogonal"},
    ),
    "pissa": Case(twins.llama(), {**_attention, "init_lora_weights": "pissa"}),
    "pissa, stacked": Case(
        twins.llama(),
        dict(**_mlps, rank_pattern={"gate_proj": 2}, init_lora_weights="pissa"),
        STACKED,
    ),
    "pissa, gpt2": Case(
        twins.gpt2(),
        {**_gpt2, "init_lora_weights": "pissa"},
        save={"fan_in_fan_out": True},
    ),
    "olora": Case(twins.llama(), {**_attention, "init_lora_weights": "olora"}),
    "named": Case(twins.llama(), _attention, name="other"),
    "embedding": Case(twins.llama(), dict(target_modules=["embed_tokens", "q_proj"])),
    "embedding, changed": Case(
        twins.llama(),
        dict(target_modules=["embed_tokens", "q_proj"]),
        trained=_change_embedding,
    ),
    "embedding and head": Case(
        twins.llama(), dict(target_modules=["embed_tokens", "lm_head"])
    ),
    "embedding, tied": Case(
        twins.llama(tie_word_embeddings=True),
        dict(target_modules=["embed_tokens", "q_proj"]),
        HEADLESS,
    ),
    "embedding, saved whole": Case(
        twins.llama(), {**_attention, "modules_to_save": ["embed_tokens", "lm_head"]}
    ),
    "gpt2": Case(twins.gpt2(), _gpt2, save={"fan_in_fan_out": True}),
    "gpt2, biases": Case(
        twins.gpt2(), {**_gpt2, "bias": "all"}, save={"fan_in_fan_out": True}
    ),
    "gpt2, whole": Case(
        twins.gpt2(),
        dict(
            target_modules=["c_attn"],
            fan_in_fan_out=True,
            modules_to_save=["lm_head"],
        ),
        save={"fan_in_fan_out": True},
    ),
    "gpt2, embeddings": Case(
        twins.gpt2(), dict(target_modules=["wte", "wpe"]), HEADLESS
    ),
    "bert": Case(twins.bert(), {**_bert, "modules_to_save": ["classifier"]}),
    "bert, task": Case(
        twins.bert(), {**_bert, "task_type": "SEQ_CLS"}, save={"task_type": "SEQ_CLS"}
    ),
    "bert, lora_only": Case(twins.bert(), {**_bert, "bias": "lora_only"}),
    "bert, all biases": Case(
        twins.bert(),
        {**_bert, "bias": "all", "modules_to_save": ["classifier"]},
    ),
    "bert, lora_bias": Case(
        twins.bert(), dict(target_modules=["query"], lora_bias=True)
    ),
    "bert, lora_bias, bias": Case(
        twins.bert(),
        dict(target_modules=["query"], lora_bias=True, bias="lora_only"),
    ),
    "bert, pooler whole": Case(
        twins.bert(),
        dict(target_modules=["query"], modules_to_save=["pooler", "LayerNorm"]),
    ),
    "convolutions": Case(twins.conv_net(), _convs, program=CONV),
    "convolutions, biases": Case(
        twins.conv_net(), {**_convs, "bias": "all"}, program=CONV
    ),
    "convolutions, whole": Case(
        twins.conv_net(),
        dict(target_modules=["line", "0"], modules_to_save=["plane"]),
        program=CONV,
    ),
    **_dora_from_peft,
    "weight as a parameter": Case(
        twins.linears(ENDS),
        dict(target_modules=["lm_head"], target_parameters=["block.q.weight"]),
        program=Program(twins.linears_forward(ENDS), (4,)),
    ),
    "more than twenty": Case(
        twins.linears(MANY),
        dict(target_modules=[*MANY[:-1]]),
        program=Program(twins.linears_forward(MANY), (4,)),
    ),
    **{
        f"parameters, {', '.join(names)}, transposed={transposed}": Case(
            twins.parameters(transposed),
            dict(target_modules=["head"], target_parameters=names, **patterns),
            program=Program(twins.parameters_forward(transposed), (5,)),
            transposed=("a_up", "b_down") if transposed else (),
        )
        for transposed in (False, True)
        for names, patterns in [
            (["experts.a_up"], {}),
            (["b_down"], {"use_rslora": True}),
            (["experts.b_down", "experts.a_up"], {}),
            (["a_up", "inner.matrix", "b_down"], {"lora_alpha": 5}),
        ]
    },
}


def _noise(model, scale=0.3) -> None:
    """Random numbers in place of all that trains, B among it, which starts at zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for x in model.parameters():
            if x.requires_grad:
                x.copy_(scale * torch.randn(x.shape))


def _cast(model, dtype) -> None:
    """What is read back from a file of this type is what the model then has."""
    for x in model.parameters():
        if x.requires_grad:
            x.data = x.data.to(dtype)


def config_of(case: Case) -> Any:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **case.adapter})


def peft_model_of(case: Case, folder: Path) -> Any:
    """A model that PEFT has adapted, and saved."""
    model = peft.get_peft_model(case.model(), config_of(case), case.name).eval()
    _noise(model)
    case.trained(model)
    _cast(model, case.dtype)
    model.save_pretrained(folder)
    _cast(model, torch.float32)
    return model


def _own(tensors: dict[str, Any]) -> set[str]:
    """The names of an adapter's own tensors.

    Beside them PEFT has a second time, by `bias="all"`, the biases of modules that it
    saves whole, and the bases of embeddings, if it knows their names for such.
    """
    beside = re.compile(r"\.(modules_to_save|original_module)\.|\.base_layer\.weight$")
    return {name for name in tensors if not beside.search(name)}


def imported(folder: Path, case: Case) -> Any:
    """A model that PEFT has adapted from files, to the last tensor and no other."""
    folder = folder if case.name == "default" else folder / case.name
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for harmless in HARMLESS:
            warnings.filterwarnings("ignore", harmless)
        model = peft.PeftModel.from_pretrained(
            case.model(), folder, adapter_name=case.name
        )
    file = load_file(folder / FILES[0])
    state = peft.get_peft_model_state_dict(model, adapter_name=case.name)
    assert _own(file) == _own(state)
    for name in file.keys() & state.keys():
        x, y = file[name], state[name]
        torch.testing.assert_close(x, y, rtol=0, atol=0, check_dtype=False)
    return model


def load(folder: Path, case: Case) -> Any:
    base = case.view.there(base_of(case.model))
    kwargs = dict(names=case.view.names, transposed=case.transposed)
    return lora_quax.peft.load(folder, base, adapter_name=case.name, **kwargs)


def save(folder: Path, model: Any, case: Case, **kwargs) -> None:
    kwargs |= dict(names=case.view.names, transposed=case.transposed, **case.save)
    lora_quax.peft.save(folder, model, adapter_name=case.name, **kwargs)


def assert_close(ours, theirs, what: str) -> None:
    theirs = np.asarray(theirs)
    scale = max(1.0, float(np.abs(theirs).max()))
    np.testing.assert_allclose(
        np.asarray(ours), theirs, rtol=0, atol=1e-5 * scale, err_msg=what
    )


def assert_same(case: Case, ours: Any, *theirs: Any) -> None:
    """Every adapted layer, the whole program, and every merged parameter agree."""
    ours = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), ours)
    tree = case.view.back(ours)
    assert_same_layers(case, tree, theirs)
    if case.program is not None:
        forward, shape = case.program
        x = np.random.default_rng(0).normal(size=(3, *shape)).astype(np.float32)
        y = jax.vmap(quax.quaxify(forward), (None, 0))(tree, jnp.asarray(x))
        assert_outputs(y, theirs, x, "the program")
    merged = jtu.tree_flatten_with_path(case.view.back(lora_quax.merge(ours)))[0]
    for model in theirs:
        expected = jtu.tree_flatten_with_path(twin_of(model.merge_and_unload()))[0]
        expected = dict(expected)
        for path, x in merged:
            assert_close(x, expected[path], jtu.keystr(path))


def assert_same_layers(case: Case, tree: Any, theirs: Sequence[Any]) -> None:
    for path, module in case.model().named_modules():
        layer: Any = at(tree, path) if type(module) in LAYERS else None
        if not any(map(is_adapted, jax.tree.leaves(layer, is_leaf=is_adapted))):
            continue
        x = example(module)
        y = jax.vmap(quax.quaxify(layer))(jnp.asarray(x))
        layers = [model.get_base_model().get_submodule(path) for model in theirs]
        assert_outputs(y, layers, x, path)


def assert_outputs(y, theirs: Sequence[Any], x: np.ndarray, what: str) -> None:
    for model in theirs:
        with torch.no_grad():
            assert_close(y, model(torch.from_numpy(x)), what)


def _bytes(folder: Path) -> dict[Path, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder): path.read_bytes() for path in files}


@pytest.mark.parametrize("case", FROM_PEFT.values(), ids=FROM_PEFT)
def test_from_peft_and_back(tmp_path, case):
    first, second, third = tmp_path / "peft", tmp_path / "ours", tmp_path / "again"
    theirs = peft_model_of(case, first)
    ours = load(first, case)
    save(second, ours, case)
    assert_same(case, ours, theirs, imported(second, case))
    save(third, load(second, case), case)
    assert len(_bytes(second)) == 2 and _bytes(second) == _bytes(third)


_per_column = ft.partial(DoRA, per="columns")
_pair = dict(targets=["q_proj", "v_proj"])

FROM_HERE = {
    "linear": Case(twins.llama(), _pair),
    "names": Case(twins.llama(), _pair, LISTED),
    "function for names": Case(twins.llama(), _pair, CALLED),
    "stacked": Case(twins.llama(3), _pair, STACKED),
    "rslora": Case(twins.llama(), _pair, save={"use_rslora": True}),
    "adapter name": Case(twins.llama(), _pair, name="other"),
    "several ranks": Case(
        twins.llama(),
        dict(
            targets={
                r".*\.[qko]_proj\.weight": True,
                "0.self_attn.q_proj": 3,
                "1.self_attn.q_proj": Adapt(rank=4, alpha=7),
            },
        ),
    ),
    "several ranks, rslora": Case(
        twins.llama(),
        dict(targets={"v_proj": True, "q_proj": Adapt(rank=3, alpha=7)}),
        save={"use_rslora": True},
    ),
    "bfloat16": Case(twins.llama(), {**_pair, "dtype": jnp.bfloat16}),
    "float16": Case(twins.llama(), {**_pair, "dtype": jnp.float16}),
    "bases trained": Case(twins.llama(), {**_pair, "stop_gradient": False}),
    "embedding": Case(twins.llama(), dict(targets=[eqx.nn.Embedding])),
    "embedding, base trained": Case(
        twins.llama(),
        dict(targets=[eqx.nn.Embedding, "q_proj"], stop_gradient=False),
    ),
    "whole modules": Case(
        twins.llama(),
        dict(targets={"q_proj": True, "lm_head": "full", "mlp": "full"}),
    ),
    "whole modules, stacked": Case(
        twins.llama(),
        dict(targets={"q_proj": True, "down_proj": "full"}),
        STACKED,
    ),
    "gpt2, whole": Case(
        twins.gpt2(),
        dict(targets={"c_attn": True, "lm_head": "full"}),
        save={"fan_in_fan_out": True},
    ),
    "gpt2, bases trained": Case(
        twins.gpt2(),
        dict(targets=["attn.c_proj"], stop_gradient=False),
        save={"fan_in_fan_out": True},
    ),
    "gpt2": Case(
        twins.gpt2(),
        dict(alpha=2, targets=["c_attn", "c_fc"]),
        save={"fan_in_fan_out": True},
    ),
    "norms": Case(twins.bert(), dict(targets={"query": True, "LayerNorm": "full"})),
    "biases of adapted layers": Case(
        twins.bert(), dict(targets={"query": True, "query.bias": "full"})
    ),
    "all biases": Case(
        twins.bert(),
        dict(targets={"query": True, "bias": "full", "classifier": "full"}),
    ),
    "task": Case(
        twins.bert(),
        dict(targets={"query": True, "classifier": "full"}),
        save={"task_type": "SEQ_CLS", "lora_dropout": 0.1},
    ),
    "convolutions": Case(twins.conv_net(), {}, program=CONV),
    "convolutions, one whole": Case(
        twins.conv_net(),
        dict(targets={eqx.nn.Linear: 3, "line": True, "plane": "full"}),
        program=CONV,
    ),
    "ends of other names": Case(
        twins.linears(ENDS),
        dict(targets=[r"(q|head)\.weight"]),
        program=Program(twins.linears_forward(ENDS), (4,)),
    ),
    "ends of other names, whole": Case(
        twins.linears(ENDS),
        dict(targets={r"q\.weight": True, "head": "full"}),
        program=Program(twins.linears_forward(ENDS), (4,)),
    ),
    "more than twenty": Case(
        twins.linears(MANY),
        dict(targets=[*MANY[:-1]]),
        program=Program(twins.linears_forward(MANY), (4,)),
    ),
    "matrices, transposed": Case(
        twins.linears(ENDS),
        dict(targets=["q.weight", "head.weight"]),
        FLIPPED,
        program=Program(twins.linears_forward(ENDS), (4,)),
        transposed=("weight",),
    ),
    "matrices, transposed, whole": Case(
        twins.linears(ENDS),
        dict(targets={"q.weight": True, "head": "full"}),
        FLIPPED,
        program=Program(twins.linears_forward(ENDS), (4,)),
        transposed=("weight",),
    ),
    "dora": Case(twins.llama(), {**_pair, "use_dora": True}),
    "dora, stacked": Case(twins.llama(3), {**_pair, "use_dora": True}, STACKED),
    "dora, base trained": Case(
        twins.llama(), {**_pair, "use_dora": True, "stop_gradient": False}
    ),
    "dora, embedding": Case(
        twins.llama(), dict(targets=[eqx.nn.Embedding], use_dora=True)
    ),
    "dora, convolutions": Case(twins.conv_net(), dict(use_dora=True), program=CONV),
    "dora, gpt2": Case(
        twins.gpt2(),
        dict(alpha=2, targets=["c_attn", "c_fc"], use_dora=True),
        save={"fan_in_fan_out": True},
    ),
    "dora, matrices, transposed": Case(
        twins.linears(ENDS),
        dict(targets=["q.weight", "head.weight"], use_dora=_per_column),
        FLIPPED,
        program=Program(twins.linears_forward(ENDS), (4,)),
        transposed=("weight",),
    ),
    **{
        f"parameters, transposed={transposed}": Case(
            twins.parameters(transposed),
            dict(
                targets={r"experts\..*": True, "matrix": Adapt(alpha=3), "head": 1},
            ),
            program=Program(twins.parameters_forward(transposed), (5,)),
            transposed=("a_up", "b_down") if transposed else (),
        )
        for transposed in (False, True)
    },
}


def adapted(case: Case) -> Any:
    base = case.view.there(base_of(case.model))
    zeros = lora_quax.init.zeros  # Quick to compile.
    kwargs = {"rank": 4, "alpha": 6, "init_a": zeros, "init_b": zeros, **case.adapter}
    return trained(lora_quax.loraify(base, key=jr.key(0), **kwargs), 0)


def trained(model: Any, seed: int) -> Any:
    """All that trains has changed."""
    rng = np.random.default_rng(seed)

    def changed(x):
        return jnp.asarray(x + (0.3 * rng.normal(size=x.shape)).astype(x.dtype))

    params, frozen = lora_quax.partition(model)
    params = jax.tree.map(lambda x: changed(np.asarray(x)), params)
    return eqx.combine(params, frozen)


@pytest.mark.parametrize("case", FROM_HERE.values(), ids=FROM_HERE)
def test_from_here_and_back(tmp_path, case):
    ours = adapted(case)
    save(tmp_path, ours, case)
    assert_same(case, ours, imported(tmp_path, case))
    returned = lora_quax.merge(load(tmp_path, case))
    jax.tree.map(
        lambda x, y: assert_close(x, y, "merged"), returned, lora_quax.merge(ours)
    )


ON_CHANGED_BASE = [
    "dora",
    "stacked",
    "rslora",
    "several ranks, rslora",
    "embedding",
    "convolutions",
    "parameters, transposed=True",
    "matrices, transposed",
]


@pytest.mark.parametrize("name", ON_CHANGED_BASE)
def test_an_initialisation_that_changed_the_base(tmp_path, name):
    case = FROM_HERE[name]

    def subtract(x):
        if isinstance(x, DoRA):
            return replace(x, lora=subtract(x.lora))
        return replace(x, base=x.base - x.delta.dense()) if is_adapted(x) else x

    initial = jax.tree.map(subtract, adapted(case), is_leaf=is_adapted)
    ours = trained(initial, 1)
    save(tmp_path, ours, case, initial=initial)
    assert_same(case, ours, imported(tmp_path, case))


def test_pissa_as_peft_converts_it(tmp_path):
    case = Case(twins.llama(), {**_attention, "init_lora_weights": "pissa"})
    theirs = peft.get_peft_model(case.model(), config_of(case)).eval()
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "initial")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    _noise(theirs)
    theirs.save_pretrained(
        tmp_path / "converted",
        path_initial_model_for_weight_conversion=str(tmp_path / "initial"),
    )
    assert_same(case, load(tmp_path / "converted", case), theirs)


def test_two_adapters_of_one_model(tmp_path):
    one = Case(twins.llama(), _attention)
    other = one._replace(adapter={**_mlps, "use_rslora": True}, name="other")
    theirs = peft.get_peft_model(one.model(), config_of(one)).eval()
    theirs.add_adapter("other", config_of(other))
    theirs.set_adapter("other")
    _noise(theirs)
    theirs.save_pretrained(tmp_path)
    for case in one, other:
        ours = load(tmp_path, case)
        save(tmp_path / "ours", ours, case)
        assert_same(case, ours, imported(tmp_path / "ours", case))
    assert_same(other, load(tmp_path, other), theirs)


REFUSED = {
    "dora, some layers of a stack": (
        twins.llama(3),
        {**_mlps, "use_dora": True, "layers_to_transform": [1]},
        "with DoRA all layers of a stack have to be adapted, and `model.layers.0",
        STACKED,
    ),
    "randomised pissa": (
        twins.llama(),
        {**_attention, "init_lora_weights": "pissa_niter_4"},
        "`init_lora_weights` is 'pissa_niter_4', by which PEFT changes the base",
    ),
    "replicated layers": (
        twins.llama(),
        {**_attention, "layer_replication": [[0, 2], [1, 2]]},
        "`layer_replication` is",
    ),
    "gpt2, square whole": (
        twins.gpt2(),
        dict(
            target_modules=["c_attn"],
            fan_in_fan_out=True,
            modules_to_save=["attn.c_proj"],
        ),
        "it is square, so that there is no telling",
    ),
    "groups": (
        twins.grouped(),
        dict(target_modules=["conv"]),
        "`conv.weight` cannot be adapted: it is a convolution of 2 groups",
    ),
}


@pytest.mark.parametrize("refused", REFUSED.values(), ids=REFUSED)
def test_refused(tmp_path, refused):
    model, config, match, *view = refused
    case = Case(model, config, *view)
    peft_model_of(case, tmp_path)
    with pytest.raises(lora_quax.AdapterError, match=match):
        load(tmp_path, case)


NOT_WRITTEN = {
    "groups": (Case(twins.grouped(), {}), "`conv.weight` .* of 2 groups"),
    "gpt2, square whole": (
        Case(
            twins.gpt2(),
            dict(targets={"c_attn": True, "attn.c_proj": "full"}),
            save={"fan_in_fan_out": True},
        ),
        "is square, so that there is no telling",
    ),
}


@pytest.mark.parametrize("case, match", NOT_WRITTEN.values(), ids=NOT_WRITTEN)
def test_not_written(tmp_path, case, match):
    with pytest.raises(ValueError, match=match):
        save(tmp_path, adapted(case), case)
