"""PyTorch models, and what they are in Equinox: the same layers with the same weights.

The twin of a module that has children is a dictionary of theirs, so that a parameter
has the same name in both. A `View` arranges it otherwise, as a model in JAX may be.
"""
# pyright: reportMissingImports=false

import functools as ft
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import quax
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D


# Layers.


def to_jax(x: torch.Tensor) -> jax.Array:
    return jnp.array(x.detach().numpy())  # A copy: PEFT merges in place.


@ft.cache
def _blank(make: Callable, *args, **kwargs) -> Any:
    """A layer of Equinox without numbers."""
    return eqx.filter_eval_shape(ft.partial(make, *args, **kwargs), key=jr.key(0))


def _filled(make: Callable, *args, weight, bias, **kwargs) -> Any:
    """A layer of Equinox with these arrays."""
    layer = _blank(make, *args, use_bias=bias is not None, **kwargs)
    layer = eqx.tree_at(lambda l: l.weight, layer, weight)
    if bias is not None:
        layer = eqx.tree_at(lambda l: l.bias, layer, bias)
    return layer


def _bias(module: Any, *after: int) -> jax.Array | None:
    return None if module.bias is None else to_jax(module.bias).reshape(-1, *after)


def linear(weight: Any, bias: Any) -> eqx.nn.Linear:
    return _filled(eqx.nn.Linear, *weight.shape[::-1], weight=weight, bias=bias)


def _embedding(module: nn.Embedding):
    return eqx.nn.Embedding(weight=to_jax(module.weight))


def _layer_norm(module: nn.LayerNorm):
    layer = eqx.nn.LayerNorm(module.normalized_shape, module.eps)
    arrays = to_jax(module.weight), to_jax(module.bias)
    return eqx.tree_at(lambda l: (l.weight, l.bias), layer, arrays)


def _conv(module: nn.Conv1d | nn.Conv2d | nn.Conv3d):
    return _filled(
        eqx.nn.Conv,
        len(module.kernel_size),
        module.in_channels,
        module.out_channels,
        module.kernel_size,
        module.stride,
        module.padding,
        groups=module.groups,
        weight=to_jax(module.weight),
        bias=_bias(module, *(1 for _ in module.kernel_size)),
    )


class Layer(NamedTuple):
    """A kind of layer of PyTorch."""

    twin: Callable[[Any], Any]
    example: Callable[[Any], tuple[int, ...]]  # the shape of an input, without batch


LAYERS = {
    nn.Linear: Layer(
        lambda m: linear(to_jax(m.weight), _bias(m)), lambda m: (m.in_features,)
    ),
    Conv1D: Layer(lambda m: linear(to_jax(m.weight).T, _bias(m)), lambda m: (m.nx,)),
    nn.Embedding: Layer(_embedding, lambda m: ()),
    nn.LayerNorm: Layer(_layer_norm, lambda m: m.normalized_shape),
    nn.Conv1d: Layer(_conv, lambda m: (m.in_channels, 7)),
    nn.Conv2d: Layer(_conv, lambda m: (m.in_channels, 7, 6)),
    nn.Conv3d: Layer(_conv, lambda m: (m.in_channels, 7, 6, 5)),
}


def example(module: nn.Module) -> np.ndarray:
    """A batch of inputs of a layer."""
    rng = np.random.default_rng(0)
    if isinstance(module, nn.Embedding):
        return rng.integers(module.num_embeddings, size=5)
    shape = LAYERS[type(module)].example(module)
    return rng.normal(size=(3, *shape)).astype(np.float32)


def twin_of(module: nn.Module) -> Any:
    if type(module) in LAYERS:
        return LAYERS[type(module)].twin(module)
    parameters = module.named_parameters(recurse=False)
    return {name: twin_of(child) for name, child in module.named_children()} | {
        name: to_jax(x) for name, x in parameters
    }


@ft.cache
def base_of(model: Callable[[], nn.Module]) -> Any:
    """The twin of a model before it is adapted."""
    return twin_of(model())


def at(tree: Any, path: str) -> Any:
    """The part of a twin that has this path; `None` if a view left it out."""
    for name in path.split("."):
        tree = tree.get(name)
    return tree


# Models. Each is tiny, in evaluation mode, and has the same weights every time.


def _fixed(make: Callable[..., nn.Module]) -> Callable[..., Callable[[], nn.Module]]:
    @ft.cache
    def options(*args, **kwargs):
        def made() -> nn.Module:
            torch.manual_seed(0)
            return make(*args, **kwargs).eval()

        return made

    return options


@_fixed
def llama(layers=2, **kwargs) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        **kwargs,
    )
    return transformers.LlamaForCausalLM(config)


@_fixed
def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=30,
        n_positions=8,
        n_embd=16,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config)


@_fixed
def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=8,
    )
    return transformers.BertForSequenceClassification(config)


class _ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.volume = nn.Conv3d(2, 3, 3, stride=2, padding=1)
        self.plane = nn.Conv2d(3, 4, (3, 2), stride=(1, 2), padding=(1, 0))
        self.line = nn.Conv1d(4, 5, 3, stride=2, padding=2, bias=False)
        self.mlp = nn.Sequential(nn.Linear(15, 6), nn.ReLU(), nn.Linear(6, 3))

    def forward(self, x):
        x = F.relu(self.volume(x)).mean(-1)
        x = F.relu(self.plane(x)).mean(-1)
        return self.mlp(self.line(x).flatten(1))


