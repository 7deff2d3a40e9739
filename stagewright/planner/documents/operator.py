"""The analytic description of a layer: its operators and the architecture they come from.

An operator's sizes are per token of one sample, for the whole (unsharded) layer; the cost model divides them by the
degrees that `split` names and multiplies by the tokens of a microbatch.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from stagewright.planner.documents.document import Bytes, Count, Index, Name, Part

Axis = Literal["tp", "sp", "cp", "ep", "etp", "vocab", "kv"]


class Operator(Part):
    """One operator of a layer.

    Parameters
    ----------
    kind : what runs; the roofline's efficiency curve is chosen by it. `dispatch` is the exchange of tokens with experts.
    flops_per_token : forward FLOP for each token, except the part that grows with the sequence.
    flops_per_token_per_position : forward FLOP for each token and each position attended to.
    output_features, inner_features : n and k of a matrix product, for the efficiency by size.
    read_bytes_per_token : memory traffic besides the matrix product's operands.
    read_bytes_per_token_per_position : the part of it that grows with the sequence (attention scores read and written).
    kept_bytes_per_token : bytes kept for the backward.
    kept_bytes_per_token_per_position : the part that grows with the sequence (attention scores kept).
    kept_split : degrees that divide what is kept, where they differ from `split`.
    recomputed_by : the level of recomputation that drops and recomputes this operator.
    split : degrees that divide it; context parallelism divides the tokens of every operator and is not named.
    parameters : trainable parameters.
    input_grad_factor, weight_grad_factor : work of each half of the backward over the forward's; by kind when None.
    positions : how many positions a token attends to: all, those before it, or those in the `window`.
    materialised : attention that stores its scores: batched products instead of one fused kernel.
    num_groups : equal products run as one grouped kernel (the routed experts).
    kv_features : features of keys and values together, which context parallelism exchanges.
    enters, exits : the operator begins or ends a region split by tensor parallelism, so its input is gathered
        (or its gradient reduced), or its output reduced.
    summed_features : numbers of four bytes a token that the devices which split the operator sum, forward and backward (a
        norm over all heads).
    sums_gradients : the operator works on what tensor parallelism leaves a device, with parameters that are whole on each,
        whose gradients are therefore summed (a norm of each head).
    fp32_output : the output is kept and exchanged in 4-byte numbers whatever the precision (logits).
    output_bytes_per_token : bytes of the layer's boundary tensor when this operator writes it.
    tokens_per_sample : tokens of one sample when not the job's sequence length (image patches).
    """

    name: Name
    kind: Literal[
        "matmul", "attention", "elementwise", "norm", "embedding", "softmax-loss", "convolution", "router", "dispatch"
    ]
    flops_per_token: Annotated[float, Field(ge=0)] = 0.0
    flops_per_token_per_position: Annotated[float, Field(ge=0)] = 0.0
    output_features: Index = 0
    inner_features: Index = 0
    read_bytes_per_token: Bytes = 0.0
    read_bytes_per_token_per_position: Bytes = 0.0
    kept_bytes_per_token: Bytes = 0.0
    kept_bytes_per_token_per_position: Bytes = 0.0
    kept_split: tuple[Axis, ...] | None = None
    recomputed_by: Literal["selective", "full"] = "full"
    split: tuple[Axis, ...] = ()
    parameters: Index = 0
    input_grad_factor: Annotated[float, Field(ge=0)] | None = None
    weight_grad_factor: Annotated[float, Field(ge=0)] | None = None
    positions: Literal["all", "causal"] = "all"
    window: Count | None = None
    materialised: bool = False
    num_groups: Count = 1
    kv_features: Index = 0
    enters: bool = False
    exits: bool = False
    summed_features: Index = 0
    sums_gradients: bool = False
    fp32_output: bool = False
    output_bytes_per_token: Bytes = 0.0
    tokens_per_sample: Index = 0


class Architecture(Part):
    """Sizes that legality and the analytic model need; a field that does not apply is 0 or None.

    `kv_lora_rank` is above 0 for multi-head latent attention; `num_predicted_tokens` counts multi-token prediction
    layers beyond the usual next token; `fused_kv_heads` tells of one projection that makes queries, keys and values,
    `fused_experts` of tensors in which all experts lie one behind the other, `biased_experts` of biases on their outputs.
    """

    family: str = "decoder"
    hidden_size: Index = 0
    num_layers: Index = 0
    num_heads: Index = 0
    num_kv_heads: Index = 0
    fused_kv_heads: bool = False
    head_size: Index = 0
    ffn_size: Index = 0
    vocab_size: Index = 0
    max_sequence_length: Index = 0
    num_experts: Index = 0
    fused_experts: bool = False
    biased_experts: bool = False
    num_shared_experts: Index = 0
    experts_per_token: Index = 0
    expert_ffn_size: Index = 0
    num_dense_layers: Index = 0
    sliding_window: Count | None = None
    gated_ffn: bool = False
    tied_embeddings: bool = False
    kv_lora_rank: Index = 0
    num_predicted_tokens: Index = 0
