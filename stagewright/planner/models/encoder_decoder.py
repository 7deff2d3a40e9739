"""T5: an encoder and a decoder that attends to it, as a graph of layers.

Every decoder block reads the encoder's output, so a cut between decoder blocks also carries that tensor: the edges from
the encoder's last norm to each decoder block say so. Both sides see the job's sequence length.
"""

from __future__ import annotations

from dataclasses import replace

from stagewright.planner.documents.operator import Architecture
from stagewright.planner.documents.profile import Edge, LayerClass, LayerRun, ModelProfile, TiedWeight
from stagewright.planner.models.config_fields import ConfigFields
from stagewright.planner.models.language_model import (
    EmbeddingShape,
    HeadShape,
    chain_edges,
    embedding_class,
    head_class,
    layer_class,
    loss_class,
    norm_class,
)
from stagewright.planner.models.transformer_block import (
    AttentionShape,
    BlockShape,
    FeedForwardShape,
    block_operators,
)


def t5_profile(fields: ConfigFields, name: str) -> ModelProfile:
    """Return the profile of a T5 (tied) or T5 v1.1 (gated, untied) config."""
    hidden = fields.size("d_model", default=512)
    heads = fields.size("num_heads", default=8)
    head_size = fields.size("d_kv", default=64)
    size = fields.size("d_ff", default=2048)
    layers = fields.size("num_layers", default=6)
    decoder_layers = fields.optional("num_decoder_layers") or layers
    vocabulary = fields.size("vocab_size", default=32128)
    gated = fields.text("feed_forward_proj", "relu").startswith("gated")
    tied = fields.flag("tie_word_embeddings", True)
    buckets = fields.size("relative_attention_num_buckets", default=32)

    attention = AttentionShape(hidden, heads, heads, head_size, causal=False, rotary=False, dropout=True)
    encoder = BlockShape(
        attention=attention,
        feed_forward=FeedForwardShape(hidden, size, gated=gated),
        norm_parameters=hidden,
        dropout=True,
    )
    decoder = replace(
        encoder,
        attention=replace(attention, causal=True),
        cross_attention=replace(attention, cross=True),
        num_norms=3,
    )
    # The first block of each side owns the relative position biases.
    biased = {"num_extra_parameters": buckets * heads}
    first_encoder = replace(encoder, attention=replace(encoder.attention, **biased))  # type: ignore[arg-type]
    first_decoder = replace(decoder, attention=replace(decoder.attention, **biased))  # type: ignore[arg-type]
    classes: dict[str, LayerClass] = {
        "embedding": embedding_class(EmbeddingShape(vocabulary, hidden, dropout=True)),
        "encoder_first": layer_class("block", block_operators(first_encoder)),
        "encoder_block": layer_class("block", block_operators(encoder)),
        "norm": norm_class(hidden, hidden),
        "decoder_embedding": embedding_class(EmbeddingShape(vocabulary, hidden, dropout=True)),
        "decoder_first": layer_class("block", block_operators(first_decoder)),
        "decoder_block": layer_class("block", block_operators(decoder)),
        "head": head_class(HeadShape(vocabulary, hidden, tied=tied)),
        "loss": loss_class(vocabulary),
    }
    layers_in_order = [
        LayerRun(name="embedding", layer_class="embedding"),
        LayerRun(name="encoder.0", layer_class="encoder_first"),
        *_rest("encoder.{}", "encoder_block", layers - 1),
        LayerRun(name="encoder_norm", layer_class="norm"),
        LayerRun(name="decoder_embedding", layer_class="decoder_embedding"),
        LayerRun(name="decoder.0", layer_class="decoder_first"),
        *_rest("decoder.{}", "decoder_block", decoder_layers - 1),
        LayerRun(name="decoder_norm", layer_class="norm"),
        LayerRun(name="head", layer_class="head"),
        LayerRun(name="loss", layer_class="loss"),
    ]
    encoder_names = ["embedding", *(f"encoder.{index}" for index in range(layers)), "encoder_norm"]
    decoder_names = [f"decoder.{index}" for index in range(decoder_layers)]
    edges = [
        *chain_edges(encoder_names),
        *chain_edges(["decoder_embedding", *decoder_names, "decoder_norm", "head", "loss"]),
        *(Edge(source="encoder_norm", target=target) for target in decoder_names),
    ]
    ties = [
        TiedWeight(
            parameter="embedding.tokens",
            layers=("embedding", "decoder_embedding", *(("head",) if tied else ())),
            num_parameters=vocabulary * hidden,
        )
    ]
    return ModelProfile(
        name=name,
        dtype="bf16",
        layers=tuple(layers_in_order),
        classes=classes,
        edges=tuple(edges),
        tied=tuple(ties),
        architecture=Architecture(
            family="encoder-decoder",
            hidden_size=hidden,
            num_layers=layers + decoder_layers,
            num_heads=heads,
            num_kv_heads=heads,
            head_size=head_size,
            ffn_size=size,
            vocab_size=vocabulary,
            max_sequence_length=fields.count("n_positions", default=512),
            gated_ffn=gated,
            tied_embeddings=tied,
        ),
    )


def _rest(name: str, layer: str, count: int) -> list[LayerRun]:
    return [LayerRun(name=name, layer_class=layer, count=count, start=1)] if count else []