def conv_forward(twin, x):
    x = jax.nn.relu(twin["volume"](x)).mean(-1)
    x = jax.nn.relu(twin["plane"](x)).mean(-1)
    x = jax.nn.relu(twin["mlp"]["0"](twin["line"](x).reshape(-1)))
    return twin["mlp"]["2"](x)


class _Mixture(nn.Module):
    """Experts, all of which see every token, kept as `(out, in)` or `(in, out)`."""

    def __init__(self, is_transposed: bool):
        super().__init__()
        self.is_transposed = is_transposed
        up, down = (3, 7, 5), (3, 5, 7)
        shapes = (down, up) if is_transposed else (up, down)
        self.a_up = nn.Parameter(torch.randn(shapes[0]))
        self.b_down = nn.Parameter(torch.randn(shapes[1]))

    def forward(self, x):
        one, two = ("eio", "ehd") if self.is_transposed else ("eoi", "edh")
        x = torch.relu(torch.einsum(f"ti,{one}->eto", x, self.a_up))
        return torch.einsum(f"eth,{two}->td", x, self.b_down)


class _Parameters(nn.Module):
    """Parameters that belong to no layer: experts, and a matrix."""

    def __init__(self, is_transposed: bool):
        super().__init__()
        self.experts = _Mixture(is_transposed)
        self.inner = _Matrix()
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.inner(self.experts(x)))


class _Matrix(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(4, 5))

    def forward(self, x):
        return x @ self.matrix.T


def parameters_forward(is_transposed: bool) -> Callable:
    one, two = ("eio", "ehd") if is_transposed else ("eoi", "edh")

    def forward(twin, x):
        experts = twin["experts"]
        x = jax.nn.relu(jnp.einsum(f"i,{one}->eo", x, experts["a_up"]))
        x = jnp.einsum(f"eh,{two}->d", x, experts["b_down"])
        return twin["head"](twin["inner"]["matrix"] @ x)

    return forward


class _Linears(nn.Module):
    """Linear layers of the names given, one after the other."""

    def __init__(self, names: Sequence[str]):
        super().__init__()
        self.names = names
        for name in names:
            holder, _, last = name.rpartition(".")
            if holder and not hasattr(self, holder):
                self.add_module(holder, nn.Module())
            self.get_submodule(holder).add_module(last, nn.Linear(4, 4))

    def forward(self, x):
        for name in self.names:
            x = torch.tanh(self.get_submodule(name)(x))
        return x


def linears_forward(names: Sequence[str]) -> Callable:
    def forward(twin, x):
        for name in names:
            x = jnp.tanh(at(twin, name)(x))
        return x

    return forward


class _Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, groups=2)


conv_net = _fixed(_ConvNet)
parameters = _fixed(_Parameters)
linears = _fixed(_Linears)
grouped = _fixed(_Grouped)


# Views.


class View(NamedTuple):
    """Another arrangement of a twin, and how its arrays are called then."""

    there: Callable[[Any], Any] = lambda tree: tree
    back: Callable[[Any], Any] = lambda tree: tree
    names: Any = None


def _layers_apart(tree: dict) -> dict:
    rest = {**tree, "model": {**tree["model"]}}
    return {"blocks": list(rest["model"].pop("layers").values()), "rest": rest}


def _layers_back(tree: dict) -> dict:
    layers = {str(i): block for i, block in enumerate(tree["blocks"])}
    return {**tree["rest"], "model": {**tree["rest"]["model"], "layers": layers}}


def _stack(tree: dict) -> dict:
    tree = _layers_apart(tree)
    blocks = jax.tree.map(lambda *x: jnp.stack(x), *tree["blocks"])
    return {**tree, "blocks": blocks}


def _unstack(tree: dict) -> dict:
    n = len(jax.tree.leaves(tree["blocks"])[0])
    blocks = [jax.tree.map(lambda x: x[i], tree["blocks"]) for i in range(n)]
    return _layers_back({**tree, "blocks": blocks})


def _called(path: str) -> str:
    return path.replace("rest.", "").replace("blocks.", "model.layers.")


def _flip(tree: Any) -> Any:
    """Linear layers as matrices `(in, out)` and biases, and back."""
    if isinstance(tree, eqx.nn.Linear):
        return {"weight": tree.weight.T, "bias": tree.bias}
    return {name: _flip(child) for name, child in tree.items()}


def _flip_back(tree: dict) -> Any:
    if "weight" in tree:
        return linear(quax.quaxify(jnp.transpose)(tree["weight"]), tree["bias"])
    return {name: _flip_back(child) for name, child in tree.items()}


SAME = View()
FLIPPED = View(_flip, _flip_back)
LISTED = View(_layers_apart, _layers_back, {"blocks.{}": "model.layers.{}", "rest": ""})
CALLED = View(_layers_apart, _layers_back, _called)
STACKED = View(_stack, _unstack, {"blocks": "model.layers.{}", "rest": ""})
# With tied embeddings, one array is both.
HEADLESS = View(lambda tree: {k: x for k, x in tree.items() if k != "lm_head"})
