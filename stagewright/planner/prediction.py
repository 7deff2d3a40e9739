"""What a plan will cost: the one scorer of the product.

A plan's schedule is made again from its name and sizes (or read from its own orders), its stages are priced by the cost
model under their degrees, and the simulator runs the order on the real links. The step is

    step = max over pipeline ranks of (end of its last action + gradient reduction + optimizer) + overhead of a step

Where weights change under microbatches, versions of them are copied and predicted, which takes of each action and update
what `version_work` says.

Messages take latency + bytes / bandwidth of the slowest link between two ranks; a directed pair of ranks carries one
message at a time. Peak memory of a rank is its states, the most live activations of its layout, the largest workspace of
its layers and what the framework holds.

Everything takes its median there; `expectation` adds what a run takes beyond.

MFU is model FLOPs (forward once, backward twice, no recomputation) over the dense peak of the job's dtype; HFU counts
what is run again. Not modelled: contention between different pairs of ranks, stragglers, input pipelines.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from stagewright.planner.cost.cost_model import CostModel
from stagewright.planner.cost.layer_table import LEVELS
from stagewright.planner.cost.measured_cost import worst_source
from stagewright.planner.cost.memory import ParameterBytes, expert_shards
from stagewright.planner.cost.memory_actions import streamed_states_s
from stagewright.planner.cost.options import CostOptions
from stagewright.planner.cost.trust import expected_error
from stagewright.planner.documents.cluster import Cluster, Device, NodeGroup
from stagewright.planner.documents.job import TrainingJob
from stagewright.planner.documents.plan import Degrees, MemoryItems, Plan, Prediction, ScheduleSpec, StagePlan
from stagewright.planner.documents.profile import ModelProfile
from stagewright.planner.errors import InvalidDocument
from stagewright.planner.layerwise import Gather, changes_of
from stagewright.planner.link_bytes import (
    gathers_by_run,
    link_bytes,
    local_steps,
    reduced_parameters,
    sharding_group,
    shared_weights,
    tied_members,
    unit_parameters,
)
from stagewright.planner.passing_bytes import num_shards, passing_bytes, step_workspaces
from stagewright.planner.replica_shares import parts_of_stage, samples_by_replica, told_part
from stagewright.planner.schedules.action import Action, parse_action
from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.schedules.family import ScheduleRequest
from stagewright.planner.schedules.lowering.gradients import (
    UPDATES_PER_MICROBATCH,
    update_period,
    with_optimizer_steps,
)
from stagewright.planner.schedules.registry import generate
from stagewright.planner.schedules.schedule import Schedule, WeightPolicy, encode
from stagewright.planner.search.joined_costs import joined_layer_costs
from stagewright.planner.search.layer_costs import Configuration, LayerCosts, layer_costs
from stagewright.planner.search.order import Layout, layout_of
from stagewright.planner.search.pipeline_costs import (
    PipelineCosts,
    Tie,
    Wiring,
    boundary_bytes,
    pipeline_costs,
)
from stagewright.planner.simulation.implied_shares import implied_shares
from stagewright.planner.simulation.network import Collectives, Links, Shares
from stagewright.planner.simulation.peak import StageBytes
from stagewright.planner.simulation.simulate import simulate
from stagewright.planner.simulation.timeline import Timeline
from stagewright.planner.simulation.versions import versions_beside_the_master
from stagewright.planner.statistics_bytes import unlike_statistics_bytes
from stagewright.planner.tied_gradients import not_waiting_bytes
from stagewright.planner.version_work import with_version_work

Floats = npt.NDArray[np.float64]

# Sharded gradients are never held in full, so they are scattered at each microbatch.
OPTIONS = CostOptions(accumulate_sharded=False)

_FUSED = re.compile(r"^\((?P<steps>.+)\)OVERLAP_F_B$")


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A plan's prediction with all that it was made of.

    `host_bytes` [D] is what one device of each rank keeps on its host, `step_bytes` [D] what it needs for the time of an
    optimizer step beside its states, `unlike_bytes` [3, D] what its parameters, gradients and optimizer states take beyond
    the prediction, which like the search counts a weight that several stages share with the layers of each, and Shampoo's
    statistics as those of square tiles: a run is expected to hold them.
    """

    prediction: Prediction
    timeline: Timeline
    schedule: Schedule
    costs: StageCosts
    pipeline: PipelineCosts
    links: Links
    stage_bytes: tuple[StageBytes, ...]
    host_bytes: Floats
    step_bytes: Floats
    unlike_bytes: Floats


