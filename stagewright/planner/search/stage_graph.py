"""Stages that run side by side: which stage graphs a model with parallel branches admits, and their compiled orders.

Layers stand in topological order. A *segment* is a range of them whose inner tensors all go from one layer to the next,
such as a vision tower, a text embedding, a decoder. A stage graph cuts the model into segments and each segment into a
chain of stages of its own; a tensor between two segments is an edge between the stages that hold its ends, so that
parallel branches run side by side and the pipeline is as deep as its longest path (GraphPipe, Jeon et al., ASPLOS 2025).
Cuts whose stage graph is a chain belong to the common search and are left out here.

The order is that of `schedules.graphpipe`, or of `schedules.distmm` where it is asked for, one stage on a rank. Every edge has a hop of its own in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np
import numpy.typing as npt

from stagewright.planner.documents.job import SearchSpace
from stagewright.planner.documents.profile import ModelProfile
from stagewright.planner.schedules.action import Kind
from stagewright.planner.schedules.family import ScheduleRequest
from stagewright.planner.schedules.registry import generate
from stagewright.planner.schedules.schedule import Schedule, chain_edges
from stagewright.planner.search.order import Order, OrderKey, layout_of
from stagewright.planner.search.space import STAGE_GRAPH_FAMILIES, FamilyRule, allows
from stagewright.planner.simulation.kernel import compile_order

Longs = npt.NDArray[np.int64]
Edges = tuple[tuple[int, int], ...]

GRAPH_RULES = tuple(
    FamilyRule(name, lambda most: (1,), lambda ranks, microbatches, chunks: True, bound="fused")
    for name in STAGE_GRAPH_FAMILIES
)
MOST_RANKS = 16
MOST_JOINTS = 8


@dataclass(frozen=True)
class StageGraph:
    """A stage graph with where each stage may start.

    Parameters
    ----------
    edges : between stages.
    windows : least and largest first layer of each stage, and of the end, as pairs.
    """

    edges: Edges
    windows: tuple[tuple[int, int], ...]

    @property
    def num_stages(self) -> int:
        return len(self.windows) - 1


def stage_graphs(profile: ModelProfile, num_stages: int) -> Iterator[StageGraph]:
    """Yield every stage graph of `num_stages` stages that is no chain, in a fixed order."""
    for segments in _segmentations(profile):
        if len(segments) > num_stages:
            continue
        for inner in combinations(range(1, num_stages), len(segments) - 1):
            counts = [end - first for first, end in pairwise((0, *inner, num_stages))]
            found = _stage_graph(profile, segments, counts)
            if found is not None and found.edges != chain_edges(num_stages):
                yield found


def has_branches(profile: ModelProfile) -> bool:
    """Tell whether some stages of the model can run side by side."""
    return any(
        _stage_graph(profile, segments, [1] * len(segments)) is not None
        and any(True for graph in stage_graphs(profile, len(segments)))
        for segments in _segmentations(profile)
    )


def _segmentations(profile: ModelProfile) -> list[tuple[tuple[int, int], ...]]:
    """Return the ways to cut the layers into segments; none where branches meet in more than MOST_JOINTS places."""
    layers = profile.num_layers
    edges = set(profile.edge_indices)
    if profile.is_chain:
        return []
    loose = [place for place in range(1, layers) if (place - 1, place) not in edges]
    joined = [
        place
        for place in range(1, layers)
        if (place - 1, place) in edges
        and (
            any(target == place and source != place - 1 for source, target in edges)
            or any(source == place - 1 and target != place for source, target in edges)
        )
    ]
    if not loose or len(joined) > MOST_JOINTS:
        return []
    found = []
    for count in range(len(joined) + 1):
        for chosen in combinations(joined, count):
            cuts = [0, *sorted([*loose, *chosen]), layers]
            segments = tuple(pairwise(cuts))
            if all(_is_simple(first, end, profile) for first, end in segments):
                found.append(segments)
    return found


def _is_simple(first: int, end: int, profile: ModelProfile) -> bool:
    """Tell whether all tensors inside a range go from one layer to the next."""
    return all(
        target == source + 1
        for source, target in profile.edge_indices
        if first <= source < end and first <= target < end
    )


def _stage_graph(
    profile: ModelProfile, segments: Sequence[tuple[int, int]], counts: Sequence[int]
) -> StageGraph | None:
    """Return the stage graph of segments cut into so many stages; None when a segment has fewer layers than stages.

    A tensor that enters a segment behind its first layer must meet its first stage, one that leaves before the last layer
    its last stage: the windows see to it.
    """
    windows: list[tuple[int, int]] = []
    edges: list[tuple[int, int]] = []
    first_stage: list[int] = []
    segment_of = np.searchsorted([end for _, end in segments], np.arange(profile.num_layers), side="right")
    crossing = [(s, t) for s, t in profile.edge_indices if segment_of[s] != segment_of[t]]
    stage = 0
    for index, ((first, end), count) in enumerate(zip(segments, counts, strict=True)):
        if end - first < count:
            return None
        entered = max((t for _, t in crossing if segment_of[t] == index), default=first)
        left = min((s for s, _ in crossing if segment_of[s] == index), default=end - 1)
        for place in range(count):
            low, high = first + place, end - count + place
            if place == 0:
                high = low
            else:
                low = max(low, entered + 1)
                high = min(high, left) if place == count - 1 else high
            if low > high:
                return None
            windows.append((low, high))
        first_stage.append(stage)
        edges += [(stage + place, stage + place + 1) for place in range(count - 1)]
        stage += count
    for source, target in crossing:
        a, b = int(segment_of[source]), int(segment_of[target])
        edges.append((first_stage[a] + counts[a] - 1, first_stage[b]))
    windows.append((profile.num_layers, profile.num_layers))
    return StageGraph(tuple(sorted(set(edges))), tuple(windows))


def graph_rules(space: SearchSpace) -> list[FamilyRule]:
    """Return the families of stage graphs that a job admits.

    Without a word of the job that is graphpipe alone: what waits for the whole batch is never faster, and needs to be
    asked for where the loss does.
    """
    wanted = space.schedules or (space.pins.schedule or STAGE_GRAPH_FAMILIES[0],)
    return [rule for rule in GRAPH_RULES if rule.name in wanted and allows(space, "schedule", rule.name)]


def graph_schedule(family: str, edges: Edges, num_stages: int, num_microbatches: int) -> Schedule:
    """Return the order of a family of stage graphs."""
    return generate(family, ScheduleRequest(num_stages, num_microbatches, edges=edges))


def compile_graph_order(schedule: Schedule) -> Order:
    """Return the compiled order of a schedule with one stage on each rank and any stage graph."""
    graph = compile_order(schedule)
    layout = layout_of(schedule)
    stages = schedule.num_stages
    kind, stage = graph.kind_stage()
    number = {edge: index + 1 for index, edge in enumerate(schedule.edges)}
    stage_on = np.argsort(schedule.placement[0])
    hop = np.zeros(len(kind), dtype=np.int32)
    for node in np.flatnonzero(graph.hop == 1).tolist():
        sender = int(graph.across[node])
        here, there = int(stage_on[graph.rank[node]]), int(stage[sender])
        hop[node] = number[(there, here) if kind[sender] == Kind.F else (here, there)]
    code = np.where(kind >= 0, kind * stages + stage, 4 * stages).astype(np.int32)
    return Order(
        placement=layout.placement,
        edges=layout.edges,
        slots=layout.slots,
        live=layout.live,
        split=layout.split,
        split_share=layout.split_share,
        defers=layout.defers,
        key=OrderKey(schedule.name, schedule.num_ranks, schedule.num_microbatches, 1),
        before=graph.before,
        across=graph.across,
        hop=hop,
        code=code,
        last=graph.last,
        num_actions=graph.num_actions,
    )
