"""From a planner's choices to an outcome: every planner is scored by the common simulator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from stagewright.planner.documents.outcome import Alternative, PlanOutcome
from stagewright.planner.documents.plan import Plan
from stagewright.planner.plan_summary import alternative_of
from stagewright.planner.planners.reach import Reach, configurations, rule_of
from stagewright.planner.planners.stage_table import StageTable
from stagewright.planner.prediction import evaluate
from stagewright.planner.search.limits import Limits
from stagewright.planner.search.problem import Candidate, Partition, Problem


class Choice(NamedTuple):
    """What a planner would run, and the value of its own objective: seconds of a step, unless the planner says."""

    value: float
    candidate: Candidate
    partition: Partition


SolveOne = Callable[[StageTable], Iterable[tuple[float, Partition]]]


def choices_over(
    problem: Problem,
    limits: Limits,
    reach: Reach,
    solve_one: SolveOne,
    *,
    lower_bound: Callable[[StageTable], float] | None = None,
) -> list[Choice]:
    """Return what a planner chooses in each configuration within its reach; stops at the deadline.

    With `lower_bound`, configurations are solved in order of it and left out once it passes the best value so far.
    """
    rule = rule_of(problem, reach)
    tables = [StageTable(problem, Candidate(item, rule, 1)) for item in configurations(problem, reach)]
    if lower_bound is not None:
        tables = [table for _, _, table in sorted((lower_bound(t), i, t) for i, t in enumerate(tables))]
    found: list[Choice] = []
    best = float("inf")
    for index, table in enumerate(tables):
        if limits.reached() is not None:
            break
        if lower_bound is not None and lower_bound(table) >= best:
            break
        for value, partition in solve_one(table):
            found.append(Choice(value, table.candidate, partition))
            best = min(best, value)
        limits.report("configurations", index + 1, len(tables), None, None)
    return found


def choices_outcome(
    problem: Problem, limits: Limits, choices: Sequence[Choice], planner: str, *, in_order: bool = False
) -> PlanOutcome:
    """Return the planner's best choice by its own objective that fits, scored, and the next ones as alternatives.

    A planner that knows nothing of memory is given the memory test from outside: its users would go down its list.
    `in_order` says that the choices already stand in the planner's order of preference.
    """
    order = list(range(len(choices)))
    if not in_order:
        order.sort(key=lambda index: choices[index].value)
    plans: list[tuple[Choice, Plan]] = []
    for index in order:
        choice = choices[index]
        if not problem.fits(choice.candidate, choice.partition):
            continue
        plans.append((choice, scored(problem, choice.candidate, choice.partition, planner)))
        if len(plans) > limits.top:
            break
    best = plans[0] if plans else None
    return PlanOutcome(
        status="feasible" if best is not None else "no_solution",
        plan=None if best is None else best[1],
        objective_s=None if best is None else best[1].prediction.step_time_s,
        bound_s=None,
        gap=None,
        own_objective=None if best is None else best[0].value,
        candidates=len(choices),
        evaluated=len(choices),
        simulated=len(plans),
        wall_s=0.0,
        alternatives=tuple(alternative(choice.candidate, plan) for choice, plan in plans[1:]),
    )


def with_plans(
    problem: Problem, limits: Limits, outcome: PlanOutcome, found: Sequence[tuple[float, Plan]]
) -> PlanOutcome:
    """Return an outcome of uniform plans with others beside them, those that fit, all ranked by the common simulator.

    `found` are plans without a prediction and the planner's own value of each.
    """
    plans, values = [], {}
    for value, plan in found:
        prediction = evaluate(plan, problem.profile).prediction
        if max(prediction.peak_memory_bytes) <= problem.capacity_bytes * (1 + 1e-12):
            plans.append(plan.model_copy(update={"prediction": prediction}))
            values[plans[-1].digest] = value
    known = [] if outcome.plan is None else [outcome.plan]
    ranked = sorted([*plans, *known], key=lambda plan: plan.prediction.step_time_s)
    if not ranked:
        return outcome
    best = ranked[0]
    return outcome.model_copy(
        update={
            "status": "feasible",
            "plan": best,
            "objective_s": best.prediction.step_time_s,
            "own_objective": values.get(best.digest, outcome.own_objective),
            "evaluated": outcome.evaluated + len(found),
            "simulated": outcome.simulated + len(found),
            "alternatives": tuple(alternative_of(plan) for plan in ranked[1 : limits.top + 1]),
        }
    )


def alternative(candidate: Candidate, plan: Plan) -> Alternative:
    """Return a runner-up."""
    return Alternative(
        summary=candidate.summary,
        step_time_s=plan.prediction.step_time_s,
        peak_memory_bytes=max(plan.prediction.peak_memory_bytes),
        plan=plan,
    )


def scored(problem: Problem, candidate: Candidate, partition: Partition, planner: str) -> Plan:
    """Return the plan of a choice with its prediction."""
    plan = problem.plan(candidate, partition, planner)
    return plan.model_copy(update={"prediction": evaluate(plan, problem.profile).prediction})


def candidates_outcome(
    problem: Problem,
    limits: Limits,
    choices: Sequence[tuple[Candidate, Partition]],
    planner: str,
    *,
    num_candidates: int | None = None,
) -> PlanOutcome:
    """Return the outcome of a planner whose objective is the simulated step: the best of its choices that fits.

    A planner that finds nothing says `no_solution`: only a planner that searched everything may say infeasible.
    """
    timed = [
        Choice(problem.step_s(candidate, partition), candidate, partition)
        for candidate, partition in choices
        if problem.fits(candidate, partition)
    ]
    outcome = choices_outcome(problem, limits, timed, planner)
    count = len(choices) if num_candidates is None else num_candidates
    return outcome.model_copy(update={"candidates": count, "evaluated": len(choices), "simulated": len(choices)})