def evaluate(plan: Plan, profile: ModelProfile, *, replica: int | None = None) -> Evaluation:
    """Return what the plan costs on its cluster; raises InvalidDocument when it was made for other layers.

    Where replicas take uneven shares, bytes are those of `replica`; of the one with most samples where it is None.
    """
    plan.check_profile(layer_digest=profile.layer_digest, num_layers=profile.num_layers)
    schedule = schedule_of(plan.schedule)
    layers = _layers_by_stage(plan, profile, replica)
    bounds = stage_bounds(plan.stages)
    levels = recompute_indices(plan.stages)
    layout = layout_of(schedule)
    check_stage_graph(layout, bounds, profile)
    wiring = wiring_of(plan, profile, layers)
    pipeline = pipeline_costs(
        layout,
        bounds,
        levels,
        layers,
        wiring,
        base_bytes=np.array([base_bytes(profile, device) for device in rank_devices(plan)]),
        ties=plan_ties(plan, profile),
        action_overhead_s=profile.action_overhead_s,
    )
    static = pipeline.static_bytes - _shared_state_bytes(plan, profile, layout, layers)
    static = static + _other_pipelines_bytes(schedule, layout, bounds, layers)
    if schedule.weight_policy in UPDATES_PER_MICROBATCH:
        static[1] = _late_gradient_bytes(schedule, bounds, levels, layers, static[1], pipeline.workspace_bytes)
    parameters = np.array(
        [row.state_bytes[0, bounds[stage] : bounds[stage + 1]].sum() for stage, row in enumerate(layers)]
    )
    version_bytes = _version_bytes(schedule, parameters)
    pipeline = replace(pipeline, static_bytes=static, version_bytes=version_bytes)
    devices = [device_of(plan.cluster, stage.group) for stage in plan.stages]
    pipeline = with_version_work(pipeline, schedule, layout, profile, parameters, devices)
    pipeline = _with_local_steps(pipeline, layout, local_steps(plan))
    offloaded = _offloaded_bytes(plan, profile, bounds, layers)
    pipeline = _with_offload(pipeline, layout, plan, offloaded)
    changes = _changes(plan, profile, layers)
    pipeline = _with_changes(pipeline, plan, changes)
    costs = stage_costs(pipeline, bounds, levels, layers)
    links = links_of(layout, bounds, layers, wiring)
    timeline = _timed(schedule, costs, links, layout, pipeline.tail_s, pipeline.optimizer_s)
    gathers = [gather for each in changes.values() for row in each for gather in row]
    prediction = _prediction(
        plan, profile, schedule, layout, pipeline, timeline, layers, levels, bounds, costs, gathers
    )
    step_bytes = np.zeros(layout.num_ranks)
    for stage, needed in enumerate(step_workspaces(plan, profile, layers, bounds, replica)):
        ranks = np.unique(schedule.placement[:, stage])
        step_bytes[ranks] = np.maximum(step_bytes[ranks], needed)
    return Evaluation(
        prediction,
        timeline,
        schedule,
        costs,
        pipeline,
        links,
        _stage_bytes(plan, profile, bounds, levels, layers),
        host_bytes=_rank_sum(layout, offloaded),
        step_bytes=step_bytes,
        unlike_bytes=_unlike_state_bytes(plan, profile, layout, layers)
        - _spared_shards(plan, profile, layout, bounds, layers)
        + np.outer((0.0, 0.0, 1.0), _rank_sum(layout, unlike_statistics_bytes(plan, profile, layers))),
    )


def _stage_bytes(
    plan: Plan, profile: ModelProfile, bounds: Sequence[int], levels: Sequence[int], layers: Sequence[LayerCosts]
) -> tuple[StageBytes, ...]:
    level = np.asarray(levels, dtype=np.int64)
    found = []
    for stage, row in enumerate(layers):
        chosen = np.arange(bounds[stage], bounds[stage + 1])
        at = (level[chosen], chosen)
        passing = passing_bytes(plan, profile, stage, row, bounds)
        absent = not_waiting_bytes(plan, profile, stage, row, bounds)
        found.append(
            StageBytes(
                row.kept_bytes[at],
                row.late_bytes[at],
                np.maximum(row.table.workspace_bytes[at] - absent, 0.0),
                np.maximum(row.table.split_workspace_bytes[at] - absent, 0.0),
                phases=passing.phases,
                whole=passing.whole,
                copied=passing.copied,
                at_once=passing.at_once,
            )
        )
    return tuple(found)


