"""Steps of `finetune`: schedules, accumulation, the loss, other updates."""

import dataclasses
import itertools
import shutil

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from files import listing
from finetuned import config, sets, stand, texts

import lora_quax
from lora_quax import peft
from lora_quax._cli.finetune.batches import batches
from lora_quax._cli.finetune.config import Lora, Train
from lora_quax._cli.finetune.data import Tokens
from lora_quax._cli.finetune.loss import Loss
from lora_quax._cli.finetune.run import Run, train
from lora_quax._cli.finetune.step import schedule, Stepper


@pytest.mark.parametrize("name, last", [("cosine", 0), ("linear", 0), ("constant", 1)])
def test_schedule(name, last):
    pytest.importorskip("optax")
    rate = schedule(Train(learning_rate=1.0, warmup=3, schedule=name), 13)
    found = [float(rate(i)) for i in range(14)]
    np.testing.assert_allclose(found[:4], [0.25, 0.5, 0.75, 1], rtol=1e-6)
    assert found[3:] == sorted(found[3:], reverse=True)
    np.testing.assert_allclose(found[-1], last, atol=1e-6)


def nonzero(model):
    """A model of which no factor is zero."""
    trains, rest = lora_quax.partition(model)
    return eqx.combine(jax.tree.map(lambda x: x + 0.1, trains), rest)


def trained(folder, base=None, **fields) -> Run:
    """A run of steps in memory, by the loop that the command has."""
    out = Run(config(folder, **fields), sets(), base or stand())
    while out.state.step < out.steps:
        out.state, *_ = out.step()
    return out


def test_the_loss_falls(tmp_path):
    out = Run(config(tmp_path, steps=30, learning_rate=0.03), sets(), stand())
    before = out.valid()
    while out.state.step < out.steps:
        out.state, loss, n = out.step()
        assert np.isfinite(loss) and n > 0
    after = out.valid()
    assert after < 0.5 * before
    # What is frozen is as it was.
    assert eqx.tree_equal(lora_quax.unload(out.state.model), stand().model)


def test_a_sum_of_batches_is_the_larger_batch(tmp_path):
    """The mean is over tokens, and not over batches of more and of fewer."""
    one = trained(tmp_path, batch=8).state
    for rows, n in ((4, 2), (1, 8)):
        other = trained(tmp_path, batch=rows, accumulate=n).state
        for x, y in zip(jax.tree.leaves(one.model), jax.tree.leaves(other.model)):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_what_fills_up_has_no_part(tmp_path):
    """A row beside others is what it is alone, and rows one by one are rows at once."""
    out = Run(config(tmp_path), sets(), stand())
    examples = out.sets.train.examples[:3]
    apart = [batches([x], 1, 64)[0] for x in examples]
    together = batches(examples, 4, 64)
    steppers = [Stepper(None), Stepper(None, Loss(one_by_one=True))]
    losses = [
        stepper.loss(out.state.model, parts)
        for stepper, parts in itertools.product(steppers, (apart, together))
    ]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-6)
    # By the book.
    logits = jax.vmap(stand().model)(
        jnp.stack([jnp.asarray(x.ids[:5]) for x in examples])
    )
    p = jax.nn.log_softmax(logits[0])
    expected = -np.mean(
        [p[i, j, x.ids[j + 1]] for i, x in enumerate(examples) for j in range(4)]
    )
    cut = [Tokens(x.ids[:5], x.learnt[:5]) for x in examples]
    found = steppers[0].loss(out.state.model, batches(cut, 3, 64))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("most", [1, 32 * 50])
def test_a_loss_in_parts_is_the_loss(most, tmp_path):
    """However many tokens a part has; gradients as well."""
    model = Run(config(tmp_path), sets(), stand()).state.model
    model = nonzero(model)
    (batch,) = batches(texts(3).examples, 3, 64)

    def of(loss):
        f = lora_quax.filter_value_and_grad(loss)
        return jax.jit(f)(model, batch)

    expected, found = of(Loss()), of(Loss(most_scores=most))
    for x, y in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(y, x, rtol=1e-5, atol=1e-5)


def test_what_is_dropped_is_of_the_seed_and_the_step(tmp_path):
    lora = Lora(rank=4, targets=("up", "lm_head"), dropout=0.5)
    settings = dataclasses.replace(config(tmp_path), lora=lora)
    out = Run(settings, sets(), stand())
    out.state = out.state._replace(model=nonzero(out.state.model))
    parts = batches(out.sets.train.examples[:4], 2, 64)
    loss = lambda step, parts=parts: out.stepper.step(
        out.state._replace(step=step), parts
    )[1]
    assert loss(0) == loss(0) and len({loss(0), loss(1), loss(2)}) == 3
    # A batch of a step drops otherwise than the next one, and no evaluation does.
    assert loss(0, [parts[0]] * 2) != loss(0, [parts[0]])
    assert out.stepper.loss(out.state.model, parts) == Stepper(None).loss(
        out.state.model, parts
    )


UPDATES = {
    "loha": dict(update="loha"),
    "vera": dict(update="vera"),
    "dora": dict(use_dora=True, use_rslora=True, dropout=0.1, alpha=8.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", UPDATES)
def test_other_updates(name, tmp_path):
    """They are resumed, and written as PEFT has them."""
    pytest.importorskip("optax")
    lora = Lora(rank=4, targets=("up", "lm_head"), **UPDATES[name])
    settings = config(tmp_path, steps=3, warmup=0)
    settings = dataclasses.replace(settings, lora=lora)
    train(settings, sets(), stand(), resume=False)
    folder = tmp_path / "run"
    ours = folder / "checkpoints" / "step-00000003"
    (batch,) = batches(texts(3).examples, 3, 64)
    losses = [
        Stepper(None).loss(model, [batch])
        for model in (
            peft.load(folder / "adapter", stand().model),
            lora_quax.load_adapter(ours / "adapter.safetensors", stand().model),
        )
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)
    if settings.lora.dropout:  # What is dropped is the same again.
        before = listing(folder)
        shutil.rmtree(ours)
        train(settings, sets(), stand(), resume=True)
        assert listing(folder) == before
