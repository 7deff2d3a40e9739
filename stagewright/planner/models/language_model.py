"""Profiles of transformer language models: embedding, blocks, final norm, head and loss as layers.

A model is a chain of named runs of blocks. The loss keeps its logits in fp32 (4 s b v / t bytes, Korthikanti et al. 2022,
section 4.3) and its gradient needs as much again. Tied embeddings count once; both layers hold a copy when they lie on
different pipeline ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from stagewright.planner.documents.operator import Architecture, Operator
from stagewright.planner.documents.profile import Edge, LayerClass, LayerRun, ModelProfile, TiedWeight
from stagewright.planner.models.transformer_block import ELEMENT, MASK, BlockShape, block_operators

LOGIT = 4.0


@dataclass(frozen=True)
class BlockRun:
    """`count` equal blocks in a row."""

    layer_class: str
    shape: BlockShape
    count: int


@dataclass(frozen=True)
class EmbeddingShape:
    """Token embedding with what is added or normalised there."""

    vocab_size: int
    features: int
    num_positions: int = 0
    num_segments: int = 0
    norm_parameters: int = 0
    projected: int = 0
    dropout: bool = False


@dataclass(frozen=True)
class HeadShape:
    """The language-model head: an optional transform, then logits over the vocabulary."""

    vocab_size: int
    features: int
    tied: bool
    bias: bool = False
    transform_parameters: int = 0
    norm_parameters: int = 0


def layer_class(
    kind: Literal["embedding", "block", "norm", "head", "loss", "convolution", "pooling", "other"],
    operators: Sequence[Operator],
) -> LayerClass:
    """Return a layer class whose parameter counts are those of its operators."""
    expert = sum(operator.parameters for operator in operators if "ep" in operator.split)
    split = {"tp", "vocab", "kv", "etp"}
    replicated = sum(operator.parameters for operator in operators if not split & set(operator.split))
    return LayerClass(
        kind=kind,
        parameters=sum(operator.parameters for operator in operators),
        replicated_parameters=replicated,
        expert_parameters=expert,
        operators=tuple(operators),
    )


def embedding_class(shape: EmbeddingShape) -> LayerClass:
    """Return token embedding, positions and segments, with norm and dropout where the model has them."""
    width = shape.projected or shape.features
    operators = [
        Operator(
            name="tokens",
            kind="embedding",
            output_features=shape.features,
            read_bytes_per_token=2 * ELEMENT * shape.features,
            split=("vocab",),
            input_grad_factor=0.0,
            weight_grad_factor=1.0,
            parameters=shape.vocab_size * shape.features,
            exits=True,
            output_bytes_per_token=ELEMENT * width,
        )
    ]
    added = (shape.num_positions + shape.num_segments) * width + shape.norm_parameters
    if added or shape.dropout:
        mask = MASK if shape.dropout else 0.0
        norm = ELEMENT if shape.norm_parameters else 0.0
        operators.append(
            Operator(
                name="positions",
                kind="elementwise",
                read_bytes_per_token=(2 * ELEMENT + mask + norm) * width,
                kept_bytes_per_token=(mask + norm) * width,
                split=("sp",),
                input_grad_factor=1.0,
                parameters=added,
            )
        )
    if shape.projected:
        operators.append(
            Operator(
                name="projection",
                kind="matmul",
                flops_per_token=2.0 * shape.features * shape.projected,
                inner_features=shape.features,
                output_features=shape.projected,
                kept_bytes_per_token=ELEMENT * shape.features,
                parameters=shape.features * shape.projected,
            )
        )
    return layer_class("embedding", operators)


def norm_class(features: int, parameters: int, *, tokens_per_sample: int = 0) -> LayerClass:
    """Return the final norm: its input is kept, its output is the head's."""
    return layer_class(
        "norm",
        [
            Operator(
                name="norm",
                kind="norm",
                read_bytes_per_token=2 * ELEMENT * features,
                kept_bytes_per_token=ELEMENT * features,
                split=("sp",),
                parameters=parameters,
                output_bytes_per_token=ELEMENT * features,
                tokens_per_sample=tokens_per_sample,
            )
        ],
    )


