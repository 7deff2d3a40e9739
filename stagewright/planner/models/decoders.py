"""Decoder-only and encoder-only transformers from their Hugging Face configs: sizes by model_type.

Each reader knows what its config leaves out: biases, norms, parallel blocks, tied embeddings, defaults. The counts of
parameters are those of the library's modules, to the unit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from stagewright.planner.documents.operator import Architecture
from stagewright.planner.documents.profile import ModelProfile
from stagewright.planner.errors import InvalidDocument
from stagewright.planner.models.config_fields import ConfigFields
from stagewright.planner.models.language_model import BlockRun, EmbeddingShape, HeadShape, language_model
from stagewright.planner.models.transformer_block import (
    AttentionShape,
    BlockShape,
    ExpertShape,
    FeedForwardShape,
    LatentShape,
)


@dataclass(frozen=True)
class DecoderShape:
    """All sizes of a language model that is a chain of blocks."""

    family: str
    embedding: EmbeddingShape
    runs: tuple[BlockRun, ...]
    head: HeadShape | None
    final_norm_parameters: int
    max_sequence_length: int
    num_predicted_tokens: int = 0

    def profile(self, name: str) -> ModelProfile:
        """Return the analytic profile."""
        return language_model(
            name,
            self.architecture(),
            self.embedding,
            self.runs,
            head=self.head,
            final_norm_parameters=self.final_norm_parameters,
            num_predictions=self.num_predicted_tokens,
        )

    def architecture(self) -> Architecture:
        """Return the sizes legality needs; where runs differ, those of the last and of the expert blocks."""
        block = self.runs[-1].shape
        attention, dense = block.attention, self.runs[0].shape.feed_forward
        experts = next((run.shape.feed_forward.experts for run in self.runs if run.shape.feed_forward.experts), None)
        num_dense = sum(run.count for run in self.runs if run.shape.feed_forward.experts is None) if experts else 0
        split_size = dense.size if dense.experts is None else (experts.shared_size if experts else 0)
        windows = {run.shape.attention.window for run in self.runs}
        return Architecture(
            family=self.family,
            hidden_size=attention.hidden,
            num_layers=sum(run.count for run in self.runs),
            num_heads=attention.num_heads,
            num_kv_heads=attention.num_kv_heads,
            fused_kv_heads=attention.fused,
            head_size=attention.head_size,
            ffn_size=split_size,
            vocab_size=self.embedding.vocab_size,
            max_sequence_length=self.max_sequence_length,
            num_experts=experts.num_experts if experts else 0,
            fused_experts=bool(experts and experts.fused),
            biased_experts=bool(experts and experts.biases),
            num_shared_experts=1 if experts and experts.shared_size else 0,
            experts_per_token=experts.top_k if experts else 0,
            expert_ffn_size=experts.size if experts else 0,
            num_dense_layers=num_dense,
            sliding_window=windows.pop() if len(windows) == 1 else None,
            gated_ffn=dense.gated,
            tied_embeddings=bool(self.head and self.head.tied),
            kv_lora_rank=attention.latent.kv_rank if attention.latent else 0,
            num_predicted_tokens=self.num_predicted_tokens,
        )


def decoder_shape(fields: ConfigFields) -> DecoderShape:
    """Return the sizes that a config describes; raises InvalidDocument for an unknown model_type or a bad field."""
    return DECODERS[fields.text("model_type")](fields)


def _gpt2(fields: ConfigFields) -> DecoderShape:
    hidden = fields.size("n_embd", default=768)
    layers = fields.size("n_layer", default=12)
    heads = fields.size("n_head", default=12)
    positions = fields.size("n_positions", "n_ctx", default=1024)
    vocabulary = fields.size("vocab_size", default=50257)
    head_size = fields.require_divides("n_embd", hidden, "n_head", heads)
    drops = {name: fields.probability(name, default=0.1) > 0 for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop")}
    block = BlockShape(
        attention=AttentionShape(
            hidden,
            heads,
            heads,
            head_size,
            rotary=False,
            qkv_bias=True,
            output_bias=True,
            materialised=_materialised(fields),
            dropout=drops["attn_pdrop"],
        ),
        feed_forward=FeedForwardShape(hidden, fields.optional("n_inner") or 4 * hidden, gated=False, bias=True),
        norm_parameters=2 * hidden,
        dropout=drops["resid_pdrop"],
    )
    return DecoderShape(
        family="decoder",
        embedding=EmbeddingShape(vocabulary, hidden, num_positions=positions, dropout=drops["embd_pdrop"]),
        runs=(BlockRun("block", block, layers),),
        head=HeadShape(vocabulary, hidden, tied=fields.flag("tie_word_embeddings", True)),
        final_norm_parameters=2 * hidden,
        max_sequence_length=positions,
    )


def _materialised(fields: ConfigFields) -> bool:
    """Return whether the model's published runs stored attention scores; fused kernels unless the config says so."""
    return fields.text("attention_kernel", "fused") == "materialised"


