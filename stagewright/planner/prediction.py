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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from stagewright.planner.cost.cost_model import CostModel
from stagewright.planner.cost.measured_cost import worst_source
from stagewright.planner.cost.memory_actions import streamed_states_s
from stagewright.planner.cost.trust import expected_error
from stagewright.planner.documents.plan import Degrees, MemoryItems, Plan, Prediction
from stagewright.planner.documents.profile import ModelProfile
from stagewright.planner.errors import InvalidDocument
from stagewright.planner.layerwise import Gather, changes_of
from stagewright.planner.link_bytes import divides_by_tiles, link_bytes, local_steps
from stagewright.planner.passing_bytes import passing_bytes, reductions
from stagewright.planner.planned_devices import base_bytes, device_of, group_of, peak_flops, price_per_s, rank_devices
from stagewright.planner.planned_links import links_of, plan_ties, wiring_of
from stagewright.planner.planned_schedule import (
    check_stage_graph,
    options_of,
    recompute_indices,
    schedule_of,
    stage_bounds,
)
from stagewright.planner.planned_states import (
    late_gradient_bytes,
    offloaded_bytes,
    other_pipelines_bytes,
    rank_sum,
    shared_state_bytes,
    spared_shard_bytes,
    unlike_state_bytes,
    version_bytes,
)
from stagewright.planner.replica_shares import has_uneven_shares, parts_of_stage, samples_by_replica, told_part
from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.schedules.lowering.gradients import update_period, with_optimizer_steps
from stagewright.planner.schedules.schedule import Schedule
from stagewright.planner.search.joined_costs import joined_layer_costs
from stagewright.planner.search.layer_costs import Configuration, LayerCosts, layer_costs
from stagewright.planner.search.order import Layout, layout_of
from stagewright.planner.search.pipeline_costs import PipelineCosts, pipeline_costs
from stagewright.planner.simulation.implied_shares import implied_shares
from stagewright.planner.simulation.network import Collectives, Links, Shares
from stagewright.planner.simulation.peak import GradientPhase, Reduction, StageBytes
from stagewright.planner.simulation.simulate import simulate
from stagewright.planner.simulation.timeline import Timeline
from stagewright.planner.statistics_bytes import unlike_statistics_bytes
from stagewright.planner.tied_gradients import not_waiting_bytes
from stagewright.planner.tile_shards import unlike_members
from stagewright.planner.version_work import with_version_work

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A plan's prediction with all that it was made of.

    `host_bytes` [D] is what one device of each rank keeps on its host, `step_bytes` [D] what it needs for the time of an
    optimizer step beside its states, `reductions` what one of each stage needs as its gradients are reduced and stepped, `unlike_bytes` [3, D] what its parameters, gradients and optimizer states take beyond
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
    reductions: tuple[Reduction, ...] = ()


def evaluate(plan: Plan, profile: ModelProfile, *, member: int | None = None) -> Evaluation:
    """Return what the plan costs on its cluster; raises InvalidDocument when it was made for other layers.

    Where the devices of a pipeline rank hold unlike shares, bytes are those of the one with the place `member` among them. Where
    that is None, they are those of a replica with most samples, or of the device with most states.
    """
    plan.check_profile(layer_digest=profile.layer_digest, num_layers=profile.num_layers)
    schedule = schedule_of(plan.schedule)
    layers = _layers_by_stage(plan, profile, member)
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
    static = pipeline.static_bytes - shared_state_bytes(plan, profile, layout, layers)
    static = static + other_pipelines_bytes(schedule, layout, bounds, layers)
    if update_period(schedule) == 1:
        static[1] = late_gradient_bytes(schedule, bounds, levels, layers, static[1], pipeline.workspace_bytes)
    parameters = np.array(
        [row.state_bytes[0, bounds[stage] : bounds[stage + 1]].sum() for stage, row in enumerate(layers)]
    )
    versions = version_bytes(schedule, bounds, levels, layers, parameters, pipeline.workspace_bytes)
    pipeline = replace(pipeline, static_bytes=static, version_bytes=versions)
    devices = [device_of(plan.cluster, stage.group) for stage in plan.stages]
    pipeline = with_version_work(pipeline, schedule, layout, profile, parameters, devices)
    pipeline = _with_local_steps(pipeline, layout, local_steps(plan))
    offloaded = offloaded_bytes(plan, profile, bounds, layers)
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
    told = [member]
    if member is None and divides_by_tiles(plan) and not has_uneven_shares(plan):
        told = [places[0] for places in unlike_members(plan)] or told
    reduced = [reductions(plan, profile, layers, bounds, each) for each in told]
    step_bytes = np.max([_step_bytes(schedule, each) for each in reduced], axis=0)
    return Evaluation(
        prediction,
        timeline,
        schedule,
        costs,
        pipeline,
        links,
        _stage_bytes(plan, profile, bounds, levels, layers),
        host_bytes=rank_sum(layout, offloaded),
        step_bytes=step_bytes,
        reductions=tuple(map(max, zip(*reduced, strict=True))),
        unlike_bytes=unlike_state_bytes(plan, profile, layout, layers)
        - spared_shard_bytes(plan, profile, layout, bounds, layers)
        + _fullest([_unlike_statistics(plan, profile, layout, layers, bounds, each) for each in told]),
    )