def step_time_at(evaluation: Evaluation, slowness: Floats) -> float:
    """Return the step time in seconds when all that pipeline rank d computes takes slowness[d] times as long, [D].

    A stage that several ranks hold takes the mean of theirs; messages and reductions keep their seconds.
    """
    layout = layout_of(evaluation.schedule)
    held = [{slot.stage for slot in slots} for slots in layout.slots]
    stage = np.array(
        [
            np.mean([slowness[rank] for rank, stages in enumerate(held) if index in stages])
            for index in range(evaluation.costs.num_stages)
        ]
    )
    names = ("forward_s", "input_grad_s", "weight_grad_s", "recompute_s")
    costs = replace(evaluation.costs, **{name: getattr(evaluation.costs, name) * stage for name in names})
    tail_s = evaluation.pipeline.tail_s + (slowness - 1.0) * _rank_sum(layout, evaluation.pipeline.optimizer_s)
    optimizer_s = evaluation.pipeline.optimizer_s * stage
    timeline = _timed(evaluation.schedule, costs, evaluation.links, layout, tail_s, optimizer_s)
    overhead_s = evaluation.prediction.step_time_s - evaluation.timeline.makespan_s
    expected = evaluation.prediction.expectation
    if expected is not None:
        overhead_s += expected.message_s + expected.jitter_s
    return timeline.makespan_s + overhead_s * float(slowness.max())


def makespan_with(evaluation: Evaluation, layout: Layout, shares_of: Callable[[Schedule], Shares]) -> float:
    """Return the makespan where the actions of the schedule that is timed take other shares of their stages' seconds.

    `layout` is that of the evaluation's schedule.
    """
    pipeline = evaluation.pipeline
    return _timed(
        evaluation.schedule,
        evaluation.costs,
        evaluation.links,
        layout,
        pipeline.tail_s,
        pipeline.optimizer_s,
        shares_of=shares_of,
        trace=False,
    ).makespan_s


def _timed(
    schedule: Schedule,
    costs: StageCosts,
    links: Links,
    layout: Layout,
    tail_s: Floats,
    optimizer_s: Floats,
    *,
    shares_of: Callable[[Schedule], Shares] = implied_shares,
    trace: bool = True,
) -> Timeline:
    """Return the simulated timeline; optimizer steps stand where they run.

    That is in the tails, or where weights change under microbatches behind the last backward of each update.
    """
    if not update_period(schedule):
        return simulate(schedule, costs, links=links, tail_s=tail_s, shares=shares_of(schedule), trace=trace)
    stepped = replace(schedule, orders=with_optimizer_steps(schedule))
    tail_s = np.maximum(tail_s - _rank_sum(layout, optimizer_s), 0.0)
    return simulate(
        stepped,
        costs,
        links=links,
        collectives=Collectives(optimizer_s=optimizer_s),
        tail_s=tail_s,
        shares=shares_of(stepped),
        trace=trace,
    )


def _other_pipelines_bytes(
    schedule: Schedule, layout: Layout, bounds: Sequence[int], layers: Sequence[LayerCosts]
) -> Floats:
    """Return the bytes [3, D] of states of a stage that a rank holds again, where each pipeline trains weights of its own."""
    again = np.zeros((3, layout.num_ranks))
    if schedule.weight_policy is not WeightPolicy.ELASTIC:
        return again
    states = [row.state_bytes[:, bounds[stage] : bounds[stage + 1]].sum(axis=1) for stage, row in enumerate(layers)]
    for rank, slots in enumerate(layout.slots):
        held = [slot.stage for slot in slots]
        again[:, rank] = sum((states[stage] for stage in held), np.zeros(3))
        again[:, rank] -= sum((states[stage] for stage in set(held)), np.zeros(3))
    return again


def _late_gradient_bytes(
    schedule: Schedule,
    bounds: Sequence[int],
    levels: Sequence[int],
    layers: Sequence[LayerCosts],
    gradient_bytes: Floats,
    workspace_bytes: Floats,
) -> Floats:
    """Return what gradients add to the peak of each rank, [D], where each microbatch's are applied and gone at its end.

    They come as the activations of their microbatch go: with A live activations, a of them that microbatch's, the peak is
    max(A + workspace, A - a + gradients).
    """
    level = np.asarray(levels, dtype=np.int64)
    leaving = np.zeros(schedule.num_ranks)
    for stage, row in enumerate(layers):
        chosen = np.arange(bounds[stage], bounds[stage + 1])
        ranks = np.unique(schedule.placement[:, stage])
        leaving[ranks] += row.kept_bytes[level[chosen], chosen].sum()
    return np.maximum(gradient_bytes - leaving - workspace_bytes, 0.0)


