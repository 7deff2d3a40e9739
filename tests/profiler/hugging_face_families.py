"""Tiny configurations of Hugging Face families of every kind, by a name that begins with the model type."""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]

FAMILIES: dict[str, Config] = {}


def _add(name: str, architecture: str, model_type: str | None = None, **fields: object) -> None:
    kind = model_type or name.partition("/")[0]
    FAMILIES[name] = {"model_type": kind, "architectures": [architecture], **fields}


_TOKENS: Config = {"vocab_size": 384, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_DECODER: Config = {
    **_TOKENS, "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 192, "max_position_embeddings": 128,
}  # fmt: skip
_ENCODER: Config = {name: value for name, value in _DECODER.items() if name != "num_key_value_heads"}
_ROBERTA: Config = {**_ENCODER, "pad_token_id": 1}
_GPT: Config = {**_TOKENS, "n_embd": 96, "n_layer": 3, "n_head": 4, "n_positions": 128}
_BOTH: Config = {
    **_TOKENS, "d_model": 96, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 192, "decoder_ffn_dim": 192, "decoder_start_token_id": 2,
}  # fmt: skip
_BART: Config = {**_BOTH, "max_position_embeddings": 128}
_T5: Config = {"d_model": 96, "d_kv": 24, "d_ff": 192, "num_layers": 2, "num_heads": 4, "vocab_size": 384}
_VISION: Config = {
    "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 192, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
_WINDOWS: Config = {
    "image_size": 32, "patch_size": 2, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4,
}  # fmt: skip
_STAGES: Config = {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]}
_SOUND: Config = {
    "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 192, "vocab_size": 32,
    "conv_dim": [32, 32], "conv_stride": [5, 4], "conv_kernel": [10, 8], "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4, "num_feat_extract_layers": 2,
}  # fmt: skip
_EXPERTS: Config = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_LOCAL_EXPERTS: Config = {"num_local_experts": 4, "num_experts_per_tok": 2}
_LATENT: Config = {
    **_DECODER, "num_key_value_heads": 4, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2,
    "n_group": 2, "topk_group": 1, "moe_intermediate_size": 48, "first_k_dense_replace": 1, "q_lora_rank": 24,
    "kv_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 24,
}  # fmt: skip
_STATE_SPACE: Config = {**_TOKENS, "hidden_size": 96, "num_hidden_layers": 3}
_TEXT_TOWER: Config = {name: value for name, value in _ENCODER.items() if not name.endswith("_token_id")}

_add("gpt2", "GPT2LMHeadModel", **_GPT)
_add("gptj", "GPTJForCausalLM", rotary_dim=12, **_GPT)
_add("codegen", "CodeGenForCausalLM", rotary_dim=12, **_GPT)
_add("gpt_bigcode", "GPTBigCodeForCausalLM", **_GPT)
_add("ctrl", "CTRLLMHeadModel", dff=192, **_GPT)
_add("openai-gpt", "OpenAIGPTLMHeadModel", **_GPT)
_add("gpt_neox", "GPTNeoXForCausalLM", **_ENCODER)
_add("opt", "OPTForCausalLM", ffn_dim=192, word_embed_proj_dim=48, do_layer_norm_before=False, **_ENCODER)
_add("bloom", "BloomForCausalLM", hidden_size=96, n_layer=3, n_head=4, **_TOKENS)
_add("mpt", "MptForCausalLM", d_model=96, n_heads=4, n_layers=3, max_seq_len=128, vocab_size=384)
_add("falcon", "FalconForCausalLM", hidden_size=96, num_hidden_layers=3, num_attention_heads=4, **_TOKENS)
_add("xglm", "XGLMForCausalLM", d_model=96, num_layers=3, attention_heads=4, ffn_dim=192, **_TOKENS)
_add("biogpt", "BioGptForCausalLM", **_ENCODER)
for _name, _class in {
    "llama": "Llama", "mistral": "Mistral", "phi": "Phi", "phi3": "Phi3", "qwen2": "Qwen2", "olmo": "Olmo",
    "olmo2": "Olmo2", "stablelm": "StableLm", "starcoder2": "Starcoder2", "cohere": "Cohere", "cohere2": "Cohere2",
    "granite": "Granite", "nemotron": "Nemotron", "persimmon": "Persimmon", "exaone4": "Exaone4",
}.items():  # fmt: skip
    _add(_name, f"{_class}ForCausalLM", **_DECODER)
for _name, _class in {
    "qwen3": "Qwen3", "gemma": "Gemma", "gemma2": "Gemma2", "gemma3_text": "Gemma3", "glm4": "Glm4", "helium": "Helium",
}.items():  # fmt: skip
    _add(_name, f"{_class}ForCausalLM", head_dim=24, **_DECODER)
_add("llama/classes", "LlamaForSequenceClassification", num_labels=3, **_DECODER)
_add("llama/tied", "LlamaForCausalLM", tie_word_embeddings=True, **_DECODER)
_add("mixtral", "MixtralForCausalLM", **_LOCAL_EXPERTS, **_DECODER)
_add("granitemoe", "GraniteMoeForCausalLM", **_LOCAL_EXPERTS, **_DECODER)
_add("gpt_oss", "GptOssForCausalLM", head_dim=24, **_LOCAL_EXPERTS, **_DECODER)
_add("qwen2_moe", "Qwen2MoeForCausalLM", shared_expert_intermediate_size=96, **_EXPERTS, **_DECODER)
_add("olmoe", "OlmoeForCausalLM", **_EXPERTS, **_DECODER)
_add("deepseek_v2", "DeepseekV2ForCausalLM", **_LATENT)
_add("deepseek_v3", "DeepseekV3ForCausalLM", **_LATENT)
_add("mamba", "MambaForCausalLM", state_size=8, **_STATE_SPACE)
_add("mamba2", "Mamba2ForCausalLM", num_heads=8, head_dim=24, state_size=16, n_groups=1, chunk_size=16, **_STATE_SPACE)
_add("rwkv", "RwkvForCausalLM", context_length=128, **_STATE_SPACE)
_add("lfm2", "Lfm2ForCausalLM", layer_types=["conv", "full_attention", "conv"], **_DECODER)
_add("zamba2", "Zamba2ForCausalLM", layers_block_type=["mamba", "hybrid", "mamba"], hybrid_layer_ids=[1],
     mamba_d_state=16, mamba_ngroups=1, n_mamba_heads=8, num_mem_blocks=1, chunk_size=16, adapter_rank=8,
     **{**_DECODER, "num_key_value_heads": 4})  # fmt: skip
_add("xlm", "XLMWithLMHeadModel", emb_dim=96, n_layers=3, n_heads=4, vocab_size=384, max_position_embeddings=128,
     bos_index=0, eos_index=1, pad_index=2, unk_index=3, mask_index=5)  # fmt: skip

for _name, _class in {
    "bert": "Bert", "megatron-bert": "MegatronBert", "layoutlm": "LayoutLM", "nystromformer": "Nystromformer",
    "modernbert": "ModernBert",
}.items():  # fmt: skip
    _add(_name, f"{_class}ForMaskedLM", **_ENCODER)
_add("bert/choice", "BertForMultipleChoice", **_ENCODER)
_add("bert/next", "BertForPreTraining", **_ENCODER)
_add("bert/question", "BertForQuestionAnswering", **_ENCODER)
for _name, _class in {
    "roberta": "Roberta", "xlm-roberta": "XLMRoberta", "camembert": "Camembert", "mpnet": "MPNet", "ibert": "IBert",
}.items():  # fmt: skip
    _add(_name, f"{_class}ForMaskedLM", **_ROBERTA)
_add("longformer", "LongformerForMaskedLM", attention_window=32, **_ROBERTA)
_add("big_bird", "BigBirdForMaskedLM", attention_type="block_sparse", block_size=8, num_random_blocks=1, **_ENCODER)
_add("albert", "AlbertForMaskedLM", embedding_size=48, **_ENCODER)
_add("electra", "ElectraForPreTraining", embedding_size=48, **_ENCODER)
_add("convbert", "ConvBertForMaskedLM", embedding_size=48, **_ENCODER)
_add("roformer", "RoFormerForMaskedLM", embedding_size=96, **_ENCODER)
_add("deberta", "DebertaForMaskedLM", relative_attention=True, pos_att_type="c2p|p2c", **_ENCODER)
_add("deberta-v2", "DebertaV2ForMaskedLM", relative_attention=True, pos_att_type="c2p|p2c", **_ENCODER)
_add("distilbert", "DistilBertForMaskedLM", dim=96, n_layers=3, n_heads=4, hidden_dim=192, vocab_size=384)
_add("fnet", "FNetForMaskedLM", **{name: _ENCODER[name] for name in _ENCODER if name != "num_attention_heads"})
_add("xlnet", "XLNetLMHeadModel", d_model=96, n_layer=3, n_head=4, d_inner=192, vocab_size=384)
_add("funnel", "FunnelForMaskedLM", d_model=96, block_sizes=[2, 2], n_head=4, d_head=24, d_inner=192,
     num_decoder_layers=2, vocab_size=384, pad_token_id=0)  # fmt: skip

for _name, _class in {"vit": "ViT", "deit": "DeiT", "beit": "Beit", "dinov2": "Dinov2", "ijepa": "IJepa"}.items():
    _add(_name, f"{_class}ForImageClassification", **_VISION)
_add("vit_mae", "ViTMAEForPreTraining", decoder_hidden_size=48, decoder_num_hidden_layers=2,
     decoder_num_attention_heads=4, decoder_intermediate_size=96, **_VISION)  # fmt: skip
_add("swin", "SwinForImageClassification", **_WINDOWS)
_add("swinv2", "Swinv2ForImageClassification", **_WINDOWS)
_add("convnext", "ConvNextForImageClassification", image_size=64, **_STAGES)
_add("resnet", "ResNetForImageClassification", embedding_size=16, layer_type="basic", **_STAGES)
_add("regnet", "RegNetForImageClassification", embedding_size=16, groups_width=8, **_STAGES)
_add("segformer", "SegformerForImageClassification", num_attention_heads=[1, 2, 2, 4], **_STAGES)
_add("poolformer", "PoolFormerForImageClassification", **_STAGES)
_add("mobilenet_v2", "MobileNetV2ForImageClassification", image_size=64, depth_multiplier=0.25)
_add("mobilevit", "MobileViTForImageClassification", image_size=64, hidden_sizes=[32, 48, 64],
     neck_hidden_sizes=[8, 16, 24, 32, 40, 48, 64], num_attention_heads=2)  # fmt: skip

_add("t5", "T5ForConditionalGeneration", decoder_start_token_id=0, **_T5)
_add("t5/no start", "T5ForConditionalGeneration", **_T5)
_add("mt5", "MT5ForConditionalGeneration", decoder_start_token_id=0, **_T5)
_add("bart", "BartForConditionalGeneration", **_BART)
_add("bart/decoder", "BartForCausalLM", **_BART)
_add("pegasus", "PegasusForConditionalGeneration", **_BART)
_add("mbart", "MBartForConditionalGeneration", **_BART)
_add("m2m_100", "M2M100ForConditionalGeneration", **_BART)
_add("led", "LEDForConditionalGeneration", attention_window=16, max_encoder_position_embeddings=128,
     max_decoder_position_embeddings=128, **_BOTH)  # fmt: skip
_add("whisper", "WhisperForConditionalGeneration", num_mel_bins=20, max_source_positions=64, max_target_positions=64,
     **_BOTH)  # fmt: skip
_add("speech_to_text", "Speech2TextForConditionalGeneration", input_feat_per_channel=20, conv_channels=32,
     max_source_positions=128, max_target_positions=64, **_BOTH)  # fmt: skip
for _name, _class in {"wav2vec2": "Wav2Vec2", "hubert": "Hubert", "wavlm": "WavLM"}.items():
    _add(_name, f"{_class}ForCTC", **_SOUND)
_add("audio-spectrogram-transformer", "ASTForAudioClassification", max_length=64, num_mel_bins=32,
     **{name: value for name, value in _VISION.items() if name not in ("image_size", "patch_size")})  # fmt: skip
for _name, _class in {"clip": "CLIPModel", "siglip": "SiglipModel"}.items():
    _add(_name, _class, projection_dim=64, text_config={**_TEXT_TOWER, "eos_token_id": 2}, vision_config=_VISION)
_add("llava", "LlavaForConditionalGeneration", text_config={"model_type": "llama", **_DECODER},
     vision_config={"model_type": "clip_vision_model", **_VISION}, image_token_index=5, image_seq_length=16)  # fmt: skip
