"""Plans whose stages differ, answered with a certificate: mixed clusters, degrees by stage, branches side by side.

On a mixed cluster the space is that of `pool_space` and, for each node group, the one of equal degrees on that group
alone: leaving groups idle is always among the plans. Where layers are tied to one stage it is that of `pool_space`. On
one kind of device, asking for degrees by stage, or a
model with branches, adds that space to the one of equal degrees on a chain of stages: both are searched, the better plan
is returned, and the lower of the two bounds holds for their union, which is what the certificate declares.
"""

from __future__ import annotations

from dataclasses import replace

from stagewright.planner.cost.roofline import peak_flops
from stagewright.planner.documents.cluster import Cluster
from stagewright.planner.documents.outcome import Alternative, PlanOutcome
from stagewright.planner.errors import InvalidArgument
from stagewright.planner.plan_summary import alternative_of
from stagewright.planner.search import exact
from stagewright.planner.search.certified import Space, Work, certified, without_plan
from stagewright.planner.search.joined_costs import MOST_SHARES
from stagewright.planner.search.limits import OPTIMAL_GAP, LeastStep, Limits
from stagewright.planner.search.pool_search import Completed, PoolSearch
from stagewright.planner.search.pool_space import PoolSpace
from stagewright.planner.search.pools import Pool, group_pools, used_first
from stagewright.planner.search.problem import Problem
from stagewright.planner.search.stage_choice import shares_weights
from stagewright.planner.search.stage_graph import MOST_RANKS

_POOLS_TIME = 0.8
ALONE = (
    "one node group whole, the others idle: equal degrees, every schedule, chunks and axis order of one kind of device"
)


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
    if problem.job.space.ties:
        return _solve_pools(problem, limits)
    known = LeastStep()
    search = PoolSearch(pools_of(problem), _part_of(limits, _POOLS_TIME), known)
    search.begin()
    # A group that may be faster alone sets the target that the pools are closed at; another one's search ends at once.
    alone = [_solve_alone(problem, _part_of(limits, 0.5), pool, known) for pool in _fastest_first(problem)]
    bound_s, termination = search.finish()
    bound_s = min(bound_s, *(_bound_of(outcome, known.least_s(), limits) for outcome in alone))
    work = sum(map(Work.of, alone), search.work.total(search.num_candidates))
    ranked = [*_ranked(search, limits), *(option for outcome in alone for option in _options(outcome))]
    if not ranked:
        return without_plan(work, bound_s, termination)
    if bound_s < known.least_s() / (1.0 + limits.gap) * (1 - OPTIMAL_GAP) and termination in ("gap", "optimal"):
        termination = limits.reached() or "time_limit"
    space = {**pool_words(search.space), "or": ALONE}
    return certified(ranked, space, bound_s, limits, work, termination)


def _fastest_first(problem: Problem) -> list[Pool]:
    """Return the node groups, that of the highest peak rate first."""

    def rate(pool: Pool) -> float:
        device = problem.cluster.group_of(pool.first).device
        return pool.num_devices * peak_flops(device, problem.job.precision)

    return sorted(group_pools(problem.cluster), key=lambda pool: (-rate(pool), pool.first))


def _part_of(limits: Limits, part: float) -> Limits:
    """Return the limits of a search that may take so much of the time that is left."""
    if limits.deadline_s is None:
        return limits
    return replace(limits, started_s=limits.clock(), deadline_s=part * limits.left_s())


def _solve_alone(problem: Problem, limits: Limits, pool: Pool, known: LeastStep) -> PlanOutcome:
    return exact.solve(alone_on(problem, pool), replace(_part_of(limits, 1.0), known=known))


def alone_on(problem: Problem, pool: Pool) -> Problem:
    """Return the question on one node group whole, all others idle, with every schedule of one kind of device.

    The cluster stays whole with that group first: measured seconds of one device stand for another by what is in it.
    """
    cluster = used_first(problem.cluster, (pool,))
    return Problem(problem.profile, cluster, problem.job, pool.num_devices, (pool.num_devices,))


def _options(outcome: PlanOutcome) -> list[Alternative]:
    """Return the plans of an answer."""
    return [*([] if outcome.plan is None else [alternative_of(outcome.plan)]), *outcome.alternatives]


def _bound_of(outcome: PlanOutcome, known_s: float, limits: Limits) -> float:
    """Return what an answer proves of its part, given the least step of all parts: it only looked for less."""
    if outcome.bound_s is not None:
        return outcome.bound_s
    return 0.0 if outcome.status == "no_solution" else known_s / (1.0 + limits.gap)


def solve_tied(problem: Problem, limits: Limits) -> PlanOutcome:
    """Return the plan of least simulated step whose stages keep tied layers together, one stage on each pipeline rank.

    Raises InvalidArgument for part of the cluster, and for tied names that are no layers.
    """
    if problem.num_devices != problem.cluster.num_devices:
        raise InvalidArgument(
            f"{problem.num_devices} of {problem.cluster.num_devices} devices were asked for; with tied layers all are used",
            field="devices",
            hint="describe a cluster with fewer nodes",
        )
    return _solve_pools(problem, limits)


