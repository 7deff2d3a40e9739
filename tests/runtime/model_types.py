"""Tiny Hugging Face models, one of every model type that the planner makes profiles of, without dropout."""

from __future__ import annotations

from typing import Any

import torch
from runtime_models import VOCABULARY
from torch import nn

_WIDTH: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
_SIZES = {**_WIDTH, "intermediate_size": 32}
_WORDS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_ENCODER = {**_SIZES, **_WORDS, "max_position_embeddings": 16}
_DECODER = {**_ENCODER, "num_key_value_heads": 2}
_HEADS = {**_DECODER, "head_dim": 4}
_GPT = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 16, **_WORDS}
_BLOOM = {"hidden_size": 16, "n_layer": 2, "n_head": 4, **_WORDS}
_FALCON = {**_WIDTH, **_WORDS}
_T5 = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4, **_WORDS, "decoder_start_token_id": 0}
_LATENT = {
    **_ENCODER, "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
    "n_group": 2, "topk_group": 1, "moe_intermediate_size": 8, "first_k_dense_replace": 1, "q_lora_rank": 8,
    "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4,
}  # fmt: skip
_CHOICES = {"num_experts_per_tok": 2, "moe_intermediate_size": 8}
_EXPERTS = {"num_experts": 4, **_CHOICES}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_VISION = {**_SIZES, "image_size": 24, "patch_size": 8}

CONFIGS: dict[str, dict[str, Any]] = {
    "bert": _ENCODER,
    "bloom": _BLOOM,
    "cohere": _DECODER,
    "cohere/norms": {**_DECODER, "use_qk_norm": True},
    "dbrx": {
        "d_model": 16,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 16,
        **_WORDS,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 8, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 16},
    },
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "deepseek_v3/one query": {**_LATENT, "q_lora_rank": None},
    "falcon": {**_FALCON, "multi_query": False},
    "falcon/alibi": {**_FALCON, "multi_query": False, "alibi": True, "parallel_attn": False, "bias": True},
    "falcon/groups": {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
    "gemma": _HEADS,
    "gemma2": {**_HEADS, "sliding_window": 4},
    "gemma3_text": {**_HEADS, "sliding_window": 4},
    "gpt2": _GPT,
    "gpt_neox": _ENCODER,
    "gpt_oss": {**_HEADS, **_LOCAL_EXPERTS, "sliding_window": 4},
    "gptj": {**_GPT, "rotary_dim": 4},
    "granite": _DECODER,
    "llama": _DECODER,
    "llava": {
        "text_config": {"model_type": "llama", **_DECODER},
        "vision_config": {"model_type": "clip_vision_model", **_SIZES, "image_size": 16, "patch_size": 8},
        "image_token_index": 5,
        "image_seq_length": 4,
    },
    "mistral": _DECODER,
    "mixtral": {**_DECODER, **_LOCAL_EXPERTS},
    "mt5": {**_T5, "feed_forward_proj": "gated-gelu"},
    "olmo2": _DECODER,
    "olmoe": {**_DECODER, **_EXPERTS},
    "opt": {**_ENCODER, "ffn_dim": 32, "word_embed_proj_dim": 16},
    "opt/norm after": {**_ENCODER, "ffn_dim": 32, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "phi": _DECODER,
    "phi3": _DECODER,
    "phimoe": {**_DECODER, **_LOCAL_EXPERTS},
    "qwen2": _DECODER,
    "qwen2_moe": {**_DECODER, **_EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3": _HEADS,
    "qwen3_moe": {**_HEADS, **_EXPERTS},
    "starcoder2": _DECODER,
    "t5": _T5,
    "vit": _VISION,
}


def without_dropout(name: str) -> dict[str, float]:
    """Return the fields of a type's configuration that are probabilities of dropout, as zeros."""
    import transformers

    fields = vars(transformers.AutoConfig.for_model(name.partition("/")[0]))
    return {
        field: 0.0
        for field, value in fields.items()
        if isinstance(value, float) and ("dropout" in field or "pdrop" in field)
    }


def model_of_type(name: str) -> nn.Module:
    """Return a model of a type, with a variant's name behind a slash, whose random weights are no zeros."""
    import transformers

    from stagewright.modeling.hugging_face import _builder

    config = transformers.AutoConfig.for_model(name.partition("/")[0], **CONFIGS[name])
    for each in (config, *(value for value in vars(config).values() if hasattr(value, "model_type"))):
        each._experts_implementation = "eager"  # the others know no fp64
        for field, value in vars(each).items():
            if isinstance(value, float) and ("dropout" in field or "pdrop" in field):
                setattr(each, field, 0.0)
    if hasattr(config, "use_cache"):
        config.use_cache = False
    torch.manual_seed(7)
    build = _builder(config)
    assert build is not None, name
    model = build(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.2)
    return model