def _attention(fields: ConfigFields, **changes: object) -> AttentionShape:
    hidden = fields.size("hidden_size")
    heads = fields.size("num_attention_heads")
    head_size = fields.optional("head_dim")
    if head_size is None:
        head_size = fields.require_divides("hidden_size", hidden, "num_attention_heads", heads)
    kv_heads = fields.optional("num_key_value_heads") or heads
    fields.require_divides("num_attention_heads", heads, "num_key_value_heads", kv_heads)
    shape = AttentionShape(hidden, heads, kv_heads, head_size)
    return replace(shape, **changes)  # type: ignore[arg-type]


def _simple(
    fields: ConfigFields,
    block: BlockShape,
    *,
    tied: bool,
    head_bias: bool = False,
    embedding: EmbeddingShape | None = None,
    runs: tuple[BlockRun, ...] | None = None,
    final_norm: int | None = None,
) -> DecoderShape:
    vocabulary = fields.size("vocab_size")
    hidden = block.attention.hidden
    layers = fields.size("num_hidden_layers", "num_layers", "n_layer")
    features = (embedding or EmbeddingShape(vocabulary, hidden)).features
    return DecoderShape(
        family="decoder",
        embedding=embedding or EmbeddingShape(vocabulary, hidden),
        runs=runs or (BlockRun("block", block, layers),),
        head=HeadShape(vocabulary, features, tied=fields.flag("tie_word_embeddings", tied), bias=head_bias),
        final_norm_parameters=block.norm_parameters if final_norm is None else final_norm,
        max_sequence_length=fields.count("max_position_embeddings", "seq_length", default=0),
    )


def _llama(fields: ConfigFields, *, tied: bool = False, qkv_bias: bool = False) -> DecoderShape:
    bias = fields.flag("attention_bias", False)
    attention = _attention(fields, qkv_bias=bias or qkv_bias, output_bias=bias)
    hidden = attention.hidden
    block = BlockShape(
        attention=attention,
        feed_forward=FeedForwardShape(
            hidden, fields.size("intermediate_size"), gated=True, bias=fields.flag("mlp_bias", False)
        ),
        norm_parameters=hidden,
    )
    return _simple(fields, block, tied=tied)


def _mistral(fields: ConfigFields) -> DecoderShape:
    return _windowed(fields, _llama(fields))


def _windowed(fields: ConfigFields, shape: DecoderShape) -> DecoderShape:
    """Return the shape with every layer in the config's sliding window, if it has one."""
    window = fields.optional("sliding_window")
    if window is None:
        return shape
    runs = []
    for run in shape.runs:
        attention = replace(run.shape.attention, window=window)
        runs.append(replace(run, shape=replace(run.shape, attention=attention)))
    return replace(shape, runs=tuple(runs))


def _alternating(fields: ConfigFields, shape: DecoderShape, *, period: int, window: int | None) -> DecoderShape:
    """Return the shape with sliding layers and, every `period`, a full one (or as `layer_types` says)."""
    block = shape.runs[-1].shape
    layers = shape.runs[-1].count
    kinds = fields.strings("layer_types") or tuple(
        "full_attention" if (index + 1) % period == 0 else "sliding_attention" for index in range(layers)
    )
    if len(kinds) != layers:
        raise InvalidDocument(
            f"{fields.source}: layer_types lists {len(kinds)} layers, num_hidden_layers is {layers}",
            field="layer_types",
        )
    runs: list[BlockRun] = []
    for kind in kinds:
        name = "block" if kind == "full_attention" or window is None else "sliding_block"
        if runs and runs[-1].layer_class == name:
            runs[-1] = replace(runs[-1], count=runs[-1].count + 1)
            continue
        attention = replace(block.attention, window=window if name == "sliding_block" else None)
        runs.append(BlockRun(name, replace(block, attention=attention), 1))
    return replace(shape, runs=tuple(runs))


