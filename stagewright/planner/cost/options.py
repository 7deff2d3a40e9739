"""What software does beside the degrees: overlaps, kernels, expert capacity. One frozen record, defaults as our runtime.

Overlap is modelled, not assumed: a share of the compute that may hide a collective, 0 where the framework waits.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CostOptions:
    """Settings of the cost model that no document holds.

    Parameters
    ----------
    tensor_overlap : share of the neighbouring matrix product under which a tensor-parallel collective hides
        (0 Megatron's default; 1 - 1/r for one decomposed into r chunks: async TP, Flux, Domino).
    context_overlap : share of the attention under which ring hops hide.
    gradient_overlap : reduction of gradient buckets starts during the last backward (DDP, Megatron's overlap flag).
    prefetch : ZeRO-3 gathers the next layer's weights during this one's compute (FSDP).
    accumulate_sharded : ZeRO-2 and 3 reduce gradients once an iteration and not at each microbatch.
    gather_once : ZeRO-3 gathers each chunk's weights once an iteration and direction (breadth-first).
    bucket_bytes : size of a gradient bucket.
    scatter_gather : a boundary tensor crosses nodes once for the tensor-parallel group and is gathered inside.
    expert_capacity : capacity factor; None is dropless, where the imbalance takes its place.
    sharding_group : devices over which ZeRO shards (HSDP, MiCS); None is all replicas.
    expert_chunks : chunks of tokens whose exchange runs beside the experts of the other chunks; 1 is no overlap.
    """

    tensor_overlap: float = 0.0
    context_overlap: float = 1.0
    gradient_overlap: bool = False
    prefetch: bool = True
    accumulate_sharded: bool = True
    gather_once: bool = False
    bucket_bytes: float = 25 * 2**20
    scatter_gather: bool = True
    expert_capacity: float | None = None
    sharding_group: int | None = None
    expert_chunks: int = 1


DEFAULT_OPTIONS = CostOptions()