def pools_of(problem: Problem) -> PoolSpace:
    """Return the space of pools that a question asks for, beside that of equal degrees; with ties there is no other."""
    space, is_mixed = problem.job.space, problem.cluster.is_mixed
    split = space.per_stage_degrees and not is_mixed
    if space.ties:
        return PoolSpace(problem, split=split)
    if is_mixed:
        return PoolSpace(problem, alone=False)
    return PoolSpace(problem, split=split, chains=split)


def _solve_pools(problem: Problem, limits: Limits) -> PlanOutcome:
    search = PoolSearch(pools_of(problem), limits)
    bound_s, termination = search.run()
    if search.best is None:
        return without_plan(search.work.total(search.num_candidates), None, termination)
    return certified(
        _ranked(search, limits),
        pool_words(search.space),
        bound_s,
        limits,
        search.work.total(search.num_candidates),
        termination,
    )


def solve_by_stage(problem: Problem, limits: Limits) -> PlanOutcome:
    """Return the better of the best plan of equal degrees on a chain and the best one over pools and stage graphs.

    The bound is the lower one of the two spaces, so it holds for both.
    """
    left_s = limits.left_s()
    first = limits if left_s == float("inf") else replace(limits, deadline_s=limits.deadline_s - 0.5 * left_s)  # type: ignore[operator]
    equal = exact.solve(problem, first)
    search = PoolSearch(pools_of(problem), limits, LeastStep(equal.objective_s or float("inf")))
    bound_s, termination = search.run()
    work = search.work.total(search.num_candidates) + Work.of(equal)
    if equal.plan is None and search.best is None:
        return equal if equal.status == "no_solution" else without_plan(work, None, termination)
    ranked = _ranked(search, limits)
    if equal.plan is not None:
        ranked.append(alternative_of(equal.plan))
        ranked += equal.alternatives
    equal_bound_s = equal.bound_s if equal.bound_s is not None else float("inf")
    space = {**problem.space_words(), "or": _words(pool_words(search.space))}
    return certified(ranked, space, min(bound_s, equal_bound_s), limits, work, termination)


def pool_words(space: PoolSpace) -> Space:
    """Return a space of pools in words and numbers."""
    problem = space.problem
    words = problem.space_words()
    words.update(
        {
            "devices": [problem.cluster.num_devices],
            "schedules": [
                *([rule.name for rule in space.rules] if space.chains else []),
                *([rule.name for rule in space.graph_rules] if space.side_by_side else []),
            ],
            "max_chunks": 1,
            "axis_orders": ["tp,cp,dp,pp"],
            "pools": [" then ".join(f"{pool.num_devices} of {pool.group}" for pool in row) for row in space.sequences],
            "stages": "contiguous layer ranges of at least one layer, uneven, one on each pipeline rank",
            "stage_graphs": (
                f"chains, and up to {MOST_RANKS} stages every graph of chains that branches of the model form"
                if space.side_by_side
                else "chains"
            ),
            "degrees": "equal on the ranks of a pool, different from pool to pool"
            + _alike_words(space)
            + "; a pool is used whole",
        }
    )
    if any(pool.parts for row in space.sequences for pool in row):
        words["shares"] = (
            f"on joined groups the {MOST_SHARES} nearest to the peak rates for each microbatch, states under ZeRO in equal "
            "shares or by memory; a layer counts with its "
            "slowest replica, and its bytes with the device that they fill most"
        )
    if problem.job.space.ties:
        words["tied"] = [" = ".join(names) for names in problem.job.space.ties]
    return words


def _alike_words(space: PoolSpace) -> str:
    """Return what no pool may have unlike another one, which no run takes."""
    shared = shares_weights(space.problem.profile, space.problem.job)
    return (" but for tp and vocab_parallel, since stages share a weight" * shared) + (
        "; on graphs of stages but for tp, cp and sp" * space.side_by_side
    )


def _words(space: Space) -> list[str]:
    return [f"{name}: {value}" for name, value in space.items()]


def _ranked(search: PoolSearch, limits: Limits) -> list[Alternative]:
    """Return the best completed candidates as scored plans."""
    chosen: list[Completed] = sorted(search.kept.values(), key=lambda done: done.step_s)[: limits.top + 1]
    return [
        alternative_of(done.candidate.scored(done.partition, "exact")).model_copy(
            update={"summary": done.candidate.summary}
        )
        for done in chosen
    ]


def largest_group(problem: Problem) -> Problem:
    """Return the question on the node group with most memory alone, which is where a diagnosis is told from.

    The question itself on one kind of device.
    """
    if not problem.cluster.is_mixed:
        return problem
    group = max(problem.cluster.groups, key=lambda item: (item.num_devices * item.device.memory_bytes, item.name))
    alone = Cluster(name=group.name, groups=(group,))
    return Problem(problem.profile, alone, problem.job, group.num_devices)
