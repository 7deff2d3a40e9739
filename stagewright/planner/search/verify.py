"""A second look at a plan's certificate: what can be recomputed from plan and profile alone is recomputed.

Checked: the prediction is what the simulator says now; the objective is the prediction's; the gap is objective over
bound, less one; the bound does not exceed the objective; the status claims no more than the gap proves. The bound itself
rests on the search's programmes and is not derived again here: the certificate's `pruned` counts say how each candidate
was closed.
"""

from __future__ import annotations

import math

from stagewright.planner.documents.plan import Plan
from stagewright.planner.documents.profile import ModelProfile
from stagewright.planner.errors import InvalidDocument
from stagewright.planner.prediction import evaluate

TOLERANCE = 1e-9
OPTIMAL_GAP = 1e-6


def verify_certificate(plan: Plan, profile: ModelProfile) -> tuple[str, ...]:
    """Return what was checked, in words; raises InvalidDocument for the first thing that does not hold."""
    certificate = plan.certificate
    if certificate is None:
        raise InvalidDocument("the plan carries no certificate", field="certificate", hint="plan with --planner exact")
    step_s = evaluate(plan, profile).prediction.step_time_s
    _require(
        math.isclose(step_s, plan.prediction.step_time_s, rel_tol=TOLERANCE),
        f"the simulator says {step_s:.9g} s a step, the plan {plan.prediction.step_time_s:.9g}",
        "prediction.step_time_s",
    )
    checked = ["the simulator gives the predicted step time again"]
    if certificate.objective_name == "step_time_s":
        _require(
            math.isclose(certificate.objective, step_s, rel_tol=TOLERANCE),
            f"the objective is {certificate.objective:.9g}, the simulated step {step_s:.9g} s",
            "certificate.objective",
        )
        checked.append("the objective is the simulated step time")
    _require(
        certificate.bound <= certificate.objective * (1 + TOLERANCE),
        f"the bound {certificate.bound:.9g} exceeds the objective {certificate.objective:.9g}",
        "certificate.bound",
    )
    gap = max(0.0, certificate.objective / certificate.bound - 1) if certificate.bound else math.inf
    _require(
        math.isclose(gap, certificate.gap, abs_tol=1e-8),
        f"objective over bound less one is {gap:.9g}, the certificate says {certificate.gap:.9g}",
        "certificate.gap",
    )
    checked.append("the bound does not exceed the objective, and the gap follows from the two")
    _require(
        certificate.status != "optimal" or gap <= OPTIMAL_GAP,
        f"the status is optimal with a gap of {gap:.3g}, it takes at most {OPTIMAL_GAP:g}",
        "certificate.status",
    )
    checked.append("the status claims no more than the gap proves")
    return tuple(checked)


def _require(holds: bool, message: str, field: str) -> None:
    if not holds:
        raise InvalidDocument(message, field=field, hint="the plan was edited, or made by another version: plan again")
