"""One answer from those of disjoint parts of a space: the best plan, the least bound, the work of all.

Parts may share the least step that any of them has found, so a part without a plan says only that nothing in it is
below that step over (1 + gap): that is the bound it contributes.
"""

from __future__ import annotations

from collections.abc import Sequence

from stagewright.planner.documents.outcome import PlanOutcome
from stagewright.planner.plan_summary import alternative_of
from stagewright.planner.search.limits import OPTIMAL_GAP, Limits
from stagewright.planner.search.problem import Problem


def united(problem: Problem, limits: Limits, outcomes: Sequence[PlanOutcome]) -> PlanOutcome:
    """Return the answer of the whole from those of its parts; `problem` is the whole question."""
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
