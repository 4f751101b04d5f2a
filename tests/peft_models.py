"""What tests of PEFT's files share: abstract models, and what is written of them.

They are abstract until `adapted` gives them numbers, so nothing is compiled.
"""

import functools as ft
import json
import re
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import safetensors.numpy
from files import numbers

from lora_quax import LoraArray, loraify, peft, unload


PREFIX = "base_model.model."
LORA_A, LORA_B = "lora_A.weight", "lora_B.weight"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@ft.cache
def abstract(make, *args, **kwargs):
    return eqx.filter_eval_shape(make, *args, key=jr.key(0), **kwargs)


def linear(n_in=3, n_out=4, use_bias=True):
    return abstract(eqx.nn.Linear, n_in, n_out, use_bias=use_bias)


def embedding(n=5, dim=4):
    return abstract(eqx.nn.Embedding, n, dim)


def conv(dims=2, n_in=3, n_out=4, kernel=2):
    return abstract(eqx.nn.Conv, dims, n_in, n_out, kernel)


def norm(n=4):
    return eqx.filter_eval_shape(eqx.nn.LayerNorm, n)


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def stacked(layer, n=3):
    """Layers along a leading axis, as `equinox.filter_vmap` makes them."""
    return jax.tree.map(
        lambda x: (
            jax.ShapeDtypeStruct((n, *x.shape), x.dtype)
            if isinstance(x, jax.ShapeDtypeStruct)
            else x
        ),
        layer,
    )


def adapted(tree, targets=None, rank=2, **options):
    """A model with numbers, in which nothing that trains is what it started from."""
    model = loraify(tree, rank, jr.key(0), targets=targets, **options)
    return numbers(model)[0]


def exported(folder: Path, model, **kwargs) -> tuple[dict, dict]:
    """The configuration and the tensors that are saved of a model."""
    peft.save(folder, model, **kwargs)
    tensors = safetensors.numpy.load_file(folder / WEIGHTS)
    assert all(name.startswith(PREFIX) for name in tensors)
    tensors = {name.removeprefix(PREFIX): x for name, x in tensors.items()}
    return json.loads((folder / CONFIG).read_text()), tensors


def dense(x: LoraArray) -> np.ndarray:
    """The update of a matrix, in float64."""
    b, a = (np.asarray(y, np.float64) for y in (x.b, x.a))
    return x.alpha / x.rank * b @ a


only = lambda *paths: {re.compile(path): True for path in paths}


def factors(*modules, rank=2, n_in=3, n_out=4):
    return {f"{m}.{LORA_A}": (rank, n_in) for m in modules} | {
        f"{m}.{LORA_B}": (n_out, rank) for m in modules
    }


def loras(model) -> list[LoraArray]:
    is_lora = lambda x: isinstance(x, LoraArray)
    return [x for x in jax.tree.leaves(model, is_leaf=is_lora) if is_lora(x)]


def numbers_of(tree):
    return unload(adapted({"q": tree}))
