"""What weights, gradients and optimizer states of a plan take beside the sum of its layers', by pipeline rank or stage.

Weights that several layers share, versions of weights, states on hosts, shards that a run spares.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from stagewright.planner.cost.memory import ParameterBytes, expert_shards
from stagewright.planner.documents.plan import Plan
from stagewright.planner.documents.profile import ModelProfile
from stagewright.planner.link_bytes import (
    SharedWeight,
    num_shards,
    reduced_parameters,
    shared_weights,
    tied_members,
    unit_parameters,
)
from stagewright.planner.schedules.schedule import Schedule, WeightPolicy
from stagewright.planner.search.layer_costs import LayerCosts
from stagewright.planner.search.order import Layout
from stagewright.planner.simulation.versions import versions_beside_the_master

Floats = npt.NDArray[np.float64]


def rank_sum(layout: Layout, by_stage: Floats) -> Floats:
    """Return the sum over the stages of each pipeline rank, [D], a stage counted once, of `by_stage` [stages]."""
    return np.array([by_stage[sorted({slot.stage for slot in slots})].sum() for slots in layout.slots])


def other_pipelines_bytes(
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


def late_gradient_bytes(
    schedule: Schedule,
    bounds: Sequence[int],
    levels: Sequence[int],
    layers: Sequence[LayerCosts],
    gradient_bytes: Floats,
    workspace_bytes: Floats,
) -> Floats:
    """Return what gradients add to the peak of each rank, [D], where each microbatch's are applied and gone at its end.

    They come as the activations of their microbatch go. With A live activations, the peak is A + workspace, or in the backward of
    some layer A - a + g + w, with a and g the activations and gradients of the layers behind it and w the layer's own workspace,
    or at the end. `gradient_bytes` [D] are those of all layers, a weight that several share once.
    """
    level = np.asarray(levels, dtype=np.int64)
    most, all_bytes = np.full(schedule.num_ranks, -np.inf), np.zeros(schedule.num_ranks)
    for stage, row in enumerate(layers):
        chosen = np.arange(bounds[stage], bounds[stage + 1])[::-1]
        at = (level[chosen], chosen)
        behind = np.append(0.0, np.cumsum(row.state_bytes[1, chosen] - row.kept_bytes[at]))
        above = max((behind[:-1] + row.table.workspace_bytes[at]).max(initial=0.0), behind[-1])
        ranks = np.unique(schedule.placement[:, stage])
        most[ranks] = np.maximum(most[ranks], above)
        all_bytes[ranks] += row.state_bytes[1, chosen].sum()
    return np.maximum(most - (all_bytes - gradient_bytes) - workspace_bytes, 0.0)


def version_bytes(
    schedule: Schedule,
    bounds: Sequence[int],
    levels: Sequence[int],
    layers: Sequence[LayerCosts],
    parameter_bytes: Floats,
    workspace_bytes: Floats,
) -> Floats:
    """Return what weights beside those that its optimizers step add to the peak of each rank, [D], of `parameter_bytes` [stages].

    PipeMare notes the weights before an update, when the activations of the microbatch before it are gone.
    """
    level = np.asarray(levels, dtype=np.int64)
    found, noted = np.zeros((2, schedule.num_ranks))
    np.add.at(found, schedule.placement, versions_beside_the_master(schedule) * parameter_bytes)
    if schedule.parameters.get("predictor") == "discrepancy":
        for stage, row in enumerate(layers):
            chosen = np.arange(bounds[stage], bounds[stage + 1])
            leaving = row.kept_bytes[level[chosen], chosen].sum()
            noted[np.unique(schedule.placement[:, stage])] += parameter_bytes[stage] - leaving
    return np.asarray(found + np.maximum(noted - workspace_bytes, 0.0))


def offloaded_bytes(plan: Plan, profile: ModelProfile, bounds: Sequence[int], layers: Sequence[LayerCosts]) -> Floats:
    """Return the bytes of optimizer states that one device of each stage keeps in host memory, [stages].

    Those of a weight that several layers of the stage share are there once.
    """
    states = np.array([row.state_bytes[2, bounds[i] : bounds[i + 1]].sum() for i, row in enumerate(layers)])
    for tie in shared_weights(plan, profile):
        for index in tie.stages:
            row = layers[index]
            for layer in [layer for layer in tie.layers if bounds[index] <= layer < bounds[index + 1]][1:]:
                states[index] -= row.state_bytes[2, layer] * _part_of(row, layer, tie)
    return states * [stage.optimizer_offload for stage in plan.stages]


def shared_state_bytes(plan: Plan, profile: ModelProfile, layout: Layout, layers: Sequence[LayerCosts]) -> Floats:
    """Return the bytes [3, D] of parameters, gradients and optimizer that layers of one rank share and each counts."""
    shared = np.zeros((3, layout.num_ranks))
    stage_of = plan.stage_of_layer
    for tie in shared_weights(plan, profile):
        for rank, slots in enumerate(layout.slots):
            held = {slot.stage for slot in slots}
            for layer in [layer for layer in tie.layers if stage_of[layer] in held][1:]:
                row = layers[stage_of[layer]]
                shared[:, rank] += row.state_bytes[:, layer] * _part_of(row, layer, tie)
    return shared


def _part_of(row: LayerCosts, layer: int, tie: SharedWeight) -> float:
    """Return which part of a layer's weights a shared one is."""
    parameters = float(row.table.dense_parameters[layer])
    return min(1.0, tie.num_parameters / parameters) if parameters > 0 else 0.0


def unlike_state_bytes(plan: Plan, profile: ModelProfile, layout: Layout, layers: Sequence[LayerCosts]) -> Floats:
    """Return what states of weights that several stages share take beyond those of their layers, [3, D]; may be negative.

    The devices of all these stages meet once an iteration, so that ZeRO divides the optimizer's states over all of them, and
    neither gradients nor weights.
    """
    unlike = np.zeros((3, layout.num_ranks))
    stage_of = plan.stage_of_layer
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
                counted = row.state_bytes[:, inside[0]] * _part_of(row, inside[0], tie)
                unlike[:, rank] += tie.num_parameters * held - counted
    return unlike


def spared_shard_bytes(
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
    return np.stack([rank_sum(layout, spared), *np.zeros((2, layout.num_ranks))])
