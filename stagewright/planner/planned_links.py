"""What crosses links in a plan: the wiring between its pipeline ranks, and the weights that stages share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from stagewright.planner.cost.cost_model import CostModel
from stagewright.planner.documents.job import TrainingJob
from stagewright.planner.documents.plan import Degrees, Plan
from stagewright.planner.documents.profile import ModelProfile
from stagewright.planner.planned_schedule import options_of
from stagewright.planner.replica_shares import parts_of_stage
from stagewright.planner.search.layer_costs import LayerCosts
from stagewright.planner.search.order import Layout
from stagewright.planner.search.pipeline_costs import Tie, Wiring, boundary_bytes
from stagewright.planner.simulation.network import Links


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
