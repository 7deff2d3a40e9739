"""The most tokens for a dollar: the least of devices x step over all device counts.

A step on n devices at p dollars an hour costs n p step / 3600, so tokens per dollar are tokens 3600 / (p n step): for
each n the fastest plan is the best one. Counts are solved in order of n x (bound of the count's space); a count is
closed when that is not below the incumbent over (1 + gap). The bound is the least n x bound of all counts. Only devices
in use are paid.
"""

from __future__ import annotations

from stagewright.planner.documents.outcome import PlanOutcome
from stagewright.planner.documents.plan import Plan
from stagewright.planner.errors import InvalidArgument
from stagewright.planner.objectives.least_step import (
    Tally,
    answered,
    device_choices,
    least_step,
    step_bound,
    unanswered,
)
from stagewright.planner.objectives.step_time import below_deadline
from stagewright.planner.search.limits import Limits
from stagewright.planner.search.problem import Problem


def solve_tokens_per_dollar(problem: Problem, limits: Limits) -> PlanOutcome:
    """Return the plan of most tokens per dollar; raises InvalidArgument when the device has no price."""
    price = price_per_hour(problem)
    most_s = problem.job.step_deadline_s or float("inf")
    counts = device_choices(problem)
    bounds = {count: count * step_bound(problem.narrowed(counts=(count,)), limits) for count in counts}
    order = sorted(counts, key=lambda count: (bounds[count], count))
    tally, plans, first = Tally(), dict[int, Plan](), None
    best_cost, stopped = float("inf"), limits.reached()
    for place, count in enumerate(order):
        if bounds[count] >= best_cost / (1.0 + limits.gap) or bounds[count] == float("inf") or stopped is not None:
            break
        outcome = least_step(problem.narrowed(counts=(count,)), limits, tally)
        first = first or outcome
        stopped = limits.reached()
        if outcome.status == "infeasible":
            bounds[count] = float("inf")
        elif outcome.bound_s is not None:
            above = outcome.bound_s > most_s
            bounds[count] = float("inf") if above else max(bounds[count], count * outcome.bound_s)
        if outcome.plan is not None and (outcome.objective_s or 0.0) <= most_s:
            plans[count] = outcome.plan
            best_cost = min(best_cost, count * outcome.plan.prediction.step_time_s)
        limits.report("device counts", place + 1, len(order), None, None)
    limits.report("device counts", len(order), len(order), None, None)
    if not plans:
        empty = first or least_step(problem, limits, tally)
        if min(bounds.values()) < float("inf"):
            return unanswered(tally, empty, "tokens_per_dollar").model_copy(
                update={"status": "no_solution", "termination": stopped or "time_limit"}
            )
        whole = problem.narrowed(counts=tuple(reversed(counts)))
        return unanswered(tally, below_deadline(problem, least_step(whole, limits, tally)), "tokens_per_dollar")
    ranked = sorted(plans.values(), key=lambda plan: plan.num_devices * plan.prediction.step_time_s)
    tokens = problem.job.global_batch * problem.job.sequence_length * 3600.0 / price
    bound_cost = min(best_cost, *bounds.values())
    return answered(
        problem,
        limits,
        tally,
        ranked[0],
        name="tokens_per_dollar",
        objective=tokens / best_cost,
        bound=tokens / bound_cost,
        gap=max(0.0, best_cost / bound_cost - 1.0),
        stopped=stopped if best_cost / bound_cost - 1.0 > limits.gap + 1e-9 else None,
        counts=counts,
        words=f"tokens per dollar at {price:.6g} dollars an hour and device",
        alternatives=ranked[1:],
    )


def price_per_hour(problem: Problem) -> float:
    """Return dollars per hour of one device; raises InvalidArgument without a price."""
    device = problem.cluster.groups[0].device
    if not device.price_per_hour:
        raise InvalidArgument(
            f"device {device.name} has no price, tokens-per-dollar needs one",
            field="cluster.groups[0].device.price_per_hour",
            hint="give --price-per-hour, or price_per_hour in the cluster file",
        )
    return device.price_per_hour
