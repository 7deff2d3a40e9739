"""Tofu (Wang et al., EuroSys 2019) on the common problem: every tensor and every operator divided by all devices.

`sharding.tofu` halves the devices again and again and divides all operators and parameters at each halving at least
communication. Here all layers of a plan take the same degrees, so a halving divides samples (weights are sharded too,
hence gathered in both directions and their gradients scattered: ZeRO-3) or features (tensor parallelism). The recursion is

    (dp, tp) -> the one of (2 dp, tp) and (dp, 2 tp) that sends fewer bytes,    log2 N times from (1, 1)

by the bytes that a device sends in a step of one microbatch, as the cost model counts them. With uniform links the
recursion is cost-monotone and the greedy choice optimal (the paper's theorem); on nested links it is a heuristic; time,
memory and pipelines are not in it. Where the end of the recursion does not fit, the product that sends least does next.
"""

from __future__ import annotations

from collections.abc import Callable

from stagewright.planner.documents.outcome import PlanOutcome
from stagewright.planner.documents.plan import Degrees
from stagewright.planner.planners.reach import Reach, configurations, rule_of
from stagewright.planner.planners.registry import NamedPlanner
from stagewright.planner.planners.scoring import Choice, choices_outcome
from stagewright.planner.search.limits import Limits
from stagewright.planner.search.problem import Candidate, Partition, Problem
from stagewright.planner.search.space import PIPELINE_OUTSIDE

Product = tuple[int, int]


def solve(problem: Problem, limits: Limits) -> PlanOutcome:
    """Return the division that the halvings end at, where it fits; else the product that sends least."""
    rule = rule_of(problem, _REACH)
    found = [
        (configuration, (configuration.degrees.dp, configuration.degrees.tp))
        for configuration in configurations(problem, _REACH)
        if not any(degree & (degree - 1) for degree in (configuration.degrees.dp, configuration.degrees.tp))
    ]
    sent = {product: sent_bytes(problem, product) for product in {product for _, product in found}}
    most = max((dp * tp for dp, tp in sent), default=1)
    ends = halvings(most, lambda product: sent_bytes(problem, product), within=list(sent))
    layers = problem.profile.num_layers
    partition = Partition((0, layers), (problem.levels[0],) * layers)
    found.sort(key=lambda pair: (pair[1] != ends, sent[pair[1]], pair[0].num_microbatches))
    choices = [Choice(sent[product], Candidate(item, rule, 1), partition) for item, product in found]
    return choices_outcome(problem, limits, choices, PLANNER.name, in_order=True)


def halvings(num_devices: int, cost: Callable[[Product], float], *, within: list[Product]) -> Product:
    """Return the (dp, tp) that halving after halving ends at, each at least cost; ties divide samples.

    Only products that a member of `within` on all the devices can still be reached from are entered.
    """
    dp, tp = 1, 1
    while dp * tp < num_devices:
        following = [
            (a, b)
            for a, b in ((2 * dp, tp), (dp, 2 * tp))
            if any(x % a == 0 and y % b == 0 for x, y in within if x * y == num_devices)
        ]
        if not following:
            break
        dp, tp = min(following, key=cost)
    return dp, tp


def sent_bytes(problem: Problem, product: Product) -> float:
    """Return the bytes that a device sends in a step: tensor-parallel collectives, gathered weights, scattered gradients."""
    dp, tp = product
    model = problem.model(PIPELINE_OUTSIDE)
    degrees = Degrees(dp=dp, tp=tp, zero=3 if dp > 1 else 0)
    table = model.shape_table(degrees, 1)
    layers = sum(float(values.sum()) for values in table.link_bytes.values()) * problem.job.global_batch / dp
    traffic = model.traffic(float(table.dense_parameters.sum()), float(table.expert_parameters.sum()), degrees)
    return layers + traffic.microbatch_bytes + traffic.iteration_bytes


_REACH = Reach(pipeline=False, tensor=True, zero=(3,))

PLANNER = NamedPlanner(
    "tofu",
    "Wang et al., Supporting Very Large Models using Automatic Dataflow Graph Partitioning, EuroSys 2019",
    solve,
    objective="bytes a device sends a step",
)