def _qwen2(fields: ConfigFields) -> DecoderShape:
    shape = _llama(fields, qkv_bias=True)
    return _windowed(fields, shape) if fields.flag("use_sliding_window", False) else shape


def _qwen3(fields: ConfigFields) -> DecoderShape:
    shape = _llama(fields)
    block = shape.runs[0].shape
    attention = replace(block.attention, head_norm="per-head", head_size=fields.size("head_dim", default=128))
    return _with_block(shape, replace(block, attention=attention))


def _with_block(shape: DecoderShape, block: BlockShape) -> DecoderShape:
    """Return a decoder of one run with another block."""
    return replace(shape, runs=(replace(shape.runs[0], shape=block),))


def _experts(fields: ConfigFields, shape: DecoderShape, experts: ExpertShape, dense: tuple[int, ...]) -> DecoderShape:
    """Return the shape with expert blocks, except for the layers in `dense`."""
    block = shape.runs[-1].shape
    layers = sum(run.count for run in shape.runs)
    feed_forward = replace(block.feed_forward, experts=experts)
    runs: list[BlockRun] = []
    for index in range(layers):
        name = "dense_block" if index in dense else "expert_block"
        if runs and runs[-1].layer_class == name:
            runs[-1] = replace(runs[-1], count=runs[-1].count + 1)
        else:
            chosen = block if index in dense else replace(block, feed_forward=feed_forward)
            runs.append(BlockRun(name, chosen, 1))
    return replace(shape, runs=tuple(runs))


def _mixtral(fields: ConfigFields) -> DecoderShape:
    experts = ExpertShape(
        num_experts=fields.size("num_local_experts", default=8),
        top_k=fields.size("num_experts_per_tok", default=2),
        size=fields.size("intermediate_size"),
    )
    return _experts(fields, _mistral(fields), experts, ())


def _sparse_step(fields: ConfigFields, layers: int) -> tuple[int, ...]:
    """Return the dense layers of a Qwen mixture: those not at every `decoder_sparse_step`, and those listed."""
    step = fields.size("decoder_sparse_step", default=1)
    listed = fields.sizes("mlp_only_layers") or ()
    return tuple(index for index in range(layers) if index in listed or (index + 1) % step)


def _qwen2_moe(fields: ConfigFields) -> DecoderShape:
    experts = ExpertShape(
        num_experts=fields.size("num_experts", default=60),
        top_k=fields.size("num_experts_per_tok", default=4),
        size=fields.size("moe_intermediate_size"),
        shared_size=fields.count("shared_expert_intermediate_size", default=0),
        shared_gate=True,
    )
    shape = _qwen2(fields)
    return _experts(fields, shape, experts, _sparse_step(fields, fields.size("num_hidden_layers")))


def _qwen3_moe(fields: ConfigFields) -> DecoderShape:
    experts = ExpertShape(
        num_experts=fields.size("num_experts", "num_local_experts", default=128),
        top_k=fields.size("num_experts_per_tok", default=8),
        size=fields.size("moe_intermediate_size"),
    )
    return _experts(fields, _qwen3(fields), experts, _sparse_step(fields, fields.size("num_hidden_layers")))


def _olmoe(fields: ConfigFields) -> DecoderShape:
    experts = ExpertShape(
        num_experts=fields.size("num_experts", default=64),
        top_k=fields.size("num_experts_per_tok", default=8),
        size=fields.size("intermediate_size"),
    )
    shape = _with_head_norm(_llama(fields))
    return _experts(fields, shape, experts, ())


def _with_head_norm(shape: DecoderShape) -> DecoderShape:
    block = shape.runs[0].shape
    return _with_block(shape, replace(block, attention=replace(block.attention, head_norm="whole")))


def _olmo2(fields: ConfigFields) -> DecoderShape:
    shape = _with_head_norm(_llama(fields))
    return _with_block(shape, replace(shape.runs[0].shape, norms_behind=1))


