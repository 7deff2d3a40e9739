"""The joint search: every candidate bounded, the promising ones solved in order of bound, the best one certified."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import comb

from stagewright.planner.documents.outcome import Alternative, PlanOutcome, Status
from stagewright.planner.documents.plan import Certificate, Plan
from stagewright.planner.prediction import evaluate
from stagewright.planner.search.brute_force import all_partitions
from stagewright.planner.search.diagnosis import diagnose
from stagewright.planner.search.interval_dp import Ranges, solve_intervals
from stagewright.planner.search.limits import Limits, Termination
from stagewright.planner.search.problem import Candidate, Partition, Problem

OPTIMAL_GAP = 1e-6
_MOST_PARTITIONS = 3000


@dataclass(frozen=True)
class Solution:
    """A completed candidate and its simulated step."""

    step_s: float
    candidate: Candidate
    partition: Partition


@dataclass(eq=False)
class Search:
    """The state of one search: incumbents by candidate, bounds, counts."""

    problem: Problem
    limits: Limits
    solutions: list[Solution] = field(default_factory=list)
    pruned: dict[str, int] = field(default_factory=dict)
    evaluated: int = 0
    simulated: int = 0
    closed_bound_s: float = float("inf")

    @property
    def incumbent_s(self) -> float:
        return min((solution.step_s for solution in self.solutions), default=float("inf"))

    def run(self, candidates: Sequence[Candidate]) -> tuple[float, Termination]:
        """Solve candidates in order of bound; return the proved bound and why the search ended."""
        queue = [(self.first_bound(candidate), index) for index, candidate in enumerate(candidates)]
        heapq.heapify(queue)
        total = len(queue)
        while queue:
            bound_s, index = queue[0]
            target_s = self.incumbent_s / (1.0 + self.limits.gap)
            if bound_s >= target_s:
                self.pruned["area"] = self.pruned.get("area", 0) + len(queue)
                break
            stopped = self.limits.reached()
            if stopped is not None:
                return min(self.closed_bound_s, bound_s), stopped
            heapq.heappop(queue)
            self.solve(candidates[index])
            self.limits.report("solving", total - len(queue), total, self.incumbent_s, bound_s)
        rest_s = queue[0][0] if queue else float("inf")
        return min(self.closed_bound_s, rest_s, self.incumbent_s), "gap"

    def first_bound(self, candidate: Candidate) -> float:
        """Return a bound that every partition obeys: all work over all ranks, and the longest layer."""
        costs = self.problem.costs(candidate.configuration)
        overhead_s = 2.0 * self.problem.profile.action_overhead_s
        ranks, count = candidate.configuration.num_ranks, candidate.configuration.num_microbatches
        once = count * overhead_s + self.problem.profile.step_overhead_s + costs.stage_latency_s
        mean = (count * costs.time_s + costs.step_s).sum() / ranks
        return float(once + max(mean, (count * costs.time_s + costs.step_s).max()))

    def solve(self, candidate: Candidate) -> None:
        """Bound a candidate by the interval programme and simulate its partitions."""
        problem = self.problem
        self.evaluated += 1
        order = problem.order(candidate)
        ranges = Ranges(
            problem.costs(candidate.configuration), order, problem.capacity_bytes - problem.base_bytes, problem.levels
        )
        extra_s = problem.profile.step_overhead_s
        found = solve_intervals(
            ranges, problem.wiring(candidate.configuration), overhead_s=problem.profile.action_overhead_s
        )
        if found is None:
            self.pruned["memory"] = self.pruned.get("memory", 0) + 1
            return
        count = problem.profile.num_layers
        if comb(count - 1, order.num_stages - 1) <= _MOST_PARTITIONS:
            self._simulate_all(candidate, ranges)
            return
        self.closed_bound_s = min(self.closed_bound_s, found.bound_s + extra_s)
        self._improve(candidate, ranges, found.bounds)

    def _simulate_all(self, candidate: Candidate, ranges: Ranges) -> None:
        """Simulate every partition, each with the least recomputation, which no other choice can beat."""
        best: Solution | None = None
        for bounds in all_partitions(ranges.costs.num_layers, ranges.order.num_stages):
            solution = self._complete(candidate, ranges, bounds)
            if solution is not None and (best is None or solution.step_s < best.step_s):
                best = solution
        assert best is not None
        self.solutions.append(best)
        self.closed_bound_s = min(self.closed_bound_s, best.step_s)

    def _improve(self, candidate: Candidate, ranges: Ranges, bounds: tuple[int, ...]) -> None:
        """Move boundaries by one layer as long as the simulated step falls."""
        best = self._complete(candidate, ranges, bounds)
        assert best is not None
        improved = True
        while improved:
            improved = False
            for index in range(1, len(bounds) - 1):
                for step in (-1, 1):
                    moved = list(best.partition.bounds)
                    moved[index] += step
                    if not moved[index - 1] < moved[index] < moved[index + 1]:
                        continue
                    solution = self._complete(candidate, ranges, tuple(moved))
                    if solution is not None and solution.step_s < best.step_s * (1 - 1e-12):
                        best, improved = solution, True
        self.solutions.append(best)

    def _complete(self, candidate: Candidate, ranges: Ranges, bounds: tuple[int, ...]) -> Solution | None:
        levels: list[int] = []
        for rank in range(ranges.order.num_ranks):
            found = ranges.least(rank, bounds[rank], bounds[rank + 1])
            if found is None:
                return None
            levels += ranges.levels_of(found, bounds[rank], bounds[rank + 1])
        partition = Partition(bounds, tuple(levels))
        self.simulated += 1
        return Solution(self.problem.step_s(candidate, partition), candidate, partition)


def solve(problem: Problem, limits: Limits) -> PlanOutcome:
    """Return the plan of least simulated step over the declared space, with its certificate."""
    candidates = problem.candidates()
    search = Search(problem, limits)
    bound_s, termination = search.run(candidates)
    if not search.solutions:
        return _without_plan(problem, search, candidates, termination)
    ranked = sorted(search.solutions, key=lambda solution: solution.step_s)
    plans = [_scored(problem, solution) for solution in ranked[: limits.top + 1]]
    plans.sort(key=lambda pair: pair[1].prediction.step_time_s)
    best = plans[0][1]
    objective_s = best.prediction.step_time_s
    bound_s = min(bound_s, objective_s)
    gap = max(0.0, objective_s / bound_s - 1.0)
    status: Status = "optimal" if gap <= OPTIMAL_GAP else "within_gap" if gap <= limits.gap + 1e-12 else "feasible"
    certificate = Certificate(
        status="optimal" if gap <= OPTIMAL_GAP else "within_gap" if gap <= limits.gap + 1e-12 else "feasible",
        objective_name="step_time_s",
        space=problem.space_words(),
        objective=objective_s,
        bound=bound_s,
        gap=gap,
        candidates=len(candidates),
        evaluated=search.evaluated,
        simulated=search.simulated,
        pruned=search.pruned,
    )
    return PlanOutcome(
        status=status,
        plan=best.model_copy(update={"certificate": certificate}),
        objective_s=objective_s,
        bound_s=bound_s,
        gap=gap,
        candidates=len(candidates),
        evaluated=search.evaluated,
        simulated=search.simulated,
        wall_s=0.0,
        termination="optimal" if gap <= OPTIMAL_GAP else termination,
        alternatives=tuple(
            Alternative(
                summary=solution.candidate.summary,
                step_time_s=plan.prediction.step_time_s,
                peak_memory_bytes=max(plan.prediction.peak_memory_bytes),
                plan=plan,
            )
            for solution, plan in plans[1:]
        ),
    )


def _scored(problem: Problem, solution: Solution) -> tuple[Solution, Plan]:
    plan = problem.plan(solution.candidate, solution.partition, "exact")
    return solution, plan.model_copy(update={"prediction": evaluate(plan, problem.profile).prediction})


def _without_plan(
    problem: Problem, search: Search, candidates: Sequence[Candidate], termination: Termination
) -> PlanOutcome:
    stopped = termination in ("time_limit", "cancelled")
    return PlanOutcome(
        status="no_solution" if stopped else "infeasible",
        plan=None,
        objective_s=None,
        bound_s=None,
        gap=None,
        candidates=len(candidates),
        evaluated=search.evaluated,
        simulated=search.simulated,
        wall_s=0.0,
        termination=termination if stopped else None,
        diagnosis=None if stopped else diagnose(problem, candidates),
    )