def _version_bytes(schedule: Schedule, parameter_bytes: Floats) -> Floats:
    """Return the bytes [D] of weights that each rank holds beside those that its optimizers step."""
    found = np.zeros(schedule.num_ranks)
    np.add.at(found, schedule.placement, versions_beside_the_master(schedule) * parameter_bytes)
    return found


def _with_local_steps(pipeline: PipelineCosts, layout: Layout, every: int | None) -> PipelineCosts:
    """Return the costs where replicas reduce once in `every` steps, one step's share of it."""
    if every is None:
        return pipeline
    saved = pipeline.reduction_s * (1.0 - 1.0 / every)
    return replace(
        pipeline, reduction_s=pipeline.reduction_s - saved, tail_s=pipeline.tail_s - _rank_sum(layout, saved)
    )


def _offloaded_bytes(plan: Plan, profile: ModelProfile, bounds: Sequence[int], layers: Sequence[LayerCosts]) -> Floats:
    """Return the bytes of optimizer states that one device of each stage keeps in host memory, [stages].

    Those of a weight that several layers of the stage share are there once.
    """
    states = np.array([row.state_bytes[2, bounds[i] : bounds[i + 1]].sum() for i, row in enumerate(layers)])
    for tie in shared_weights(plan, profile):
        for index in tie.stages:
            row = layers[index]
            for layer in [layer for layer in tie.layers if bounds[index] <= layer < bounds[index + 1]][1:]:
                share = tie.num_parameters / max(float(row.table.dense_parameters[layer]), 1.0)
                states[index] -= row.state_bytes[2, layer] * min(1.0, share)
    return states * [stage.optimizer_offload for stage in plan.stages]


def _with_offload(pipeline: PipelineCosts, layout: Layout, plan: Plan, offloaded: Floats) -> PipelineCosts:
    """Return the costs where stages keep a share of their optimizer states on the host and stream it in for the step."""
    if not offloaded.any():
        return pipeline
    seconds = np.zeros(layout.num_stages)
    for index, stage in enumerate(plan.stages):
        if not stage.optimizer_offload:
            continue
        device = device_of(plan.cluster, stage.group)
        if device.host_bytes_per_s is None:
            raise InvalidDocument(
                f"stages[{index}].optimizer_offload is {stage.optimizer_offload}, {device.name} states no bandwidth to a host",
                field=f"stages[{index}].optimizer_offload",
                hint="set host_bytes_per_s of the device, or keep the states on it",
            )
        seconds[index] = streamed_states_s(offloaded[index], device.host_bytes_per_s)
    static = pipeline.static_bytes.copy()
    static[2] -= _rank_sum(layout, offloaded)
    return replace(
        pipeline,
        static_bytes=static,
        optimizer_s=pipeline.optimizer_s + seconds,
        tail_s=pipeline.tail_s + _rank_sum(layout, seconds),
    )


def _changes(plan: Plan, profile: ModelProfile, layers: Sequence[LayerCosts]) -> dict[int, tuple[list[Gather], ...]]:
    """Return what is gathered in a forward and in a backward where stages of one rank differ in degrees, by the later stage."""
    changes = changes_of(plan, [profile.classes[name].kind for name in profile.layer_classes])
    if any(max(change.joins, change.splits) > 1 for change in changes):  # whole sequences cross
        stages = [
            stage.model_copy(update={"degrees": stage.degrees.model_copy(update={"sp": False})})
            for stage in plan.stages
        ]
        layers = _layers_by_stage(plan.model_copy(update={"stages": tuple(stages)}), profile)
    return {
        change.stage + 1: change.gathers(
            float(layers[change.stage].cut_bytes[plan.stages[change.stage + 1].layer_indices[0]])
        )
        for change in changes
    }


def _with_changes(
    pipeline: PipelineCosts, plan: Plan, changes: Mapping[int, tuple[list[Gather], ...]]
) -> PipelineCosts:
    """Return the costs with what is gathered between stages of one rank: in the later one's forward and backward."""
    if not changes:
        return pipeline
    costs = pipeline.costs.copy()
    for stage, gathers in changes.items():
        group = group_of(plan.cluster, plan.stages[stage].group)
        costs[:2, stage] += [sum(gather.seconds(group) for gather in each) for each in gathers]
    return replace(pipeline, costs=costs)