def head_class(shape: HeadShape, *, num_passes: int = 1) -> LayerClass:
    """Return the head: logits in the activations' precision, of each of `num_passes` predicted tokens."""
    operators = []
    if shape.transform_parameters or shape.norm_parameters:
        operators.append(
            Operator(
                name="transform",
                kind="matmul",
                flops_per_token=2.0 * shape.features * shape.features,
                inner_features=shape.features,
                output_features=shape.features,
                kept_bytes_per_token=3 * ELEMENT * shape.features,
                split=("sp",),
                parameters=shape.transform_parameters + shape.norm_parameters,
            )
        )
    operators.append(
        Operator(
            name="logits",
            kind="matmul",
            flops_per_token=2.0 * shape.features * shape.vocab_size * num_passes,
            inner_features=shape.features,
            output_features=shape.vocab_size,
            kept_bytes_per_token=ELEMENT * shape.features * num_passes,
            kept_split=("sp",),
            split=("vocab",),
            parameters=shape.vocab_size * shape.features + (shape.vocab_size if shape.bias else 0),
            enters=True,
            output_bytes_per_token=ELEMENT * shape.vocab_size * num_passes,
        )
    )
    return layer_class("head", operators)


def loss_class(vocab_size: int, *, num_passes: int = 1) -> LayerClass:
    """Return soft-max and cross-entropy in fp32 over the vocabulary's shard, for each predicted token."""
    return layer_class(
        "loss",
        [
            Operator(
                name="cross_entropy",
                kind="softmax-loss",
                output_features=vocab_size,
                # Logits are read, widened and soft-maxed in fp32.
                read_bytes_per_token=(ELEMENT + 3 * LOGIT) * vocab_size * num_passes,
                kept_bytes_per_token=LOGIT * vocab_size * num_passes,
                split=("vocab",),
                input_grad_factor=0.5,
                fp32_output=True,
                output_bytes_per_token=LOGIT,
            )
        ],
    )


def prediction_class(block: BlockShape) -> LayerClass:
    """Return one multi-token prediction layer (DeepSeek-V3): two norms, a projection of 2h to h, a block, a norm.

    It also carries the main model's hidden state past itself, so its boundary tensor is twice as wide.
    """
    hidden = block.attention.hidden
    head = [
        Operator(
            name="prediction_norms",
            kind="norm",
            read_bytes_per_token=3 * 2 * ELEMENT * hidden,
            kept_bytes_per_token=3 * ELEMENT * hidden,
            split=("sp",),
            parameters=3 * block.norm_parameters,
        ),
        Operator(
            name="prediction_projection",
            kind="matmul",
            flops_per_token=2.0 * 2 * hidden * hidden,
            inner_features=2 * hidden,
            output_features=hidden,
            kept_bytes_per_token=2 * ELEMENT * hidden,
            split=("sp",),
            parameters=2 * hidden * hidden,
            output_bytes_per_token=ELEMENT * hidden,
        ),
    ]
    return layer_class("block", [*head, *block_operators(block)])


def language_model(
    name: str,
    architecture: Architecture,
    embedding: EmbeddingShape,
    runs: Sequence[BlockRun],
    *,
    head: HeadShape | None,
    final_norm_parameters: int,
    num_predictions: int = 0,
) -> ModelProfile:
    """Return the profile of a decoder or encoder: embedding, runs of blocks, norm, head, loss.

    `num_predictions` layers of multi-token prediction stand behind the blocks; head and loss then run once more for each.
    """
    classes: dict[str, LayerClass] = {"embedding": embedding_class(embedding)}
    layers = [LayerRun(name="embedding", layer_class="embedding")]
    first = 0
    for run in runs:
        classes.setdefault(run.layer_class, layer_class("block", block_operators(run.shape)))
        layers.append(LayerRun(name="blocks.{}", layer_class=run.layer_class, count=run.count, start=first))
        first += run.count
    hidden = architecture.hidden_size
    if num_predictions:
        classes["prediction"] = prediction_class(runs[-1].shape)
        layers.append(LayerRun(name="predictions.{}", layer_class="prediction", count=num_predictions))
    if final_norm_parameters:
        classes["norm"] = norm_class(hidden, final_norm_parameters)
        layers.append(LayerRun(name="norm", layer_class="norm"))
    tied: tuple[TiedWeight, ...] = ()
    if head is not None:
        classes["head"] = head_class(head, num_passes=1 + num_predictions)
        classes["loss"] = loss_class(head.vocab_size, num_passes=1 + num_predictions)
        layers += [LayerRun(name="head", layer_class="head"), LayerRun(name="loss", layer_class="loss")]
        if head.tied:
            tied = (
                TiedWeight(
                    parameter="embedding.tokens",
                    layers=("embedding", "head"),
                    num_parameters=embedding.vocab_size * embedding.features,
                ),
            )
    return ModelProfile(
        name=name, dtype="bf16", layers=tuple(layers), classes=classes, tied=tied, architecture=architecture
    )


def chain_edges(names: Sequence[str]) -> list[Edge]:
    """Return the edges of a chain of layers."""
    return [Edge(source=left, target=right) for left, right in itertools.pairwise(names)]
