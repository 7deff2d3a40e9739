"""Which stage sends which layers' values to which stage, and with which ranks this one exchanges them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from stagewright.planner.documents.plan import Plan
from stagewright.runtime.resharding import Resharding
from stagewright.runtime.sequence_pieces import num_pieces
from stagewright.runtime.topology import (
    Part,
    StageKey,
    Topology,
    has_unequal_replicas,
    has_unequal_tensors,
    stage_edges,
)

Hop = tuple[int, int, int]  # (replica, source stage, target stage)


@dataclass(frozen=True)
class StageGraph:
    """Edges between stages, and the other ends of those that leave this rank.

    Parameters
    ----------
    layers : for each edge (source, target), the layers whose values travel.
    held : (replica, stage) of this rank's stages.
    peers : from whom this rank receives the messages over an edge that has one end here.
    takers : to whom it sends those over the same edge, where they are others.
    is_divided : whether messages are parts of a microbatch, since stages have different numbers of replicas or divide
        tensors and sequences unlike.
    source_pieces : how many pieces of a sequence a device of the source of an edge has; 1 for those without.
    has_one_length : whether sequences are as long in all microbatches, so that a message's shapes are known by its edge alone
        where batches of both ends have parts of them.
    reshardings : what happens on edges between stages of this rank with unlike degrees.
    """

    layers: Mapping[tuple[int, int], tuple[int, ...]]
    held: frozenset[StageKey]
    peers: Mapping[Hop, tuple[Part, ...]]
    takers: Mapping[Hop, tuple[Part, ...]] = field(default_factory=dict)
    is_divided: bool = False
    source_pieces: Mapping[tuple[int, int], int] = field(default_factory=dict)
    has_one_length: bool = False
    reshardings: Mapping[tuple[int, int], Resharding] = field(default_factory=dict)

    def sources(self, stage: int) -> tuple[int, ...]:
        """Stages whose values a stage takes."""
        return tuple(source for source, target in self.layers if target == stage)

    def targets(self, stage: int) -> tuple[int, ...]:
        """Stages that take a stage's values."""
        return tuple(target for source, target in self.layers if source == stage)

    def is_remote(self, replica: int, stage: int) -> bool:
        """Whether a stage lies on another rank."""
        return (replica, stage) not in self.held


def make_stage_graph(
    plan: Plan,
    topology: Topology,
    layer_edges: tuple[tuple[int, int], ...],
    kinds: Sequence[str],
    reshardings: Mapping[tuple[int, int], Resharding] | None = None,
) -> StageGraph:
    """Return one rank's graph for a model with these edges between layers, whose `kinds` are given by layer."""
    edges, held = stage_edges(plan, layer_edges), frozenset(topology.stages)
    hops = {
        (replica, source, target): target if (replica, source) in held else source
        for replica in range(len(plan.schedule.placement))
        for source, target in edges
        if ((replica, source) in held) != ((replica, target) in held)
    }
    unlike = plan.schedule.num_ranks > 1 and has_unequal_tensors(plan)
    if not unlike:
        peers = {hop: topology.parts(hop[0], other) for hop, other in hops.items()}
        return StageGraph(edges, held, peers, is_divided=has_unequal_replicas(plan), reshardings=reshardings or {})
    inside = _cuts_behind_blocks(plan, kinds)
    total = num_pieces(plan)
    return StageGraph(
        edges,
        held,
        {hop: topology.parts(hop[0], other, is_split=hop[2] in inside) for hop, other in hops.items()},
        {hop: topology.takers(hop[0], other, is_split=hop[2] in inside) for hop, other in hops.items()},
        is_divided=True,
        source_pieces={edge: _num_held(plan, edge[0], total, is_split=edge[1] in inside) for edge in edges},
        has_one_length=any(stage.degrees.cp > 1 for stage in plan.stages),
        reshardings=reshardings or {},
    )


def _num_held(plan: Plan, stage: int, total: int, *, is_split: bool) -> int:
    degrees = plan.stages[stage].degrees
    return total // degrees.cp // (degrees.tp if is_split and degrees.sp else 1)


def _cuts_behind_blocks(plan: Plan, kinds: Sequence[str]) -> set[int]:
    """Return the stages in front of which a block ends: sequence parallelism has split what they take.

    What follows the last block takes parts too, and joins them.
    """
    blocks = [index for index, kind in enumerate(kinds) if kind == "block"]
    firsts = {stage: each.layer_indices[0] for stage, each in enumerate(plan.stages) if each.num_layers}
    return {stage for stage, first in firsts.items() if blocks and blocks[0] < first <= blocks[-1] + 1}