def _phimoe(fields: ConfigFields) -> DecoderShape:
    attention = _attention(fields, qkv_bias=True, output_bias=True)
    block = BlockShape(
        attention=attention,
        feed_forward=FeedForwardShape(attention.hidden, fields.size("intermediate_size"), gated=True),
        norm_parameters=2 * attention.hidden,
    )
    experts = ExpertShape(
        num_experts=fields.size("num_local_experts", default=16),
        top_k=fields.size("num_experts_per_tok", default=2),
        size=fields.size("intermediate_size"),
    )
    return _experts(fields, _simple(fields, block, tied=False, head_bias=True), experts, ())


def _gpt_oss(fields: ConfigFields) -> DecoderShape:
    heads = fields.size("num_attention_heads")
    attention = _attention(fields, qkv_bias=True, output_bias=True, num_extra_parameters=heads)
    block = BlockShape(
        attention=attention,
        feed_forward=FeedForwardShape(attention.hidden, fields.size("intermediate_size"), gated=True),
        norm_parameters=attention.hidden,
    )
    experts = ExpertShape(
        num_experts=fields.size("num_local_experts", default=128),
        top_k=fields.size("num_experts_per_tok", "experts_per_token", default=4),
        size=fields.size("intermediate_size"),
        router_bias=True,
        biases=True,
    )
    feed_forward = replace(block.feed_forward, experts=experts)
    shape = _simple(fields, replace(block, feed_forward=feed_forward), tied=False)
    window = fields.optional("sliding_window") or 128
    kinds = fields.strings("layer_types")
    if kinds is None:
        layers = fields.size("num_hidden_layers")
        kinds = tuple("sliding_attention" if (index + 1) % 2 else "full_attention" for index in range(layers))
    typed = ConfigFields({**fields.values, "layer_types": list(kinds)}, fields.source)
    return _alternating(typed, shape, period=2, window=window)


def _gemma(fields: ConfigFields) -> DecoderShape:
    return _llama(ConfigFields({"head_dim": 256, **fields.values}, fields.source), tied=True)


def _gemma2(fields: ConfigFields) -> DecoderShape:
    shape = _gemma(fields)
    shape = _with_block(shape, replace(shape.runs[0].shape, num_norms=4, norms_behind=1))
    return _alternating(fields, shape, period=2, window=fields.optional("sliding_window") or 4096)


def _gemma3(fields: ConfigFields) -> DecoderShape:
    shape = _gemma(fields)
    block = shape.runs[0].shape
    attention = replace(block.attention, head_norm="per-head")
    shape = _with_block(shape, replace(block, num_norms=4, norms_behind=1, attention=attention))
    period = fields.size("sliding_window_pattern", default=6)
    return _alternating(fields, shape, period=period, window=fields.optional("sliding_window") or 4096)


def _phi(fields: ConfigFields) -> DecoderShape:
    attention = _attention(fields, qkv_bias=True, output_bias=True)
    hidden = attention.hidden
    block = BlockShape(
        attention=attention,
        feed_forward=FeedForwardShape(hidden, fields.size("intermediate_size"), gated=False, bias=True),
        norm_parameters=2 * hidden,
        num_norms=1,
        parallel=True,
    )
    return _simple(fields, block, tied=False, head_bias=True)


def _phi3(fields: ConfigFields) -> DecoderShape:
    shape = _llama(fields)
    block = shape.runs[0].shape
    return _windowed(fields, _with_block(shape, replace(block, attention=replace(block.attention, fused=True))))


def _gptj(fields: ConfigFields) -> DecoderShape:
    hidden = fields.size("n_embd", default=4096)
    heads = fields.size("n_head", default=16)
    head_size = fields.require_divides("n_embd", hidden, "n_head", heads)
    block = BlockShape(
        attention=AttentionShape(hidden, heads, heads, head_size),
        feed_forward=FeedForwardShape(hidden, fields.optional("n_inner") or 4 * hidden, gated=False, bias=True),
        norm_parameters=2 * hidden,
        num_norms=1,
        parallel=True,
    )
    return _simple(fields, block, tied=False, head_bias=True)


def _gpt_neox(fields: ConfigFields) -> DecoderShape:
    bias = fields.flag("attention_bias", True)
    attention = _attention(fields, qkv_bias=bias, output_bias=bias)
    hidden = attention.hidden
    block = BlockShape(
        attention=attention,
        feed_forward=FeedForwardShape(hidden, fields.size("intermediate_size"), gated=False, bias=True),
        norm_parameters=2 * hidden,
        num_norms=2,
        parallel=fields.flag("use_parallel_residual", True),
    )
    return _simple(fields, block, tied=False)


