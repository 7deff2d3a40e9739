"""The search for the least step, mapped over the parts of an executor: the same proof, put together again.

Parts are the pipeline depths that the job allows. Let X be the least step that any part found and g the gap. Every part
proves that none of its plans is below min(X, its own best) / (1 + g), or says what it left open; the bound of the whole is
the least of the parts' bounds. So at gap 0 every executor returns the same step, and at a gap g a step within g of the
same optimum. Where plans tie, or within the gap, which one is returned may depend on what ran first.
"""

from __future__ import annotations

from stagewright.planner.documents.outcome import PlanOutcome
from stagewright.planner.executors.executor import Executor
from stagewright.planner.executors.part import Part
from stagewright.planner.search.limits import Limits
from stagewright.planner.search.pricing import PP
from stagewright.planner.search.problem import Problem
from stagewright.planner.search.union import united


def solve_mapped(problem: Problem, limits: Limits, executor: Executor) -> PlanOutcome:
    """Return the plan of least step, searched part by part on an executor."""
    parts = _parts(problem, limits)
    outcomes: dict[int, PlanOutcome] = {}
    best_s = float("inf")
    for place, outcome in executor.run(parts, lambda: limits.reached() is not None):
        outcomes[place] = outcome
        best_s = min(best_s, outcome.objective_s if outcome.objective_s is not None else float("inf"))
        known = best_s if best_s < float("inf") else None
        limits.report("parts", len(outcomes), len(parts), known, None)
    return united(problem, limits, [outcomes[place] for place in range(len(parts))])


def _parts(problem: Problem, limits: Limits) -> list[Part]:
    """Return one part for each pipeline depth of the space, shallow ones first."""
    depths = sorted({int(depth) for depth in problem.shapes[:, PP]}) if len(problem.shapes) else []
    left_s = limits.left_s()
    found = []
    for depth in depths:
        space = problem.job.space
        pinned = space.model_copy(update={"pins": space.pins.model_copy(update={"pp": depth})})
        found.append(
            Part(
                problem.profile,
                problem.cluster,
                problem.job.model_copy(update={"space": pinned}),
                problem.num_devices,
                problem.only_counts,
                problem.most_bytes,
                limits.gap,
                limits.top,
                None if left_s == float("inf") else left_s,
            )
        )
    return found
