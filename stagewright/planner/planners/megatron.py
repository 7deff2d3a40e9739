"""Megatron-LM's rules of thumb (Narayanan et al., SC 2021, sections 3 and 5.4).

Takeaway 1: tensor parallelism up to the devices of a node, pipeline parallelism across nodes. Takeaway 2: model
parallelism only as much as memory needs, data parallelism for the rest. Takeaway 3: the microbatch is tuned. Stages get
equal numbers of transformer blocks, embedding and head go to the ends, full recomputation where it is needed, 1F1B,
interleaved where the layers divide. The smallest tp * pp that fits wins, and within it the best simulated microbatch.
"""

from __future__ import annotations

from stagewright.planner.documents.outcome import PlanOutcome
from stagewright.planner.planners.registry import NamedPlanner
from stagewright.planner.planners.scoring import candidates_outcome
from stagewright.planner.search.limits import Limits
from stagewright.planner.search.problem import Candidate, Partition, Problem

_SCHEDULES = ("1f1b", "interleaved")


def solve(problem: Problem, limits: Limits) -> PlanOutcome:
    """Return the plan that the rules give."""
    per_node = min(group.devices_per_node for group in problem.cluster.groups)
    candidates = [item for item in problem.candidates() if _follows(item, problem, per_node)]
    choices: list[tuple[Candidate, Partition]] = []
    for size in sorted({_model_parallel(item) for item in candidates}):
        group = [item for item in candidates if _model_parallel(item) == size]
        tensor = max(item.configuration.degrees.tp for item in group)
        for candidate in group:
            if candidate.configuration.degrees.tp == tensor:
                choices += _fitting(problem, candidate)
        if choices:
            break
    return candidates_outcome(problem, limits, choices, PLANNER.name, num_candidates=len(candidates))


def _model_parallel(candidate: Candidate) -> int:
    return candidate.configuration.degrees.tp * candidate.configuration.num_ranks


def _follows(candidate: Candidate, problem: Problem, per_node: int) -> bool:
    configuration = candidate.configuration
    degrees = configuration.degrees
    return (
        degrees.tp <= per_node
        and (configuration.num_ranks == 1 or degrees.tp == min(per_node, _widest(problem, per_node)))
        and degrees.cp == 1
        and degrees.zero <= 1
        and candidate.rule.name in _SCHEDULES
        and configuration.num_devices == problem.num_devices
    )


def _widest(problem: Problem, per_node: int) -> int:
    """Return the widest tensor degree inside a node that the heads divide by."""
    heads = problem.profile.architecture.num_heads if problem.profile.architecture is not None else 1
    return max(tp for tp in range(1, per_node + 1) if per_node % tp == 0 and (heads or 1) % tp == 0)


def _fitting(problem: Problem, candidate: Candidate) -> list[tuple[Candidate, Partition]]:
    """Return the equal partition with the weakest uniform recomputation that fits, if any."""
    bounds = equal_blocks(problem, candidate.configuration.num_ranks * candidate.num_chunks)
    for level in problem.levels:
        partition = Partition(bounds, (level,) * problem.profile.num_layers)
        if problem.fits(candidate, partition):
            return [(candidate, partition)]
    return []


def equal_blocks(problem: Problem, num_stages: int) -> tuple[int, ...]:
    """Return bounds that give each stage as equal a number of blocks as can be; what surrounds them goes to the ends."""
    kinds = [problem.profile.classes[name].kind for name in problem.profile.layer_classes]
    blocks = [index for index, kind in enumerate(kinds) if kind == "block"]
    if len(blocks) < num_stages:
        count = len(kinds)
        return tuple(round(index * count / num_stages) for index in range(num_stages + 1))
    inner = [blocks[round(index * len(blocks) / num_stages)] for index in range(1, num_stages)]
    return (0, *inner, len(kinds))


PLANNER = NamedPlanner(
    "megatron",
    "Narayanan et al., Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM, SC 2021",
    solve,
    objective="rules of thumb",
    aliases=("megatron-lm", "ptd-p"),
)
