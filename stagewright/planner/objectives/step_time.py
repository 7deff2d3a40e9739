"""The least step, or the least step below a deadline: the search itself."""

from __future__ import annotations

from stagewright.planner.documents.outcome import Diagnosis, PlanOutcome, Relaxation
from stagewright.planner.search.exact import solve
from stagewright.planner.search.limits import Limits
from stagewright.planner.search.problem import Problem


def solve_step_time(problem: Problem, limits: Limits) -> PlanOutcome:
    """Return the plan of least step; infeasible where even the fastest is longer than the job's step deadline."""
    return below_deadline(problem, solve(problem, limits))


def below_deadline(problem: Problem, outcome: PlanOutcome) -> PlanOutcome:
    """Return the outcome of a search for the least step, infeasible when its plan is longer than the step deadline."""
    most_s = problem.job.step_deadline_s
    if most_s is None or outcome.plan is None or outcome.objective_s is None or outcome.objective_s <= most_s:
        return outcome
    proved = outcome.bound_s is not None and outcome.bound_s > most_s
    least = f"proved: no plan is below {outcome.bound_s:.6g} s" if proved else f"bound {outcome.bound_s or 0.0:.6g} s"
    return outcome.model_copy(
        update={
            "status": "infeasible" if proved else "no_solution",
            "plan": None,
            "objective_s": None,
            "objective": None,
            "gap": None,
            "alternatives": (),
            "diagnosis": Diagnosis(
                message=f"the fastest plan takes {outcome.objective_s:.6g} s a step, step_deadline_s is {most_s:.6g} ({least})",
                binding="step_deadline_s",
                nearest=outcome.plan,
                relaxations=(
                    Relaxation(change=f"step_deadline_s of {outcome.objective_s:.6g}", step_time_s=outcome.objective_s),
                ),
            ),
        }
    )