def _shared_state_bytes(plan: Plan, profile: ModelProfile, layout: Layout, layers: Sequence[LayerCosts]) -> Floats:
    """Return the bytes [3, D] of parameters, gradients and optimizer that layers of one rank share and each counts."""
    shared = np.zeros((3, layout.num_ranks))
    stage_of = {layer: index for index, stage in enumerate(plan.stages) for layer in stage.layer_indices}
    for tie in shared_weights(plan, profile):
        for rank, slots in enumerate(layout.slots):
            held = {slot.stage for slot in slots}
            for layer in [layer for layer in tie.layers if stage_of[layer] in held][1:]:
                row = layers[stage_of[layer]]
                parameters = float(row.table.dense_parameters[layer])
                if parameters > 0:
                    shared[:, rank] += row.state_bytes[:, layer] * min(1.0, tie.num_parameters / parameters)
    return shared


def _unlike_state_bytes(plan: Plan, profile: ModelProfile, layout: Layout, layers: Sequence[LayerCosts]) -> Floats:
    """Return what states of weights that several stages share take beyond those of their layers, [3, D]; may be negative.

    The devices of all these stages meet once an iteration, so that ZeRO divides the optimizer's states over all of them, and
    neither gradients nor weights.
    """
    unlike = np.zeros((3, layout.num_ranks))
    stage_of = {layer: index for index, stage in enumerate(plan.stages) for layer in stage.layer_indices}
    sizes = ParameterBytes.of(plan.job.optimizer)
    for tie in shared_weights(plan, profile):
        if len(tie.stages) == 1 or not any(plan.stages[stage].degrees.zero for stage in tie.stages):
            continue
        divided = tied_members(plan, tie) if plan.stages[min(tie.stages)].degrees.zero else 1
        held = np.array([sizes.parameter, sizes.gradient, (sizes.master + sizes.moments) / divided])
        for rank, slots in enumerate(layout.slots):
            inside = [layer for layer in tie.layers if stage_of[layer] in {slot.stage for slot in slots}]
            if inside:
                row = layers[stage_of[inside[0]]]
                share = min(1.0, tie.num_parameters / max(float(row.table.dense_parameters[inside[0]]), 1.0))
                unlike[:, rank] += tie.num_parameters * held - row.state_bytes[:, inside[0]] * share
    return unlike


def _spared_shards(
    plan: Plan, profile: ModelProfile, layout: Layout, bounds: Sequence[int], layers: Sequence[LayerCosts]
) -> Floats:
    """Return the bytes [3, D] of weights that the ledger counts and a run does not hold.

    Under ZeRO-3 weights narrower than 32 bits are gathered from their masters, so that there is no shard of them beside; where
    masters lie on the host there is one.
    """
    spared, optimizer, ties = np.zeros(layout.num_stages), plan.job.optimizer, shared_weights(plan, profile)
    for index, (stage, row) in enumerate(zip(plan.stages, layers, strict=True)):
        if stage.degrees.zero < 3 or stage.optimizer_offload or ParameterBytes.of(optimizer).master == 0:
            continue
        inside = slice(bounds[index], bounds[index + 1])
        together, experts = reduced_parameters(row, inside, stage.degrees)
        dense = sum(unit_parameters(together, inside.start, ties))
        for parameters, shards in ((dense, num_shards(plan, index)), (sum(experts), expert_shards(stage.degrees))):
            if shards > 1:
                spared[index] += parameters * optimizer.parameter_bytes / shards
    return np.stack([_rank_sum(layout, spared), *np.zeros((2, layout.num_ranks))])


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


def group_of(cluster: Cluster, name: str | None) -> NodeGroup:
    """Return a node group by name, the first one for None."""
    return next((group for group in cluster.groups if group.name == name), cluster.groups[0])


def device_of(cluster: Cluster, group: str | None) -> Device:
    """Return the device of a node group, the first one for None."""
    return group_of(cluster, group).device


def rank_devices(plan: Plan) -> list[Device]:
    """Return the device of each pipeline rank, by the group of the stages it holds."""
    found = [plan.cluster.groups[0].device] * plan.schedule.num_ranks
    for row in plan.schedule.placement:
        for stage, rank in zip(plan.stages, row, strict=True):
            found[rank] = device_of(plan.cluster, stage.group)
    return found


