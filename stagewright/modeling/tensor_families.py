"""What tensor parallelism splits in models of Hugging Face families, by model type.

Paths are those in the base model, with `*` for any index. What a configuration's own `base_model_tp_plan` says rightly
needs no entry here; an entry goes before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Role = Literal["column", "row", "vocabulary", "heads", "norm", "shared", "latent"]


@dataclass(frozen=True)
class ModuleSplit:
    """How one module is split.

    Parameters
    ----------
    role : what the module is (see `tensor_plan`); None where nothing of its own is split.
    parts : relative sizes of what lies one behind the other in a column layer's outputs (queries, keys, values), or sizes of
        a latent and the key behind it; a name is that of a number in the configuration.
    counts : numbers that the module keeps of what is split in it (heads, features), each divided by the degree.
    head_arguments : arguments that have values of their own for each head.
    whole_arguments : arguments that stay whole under sequence parallelism.
    at_positions : whether the module works on single positions, in whatever shape they come.
    """

    role: Role | None = None
    parts: tuple[int | str, ...] = (1,)
    counts: tuple[str, ...] = ()
    head_arguments: tuple[str, ...] = ()
    whole_arguments: tuple[str, ...] = ()
    at_positions: bool = False


Family = Mapping[str, ModuleSplit]

_COLUMN, _ROW, _HEADS, _NORM = (ModuleSplit(role) for role in ("column", "row", "heads", "norm"))


def _pair(owner: str, columns: tuple[str, ...], row: str) -> dict[str, ModuleSplit]:
    """Return the columns in a module and the row that their outputs lead to."""
    return {**{f"{owner}.{name}": _COLUMN for name in columns}, f"{owner}.{row}": _ROW}


_QKV = ("q_proj", "k_proj", "v_proj")
_LLAMA_ATTENTION = _pair("layers.*.self_attn", _QKV, "o_proj")
_NORMS_OVER_HEADS = {"layers.*.self_attn.q_norm": _NORM, "layers.*.self_attn.k_norm": _NORM}

_BERT: Family = {
    **_pair("encoder.layer.*.attention", ("self.query", "self.key", "self.value"), "output.dense"),
    "encoder.layer.*.intermediate.dense": _COLUMN,
    "encoder.layer.*.output.dense": _ROW,
}
_BLOOM: Family = {
    "h.*.self_attention": ModuleSplit(counts=("num_heads",), head_arguments=("alibi",)),
    **_pair("h.*.self_attention", ("query_key_value",), "dense"),
    **_pair("h.*.mlp", ("dense_h_to_4h",), "dense_4h_to_h"),
}
_CLIP_VISION: Family = {
    **_pair("encoder.layers.*.self_attn", _QKV, "out_proj"),
    **_pair("encoder.layers.*.mlp", ("fc1",), "fc2"),
}
_DBRX_ATTENTION = "blocks.*.norm_attn_norm.attn"
_DBRX: Family = {
    _DBRX_ATTENTION: ModuleSplit(counts=("hidden_size", "num_heads", "num_key_value_heads")),
    f"{_DBRX_ATTENTION}.Wqkv": ModuleSplit("column", ("n_heads", "attn_config.kv_n_heads", "attn_config.kv_n_heads")),
    f"{_DBRX_ATTENTION}.out_proj": _ROW,
}
_DEEPSEEK: Family = {
    "layers.*.self_attn": ModuleSplit(counts=("num_heads",)),
    **_pair("layers.*.self_attn", ("q_proj", "q_b_proj", "kv_b_proj"), "o_proj"),
    "layers.*.self_attn.q_a_proj": ModuleSplit("latent"),
    "layers.*.self_attn.kv_a_proj_with_mqa": ModuleSplit("latent", ("kv_lora_rank", "qk_rope_head_dim")),
}
_FALCON: Family = {
    **_BLOOM,
    "h.*.self_attention": ModuleSplit(counts=("num_heads", "num_kv_heads"), head_arguments=("alibi", "attention_mask")),
}
_GPT2: Family = {
    "h.*.attn": ModuleSplit(counts=("num_heads", "split_size")),
    "h.*.attn.c_attn": ModuleSplit("column", (1, 1, 1)),
    "h.*.attn.c_proj": _ROW,
    **_pair("h.*.mlp", ("c_fc",), "c_proj"),
}
_GPTJ: Family = {
    "h.*.attn": ModuleSplit(counts=("num_attention_heads",)),
    **_pair("h.*.attn", _QKV, "out_proj"),
    **_pair("h.*.mlp", ("fc_in",), "fc_out"),
}
_OPT: Family = {
    "decoder.layers.*.self_attn": ModuleSplit(counts=("num_heads",)),
    **_pair("decoder.layers.*.self_attn", _QKV, "out_proj"),
    "decoder.layers.*.fc1": ModuleSplit("column", at_positions=True),
    "decoder.layers.*.fc2": _ROW,
}
_PHI3: Family = {
    "layers.*.self_attn": ModuleSplit(counts=("config.num_attention_heads", "num_key_value_heads")),
    "layers.*.self_attn.qkv_proj": ModuleSplit(
        "column", ("num_attention_heads", "num_key_value_heads", "num_key_value_heads")
    ),
    "layers.*.self_attn.o_proj": _ROW,
    "layers.*.mlp.gate_up_proj": ModuleSplit("column", (1, 1)),
    "layers.*.mlp.down_proj": _ROW,
}
_SHARED_EXPERT: Family = _pair("layers.*.mlp.shared_expert", ("gate_proj", "up_proj"), "down_proj")
_VIT: Family = {
    **_pair("layers.*.attention", _QKV, "o_proj"),
    **_pair("layers.*.mlp", ("fc1",), "fc2"),
}


def _t5() -> Family:
    found: dict[str, ModuleSplit] = {}
    attentions = {
        "*.block.*.layer.0.SelfAttention": (),
        "decoder.block.*.layer.1.EncDecAttention": ("key_value_states",),
    }
    for owner, whole in attentions.items():
        found[owner] = ModuleSplit(counts=("n_heads", "inner_dim"), whole_arguments=whole)
        found |= {**_pair(owner, ("q", "k", "v"), "o"), f"{owner}.relative_attention_bias": _HEADS}
    return {**found, **_pair("*.block.*.layer.*.DenseReluDense", ("wi", "wi_0", "wi_1"), "wo")}


FAMILIES: Mapping[str, Family] = {
    "bert": _BERT,
    "bloom": _BLOOM,
    "clip_vision_model": _CLIP_VISION,
    "cohere": {"layers.*.self_attn.q_norm": _HEADS, "layers.*.self_attn.k_norm": _HEADS},
    "dbrx": _DBRX,
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "falcon": _FALCON,
    "gpt2": _GPT2,
    "gpt_oss": {**_LLAMA_ATTENTION, "layers.*.self_attn.sinks": _HEADS},
    "gptj": _GPTJ,
    "mt5": _t5(),
    "olmo2": {**_LLAMA_ATTENTION, **_NORMS_OVER_HEADS},
    "olmoe": {**_LLAMA_ATTENTION, **_NORMS_OVER_HEADS},
    "opt": _OPT,
    "phi3": _PHI3,
    "phimoe": _LLAMA_ATTENTION,
    "qwen2_moe": _SHARED_EXPERT,
    "t5": _t5(),
    "vit": _VIT,
}

# Modules of a model that are models of their own, and the configuration inside the model's that is theirs.
INSIDE: Mapping[str, Mapping[str, str]] = {"llava": {"vision_tower": "vision_config", "language_model": "text_config"}}
