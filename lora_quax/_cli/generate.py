"""`generate`: how a language model goes on, with an adapter or without."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import quax
from jaxtyping import PyTree

from .._disk.adapter import load_adapter
from ..peft._load import load
from .content import is_peft
from .finetune.base import Causal, read_base
from .finetune.config import Base, is_gguf
from .finetune.extra import needs
from .finetune.tokens import Encoder, read_encoder


class Sampling(NamedTuple):
    """How a token is drawn: the likeliest, at the temperature 0."""

    temperature: float
    top_p: float
    seed: int

    def check(self) -> None:
        """**Raises:** `ValueError`."""
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"--temperature has to be 0 or more: {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p has to be in (0, 1]: {self.top_p}.")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed has to be 0 or more: {self.seed}.")


def generate(
    config: Base,
    adapter: Path | None,
    prompt: str,
    max_tokens: int,
    sampling: Sampling,
    chat: bool = False,
    system: str | None = None,
) -> int:
    """Prints how a text goes on, or what is answered to it in a chat.

    **Raises:** `ValueError` and `OSError` for what is wrong, before anything is
    printed.
    """
    if not 1 <= max_tokens < 2**31:
        bounds = "1 or more, and less than 2**31"
        raise ValueError(f"--max-tokens has to be {bounds}: {max_tokens}.")
    if system is not None and not chat:
        raise ValueError("--system is for a chat: give --chat with it.")
    try:
        f"{prompt}{system}".encode()
    except UnicodeEncodeError as e:
        raise ValueError("The prompt is not UTF-8.") from e
    sampling.check()
    is_ours = adapter is not None and not is_peft(adapter)  # Or it is not there.
    for package in ("tokenizers", "eqx_zoo"):
        needs(package)
    encoder = read_encoder(config.tokenizer or config.path)
    ids = _prompt(encoder, prompt, chat, system)
    base = read_base(config)
    encoder.check(base.vocabulary)
    left = _left(base, ids)
    model = base.model
    if adapter is not None and is_ours:
        model = load_adapter(adapter, model)
    elif adapter is not None:
        model = load(adapter, model, names=base.names)
    stream = needs("tokenizers").decoders.DecodeStream(skip_special_tokens=True)
    is_full = left < max_tokens
    for token in tokens(model, base, ids, min(max_tokens, left), sampling):
        if token in encoder.ends:
            is_full = False
            break
        print(stream.step(encoder.tokenizer, token) or "", end="", flush=True)
    print()
    if is_full:
        print(f"The context of {base.context:,} tokens is full.", file=sys.stderr)
    return 0


def _left(base: Causal, prompt: np.ndarray) -> int:
    """How many tokens there is room for after the prompt.

    **Raises:** `ValueError` if there is none.
    """
    if base.context is None:
        return sys.maxsize
    if len(prompt) >= base.context:
        raise ValueError(
            f"The prompt has {len(prompt):,} tokens, and the context of the model is "
            f"{base.context:,}: it has to be shorter."
        )
    return base.context - len(prompt)


def _prompt(
    encoder: Encoder, prompt: str, chat: bool, system: str | None
) -> np.ndarray:
    """**Raises:** `ValueError` if there is nothing to go on from."""
    if chat:
        messages = [] if system is None else [{"role": "system", "content": system}]
        messages.append({"role": "user", "content": prompt})
        ids = encoder.with_offsets(encoder.render(messages, True))[0]
    else:
        ids = encoder.prompt(prompt)
    if not len(ids):
        raise ValueError("The prompt has no token to go on from.")
    return ids


def tokens(
    model: PyTree, base: Causal, prompt: np.ndarray, n: int, sampling: Sampling
) -> Iterator[int]:
    """One token after another. What is drawn is a function of the seed and of the
    number of the token."""

    @eqx.filter_jit
    def step(model, tokens, cache, i):
        logits, cache = quax.quaxify(model)(tokens, cache)
        return _draw(logits[-1].astype(jnp.float32), i, sampling), cache

    ids, cache = jnp.asarray(prompt), base.model.init_cache(len(prompt) + n)
    for i in range(n):
        token, cache = step(model, ids, cache, jnp.int32(i))
        yield int(token)
        ids = token[None]


def _draw(logits: jax.Array, i: jax.Array, sampling: Sampling) -> jax.Array:
    """**Arguments:**

    - `logits`: of shape `(vocabulary,)`.
    - `i`: the number of the token.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits).astype(jnp.int32)
    logits = logits / sampling.temperature
    # The likeliest tokens, as few as have `top_p` of the probability together.
    order = jnp.argsort(-logits)
    p = jax.nn.softmax(logits[order])
    before = jnp.cumsum(p) - p
    kept = jnp.where(before < sampling.top_p, logits[order], -jnp.inf)
    key = jr.fold_in(jr.key(sampling.seed), i)
    return order[jr.categorical(key, kept)].astype(jnp.int32)


def config_of(path: Path, **options: Any) -> Base:
    """**Raises:** `FileNotFoundError` or `ValueError` if there is no such model."""
    if not path.exists():
        raise FileNotFoundError(f"There is no model at {path}.")
    if not path.is_dir() and not is_gguf(path):
        raise ValueError(f"{path} is neither a folder nor a file *.gguf.")
    return Base(path, **options)
