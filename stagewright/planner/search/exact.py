"""From a question to a certified answer: run the joint search, score what it found, say what was proved."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from stagewright.planner.documents.outcome import PlanOutcome
from stagewright.planner.documents.plan import Certificate, Plan
from stagewright.planner.plan_summary import alternative_of
from stagewright.planner.prediction import evaluate
from stagewright.planner.search.incumbent import start
from stagewright.planner.search.joint_search import JointSearch
from stagewright.planner.search.limits import OPTIMAL_GAP, LeastStep, Limits, Termination
from stagewright.planner.search.problem import Problem
from stagewright.planner.search.targets import target_jobs
from stagewright.planner.search.union import united


def solve(problem: Problem, limits: Limits) -> PlanOutcome:
    """Return the plan of least simulated step over the declared space, with its certificate.

    A target format's space is a union of disjoint parts, solved one after the other with the least step shared.
    """
    jobs = target_jobs(problem.job)
    if jobs is None:
        return _solve_space(problem, limits)
    shared = replace(limits, known=limits.known or LeastStep())
    return united(problem, limits, [_solve_space(replace(problem, job=job), shared) for job in jobs])


def _solve_space(problem: Problem, limits: Limits) -> PlanOutcome:
    search = JointSearch(problem, limits)
    bound_s, termination = search.run()
    if search.best is None:
        return _without_plan(search, bound_s, termination)
    plans = _plans(search)
    best = plans[0]
    objective_s = best.prediction.step_time_s
    any_order_s = min(search.any_order_s(), objective_s)
    bound_s = max(min(bound_s, objective_s), any_order_s)
    gap = max(0.0, objective_s / bound_s - 1.0)
    status = "optimal" if gap <= OPTIMAL_GAP else "within_gap" if gap <= limits.gap + 1e-9 else "feasible"
    certificate = Certificate(
        status=status,
        objective_name="step_time_s",
        space=problem.space_words(),
        objective=objective_s,
        bound=bound_s,
        gap=gap,
        any_order_bound=any_order_s,
        candidates=search.num_candidates,
        evaluated=search.evaluated,
        simulated=search.simulated,
        pruned=dict(sorted(search.pruned.items())),
    )
    return PlanOutcome(
        status=status,
        plan=best.model_copy(update={"certificate": certificate}),
        objective_s=objective_s,
        bound_s=bound_s,
        gap=gap,
        objective=objective_s,
        bound=bound_s,
        candidates=search.num_candidates,
        evaluated=search.evaluated,
        simulated=search.simulated,
        wall_s=0.0,
        termination="optimal" if gap <= OPTIMAL_GAP else termination,
        alternatives=tuple(alternative_of(plan) for plan in plans[1:]),
    )


def _plans(search: JointSearch) -> list[Plan]:
    """Return the best candidates that were completed as scored plans, the best one first."""
    assert search.best is not None
    limits, problem = search.limits, search.problem
    if len(search.found) <= limits.top:
        _complete_others(search, limits.top + 1)
    order = sorted(search.found, key=lambda index: (search.found[index].step_s, index))
    order.remove(search.best.index)
    plans = []
    for index in [search.best.index, *order][: limits.top + 1]:
        partition = search.partition(index, search.found[index])
        plan = problem.plan(search.candidate(index), partition, "exact")
        plans.append(plan.model_copy(update={"prediction": evaluate(plan, problem.profile).prediction}))
    plans.sort(key=lambda plan: plan.prediction.step_time_s)
    return plans


def _complete_others(search: JointSearch, count: int) -> None:
    """Complete the most promising candidates, three times as many as are wanted, so that there are runners-up to name."""
    left = np.array([index for index in range(search.num_candidates) if index not in search.found], dtype=np.int64)
    for index in left[np.argsort(search.estimate(left), kind="stable")][: 3 * count].tolist():
        costs = search.costs(index) if search.limits.reached() is None else None
        completion = None if costs is None else start(costs)
        if completion is not None:
            search.keep(index, completion)


def _without_plan(search: JointSearch, bound_s: float, termination: Termination) -> PlanOutcome:
    stopped = termination in ("time_limit", "cancelled")
    return PlanOutcome(
        status="no_solution" if stopped else "infeasible",
        plan=None,
        objective_s=None,
        bound_s=bound_s if stopped and np.isfinite(bound_s) else None,
        gap=None,
        candidates=search.num_candidates,
        evaluated=search.evaluated,
        simulated=search.simulated,
        wall_s=0.0,
        termination=termination if stopped else None,
    )