def base_bytes(profile: ModelProfile, device: Device) -> float:
    """Return what framework and driver hold before the first tensor, bytes."""
    return profile.framework_bytes + device.reserved_bytes


def ties_of(profile: ModelProfile, degrees: Degrees, job: TrainingJob) -> list[Tie]:
    """Return the pairs of layers that share a weight, with its gradient's bytes on one device."""
    names = {name: index for index, name in enumerate(profile.layer_names)}
    divisor = degrees.tp if degrees.vocab_parallel else 1
    found = []
    for tie in profile.trained_ties:
        layers = sorted(names[name] for name in tie.layers)
        size = tie.num_parameters / divisor * job.optimizer.gradient_bytes
        found += [Tie(layers[0], other, size) for other in layers[1:]]
    return found


def plan_ties(plan: Plan, profile: ModelProfile) -> list[Tie]:
    """Return the pairs of layers that share a weight; where their stages differ, the larger gradient on one device."""
    return max(
        (ties_of(profile, degrees, plan.job) for degrees in dict.fromkeys(stage.degrees for stage in plan.stages)),
        key=lambda ties: sum(tie.gradient_bytes for tie in ties),
    )


def wiring_of(plan: Plan, profile: ModelProfile, layers: Sequence[LayerCosts]) -> Wiring:
    """Return the links between the plan's pipeline ranks."""
    model = CostModel(profile, plan.cluster, plan.job, options_of(plan), plan.mapping.axis_order)
    first = [0] * plan.schedule.num_ranks
    for row in reversed(plan.schedule.placement):
        for stage, rank in reversed(list(enumerate(row))):
            first[rank] = stage
    return wire_ranks(
        model,
        [(plan.stages[stage].degrees, _link_group(plan, stage, model)) for stage in first],
        plan.mapping.pipeline_ranks,
        max(float(row.cut_bytes.max()) for row in layers),
    )


def slowest_inside(model: CostModel, degrees: Degrees, groups: Sequence[str]) -> str:
    """Return the node group whose links carry a tensor-parallel group slowest, the first of equal ones."""
    return min(groups, key=lambda name: model.rank_groups(degrees, group=name).tp.ring_bytes_per_s)


def _link_group(plan: Plan, index: int, model: CostModel) -> str | None:
    """Return the node group on whose links a stage's tensor-parallel groups are priced."""
    stage = plan.stages[index]
    if not stage.batch_shares and not stage.state_shares:
        return stage.group
    groups = dict.fromkeys(part.group for part in parts_of_stage(plan, index))
    return slowest_inside(model, stage.degrees, list(groups))


def wire_ranks(
    model: CostModel,
    ranks: Sequence[tuple[Degrees, str | None]],
    devices: Sequence[Sequence[int]],
    reference_bytes: float,
) -> Wiring:
    """Return the wiring of pipeline ranks with their own degrees and node groups; `devices` by rank."""
    width = max(len(row) for row in devices)
    device = np.array([np.resize(row, width) for row in devices], dtype=np.int64)
    each = {key: wire(model, key[0], device, reference_bytes, key[1]).inside for key in dict.fromkeys(ranks)}
    insides = tuple(each[key] for key in ranks) if len(each) > 1 else ()
    return Wiring(model.cluster, device, reference_bytes, each[ranks[0]], insides)


def wire(
    model: CostModel, degrees: Degrees, device: npt.NDArray[np.int64], reference_bytes: float, group: str | None
) -> Wiring:
    """Return the wiring of ranks on `device` [D, devices of a rank]."""
    inside = model.scattering_group(degrees, group=group, num_pipeline_ranks=len(device))
    return Wiring(model.cluster, device, reference_bytes, inside)


def links_of(layout: Layout, bounds: Sequence[int], layers: Sequence[LayerCosts], wiring: Wiring) -> Links:
    """Return the same lines in the simulator's form."""
    ranks = layout.num_ranks
    latency, bandwidth = np.zeros((ranks, ranks)), np.full((ranks, ranks), np.inf)
    for first, second in {(a, b) for a, b in layout.hop_pairs.tolist() if a != b}:
        line = wiring.line(first, second)
        for a, b in ((first, second), (second, first)):
            latency[a, b], bandwidth[a, b] = line.latency_s, line.bytes_per_s
    return Links(latency_s=latency, bytes_per_s=bandwidth, boundary_bytes=boundary_bytes(layout, bounds, layers))


