"""Forms of adaptation that are not LoRA compute the same in PEFT and here, whichever of
them wrote the files."""

import functools as ft
import json
import warnings
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import quax


_reason = "needs PyTorch and PEFT: pip install '.[interop]'"
torch: Any = pytest.importorskip("torch", reason=_reason)
pytest.importorskip("transformers", reason=_reason)
peft: Any = pytest.importorskip("peft", reason=_reason)

import lora_quax  # noqa: E402
from lora_quax import Adapt, AdapterError, IA3, LoHa, LoKr, VeRA  # noqa: E402


pytestmark = pytest.mark.slow


class _Net(torch.nn.Module):
    """Linear layers with and without a bias, convolutions, and blocks."""

    def __init__(self):
        super().__init__()
        nn = torch.nn
        torch.manual_seed(0)
        self.line = nn.Conv1d(3, 4, 3)
        self.plane = nn.Conv2d(4, 8, 3, dilation=2)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.up = nn.Linear(8, 24)
        self.blocks = nn.ModuleList(nn.Linear(24, 24, bias=False) for _ in range(2))
        self.down = nn.Linear(24, 6, bias=False)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        x = torch.tanh(self.line(x))
        x = torch.tanh(self.plane(x[..., None] * x[..., None, :]))
        x = torch.tanh(self.up(self.grouped(x).flatten(1)))
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.head(self.down(x))


class _Twin(eqx.Module):
    """The same, with stacked blocks."""

    line: eqx.nn.Conv1d
    plane: eqx.nn.Conv2d
    grouped: eqx.nn.Conv2d
    up: eqx.nn.Linear
    blocks: eqx.nn.Linear
    down: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, net: _Net):
        conv = ft.partial(eqx.nn.Conv, key=jr.key(0))
        line = ft.partial(eqx.nn.Linear, key=jr.key(0))
        self.line = _filled(conv(1, 3, 4, 3), net.line)
        self.plane = _filled(conv(2, 4, 8, 3, dilation=2), net.plane)
        self.grouped = _filled(conv(2, 8, 8, 3, groups=2), net.grouped)
        self.up = _filled(line(8, 24), net.up)
        blocks = [
            _filled(line(24, 24, use_bias=False), block)
            for block in getattr(net, "blocks")
        ]
        self.blocks = jax.tree.map(lambda *x: jnp.stack(x), *blocks)
        self.down = _filled(line(24, 6, use_bias=False), net.down)
        self.head = _filled(line(6, 2), net.head)

    def __call__(self, x):
        x = jnp.tanh(self.line(x))
        x = jnp.tanh(self.plane(x[..., None] * x[..., None, :]))
        x = jnp.tanh(self.up(self.grouped(x).ravel()))
        x = jax.lax.scan(lambda x, block: (jnp.tanh(block(x)), None), x, self.blocks)[0]
        return self.head(self.down(x))


def _filled(layer, module):
    to_jax = lambda x: jnp.array(x.detach().numpy())
    weight = to_jax(module.weight)
    layer = eqx.tree_at(lambda l: l.weight, layer, weight)
    if layer.bias is None:
        return layer
    bias = to_jax(module.bias).reshape(layer.bias.shape)
    return eqx.tree_at(lambda l: l.bias, layer, bias)


NAMES = {"blocks": "blocks.{}"}
X = np.random.default_rng(0).standard_normal((5, 3, 9)).astype(np.float32)


class Case(NamedTuple):
    config: Any  # of PEFT
    targets: dict[Any, Any]  # for `loraify`
    rank: int | None = 3


_conv = ["line", "plane", "grouped"]
_linear = ["up", "blocks.0", "blocks.1", "down"]
_all = dict.fromkeys([*_conv, "up", "blocks", "down"], True)
_line = {"up": True, "blocks": True, "down": True}
_head: Any = dict(modules_to_save=["head"])
_lokr = lambda **options: Adapt(update=ft.partial(LoKr.init, **options))
_ia3 = lambda side: Adapt(update=ft.partial(IA3.init, feedforward=side))

CASES = {
    "loha": Case(
        peft.LoHaConfig(r=3, alpha=5, target_modules=[*_conv, *_linear], **_head),
        {**_all, "head": "full"},
    ),
    "loha, several ranks": Case(
        peft.LoHaConfig(
            r=3,
            alpha=3,
            rank_pattern={"down": 2},
            alpha_pattern={"up": 7.5},
            target_modules=_linear,
        ),
        {**_line, "down": 2, "up": Adapt(alpha=7.5)},
    ),
    "lokr": Case(
        peft.LoKrConfig(r=1, alpha=5, target_modules=[*_conv, *_linear], **_head),
        {**_all, "head": "full"},
        1,
    ),
    "lokr, plain": Case(
        peft.LoKrConfig(r=9, alpha=5, target_modules=[*_conv[1:], *_linear]),
        dict.fromkeys([*_conv[1:], "up", "blocks", "down"], True),
        9,
    ),
    "lokr, both": Case(
        peft.LoKrConfig(
            r=1,
            alpha=5,
            decompose_both=True,
            decompose_factor=4,
            target_modules=_linear,
        ),
        dict.fromkeys(["up", "blocks", "down"], _lokr(both=True, factor=4)),
        1,
    ),
    "vera": Case(
        peft.VeraConfig(r=7, target_modules=_linear, **_head),
        {**_line, "head": "full"},
        7,
    ),
    "ia3": Case(
        peft.IA3Config(
            target_modules=["plane", *_linear],
            feedforward_modules=["plane", "up", "down"],
            **_head,
        ),
        {
            "plane": _ia3(True),
            "up": _ia3(True),
            "blocks": _ia3(False),
            "down": _ia3(True),
            "head": "full",
        },
        None,
    ),
}
UPDATES = {"loha": LoHa, "lokr": LoKr, "vera": VeRA, "ia3": IA3}