def _step_bytes(schedule: Schedule, reduced: Sequence[Reduction]) -> Floats:
    """Return what a device of each pipeline rank needs for the time of an optimizer step, [D]."""
    found = np.zeros(schedule.num_ranks)
    for stage, each in enumerate(reduced):
        ranks = np.unique(schedule.placement[:, stage])
        found[ranks] = np.maximum(found[ranks], max(each.most, each.stepped))
    return found


def _unlike_statistics(
    plan: Plan,
    profile: ModelProfile,
    layout: Layout,
    layers: Sequence[LayerCosts],
    bounds: Sequence[int],
    member: int | None,
) -> Floats:
    """Return what a device of each pipeline rank holds for Shampoo beyond the ledger, by class of state, [3, D]."""
    by_stage = unlike_statistics_bytes(plan, profile, layers, bounds, member)
    return np.stack([rank_sum(layout, row) for row in by_stage])


def _fullest(by_member: Sequence[Floats]) -> Floats:
    """Return of each pipeline rank the bytes [3, D] of the device where they are most together."""
    every = np.stack(by_member)
    most = every.sum(axis=1).argmax(axis=0)
    return every[most, :, np.arange(every.shape[2])].T


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
        received = _received_bytes(row, level[chosen], chosen)
        found.append(
            StageBytes(
                row.kept_bytes[at] + received,
                row.late_bytes[at],
                np.maximum(row.table.workspace_bytes[at] - absent, 0.0),
                np.maximum(row.table.input_grad_workspace_bytes[at] - absent, 0.0),
                forward_workspace=np.maximum(row.table.forward_workspace_bytes[at] - received, 0.0),
                late_workspace=row.table.weight_grad_workspace_bytes[chosen],
                phases=_as_they_begin(passing.phases, row.kept_bytes[0, chosen] - row.kept_bytes[at]),
                whole=passing.whole,
                copied=passing.copied,
                at_once=passing.at_once,
                staying=passing.staying,
                beside_product=passing.beside_product,
            )
        )
    return tuple(found)


def _as_they_begin(
    phases: tuple[tuple[GradientPhase, ...], ...], less: Floats
) -> tuple[tuple[GradientPhase, ...], ...]:
    """Return the phases of layers of which `less` is not there as their backwards begin, but made again in them."""
    return tuple(
        (replace(each[0], begin=max(each[0].begin - bytes, 0.0)), *each[1:]) if each else each
        for each, bytes in zip(phases, less.tolist(), strict=bool(phases))
    )


def _received_bytes(row: LayerCosts, levels: Ints, inside: Ints) -> Floats:
    """Return what a stage keeps of what it receives, beside what its layers keep at their levels, [layers].

    A message that its first layer does not keep, as a loss that keeps what it makes of logits, or a norm that keeps its input in
    wider numbers.
    """
    found = np.zeros(len(inside))
    if len(inside) and inside[0] > 0:
        found[0] = row.table.unkept_input_bytes[levels[0], inside[0]]
    return found


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
    tail_s = evaluation.pipeline.tail_s + (slowness - 1.0) * rank_sum(layout, evaluation.pipeline.optimizer_s)
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
    tail_s = np.maximum(tail_s - rank_sum(layout, optimizer_s), 0.0)
    return simulate(
        stepped,
        costs,
        links=links,
        collectives=Collectives(optimizer_s=optimizer_s),
        tail_s=tail_s,
        shares=shares_of(stepped),
        trace=trace,
    )


def _with_local_steps(pipeline: PipelineCosts, layout: Layout, every: int | None) -> PipelineCosts:
    """Return the costs where replicas reduce once in `every` steps, one step's share of it."""
    if every is None:
        return pipeline
    saved = pipeline.reduction_s * (1.0 - 1.0 / every)
    return replace(pipeline, reduction_s=pipeline.reduction_s - saved, tail_s=pipeline.tail_s - rank_sum(layout, saved))


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
    static[2] -= rank_sum(layout, offloaded)
    return replace(
        pipeline,
        static_bytes=static,
        optimizer_s=pipeline.optimizer_s + seconds,
        tail_s=pipeline.tail_s + rank_sum(layout, seconds),
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


def _layers_by_stage(plan: Plan, profile: ModelProfile, member: int | None = None) -> list[LayerCosts]:
    known: dict[tuple[Degrees, str | None, tuple[int, ...], tuple[float, ...]], LayerCosts] = {}
    model = CostModel(profile, plan.cluster, plan.job, options_of(plan), plan.mapping.axis_order)
    for index, stage in enumerate(plan.stages):
        key = (stage.degrees, stage.group, stage.batch_shares, stage.state_shares)
        if key not in known and (stage.batch_shares or stage.state_shares):
            parts = parts_of_stage(plan, index)
            known[key] = joined_layer_costs(model, stage.degrees, parts, told=told_part(plan, index, member))
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
    peak = peak_flops(plan)
    busy = timeline.busy_s()
    price = price_per_s(plan)
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
        exposed_communication_s=float((pipeline.tail_s - rank_sum(layout, pipeline.optimizer_s)).max()),
        optimizer_s=float(rank_sum(layout, pipeline.optimizer_s).max()),
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


def with_prediction(plan: Plan, profile: ModelProfile) -> Plan:
    """Return the plan with the scorer's prediction in it."""
    return plan.model_copy(update={"prediction": evaluate(plan, profile).prediction})
