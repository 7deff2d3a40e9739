"""The search for the least step, mapped over the parts of an executor: the same proof, put together again.

Parts are the pipeline depths that the job allows. Let X be the least step that any part found and g the gap. Every part
proves that none of its plans is below min(X, its own best) / (1 + g), or says what it left open; the bound of the whole is
the least of the parts' bounds. So at gap 0 every executor returns the same step, and at a gap g a step within g of the
same optimum. Where plans tie, or within the gap, which one is returned may depend on what ran first.
"""

from __future__ import annotations

from collections.abc import Sequence

from stagewright.planner.documents.outcome import PlanOutcome
from stagewright.planner.executors.executor import Executor
from stagewright.planner.executors.part import Part
from stagewright.planner.plan_summary import alternative_of
from stagewright.planner.search.exact import OPTIMAL_GAP
from stagewright.planner.search.limits import Limits
from stagewright.planner.search.pricing import PP
from stagewright.planner.search.problem import Problem


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
    return _together(problem, limits, [outcomes[place] for place in range(len(parts))])


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


def _together(problem: Problem, limits: Limits, outcomes: Sequence[PlanOutcome]) -> PlanOutcome:
    plans = [outcome.plan for outcome in outcomes if outcome.plan is not None]
    plans += [other.plan for outcome in outcomes for other in outcome.alternatives]
    ranked = sorted(plans, key=lambda plan: plan.prediction.step_time_s)
    stopped = limits.reached() or next((o.termination for o in outcomes if o.status == "no_solution"), None)
    totals = {
        name: sum(getattr(outcome, name) for outcome in outcomes) for name in ("candidates", "evaluated", "simulated")
    }
    if not ranked:
        return PlanOutcome(
            status="infeasible" if stopped is None else "no_solution",
            plan=None,
            objective_s=None,
            bound_s=None,
            gap=None,
            wall_s=0.0,
            termination=stopped,
            **totals,
        )
    best = ranked[0]
    step_s = best.prediction.step_time_s
    bounds = [_bound_of(outcome, step_s, limits.gap) for outcome in outcomes]
    bound_s = min(step_s, *bounds)
    gap = max(0.0, step_s / bound_s - 1.0) if bound_s > 0 else float("inf")
    status = "optimal" if gap <= OPTIMAL_GAP else "within_gap" if gap <= limits.gap + 1e-9 else "feasible"
    ended = "optimal" if gap <= OPTIMAL_GAP else "gap" if gap <= limits.gap + 1e-9 else stopped or "time_limit"
    certificate = next(o.plan.certificate for o in outcomes if o.plan is not None)
    assert certificate is not None
    pruned: dict[str, int] = {}
    for outcome in outcomes:
        if outcome.plan is not None and outcome.plan.certificate is not None:
            for reason, count in outcome.plan.certificate.pruned.items():
                pruned[reason] = pruned.get(reason, 0) + count
    whole = certificate.model_copy(
        update={
            "status": status,
            "space": problem.space_words(),
            "objective": step_s,
            "bound": bound_s,
            "gap": gap,
            "pruned": dict(sorted(pruned.items())),
            **totals,
        }
    )
    return PlanOutcome.model_validate(
        {
            "status": status,
            "plan": best.model_copy(update={"job": problem.job, "certificate": whole}),
            "objective_s": step_s,
            "bound_s": bound_s,
            "objective": step_s,
            "bound": bound_s,
            "gap": gap,
            "wall_s": 0.0,
            "termination": ended,
            "alternatives": tuple(
                alternative_of(plan.model_copy(update={"job": problem.job})) for plan in ranked[1 : limits.top + 1]
            ),
            **totals,
        }
    )


def _bound_of(outcome: PlanOutcome, step_s: float, gap: float) -> float:
    """Return what a part proves of its own plans, given that the best plan of all takes `step_s`."""
    if outcome.status == "infeasible":
        return step_s / (1.0 + gap)
    return outcome.bound_s or 0.0