def _layers_by_stage(plan: Plan, profile: ModelProfile, replica: int | None = None) -> list[LayerCosts]:
    known: dict[tuple[Degrees, str | None, tuple[int, ...], tuple[float, ...]], LayerCosts] = {}
    model = CostModel(profile, plan.cluster, plan.job, options_of(plan), plan.mapping.axis_order)
    for index, stage in enumerate(plan.stages):
        key = (stage.degrees, stage.group, stage.batch_shares, stage.state_shares)
        if key not in known and (stage.batch_shares or stage.state_shares):
            parts = parts_of_stage(plan, index)
            known[key] = joined_layer_costs(model, stage.degrees, parts, told=told_part(plan, index, replica))
        elif key not in known:
            known[key] = layer_costs(
                model,
                Configuration(
                    stage.degrees,
                    plan.schedule.num_ranks,
                    samples_by_replica(plan, index)[0],
                    plan.schedule.num_microbatches,
                    plan.mapping.axis_order,
                    stage.group,
                ),
            )
    return [known[stage.degrees, stage.group, stage.batch_shares, stage.state_shares] for stage in plan.stages]


def stage_costs(
    pipeline: PipelineCosts, bounds: Sequence[int], levels: Sequence[int], layers: Sequence[LayerCosts]
) -> StageCosts:
    """Return the simulator's costs; recomputation is told apart from the input gradient."""
    count = len(bounds) - 1
    recompute, kept, late = np.zeros(count), np.zeros(count), np.zeros(count)
    level = np.asarray(levels, dtype=np.int64)
    for stage in range(count):
        chosen = np.arange(bounds[stage], bounds[stage + 1])
        at = (level[chosen], chosen)
        recompute[stage] = layers[stage].recompute_s[at].sum()
        kept[stage] = layers[stage].kept_bytes[at].sum()
        late[stage] = layers[stage].late_bytes[at].sum()
    kept = np.where((kept == 0) & (late > 0), 1.0, kept)  # a byte, so that the share of it can be told
    share = 1.0 - np.divide(late, kept, out=np.ones(count), where=kept > 0)
    forward, input_grad, weight_grad = pipeline.costs
    return StageCosts(forward, input_grad - recompute, weight_grad, kept, share, recompute)


def _parse_step(text: str) -> Action | tuple[Action, ...]:
    match = _FUSED.match(text)
    if match is None:
        return parse_action(text)
    return tuple(parse_action(part) for part in match["steps"].split(";"))


def _prediction(
    plan: Plan,
    profile: ModelProfile,
    schedule: Schedule,
    layout: Layout,
    pipeline: PipelineCosts,
    timeline: Timeline,
    layers: Sequence[LayerCosts],
    levels: Sequence[int],
    bounds: Sequence[int],
    costs: StageCosts,
    gathers: Sequence[Gather],
) -> Prediction:
    job = plan.job
    step_s = timeline.makespan_s + profile.step_overhead_s
    tokens = job.global_batch * job.sequence_length
    model_flops, extra_flops = _flops(plan, bounds, levels, layers)
    peak = _peak_flops(plan)
    busy = timeline.busy_s()
    price = _price_per_s(plan)
    source = worst_source([row.table.source for row in layers])
    logits = _logits(layout, bounds, levels, layers)
    return Prediction(
        step_time_s=step_s,
        tokens_per_s=tokens / step_s,
        samples_per_s=job.global_batch / step_s,
        mfu=3 * model_flops / (step_s * peak) if peak and model_flops else None,
        hfu=(3 * model_flops + extra_flops) / (step_s * peak) if peak and model_flops else None,
        bubble_over_total=float(np.clip(1.0 - busy.mean() / timeline.makespan_s, 0.0, 1.0)),
        peak_memory_bytes=tuple(pipeline.peak_bytes.tolist()),
        memory=tuple(_items(pipeline, rank, logits[rank]) for rank in range(layout.num_ranks)),
        stage_time_s=tuple(pipeline.costs.sum(axis=0).tolist()),
        exposed_communication_s=float((pipeline.tail_s - _rank_sum(layout, pipeline.optimizer_s)).max()),
        optimizer_s=float(_rank_sum(layout, pipeline.optimizer_s).max()),
        link_bytes=link_bytes(plan, profile, schedule, layout, bounds, layers, costs.activation.tolist(), gathers),
        tokens_per_dollar=None if price is None else tokens / step_s / price,
        source=source,
        expected_error=max(expected_error(source, device_of(plan.cluster, stage.group)) for stage in plan.stages),
    )


