"""A finished search as an answer: the best plan with its certificate, runners-up, status; or why there is none.

Every search ends here, so certificate and outcome count the same candidates and carry the same bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stagewright.planner.documents.outcome import Alternative, PlanOutcome, Status
from stagewright.planner.documents.plan import Certificate, Plan
from stagewright.planner.search.limits import OPTIMAL_GAP, Limits, Termination

# Where a deadline left nothing bounded and measured layers have no peak to go by: gaps stay finite.
_LEAST_STEP_S = 1e-9
Space = dict[str, str | int | float | list[str] | list[int]]


@dataclass(frozen=True)
class Work:
    """What a search did: candidates of its space, those solved, those simulated, those removed by each reason."""

    candidates: int
    evaluated: int
    simulated: int
    pruned: Mapping[str, int]

    def __add__(self, other: Work) -> Work:
        names = self.pruned.keys() | other.pruned.keys()
        return Work(
            self.candidates + other.candidates,
            self.evaluated + other.evaluated,
            self.simulated + other.simulated,
            {name: self.pruned.get(name, 0) + other.pruned.get(name, 0) for name in names},
        )

    @classmethod
    def of(cls, outcome: PlanOutcome) -> Work:
        """Return the work that an answer reports."""
        certificate = None if outcome.plan is None else outcome.plan.certificate
        pruned = {} if certificate is None else certificate.pruned
        return cls(outcome.candidates, outcome.evaluated, outcome.simulated, pruned)


def certified(
    ranked: Sequence[Alternative],
    space: Space,
    bound_s: float,
    limits: Limits,
    work: Work,
    termination: Termination,
    *,
    any_order_s: float | None = None,
) -> PlanOutcome:
    """Return the answer of a search that found plans.

    Parameters
    ----------
    ranked : scored plans, at least one, in any order.
    bound_s : proved lower bound on the step of every plan of the space.
    any_order_s : bound that holds for every order of the actions as well.
    """
    ranked = sorted(ranked, key=lambda item: item.step_time_s)
    best = ranked[0].plan
    objective_s = best.prediction.step_time_s
    if any_order_s is not None:
        any_order_s = min(any_order_s, objective_s)
        bound_s = max(bound_s, any_order_s)
    bound_s = min(max(bound_s, _LEAST_STEP_S), objective_s)
    gap = max(0.0, objective_s / bound_s - 1.0)
    status: Status
    if gap <= OPTIMAL_GAP:
        status, termination = "optimal", "optimal"
    else:
        status = "within_gap" if gap <= limits.gap + 1e-9 else "feasible"
    certificate = Certificate(
        status=status,
        objective_name="step_time_s",
        space=space,
        objective=objective_s,
        bound=bound_s,
        gap=gap,
        any_order_bound=any_order_s,
        candidates=work.candidates,
        evaluated=work.evaluated,
        simulated=work.simulated,
        pruned=dict(sorted(work.pruned.items())),
    )
    return PlanOutcome(
        status=status,
        plan=_with(best, certificate),
        objective_s=objective_s,
        bound_s=bound_s,
        gap=gap,
        objective=objective_s,
        bound=bound_s,
        candidates=work.candidates,
        evaluated=work.evaluated,
        simulated=work.simulated,
        wall_s=0.0,
        termination="gap" if status == "within_gap" else termination,
        alternatives=tuple(ranked[1 : limits.top + 1]),
    )


def without_plan(work: Work, bound_s: float | None, termination: Termination) -> PlanOutcome:
    """Return the answer of a search that found nothing: infeasible, unless a limit stopped it."""
    stopped = termination in ("time_limit", "cancelled")
    return PlanOutcome(
        status="no_solution" if stopped else "infeasible",
        plan=None,
        objective_s=None,
        bound_s=bound_s if stopped and bound_s is not None and bound_s < float("inf") else None,
        gap=None,
        candidates=work.candidates,
        evaluated=work.evaluated,
        simulated=work.simulated,
        wall_s=0.0,
        termination=termination if stopped else None,
    )


def _with(plan: Plan, certificate: Certificate) -> Plan:
    return plan.model_copy(update={"certificate": certificate})
