"""The analytic description of a layer: its operators and the architecture they come from.

An operator's sizes are per token of one sample, for the whole (unsharded) layer; the cost model divides them by the
degrees that `split` names and multiplies by the tokens of a microbatch.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from stagewright.planner.documents.document import Bytes, Count, Index, Name, Part

Axis = Literal["tp", "sp", "cp", "ep", "etp", "vocab"]


class Operator(Part):
    """One operator of a layer.

    Parameters
    ----------
    kind : what runs; the roofline's efficiency curve is chosen by it.
    flops_per_token : forward FLOP for each token, except the part that grows with the sequence.
    flops_per_token_per_position : forward FLOP for each token and each position attended to.
    output_features, inner_features : n and k of a matrix product, for the efficiency by size.
    read_bytes_per_token, weight_bytes : memory traffic besides the matrix product's operands.
    kept_bytes_per_token : bytes kept for the backward.
    kept_bytes_per_token_per_position : the part that grows with the sequence (attention scores kept).
    recomputed_by : the level of recomputation that drops and recomputes this operator.
    split : degrees that divide it.
    parameters : trainable parameters.
    """

    name: Name
    kind: Literal["matmul", "attention", "elementwise", "norm", "embedding", "softmax-loss", "convolution", "router"]
    flops_per_token: Annotated[float, Field(ge=0)] = 0.0
    flops_per_token_per_position: Annotated[float, Field(ge=0)] = 0.0
    output_features: Index = 0
    inner_features: Index = 0
    read_bytes_per_token: Bytes = 0.0
    kept_bytes_per_token: Bytes = 0.0
    kept_bytes_per_token_per_position: Bytes = 0.0
    recomputed_by: Literal["selective", "full"] = "full"
    split: tuple[Axis, ...] = ()
    parameters: Index = 0


class Architecture(Part):
    """Sizes that legality and the analytic model need; a field that does not apply is 0 or None."""

    family: str = "decoder"
    hidden_size: Index = 0
    num_layers: Index = 0
    num_heads: Index = 0
    num_kv_heads: Index = 0
    head_size: Index = 0
    ffn_size: Index = 0
    vocab_size: Index = 0
    max_sequence_length: Index = 0
    num_experts: Index = 0
    num_shared_experts: Index = 0
    experts_per_token: Index = 0
    expert_ffn_size: Index = 0
    num_dense_layers: Index = 0
    sliding_window: Count | None = None
    gated_ffn: bool = False
    tied_embeddings: bool = False