def _noise(model) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for x in model.parameters():
            if x.requires_grad:
                x.add_(0.3 * torch.randn(x.shape, generator=generator))


def _trained(model):
    params, rest = lora_quax.partition(model)
    leaves, treedef = jax.tree.flatten(params)
    keys = jr.split(jr.key(3), len(leaves))
    leaves = [x + 0.3 * jr.normal(key, x.shape) for key, x in zip(keys, leaves)]
    return eqx.combine(jax.tree.unflatten(treedef, leaves), rest)


def _adapted(name: str):
    case = CASES[name]
    update = UPDATES[name.partition(",")[0]]
    model = lora_quax.loraify(
        _Twin(_Net()), case.rank, jr.key(1), update=update, targets=case.targets
    )
    return _trained(model)


def _run(model):
    return np.asarray(jax.vmap(quax.quaxify(model))(X))


def _run_torch(model):
    with torch.no_grad():
        return model(torch.tensor(X)).numpy()


def _same(ours, theirs):
    """Unmerged and merged."""
    expected = _run_torch(theirs)
    assert np.abs(expected - _run_torch(_Net())).max() > 1e-2
    np.testing.assert_allclose(_run(ours), expected, rtol=1e-5, atol=1e-5)
    merged, twin = lora_quax.merge(ours), _Twin(theirs.merge_and_unload())
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5),
        *(eqx.filter(x, eqx.is_array) for x in (merged, twin)),
    )


