"""From a question to a certified answer: run the joint search, score what it found, say what was proved."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from stagewright.planner.documents.outcome import PlanOutcome
from stagewright.planner.documents.plan import Plan
from stagewright.planner.plan_summary import alternative_of
from stagewright.planner.prediction import evaluate
from stagewright.planner.search.certified import certified, without_plan
from stagewright.planner.search.incumbent import start
from stagewright.planner.search.joint_search import JointSearch
from stagewright.planner.search.limits import LeastStep, Limits
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
    search = JointSearch.of(problem, limits)
    bound_s, termination = search.run()
    work = search.work.total(search.space.num_candidates)
    if search.completions.best is None:
        return without_plan(work, bound_s, termination)
    return certified(
        [alternative_of(plan) for plan in _plans(search)],
        problem.space_words(),
        bound_s,
        limits,
        work,
        termination,
        any_order_s=search.space.any_order_s(search.completions.incumbent_s),
    )


def _plans(search: JointSearch) -> list[Plan]:
    """Return the best candidates that were completed as scored plans, the best one first."""
    limits, problem, completions = search.limits, search.space.problem, search.completions
    assert completions.best is not None
    if len(completions.found) <= limits.top and limits.reached() is None:
        _complete_others(search, limits.top + 1)
    order = sorted(completions.found, key=lambda index: (completions.found[index].step_s, index))
    order.remove(completions.best.index)
    chosen = [completions.best.index, *(order[: limits.top] if limits.reached() is None else [])]

    def scored(index: int) -> Plan:
        partition = completions.partition(index, completions.found[index])
        plan = problem.plan(search.space.candidate(index), partition, "exact")
        return plan.model_copy(update={"prediction": evaluate(plan, problem.profile).prediction})

    with search.lanes(scored) as lanes:
        plans = lanes.answers([(index, index) for index in chosen])
    plans.sort(key=lambda plan: plan.prediction.step_time_s)
    return plans


def _complete_others(search: JointSearch, count: int) -> None:
    """Complete the most promising candidates, three times as many as are wanted, so that there are runners-up to name."""
    space, completions = search.space, search.completions
    left = np.array([index for index in range(space.num_candidates) if index not in completions.found], dtype=np.int64)
    for index in left[np.argsort(space.estimate(left), kind="stable")][: 3 * count].tolist():
        costs = search.costs.of(index) if search.limits.reached() is None else None
        completion = None if costs is None else start(costs)
        if completion is not None:
            completions.keep(index, completion)
