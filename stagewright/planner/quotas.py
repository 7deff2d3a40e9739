"""How many nodes of each zone to rent: most tokens for a dollar under quotas (Sailor, Strati et al., SOSP 2025).

A cluster's groups are zones: a device kind with a price, a quota of nodes, and links that differ inside and between zones.
For every choice of node counts n_z <= quota_z the fastest plan on those nodes is searched, and of all plans the one that
costs fewest dollars a step is taken,

    dollars = step * sum over zones of (devices that the plan uses in z) * price_z / 3600,

among those within a limit on the step and on the dollars an hour. Counts are every number up to MOST_EVERY, then powers of
two and the quota itself; their product over zones is enumerated. The answer is the best of the choices, each with the
proved gap of its own search; a slower plan on the same nodes is never cheaper when it uses all of them. Sailor prunes the
same space by heuristics and a dynamic programme over zones.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product

from stagewright.planner.cost.cost_model import CostModel
from stagewright.planner.documents.cluster import Cluster
from stagewright.planner.documents.job import TrainingJob
from stagewright.planner.documents.plan import Plan
from stagewright.planner.documents.profile import ConfigurationCost, ModelProfile
from stagewright.planner.errors import Infeasible, InvalidArgument
from stagewright.planner.planning import make_plan

MOST_EVERY = 4


@dataclass(frozen=True, eq=False)
class Rental:
    """The nodes to rent and what they earn.

    Parameters
    ----------
    nodes : rented of each zone, those of none left out.
    choices, searched : how many choices of counts there were, and how many were searched before the deadline.
    """

    plan: Plan
    nodes: Mapping[str, int]
    tokens_per_dollar: float
    choices: int
    searched: int


def rent(
    profile: ModelProfile,
    zones: Cluster,
    job: TrainingJob,
    *,
    most_step_s: float = float("inf"),
    most_dollars_per_hour: float = float("inf"),
    gap: float = 0.01,
    deadline_s: float | None = None,
) -> Rental:
    """Return the nodes and the plan of most tokens per dollar; each group's `num_nodes` is its quota.

    Parameters
    ----------
    most_step_s, most_dollars_per_hour : what a step may take, and what the devices in use may cost.
    deadline_s : for all choices together.

    Raises
    ------
    InvalidArgument : when a zone has no price.
    Infeasible : when no choice that was searched has a plan within both limits.
    """
    started = time.perf_counter()
    for index, group in enumerate(zones.groups):
        if not group.device.price_per_hour:
            raise InvalidArgument(
                f"zone {group.name} has no price",
                field=f"cluster.groups[{index}].device.price_per_hour",
                hint="give its device a price_per_hour",
            )
    choices = list(node_choices(zones))
    best: tuple[float, Plan, dict[str, int]] | None = None
    searched, fastest_s, cheapest = 0, float("inf"), float("inf")
    for nodes in choices:
        left_s = None if deadline_s is None else deadline_s - (time.perf_counter() - started)
        if left_s is not None and left_s <= 0:
            break
        searched += 1
        part = rented(zones, nodes)
        plan = make_plan(on_part(profile, zones, part, job), part, job, gap=gap, deadline_s=left_s, top=0).plan
        if plan is None:
            continue
        step_s, hourly = plan.prediction.step_time_s, dollars_per_hour(plan)
        fastest_s, cheapest = min(fastest_s, step_s), min(cheapest, hourly)
        if step_s > most_step_s or hourly > most_dollars_per_hour:
            continue
        dollars = step_s * hourly / 3600.0
        if best is None or dollars < best[0] * (1 - 1e-12):
            best = (dollars, plan, nodes)
    if best is None:
        raise Infeasible(
            f"none of {searched} choices of nodes takes at most {most_step_s:.4g} s a step for at most "
            f"{most_dollars_per_hour:.4g} dollars an hour; the fastest takes {fastest_s:.4g} s, the cheapest {cheapest:.4g} dollars",
            field="cluster",
            hint="raise a quota or one of the limits",
        )
    dollars, plan, nodes = best
    tokens = job.global_batch * job.sequence_length
    return Rental(plan, nodes, tokens / dollars, len(choices), searched)


def node_choices(zones: Cluster) -> Iterator[dict[str, int]]:
    """Yield every choice of at least one node, the fewest first: nodes of each zone, those of none left out."""
    counts = [_counts(group.num_nodes) for group in zones.groups]
    rows = sorted(product(*counts), key=lambda row: (sum(row), row))
    for row in rows[1:]:
        yield {group.name: count for group, count in zip(zones.groups, row, strict=True) if count}


def rented(zones: Cluster, nodes: Mapping[str, int]) -> Cluster:
    """Return the cluster of the rented nodes, on the links of the whole one."""
    groups = tuple(
        group.model_copy(update={"num_nodes": nodes[group.name]}) for group in zones.groups if group.name in nodes
    )
    name = "+".join(f"{group.num_nodes} {group.name}" for group in groups)
    between = zones.between_groups if len(groups) > 1 else None
    return Cluster(name=name, groups=groups, between_groups=between)


def on_part(profile: ModelProfile, zones: Cluster, part: Cluster, job: TrainingJob) -> ModelProfile:
    """Return the profile as some of the zones see it: measured seconds are those of the fastest device of all zones.

    Where that one is not rented, they grow by the ratio of the rates, which the cost model applies within a cluster.
    """
    model = CostModel(profile, zones, job)
    factor = min(model.slowness(group) for group in part.groups)
    if factor == 1.0:
        return profile
    classes = {
        name: layer.model_copy(update={"costs": tuple(_slowed(cost, factor) for cost in layer.costs)})
        for name, layer in profile.classes.items()
    }
    return profile.model_copy(update={"classes": classes})


def _slowed(cost: ConfigurationCost, factor: float) -> ConfigurationCost:
    seconds = {
        name: factor * getattr(cost, name) for name in ("forward_s", "input_grad_s", "weight_grad_s", "optimizer_s")
    }
    recompute = {level: factor * value for level, value in cost.recompute_s.items()}
    return cost.model_copy(update={**seconds, "recompute_s": recompute})


def dollars_per_hour(plan: Plan) -> float:
    """Return what the devices that a plan uses cost; raises InvalidArgument for one without a price."""
    total = 0.0
    for device in [device for ranks in plan.mapping.pipeline_ranks for device in ranks]:
        price = plan.cluster.group_of(device).device.price_per_hour
        if price is None:
            raise InvalidArgument(f"device {device} has no price", field="cluster.groups", hint="give a price_per_hour")
        total += price
    return total


def _counts(quota: int) -> list[int]:
    powers = {1 << power for power in range(quota.bit_length())}
    return sorted(count for count in {*range(MOST_EVERY + 1), *powers, quota} if count <= quota)
