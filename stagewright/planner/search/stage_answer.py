"""Plans whose stages differ, answered with a certificate: mixed clusters, degrees by stage, branches side by side.

On a mixed cluster the space is that of `pool_search` alone. On one kind of device, asking for degrees by stage, or a
model with branches, adds that space to the one of equal degrees on a chain of stages: both are searched, the better plan
is returned, and the lower of the two bounds holds for their union, which is what the certificate declares.
"""

from __future__ import annotations

import time
from dataclasses import replace

from stagewright.planner.documents.cluster import Cluster
from stagewright.planner.documents.outcome import Alternative, PlanOutcome
from stagewright.planner.documents.plan import Certificate, Plan
from stagewright.planner.errors import InvalidArgument
from stagewright.planner.search import exact
from stagewright.planner.search.limits import OPTIMAL_GAP, Limits, Termination
from stagewright.planner.search.pool_search import Completed, PoolSearch
from stagewright.planner.search.problem import Problem
from stagewright.planner.search.stage_graph import GRAPHPIPE, MOST_RANKS

Space = dict[str, str | int | float | list[str] | list[int]]


def solve_mixed(problem: Problem, limits: Limits) -> PlanOutcome:
    """Return the plan of least simulated step over pools of a mixed cluster; raises InvalidArgument for part of it."""
    cluster = problem.cluster
    if problem.num_devices != cluster.num_devices:
        raise InvalidArgument(
            f"{problem.num_devices} of the {cluster.num_devices} devices of mixed cluster {cluster.name} were asked for; "
            "its groups are used whole or not at all",
            field="devices",
            hint="describe a cluster with fewer nodes",
        )
    search = PoolSearch(problem, limits)
    bound_s, termination = search.run()
    if search.best is None:
        return _without_plan(search, termination)
    return _outcome(problem, search, limits, bound_s, termination, pool_space(problem, search))


def solve_by_stage(problem: Problem, limits: Limits) -> PlanOutcome:
    """Return the better of the best plan of equal degrees on a chain and the best one over pools and stage graphs.

    The bound is the lower one of the two spaces, so it holds for both.
    """
    left_s = limits.left_s()
    first = limits if left_s == float("inf") else replace(limits, deadline_s=limits.deadline_s - 0.5 * left_s)  # type: ignore[operator]
    equal = exact.solve(problem, first)
    split = problem.job.space.per_stage_degrees
    search = PoolSearch(problem, limits, split=split, chains=split, known_s=equal.objective_s or float("inf"))
    bound_s, termination = search.run()
    if equal.plan is None and search.best is None:
        return equal if equal.status == "no_solution" else _without_plan(search, termination)
    equal_bound_s = equal.bound_s if equal.bound_s is not None else float("inf")
    space = {**problem.space_words(), "or": _words(pool_space(problem, search))}
    both = _outcome(problem, search, limits, min(bound_s, equal_bound_s), termination, space, equal)
    return both.model_copy(
        update={
            "candidates": both.candidates + equal.candidates,
            "evaluated": both.evaluated + equal.evaluated,
            "simulated": both.simulated + equal.simulated,
        }
    )


def pool_space(problem: Problem, search: PoolSearch) -> Space:
    """Return the space of a pool search in words and numbers."""
    words = problem.space_words()
    words.update(
        {
            "devices": [problem.cluster.num_devices],
            "schedules": [
                *([rule.name for rule in search.rules] if search.chains else []),
                *([GRAPHPIPE.name] if search.side_by_side else []),
            ],
            "max_chunks": 1,
            "axis_orders": ["tp,cp,dp,pp"],
            "pools": [" then ".join(f"{pool.num_devices} of {pool.group}" for pool in row) for row in search.sequences],
            "stages": "contiguous layer ranges of at least one layer, uneven, one on each pipeline rank",
            "stage_graphs": (
                f"chains, and up to {MOST_RANKS} stages every graph of chains that branches of the model form"
                if search.side_by_side
                else "chains"
            ),
            "degrees": "equal on the ranks of a pool, different from pool to pool; a pool is used whole",
        }
    )
    return words


def _words(space: Space) -> list[str]:
    return [f"{name}: {value}" for name, value in space.items()]


def _outcome(
    problem: Problem,
    search: PoolSearch,
    limits: Limits,
    bound_s: float,
    termination: Termination,
    space: Space,
    other: PlanOutcome | None = None,
) -> PlanOutcome:
    plans = _plans(search, limits)
    if other is not None and other.plan is not None:
        summary = f"equal degrees, {other.plan.schedule.name}"
        plans.append((summary, other.plan))
        plans += [(item.summary, item.plan) for item in other.alternatives]
    plans.sort(key=lambda pair: pair[1].prediction.step_time_s)
    best = plans[0][1]
    objective_s = best.prediction.step_time_s
    bound_s = min(bound_s, objective_s)
    gap = max(0.0, objective_s / bound_s - 1.0)
    status = "optimal" if gap <= OPTIMAL_GAP else "within_gap" if gap <= limits.gap + 1e-9 else "feasible"
    certificate = Certificate(
        status=status,
        objective_name="step_time_s",
        space=space,
        objective=objective_s,
        bound=bound_s,
        gap=gap,
        candidates=search.num_candidates + (other.candidates if other is not None else 0),
        evaluated=search.evaluated + (other.evaluated if other is not None else 0),
        simulated=search.simulated + (other.simulated if other is not None else 0),
        pruned=dict(sorted(search.pruned.items())),
    )
    return PlanOutcome(
        status=status,
        plan=best.model_copy(update={"certificate": certificate}),
        objective_s=objective_s,
        bound_s=bound_s,
        gap=gap,
        candidates=search.num_candidates,
        evaluated=search.evaluated,
        simulated=search.simulated,
        wall_s=time.perf_counter() - limits.started_s if limits.started_s else 0.0,
        termination="optimal" if status == "optimal" else "gap" if status == "within_gap" else termination,
        alternatives=tuple(
            Alternative(
                summary=summary,
                step_time_s=plan.prediction.step_time_s,
                peak_memory_bytes=max(plan.prediction.peak_memory_bytes),
                plan=plan,
            )
            for summary, plan in plans[1 : limits.top + 1]
        ),
    )


def _plans(search: PoolSearch, limits: Limits) -> list[tuple[str, Plan]]:
    """Return the best completed candidates as scored plans."""
    if search.best is None:
        return []
    chosen: list[Completed] = sorted(search.kept.values(), key=lambda done: done.step_s)[: limits.top + 1]
    return [(done.candidate.summary, done.candidate.scored(done.partition, "exact")) for done in chosen]


def _without_plan(search: PoolSearch, termination: Termination) -> PlanOutcome:
    stopped = termination in ("time_limit", "cancelled")
    return PlanOutcome(
        status="no_solution" if stopped else "infeasible",
        plan=None,
        objective_s=None,
        bound_s=None,
        gap=None,
        candidates=search.num_candidates,
        evaluated=search.evaluated,
        simulated=search.simulated,
        wall_s=0.0,
        termination=termination if stopped else None,
    )


def largest_group(problem: Problem) -> Problem:
    """Return the question on the node group with most memory alone, which is where a diagnosis is told from.

    The question itself on one kind of device.
    """
    if not problem.cluster.is_mixed:
        return problem
    group = max(problem.cluster.groups, key=lambda item: (item.num_devices * item.device.memory_bytes, item.name))
    alone = Cluster(name=group.name, groups=(group,))
    return Problem(problem.profile, alone, problem.job, group.num_devices)
