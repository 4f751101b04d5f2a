"""Arguments that PEFT has and that are called otherwise here."""

import functools as ft
from collections.abc import Callable
from typing import ParamSpec, TypeVar


_P = ParamSpec("_P")
_R = TypeVar("_R")

_RANK = "is `rank` here"
_NONE_HERE = "has no meaning here; leave it out"
_PATTERN = (
    "is part of `targets` here, as a specification of its own: "
    '`targets={"q_proj": Adapt(rank=16, alpha=32)}`'
)
_LAYERS = r'is part of `targets` here: `targets=r"blocks\.[0-3]\..*q_proj"`'

# The fields of `peft.LoraConfig`, and some of PEFT's other configurations.
_HERE = {
    "r": _RANK,
    "lora_rank": _RANK,
    "lora_alpha": "is `alpha` here, and by default the rank, so that the scaling is 1",
    "target_modules": "is `targets` here, and takes the same names",
    "target_parameters": "is `targets` here, which means arrays as well as layers",
    "exclude_modules": (
        "is part of `targets` here, where the last entry that means a weight decides: "
        '`targets=[eqx.nn.Linear, ("lm_head", "freeze")]`'
    ),
    "modules_to_save": (
        'is part of `targets` here: `targets={eqx.nn.Linear: True, "lm_head": "full"}`'
    ),
    "init_lora_weights": (
        "is `init_a` and `init_b` here: see `lora_quax.init`; what is taken from the "
        "weights, as PiSSA is, or from data, as EVA is, `lora_quax.initialise` does to "
        "the adapted model"
    ),
    "rank_pattern": _PATTERN,
    "alpha_pattern": _PATTERN,
    "layers_to_transform": _LAYERS,
    "layers_pattern": _LAYERS,
    "fan_in_fan_out": (
        "is `rows` and `cols` of an `Adapt` here; for the layers of Equinox they are "
        "known"
    ),
    "lora_dropout": "is `dropout` here, and drops in a step that is given a key: see "
    "`lora_quax.with_dropout_key`",
    "lora_bias": "is not here: the bias of a layer trains by `targets`, as `bias` does",
    "trainable_token_indices": (
        "is a form of update here, `lora_quax.Rows`: "
        '`targets={..., "embed_tokens": Adapt(update=functools.partial('
        "lora_quax.Rows.init, indices=[...]))}`"
    ),
    "decompose_factor": (
        "is `factor` here, of `update=functools.partial(lora_quax.LoKr.init, factor=8)`"
    ),
    "decompose_both": (
        "is `both` here, of `update=functools.partial(lora_quax.LoKr.init, both=True)`"
    ),
    "feedforward_modules": (
        "is part of `targets` here: "
        '`targets={"down_proj": Adapt(update=functools.partial(lora_quax.IA3.init, '
        "feedforward=True))}`"
    ),
    "d_initial": (
        "is an option of `lora_quax.VeRA.init` here: "
        "`update=functools.partial(lora_quax.VeRA.init, d_initial=0.1)`"
    ),
    "projection_prng_key": "is part of `key` here",
    "save_projection": "is always so here: factors that are shared are written",
    "layer_replication": "is not here: build the model with the layers it is to have",
    "ensure_weight_tying": (
        "is an argument of `lora_quax.peft.save` here; what `eqx.nn.Shared` ties stays "
        "tied"
    ),
    "loftq_config": "is the arguments of `lora_quax.loftq` here",
    "peft_type": _NONE_HERE,
    "task_type": _NONE_HERE,
    "inference_mode": _NONE_HERE,
    "base_model_name_or_path": _NONE_HERE,
}


def answers_peft(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """`function`, which answers an argument of PEFT's with what it is called here."""

    @ft.wraps(function)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if said := [f"`{name}` {_HERE[name]}." for name in kwargs if name in _HERE]:
            raise TypeError("\n".join(said))
        return function(*args, **kwargs)

    return wrapper
