"""Which device holds which part of a layer's state under a plan: parameters and optimizer state as intervals.

A layer's weights of one kind (dense, replicated over tensor shards, or routed experts) are the interval [0, 1). With tensor
degree t and n replicas of a shard, device (shard i, replica r) holds

    parameters   [i, i + 1) / t                            ZeRO 0 to 2
                 [i + r / n, i + (r + 1) / n) / t          ZeRO 3
    optimizer    [i, i + 1) / t                            ZeRO 0, else as ZeRO 3

Routed experts are split by ep * etp in place of t. An embedding or head without vocabulary parallelism is not split.
Gradients live only inside a step, so between steps they are no state. Weights tied over stages belong to their first
layer. The intervals of one kind and item are disjoint or equal, and cover [0, 1).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from stagewright.planner.documents.plan import Degrees, Plan
from stagewright.planner.documents.profile import LayerClass, ModelProfile


@dataclass(frozen=True)
class Piece:
    """A part of one layer's state on one device: kind of weights, item, interval, and the bytes of the whole interval [0, 1)."""

    layer: int
    kind: str
    item: str
    start: float
    end: float
    whole_bytes: float

    @property
    def size_bytes(self) -> float:
        return (self.end - self.start) * self.whole_bytes


def state_pieces(plan: Plan, profile: ModelProfile) -> Iterator[tuple[int, Piece]]:
    """Yield (device, piece) for all state of a plan, in order of stages and devices."""
    optimizer = plan.job.optimizer
    names = profile.layer_classes
    for row in plan.schedule.placement:
        for stage, rank in zip(plan.stages, row, strict=True):
            for layer in stage.layer_indices:
                trained = profile.classes[names[layer]].is_trained
                for kind, count, shards in _weights(profile.classes[names[layer]], stage.degrees):
                    for index, device in enumerate(plan.mapping.pipeline_ranks[rank]):
                        shard, replica = index % shards, index // shards
                        replicas = stage.degrees.num_devices // shards
                        whole = (shard / shards, (shard + 1) / shards)
                        each = 1.0 / (shards * replicas)
                        first = (shard * replicas + replica) * each
                        part = (first, first + each)
                        span = part if stage.degrees.zero >= 3 and trained else whole
                        yield device, Piece(layer, kind, "parameters", *span, count * optimizer.parameter_bytes)
                        span = part if stage.degrees.zero >= 1 else whole
                        if optimizer.state_bytes and trained:
                            yield device, Piece(layer, kind, "optimizer", *span, count * optimizer.state_bytes)


def _weights(layer: LayerClass, degrees: Degrees) -> Iterator[tuple[str, int, int]]:
    """Yield (kind, parameters, shards) of a layer's weights that exist."""
    split = degrees.vocab_parallel or layer.kind not in ("embedding", "head", "loss")
    whole = layer.whole_parameters(splits_vocabulary=degrees.vocab_parallel)
    dense = layer.parameters - whole - layer.expert_parameters
    if dense:
        yield "dense", dense, degrees.tp if split else 1
    if whole:
        yield "replicated", whole, 1
    if layer.expert_parameters:
        yield "expert", layer.expert_parameters, degrees.expert_split