def _items(pipeline: PipelineCosts, rank: int, logits: float) -> MemoryItems:
    parameters, gradients, optimizer = pipeline.static_bytes[:, rank].tolist()
    return MemoryItems(
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        weight_versions=float(np.broadcast_to(pipeline.version_bytes, pipeline.tail_s.shape)[rank]),
        activations=float(pipeline.activation_bytes[rank]) - logits,
        logits=logits,
        workspace=float(pipeline.workspace_bytes[rank]),
        framework=float(np.broadcast_to(pipeline.base_bytes, pipeline.tail_s.shape)[rank]),
    )


def _logits(layout: Layout, bounds: Sequence[int], levels: Sequence[int], layers: Sequence[LayerCosts]) -> list[float]:
    """Return the bytes of logits among each rank's activations at their peak."""
    level = np.asarray(levels, dtype=np.int64)
    kept, late, logits, late_logits = (np.zeros(len(bounds) - 1) for _ in range(4))
    for stage, row in enumerate(layers):
        chosen = np.arange(bounds[stage], bounds[stage + 1])
        at = (level[chosen], chosen)
        kept[stage] = row.kept_bytes[at].sum()
        late[stage] = row.late_bytes[at].sum()
        if len(row.table.logits_bytes):
            logits[stage] = row.table.logits_bytes[chosen].sum()
            late_logits[stage] = np.clip(row.late_bytes[at], 0.0, row.table.logits_bytes[chosen]).sum()
    found = []
    for rank, slots in enumerate(layout.slots):
        held = [slot.stage for slot in slots]
        live = layout.live[rank]
        if not len(live):
            found.append(0.0)
            continue
        fullest = int(np.argmax(live[:, 0] @ kept[held] + live[:, 1] @ late[held]))
        found.append(float(live[fullest, 0] @ logits[held] + live[fullest, 1] @ late_logits[held]))
    return found


def _rank_sum(layout: Layout, by_stage: Floats) -> Floats:
    return np.array([by_stage[sorted({slot.stage for slot in slots})].sum() for slots in layout.slots])


def _flops(
    plan: Plan, bounds: Sequence[int], levels: Sequence[int], layers: Sequence[LayerCosts]
) -> tuple[float, float]:
    """Return forward FLOPs of the global batch, and those that recomputation runs again."""
    model, extra = 0.0, 0.0
    for stage, row in enumerate(layers):
        batches = plan.job.global_batch / told_part(plan, stage).samples
        for layer in range(bounds[stage], bounds[stage + 1]):
            flops = float(row.table.model_flops[layer]) * batches
            model += flops
            forward_s = float(row.forward_s[layer])
            if forward_s > 0:
                extra += flops * min(1.0, float(row.recompute_s[levels[layer], layer]) / forward_s)
    return model, extra


def _peak_flops(plan: Plan) -> float:
    """Return the dense peak of all devices of the plan at the job's dtype, FLOP per second."""
    total = 0.0
    for rank, devices in enumerate(plan.mapping.pipeline_ranks):
        stage = plan.schedule.placement[0].index(rank) if rank in plan.schedule.placement[0] else 0
        kinds = [(device_of(plan.cluster, plan.stages[stage].group), len(devices))]
        if plan.stages[stage].batch_shares or plan.stages[stage].state_shares:
            kinds = _kinds(plan.cluster, devices)
        total += sum(count * (kind.flops.get(plan.job.precision) or max(kind.flops.values())) for kind, count in kinds)
    return total


def _price_per_s(plan: Plan) -> float | None:
    """Return dollars per second of the devices used; None when a device has no price."""
    total = 0.0
    for kind, count in _kinds(plan.cluster, [device for ranks in plan.mapping.pipeline_ranks for device in ranks]):
        if kind.price_per_hour is None:
            return None
        total += count * kind.price_per_hour / 3600.0
    return total or None


def _kinds(cluster: Cluster, devices: Sequence[int]) -> list[tuple[Device, int]]:
    """Return the kinds of some devices with their numbers."""
    ends = np.cumsum([group.num_devices for group in cluster.groups])
    counts = np.bincount(np.searchsorted(ends, devices, side="right"), minlength=len(ends))
    return [(group.device, count) for group, count in zip(cluster.groups, counts.tolist(), strict=True) if count]


def with_prediction(plan: Plan, profile: ModelProfile) -> Plan:
    """Return the plan with the scorer's prediction in it."""
    return plan.model_copy(update={"prediction": evaluate(plan, profile).prediction})
