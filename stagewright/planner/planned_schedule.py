"""What a plan's schedule and stages say, in the form that pricing and simulation take: order, ranges of layers, levels."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from stagewright.planner.cost.layer_table import LEVELS
from stagewright.planner.cost.options import CostOptions
from stagewright.planner.documents.plan import Plan, ScheduleSpec, StagePlan
from stagewright.planner.documents.profile import ModelProfile
from stagewright.planner.errors import InvalidDocument
from stagewright.planner.link_bytes import gathers_by_run, sharding_group
from stagewright.planner.schedules.action import Action, parse_action
from stagewright.planner.schedules.family import ScheduleRequest
from stagewright.planner.schedules.registry import generate
from stagewright.planner.schedules.schedule import Schedule, encode
from stagewright.planner.search.order import Layout

# Sharded gradients are never held in full, so they are scattered at each microbatch.
OPTIONS = CostOptions(accumulate_sharded=False)

_FUSED = re.compile(r"^\((?P<steps>.+)\)OVERLAP_F_B$")


def options_of(plan: Plan) -> CostOptions:
    """Return the cost model's options, with those that the plan's schedule parameters change."""
    return replace(OPTIONS, sharding_group=sharding_group(plan), gather_once=gathers_by_run(plan))


def schedule_of(spec: ScheduleSpec) -> Schedule:
    """Return the schedule a plan names; raises InvalidDocument when its placement is not the family's."""
    placement = np.array(spec.placement, dtype=np.int32)
    if spec.orders is not None:
        orders = tuple(encode([_parse_step(text) for text in rank]) for rank in spec.orders)
        return Schedule(
            spec.name, spec.num_microbatches, placement, orders, spec.num_slices, spec.edges, parameters=spec.parameters
        )
    schedule = generate(
        spec.name,
        ScheduleRequest(
            spec.num_ranks,
            spec.num_microbatches,
            num_chunks=spec.num_chunks,
            num_slices=spec.num_slices,
            num_waves=spec.num_waves,
            edges=spec.edges,
            parameters=spec.parameters,
        ),
    )
    if not np.array_equal(schedule.placement, placement):
        raise InvalidDocument(
            f"schedule.placement is {placement.tolist()}, {spec.name} places its stages on {schedule.placement.tolist()}",
            field="schedule.placement",
            hint="give the orders of a schedule that no family makes",
        )
    return schedule


def stage_bounds(stages: Sequence[StagePlan]) -> list[int]:
    """Return the first layer of each stage and the number of layers; raises InvalidDocument unless stages are ranges."""
    bounds = [0]
    for index, stage in enumerate(stages):
        layers = stage.layer_indices
        if list(layers) != list(range(bounds[-1], bounds[-1] + len(layers))):
            raise InvalidDocument(
                f"stages[{index}] holds layers {list(layers)}, the next one in order is {bounds[-1]}",
                field=f"stages[{index}]",
                hint="the scorer takes stages that are ranges in model order",
            )
        bounds.append(bounds[-1] + len(layers))
    return bounds


def check_stage_graph(layout: Layout, bounds: Sequence[int], profile: ModelProfile) -> None:
    """Raise InvalidDocument unless every tensor between layers stays on a stage or has an edge of the stage graph.

    A chain of stages hands on what only later stages use, so it carries every tensor.
    """
    if layout.is_chain:
        return
    stage_of = np.searchsorted(bounds, np.arange(profile.num_layers), side="right") - 1
    known = set(layout.edges)
    for source, target in profile.edge_indices:
        edge = (int(stage_of[source]), int(stage_of[target]))
        if edge[0] != edge[1] and edge not in known:
            names = profile.layer_names
            raise InvalidDocument(
                f"layer {names[target]!r} on stage {edge[1]} uses {names[source]!r} of stage {edge[0]}, and the stage "
                f"graph has edges {sorted(known)} only",
                field="schedule.edges",
                hint=f"add the edge {list(edge)}",
            )


def recompute_indices(stages: Sequence[StagePlan]) -> list[int]:
    """Return the index in LEVELS of each layer's recomputation level."""
    return [LEVELS.index(level) for stage in stages for level in stage.recompute_levels()]


def _parse_step(text: str) -> Action | tuple[Action, ...]:
    match = _FUSED.match(text)
    if match is None:
        return parse_action(text)
    return tuple(parse_action(part) for part in match["steps"].split(";"))