def _opt(fields: ConfigFields) -> DecoderShape:
    bias = fields.flag("enable_bias", True)
    attention = _attention(fields, qkv_bias=bias, output_bias=bias, rotary=False, dropout=True)
    hidden = attention.hidden
    projected = fields.size("word_embed_proj_dim", default=hidden)
    positions = fields.size("max_position_embeddings", default=2048) + 2
    block = BlockShape(
        attention=attention,
        feed_forward=FeedForwardShape(hidden, fields.size("ffn_dim"), gated=False, bias=bias),
        norm_parameters=2 * hidden,
        dropout=True,
    )
    if projected != hidden:
        raise InvalidDocument(
            f"{fields.source}: word_embed_proj_dim {projected} differs from hidden_size {hidden}, which is not supported",
            field="word_embed_proj_dim",
        )
    vocabulary = fields.size("vocab_size")
    embedding = EmbeddingShape(vocabulary, hidden, num_positions=positions, dropout=True)
    return _simple(fields, block, tied=True, embedding=embedding)


def _bloom(fields: ConfigFields) -> DecoderShape:
    hidden = fields.size("hidden_size", "n_embed")
    heads = fields.size("n_head", "num_attention_heads")
    head_size = fields.require_divides("hidden_size", hidden, "n_head", heads)
    block = BlockShape(
        attention=AttentionShape(
            hidden,
            heads,
            heads,
            head_size,
            rotary=False,
            qkv_bias=True,
            output_bias=True,
            materialised=_materialised(fields),
        ),
        feed_forward=FeedForwardShape(hidden, 4 * hidden, gated=False, bias=True),
        norm_parameters=2 * hidden,
    )
    embedding = EmbeddingShape(fields.size("vocab_size"), hidden, norm_parameters=2 * hidden)
    return _simple(fields, block, tied=True, embedding=embedding)


def _falcon(fields: ConfigFields) -> DecoderShape:
    hidden = fields.size("hidden_size")
    heads = fields.size("num_attention_heads", "n_head")
    new_decoder = fields.flag("new_decoder_architecture", False)
    multi_query = fields.flag("multi_query", True)
    kv_heads = fields.size("num_kv_heads", "n_head_kv", default=heads) if new_decoder else (1 if multi_query else heads)
    parallel = new_decoder or fields.flag("parallel_attn", True)
    num_norms = fields.count("num_ln_in_parallel_attn", default=2) if new_decoder else (1 if parallel else 2)
    bias = fields.flag("bias", False)
    head_size = fields.require_divides("hidden_size", hidden, "num_attention_heads", heads)
    block = BlockShape(
        attention=AttentionShape(hidden, heads, kv_heads, head_size, qkv_bias=bias, output_bias=bias, fused=True),
        feed_forward=FeedForwardShape(
            hidden, fields.size("ffn_hidden_size", default=4 * hidden), gated=False, bias=bias
        ),
        norm_parameters=2 * hidden,
        num_norms=num_norms,
        parallel=parallel,
    )
    return _simple(fields, block, tied=True)


def _starcoder2(fields: ConfigFields) -> DecoderShape:
    bias = fields.flag("use_bias", True)
    attention = _attention(fields, qkv_bias=bias, output_bias=bias)
    block = BlockShape(
        attention=attention,
        feed_forward=FeedForwardShape(attention.hidden, fields.size("intermediate_size"), gated=False, bias=bias),
        norm_parameters=2 * attention.hidden,
    )
    return _windowed(fields, _simple(fields, block, tied=True))


def _cohere(fields: ConfigFields) -> DecoderShape:
    attention = _attention(fields)
    block = BlockShape(
        attention=attention,
        feed_forward=FeedForwardShape(attention.hidden, fields.size("intermediate_size"), gated=True),
        norm_parameters=attention.hidden,
        num_norms=1,
        parallel=True,
    )
    return _simple(fields, block, tied=True)