def _imported(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*")
        return peft.PeftModel.from_pretrained(_Net(), str(path)).eval()


@pytest.mark.parametrize("name", CASES)
def test_from_peft_and_back(tmp_path, name):
    theirs = peft.get_peft_model(_Net(), CASES[name].config).eval()
    _noise(theirs)
    theirs.save_pretrained(tmp_path)
    ours = lora_quax.peft.load(tmp_path, _Twin(_Net()), names=NAMES)
    _same(ours, theirs)
    lora_quax.peft.save(tmp_path / "again", ours, names=NAMES)
    _same(ours, _imported(tmp_path / "again"))


@pytest.mark.parametrize("name", CASES)
def test_from_here_and_back(tmp_path, name):
    ours = _adapted(name)
    lora_quax.peft.save(tmp_path, ours, names=NAMES, base=_Twin(_Net()))
    _same(ours, _imported(tmp_path))
    again = lora_quax.peft.load(tmp_path, _Twin(_Net()), names=NAMES)
    np.testing.assert_allclose(_run(again), _run(ours), rtol=1e-6, atol=1e-6)
    assert eqx.tree_equal(*(jax.tree.structure(x) for x in (again, ours)))


# Gradients.

# PEFT has no LoRA of convolutions with gaps: it leaves these out of the product with A.
_lora = ft.partial(peft.LoraConfig, r=3, lora_alpha=5, **_head)
CONFIGS = {name: case.config for name, case in CASES.items()} | {
    "lora": _lora(target_modules=["line", *_linear]),
    "lora, rank-stabilised": _lora(target_modules=_linear, use_rslora=True),
    "dora": _lora(target_modules=["line", *_linear], use_dora=True),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients(tmp_path, name):
    """A step of gradient descent on each side comes to the same factors."""
    theirs = peft.get_peft_model(_Net(), CONFIGS[name]).eval()
    _noise(theirs)
    theirs.save_pretrained(tmp_path / "before")
    theirs(torch.tensor(X)).square().sum().backward()
    with torch.no_grad():
        for x in theirs.parameters():
            if x.requires_grad:
                x.sub_(x.grad)
    theirs.save_pretrained(tmp_path / "after")
    before, after = (
        lora_quax.peft.load(tmp_path / when, _Twin(_Net()), names=NAMES)
        for when in ("before", "after")
    )

    def loss(model):
        return jnp.sum(jax.vmap(quax.quaxify(model))(X) ** 2)

    grads = eqx.filter_jit(lora_quax.filter_grad(loss))(before)
    for grad, x, y in zip(
        jax.tree.leaves(grads),
        *(jax.tree.leaves(lora_quax.partition(model)[0]) for model in (before, after)),
        strict=True,
    ):
        wanted = np.asarray(x) - np.asarray(y)
        scale = np.abs(wanted).max()
        assert scale > 1e-3
        np.testing.assert_allclose(grad / scale, wanted / scale, rtol=0, atol=1e-5)


# Rows of an embedding.


class _Words(torch.nn.Module):
    """An embedding and a layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = torch.nn.Embedding(11, 6)
        self.up = torch.nn.Linear(6, 6)

    def forward(self, ids):
        return torch.tanh(self.up(self.embed_tokens(ids)))


class _WordsTwin(eqx.Module):
    embed_tokens: eqx.nn.Embedding
    up: eqx.nn.Linear

    def __init__(self, net: _Words):
        weight = jnp.array(net.embed_tokens.weight.detach().numpy())
        self.embed_tokens = eqx.nn.Embedding(weight=weight)
        self.up = _filled(eqx.nn.Linear(6, 6, key=jr.key(0)), net.up)

    def __call__(self, ids):
        return jnp.tanh(jax.vmap(self.up)(jax.vmap(self.embed_tokens)(ids)))


IDS = np.array([0, 3, 9, 3, 10])


def _same_tokens(ours, theirs):
    with torch.no_grad():
        expected = theirs(torch.tensor(IDS)).numpy()
        plain = _Words()(torch.tensor(IDS)).numpy()
    assert np.abs(expected - plain)[[0, 1, 3]].min(-1).max() > 1e-3
    run = lambda model: quax.quaxify(model)(jnp.array(IDS))
    np.testing.assert_allclose(run(ours), expected, rtol=1e-5, atol=1e-5)
    merged = lora_quax.merge(ours).embed_tokens.weight
    weight = theirs.merge_and_unload().embed_tokens.weight.detach().numpy()
    np.testing.assert_allclose(merged, weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("indices", [[9, 3], {"embed_tokens": [3, 0, 9]}])
def test_tokens(tmp_path, indices):
    config = peft.LoraConfig(
        r=2, target_modules=["up"], trainable_token_indices=indices
    )
    theirs = peft.get_peft_model(_Words(), config).eval()
    _noise(theirs)
    theirs.save_pretrained(tmp_path)
    ours = lora_quax.peft.load(tmp_path, _WordsTwin(_Words()))
    assert isinstance(ours.embed_tokens.weight.delta, lora_quax.Rows)
    lora_quax.peft.save(tmp_path / "again", ours)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore")
        again = peft.PeftModel.from_pretrained(_Words(), str(tmp_path / "again")).eval()
    _same_tokens(ours, again)
    _same_tokens(ours, theirs)
    loaded = lora_quax.peft.load(tmp_path / "again", _WordsTwin(_Words()))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6),
        *(eqx.filter(x, eqx.is_array) for x in (loaded, ours)),
    )


# What is refused.


def _saved(tmp_path, name, **changed):
    peft.get_peft_model(_Net(), CASES[name].config).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    return tmp_path


@pytest.mark.parametrize(
    "name, changed, message",
    [
        ("loha", dict(use_effective_conv2d=True), "`use_effective_conv2d` is True"),
        ("loha", dict(alpha=None), "`alpha` is missing"),
        ("loha", dict(r=2), "of rank"),
        ("lokr", dict(target_modules=["up"]), "does not target"),
        ("ia3", dict(fan_in_fan_out=True), "`fan_in_fan_out` is exchanged for LoRA"),
    ],
)
def test_files_that_are_refused(tmp_path, name, changed, message):
    path = _saved(tmp_path, name, **changed)
    with pytest.raises(AdapterError, match=message):
        lora_quax.peft.load(path, _Twin(_Net()), names=NAMES)


def test_vera_without_its_factors_is_refused(tmp_path):
    config = peft.VeraConfig(r=2, target_modules=["up"], save_projection=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(_Net(), config).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="from a seed"):
        lora_quax.peft.load(tmp_path, _Twin(_Net()))


def test_models_that_are_refused(tmp_path):
    base, key = _Twin(_Net()), jr.key(0)
    ia3 = lora_quax.loraify(base, None, key, targets=["up"], update=IA3)
    mixed = lora_quax.loraify(
        base, 2, key, targets={"up": True, "down": Adapt(update=LoHa)}
    )
    line = ft.partial(lora_quax.loraify, base, 9, key, update=LoKr, targets=["line"])
    loha = lora_quax.loraify(base, 2, key, update=LoHa)
    for model, options, message in [
        (ia3, {}, "scales the bias of a layer"),
        (mixed, {}, "An adapter of PEFT is of one form"),
        (line(), {}, "`w2` is a plain array"),
        (loha, dict(use_rslora=True), "`use_rslora` is for LoRA"),
        (loha, dict(consumer="vllm"), "vllm takes LoRA"),
    ]:
        with pytest.raises(ValueError, match=message):
            lora_quax.peft.save(tmp_path / "none", model, names=NAMES, **options)
    assert not (tmp_path / "none").exists()
