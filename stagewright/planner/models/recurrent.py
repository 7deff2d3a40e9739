"""GNMT: recurrent encoder and decoder with attention (Wu et al. 2016), in the layer form that PipeDream trained.

An LSTM layer of width h on inputs of width d multiplies 4h (d + h) weights for each token; its steps follow one another, so
products are as small as one time step. The model is a chain for the encoder and a chain for the decoder whose blocks
all read the attention's context.
"""

from __future__ import annotations

from stagewright.planner.documents.operator import Architecture, Operator
from stagewright.planner.documents.profile import Edge, LayerClass, LayerRun, ModelProfile
from stagewright.planner.models.language_model import (
    EmbeddingShape,
    HeadShape,
    chain_edges,
    embedding_class,
    head_class,
    layer_class,
    loss_class,
)
from stagewright.planner.models.transformer_block import ELEMENT


def gnmt(name: str, *, hidden: int = 1024, num_layers: int = 8, vocab_size: int = 32320) -> ModelProfile:
    """Return GNMT: bidirectional first encoder layer, attention in the first decoder layer, residual connections."""
    classes: dict[str, LayerClass] = {
        "embedding": embedding_class(EmbeddingShape(vocab_size, hidden)),
        "encoder_bidirectional": layer_class("block", [_lstm("forward", hidden, hidden), *_backward_half(hidden)]),
        "encoder_second": layer_class("block", _layer(2 * hidden, hidden)),
        "encoder": layer_class("block", _layer(hidden, hidden)),
        "decoder_attention": layer_class("block", [*_layer(hidden, hidden), *_attention(hidden)]),
        "decoder": layer_class("block", _layer(2 * hidden, hidden)),
        "head": head_class(HeadShape(vocab_size, hidden, tied=False, bias=True)),
        "loss": loss_class(vocab_size),
    }
    encoder = ["encoder.0", *(f"encoder.{index}" for index in range(1, num_layers))]
    decoder = [f"decoder.{index}" for index in range(num_layers)]
    layers = [
        LayerRun(name="embedding", layer_class="embedding"),
        LayerRun(name="encoder.0", layer_class="encoder_bidirectional"),
        LayerRun(name="encoder.1", layer_class="encoder_second"),
        LayerRun(name="encoder.{}", layer_class="encoder", count=num_layers - 2, start=2),
        LayerRun(name="decoder_embedding", layer_class="embedding"),
        LayerRun(name="decoder.0", layer_class="decoder_attention"),
        LayerRun(name="decoder.{}", layer_class="decoder", count=num_layers - 1, start=1),
        LayerRun(name="head", layer_class="head"),
        LayerRun(name="loss", layer_class="loss"),
    ]
    edges = [
        *chain_edges(["embedding", *encoder, "decoder.0"]),
        *chain_edges(["decoder_embedding", *decoder, "head", "loss"]),
        *(Edge(source="decoder.0", target=target) for target in decoder[2:]),
    ]
    return ModelProfile(
        name=name,
        dtype="bf16",
        layers=tuple(layers),
        classes=classes,
        edges=tuple(edges),
        architecture=Architecture(
            family="recurrent", hidden_size=hidden, num_layers=2 * num_layers, vocab_size=vocab_size
        ),
    )


def _lstm(name: str, inner: int, hidden: int, *, output: float = 0.0) -> Operator:
    """Return one LSTM: gates' products; kept are its input, the four gates and the cell."""
    return Operator(
        name=name,
        kind="matmul",
        flops_per_token=2.0 * 4 * hidden * (inner + hidden),
        inner_features=inner + hidden,
        output_features=4 * hidden,
        kept_bytes_per_token=ELEMENT * (inner + 6 * hidden),
        parameters=4 * hidden * (inner + hidden) + 8 * hidden,
        output_bytes_per_token=output,
    )


def _layer(inner: int, hidden: int) -> list[Operator]:
    return [_lstm("lstm", inner, hidden), _gates(hidden, output=ELEMENT * hidden)]


def _backward_half(hidden: int) -> list[Operator]:
    return [_lstm("backward", hidden, hidden), _gates(2 * hidden, output=2 * ELEMENT * hidden)]


def _gates(hidden: int, *, output: float) -> Operator:
    """Return gates, cell update, dropout and residual addition."""
    return Operator(
        name="gates",
        kind="elementwise",
        read_bytes_per_token=ELEMENT * 10 * hidden,
        kept_bytes_per_token=hidden,
        input_grad_factor=1.0,
        output_bytes_per_token=output,
    )


def _attention(hidden: int) -> list[Operator]:
    """Return normalised Bahdanau attention: projections of query and memory, tanh scores over all positions."""
    return [
        Operator(
            name="attention_projections",
            kind="matmul",
            flops_per_token=2.0 * 2 * hidden * hidden,
            inner_features=hidden,
            output_features=2 * hidden,
            kept_bytes_per_token=ELEMENT * 2 * hidden,
            parameters=2 * hidden * hidden + 2 * hidden + 1,
        ),
        Operator(
            name="attention_scores",
            kind="elementwise",
            read_bytes_per_token_per_position=ELEMENT * 2 * hidden,
            kept_bytes_per_token_per_position=ELEMENT * hidden,
            recomputed_by="selective",
            input_grad_factor=1.5,
            output_bytes_per_token=ELEMENT * hidden,
        ),
    ]