def _deepseek(fields: ConfigFields) -> DecoderShape:
    hidden = fields.size("hidden_size")
    heads = fields.size("num_attention_heads")
    latent = LatentShape(
        query_rank=fields.count("q_lora_rank", default=0),
        kv_rank=fields.size("kv_lora_rank"),
        nope_size=fields.size("qk_nope_head_dim"),
        rope_size=fields.size("qk_rope_head_dim"),
        value_size=fields.size("v_head_dim"),
    )
    attention = AttentionShape(hidden, heads, heads, latent.value_size, latent=latent)
    block = BlockShape(
        attention=attention,
        feed_forward=FeedForwardShape(hidden, fields.size("intermediate_size"), gated=True),
        norm_parameters=hidden,
    )
    size = fields.size("moe_intermediate_size")
    experts = ExpertShape(
        num_experts=fields.size("n_routed_experts"),
        top_k=fields.size("num_experts_per_tok"),
        size=size,
        shared_size=size * fields.count("n_shared_experts", default=0),
        # The bias of auxiliary-loss-free balancing is a buffer that no gradient trains.
        router_bias=False,
    )
    shape = _experts(
        fields,
        _simple(fields, block, tied=False),
        experts,
        tuple(range(fields.count("first_k_dense_replace", default=0))),
    )
    predicted = fields.count("num_nextn_predict_layers", default=0)
    return replace(shape, num_predicted_tokens=predicted)


def _dbrx(fields: ConfigFields) -> DecoderShape:
    hidden = fields.size("d_model")
    heads = fields.size("n_heads")
    attention_fields, experts_fields = fields.part("attn_config"), fields.part("ffn_config")
    head_size = fields.require_divides("d_model", hidden, "n_heads", heads)
    attention = AttentionShape(hidden, heads, attention_fields.size("kv_n_heads", default=heads), head_size, fused=True)
    size = experts_fields.size("ffn_hidden_size")
    experts = ExpertShape(experts_fields.size("moe_num_experts"), experts_fields.size("moe_top_k"), size, fused=True)
    block = BlockShape(
        attention=attention,
        feed_forward=FeedForwardShape(hidden, size, gated=True, experts=experts),
        norm_parameters=hidden,
    )
    named = ConfigFields({**fields.values, "num_hidden_layers": fields.size("n_layers")}, fields.source)
    return _simple(named, block, tied=False)


def _bert(fields: ConfigFields) -> DecoderShape:
    attention = _attention(fields, causal=False, rotary=False, qkv_bias=True, output_bias=True, dropout=True)
    hidden = attention.hidden
    positions = fields.size("max_position_embeddings", default=512)
    vocabulary = fields.size("vocab_size")
    block = BlockShape(
        attention=replace(attention, materialised=_materialised(fields)),
        feed_forward=FeedForwardShape(hidden, fields.size("intermediate_size"), gated=False, bias=True),
        norm_parameters=2 * hidden,
        dropout=True,
    )
    embedding = EmbeddingShape(
        vocabulary,
        hidden,
        num_positions=positions,
        num_segments=fields.size("type_vocab_size", default=2),
        norm_parameters=2 * hidden,
        dropout=True,
    )
    head = HeadShape(
        vocabulary,
        hidden,
        tied=fields.flag("tie_word_embeddings", True),
        bias=True,
        transform_parameters=hidden * hidden + hidden,
        norm_parameters=2 * hidden,
    )
    return DecoderShape(
        family="encoder",
        embedding=embedding,
        runs=(BlockRun("block", block, fields.size("num_hidden_layers")),),
        head=head,
        final_norm_parameters=0,
        max_sequence_length=positions,
    )


def _megatron(fields: ConfigFields) -> DecoderShape:
    """Megatron-LM's GPT as its papers ran it: learned positions, GELU, dropout, tied embeddings."""
    return _gpt2(fields)


DECODERS: Mapping[str, Callable[[ConfigFields], DecoderShape]] = {
    "bert": _bert,
    "bloom": _bloom,
    "cohere": _cohere,
    "dbrx": _dbrx,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
    "falcon": _falcon,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "gpt_oss": _gpt_oss,
    "gptj": _gptj,
    "granite": _llama,
    "llama": _llama,
    "megatron_gpt": _megatron,
    "mistral": _mistral,
    "mixtral": _mixtral,
    "olmo2": _olmo2,
    "olmoe": _olmoe,
    "opt": _opt,
    "phi": _phi,
    "phi3": _phi3,
    "phimoe": _phimoe,
    "qwen2": _qwen2,
    "qwen2_moe": _qwen2_moe,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "starcoder2": _starcoder2,
}
