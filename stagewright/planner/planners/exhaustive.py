"""Everything, simulated: each partition and each recomputation of each candidate. For about 8 layers.

Optimal over the declared space without any bound; it exists to check the planners that use them.
"""

from __future__ import annotations

from math import comb

from stagewright.planner.documents.outcome import PlanOutcome
from stagewright.planner.errors import InvalidArgument
from stagewright.planner.planners.registry import NamedPlanner
from stagewright.planner.planners.scoring import candidates_outcome
from stagewright.planner.search.brute_force import best_completion
from stagewright.planner.search.limits import Limits
from stagewright.planner.search.problem import Candidate, Partition, Problem

MOST_COMPLETIONS = 20_000_000


def solve(problem: Problem, limits: Limits) -> PlanOutcome:
    """Return the best of all completions; raises InvalidArgument when there are more than 20 million."""
    candidates = problem.candidates()
    layers, levels = problem.profile.num_layers, len(problem.levels)
    total = sum(
        comb(layers - 1, item.configuration.num_ranks * item.num_chunks - 1) * levels**layers for item in candidates
    )
    if total > MOST_COMPLETIONS:
        raise InvalidArgument(
            f"there are {total} partitions with recomputation, the exhaustive planner takes at most {MOST_COMPLETIONS}",
            field="planner",
            hint="pin degrees, schedule or recompute, or take the exact planner",
        )
    choices: list[tuple[Candidate, Partition]] = []
    for index, candidate in enumerate(candidates):
        found = best_completion(problem, candidate)
        if found is not None:
            choices.append((candidate, found[1]))
        limits.report("simulating", index + 1, len(candidates), None, None)
        if limits.reached() is not None:
            break
    outcome = candidates_outcome(problem, limits, choices, PLANNER.name, num_candidates=len(candidates))
    if outcome.plan is None and limits.reached() is None:
        return outcome.model_copy(update={"status": "infeasible"})
    return outcome


PLANNER = NamedPlanner("exhaustive", "every partition and recomputation, simulated", solve, aliases=("brute-force",))
