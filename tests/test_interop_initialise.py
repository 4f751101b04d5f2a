"""First values from data are those that PEFT finds in the same data."""

from typing import Any

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
corda: Any = pytest.importorskip("peft.tuners.lora.corda", reason=_reason)

import lora_quax  # noqa: E402


pytestmark = pytest.mark.slow

RANK, SCALING = 4, 1.5
SIZES = {"up": (12, 20), "mid": (20, 16), "down": (16, 10)}
X = np.random.default_rng(0).normal(0.2, 1, (64, 12)).astype(np.float32)
X *= np.linspace(0.3, 2, 12, dtype=np.float32)


class _Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        for name, (n, m) in SIZES.items():
            setattr(self, name, torch.nn.Linear(n, m))

    def forward(self, x):
        return self.down(torch.tanh(self.mid(torch.tanh(self.up(x)))))


class _Twin(eqx.Module):
    up: eqx.nn.Linear
    mid: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, net):
        layers = []
        for name, (n, m) in SIZES.items():
            of = getattr(net, name)
            layer = eqx.nn.Linear(n, m, key=jr.key(0))
            numbers = [jnp.asarray(x.detach().numpy()) for x in (of.weight, of.bias)]
            layers.append(
                eqx.tree_at(lambda x: (x.weight, x.bias), layer, tuple(numbers))
            )
        self.up, self.mid, self.down = layers

    def __call__(self, x):
        return self.down(jnp.tanh(self.mid(jnp.tanh(self.up(x)))))


def _config(init, **kwargs):
    return peft.LoraConfig(
        r=RANK,
        lora_alpha=RANK * SCALING,
        target_modules=list(SIZES),
        init_lora_weights=init,
        **kwargs,
    )


def _ours(plain):
    return lora_quax.loraify(plain, RANK, jr.key(1), alpha=RANK * SCALING)


def _moments(model):
    forward = lambda model, x: jax.vmap(quax.quaxify(model))(x)
    return eqx.filter_jit(lora_quax.input_moments(forward))(model, X)


def _theirs(model):
    """By name: the factors `a` and `b`, and the base."""
    out = {}
    for name in SIZES:
        layer = getattr(model.base_model.model, name)
        parts = layer.lora_A, layer.lora_B
        a, b = (x["default"].weight.detach().numpy() for x in parts)
        out[name] = a, b, layer.base_layer.weight.detach().numpy()
    return out


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_eva(rho):
    net = _Net()
    model = _ours(_Twin(net))
    ours = lora_quax.initialise(model, "eva", moments=_moments(model), rho=rho)
    config = _config("eva", eva_config=peft.EvaConfig(rho=rho, tau=0.9999999))
    theirs = peft.get_peft_model(net, config, low_cpu_mem_usage=True)
    peft.initialize_lora_eva_weights(
        theirs,
        [torch.tensor(X)],
        forward_fn=lambda model, x: model(x),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    ranks = []
    for name, (a, b, base) in _theirs(theirs).items():
        w = getattr(ours, name).weight
        ranks.append(w.rank)
        assert w.rank == len(a)
        scaling = getattr(theirs.base_model.model, name).scaling["default"]
        assert scaling == pytest.approx(w.scaling)
        np.testing.assert_allclose(w.a.T @ w.a, a.T @ a, atol=2e-3)
        assert not b.any() and not w.b.any()
        np.testing.assert_array_equal(w.base, base)
    assert sum(ranks) == 3 * RANK and (len(set(ranks)) > 1) == (rho > 1)


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda(mode):
    net = _Net()
    model = _ours(_Twin(net))
    method: Any = f"corda {mode}"
    ours = lora_quax.initialise(model, method, moments=_moments(model))
    config = _config(
        "corda", corda_config=peft.tuners.lora.config.CordaConfig(corda_method=mode)
    )
    corda.preprocess_corda(net, config, run_model=lambda: net(torch.tensor(X)))
    for name, (a, b, base) in _theirs(peft.get_peft_model(net, config)).items():
        w = getattr(ours, name).weight
        np.testing.assert_allclose(w.b @ w.a, b @ a, atol=2e-4)
        np.testing.assert_allclose(w.base, base, atol=2e-4)


def test_lora_ga():
    net = _Net()
    plain = _Twin(net)
    loss = lambda model, x: jnp.mean(jax.vmap(model)(x) ** 2)
    gradients = eqx.filter_grad(loss)(plain, X)
    ours = lora_quax.initialise(_ours(plain), "lora-ga", gradients=gradients)
    config = _config("lora_ga", lora_ga_config=peft.LoraGAConfig())
    step = lambda: torch.mean(net(torch.tensor(X)) ** 2).backward()
    peft.preprocess_loraga(net, config, step)
    for name, (a, b, base) in _theirs(peft.get_peft_model(net, config)).items():
        w, g = getattr(ours, name).weight, getattr(gradients, name).weight
        # PEFT has b times the singular values besides, and an `a` of length one. Which
        # way a singular vector points is for the library to say.
        values = np.linalg.svd(g, compute_uv=False)[RANK : 2 * RANK]
        length = len(g) ** 0.25 / 4
        for x, y in ((w.b * values, b), (w.a.T / length, a.T)):
            signs = np.sign(np.sum(x * y, 0))
            np.testing.assert_allclose(x * signs, y, atol=1e-3 * np.abs(y).max())
        taken = getattr(plain, name).weight - w.base
        np.testing.assert_allclose(taken, SCALING * w.b @ w.a, atol=1e-5)
        taken = getattr(plain, name).weight - base
        np.testing.assert_allclose(taken, SCALING * b @ a, atol=1e-5)
