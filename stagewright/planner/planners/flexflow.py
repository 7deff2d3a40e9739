"""FlexFlow's search (Jia et al., MLSys 2019): Metropolis-Hastings over plans, costs by full or delta simulation.

A proposal changes one thing, drawn uniformly: a stage boundary, a layer's recomputation, or the candidate (degrees,
microbatch, schedule) with its partition. It is accepted with probability

    min{ 1, exp( beta (cost(S) - cost(S*)) / cost(S) ) },

so worse plans are kept now and then. The chain starts from several points (even stages), stops at its number of
proposals, or when the second half of them brought nothing. Delta simulation keeps the end time of every action and runs
again only those that a changed duration or message reaches; it gives the full simulation's number.

Deterministic by seed. No guarantee: detailed balance holds in the limit only. Plans that do not fit cost infinity. The
space is the Problem's own, so operators of a stage share their degrees where the Problem wants that (SOAP's per-operator
degrees are not plans).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp
from random import Random

import numpy as np
import numpy.typing as npt
from numba import njit

from stagewright.planner.documents.outcome import PlanOutcome
from stagewright.planner.planners.aceso import even_bounds
from stagewright.planner.planners.registry import NamedPlanner
from stagewright.planner.planners.scoring import candidates_outcome
from stagewright.planner.search.limits import Limits
from stagewright.planner.search.order import Order, pad
from stagewright.planner.search.pipeline_costs import PipelineCosts
from stagewright.planner.search.problem import Candidate, Partition, Problem

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]

NUM_STARTS = 4
NUM_PROPOSALS = 1500


@dataclass(eq=False)
class DeltaSimulation:
    """The end times of an order's actions under the costs seen last; `makespan` runs again only what they change."""

    order: Order
    _duration: Floats | None = None
    _hop_s: Floats | None = None
    _end: Floats | None = None
    num_run: int = 0

    def makespan(self, pipeline: PipelineCosts) -> float:
        """Return the makespan under new costs; `num_run` counts the actions that were run again."""
        order, hop_s = self.order, pad(pipeline.hop_s)
        duration = order.durations(pipeline.costs)
        if self._duration is None or self._hop_s is None or self._end is None:
            self._end = np.zeros(len(order.before))
            changed = np.ones(len(duration), dtype=np.bool_)
            moved = np.ones(len(hop_s), dtype=np.bool_)
        else:
            changed, moved = duration != self._duration, hop_s != self._hop_s
        self.num_run = int(
            _run_again(order.before, order.across, order.hop, order.code, duration, hop_s, changed, moved, self._end)
        )
        self._duration, self._hop_s = duration, hop_s
        last = order.last
        return float((self._end[last] + pipeline.tail_s)[last > 0].max())


@njit(cache=True)
def _run_again(
    before: Ints,
    across: Ints,
    hop: Ints,
    code: Ints,
    duration: Floats,
    hop_s: Floats,
    changed: npt.NDArray[np.bool_],
    moved: npt.NDArray[np.bool_],
    end: Floats,
) -> int:
    """Bring `end` up to date; return how many actions were run again."""
    touched = np.zeros(len(before), dtype=np.bool_)
    count = 0
    for node in range(1, len(before)):
        if not (changed[code[node]] or moved[hop[node]] or touched[before[node]] or touched[across[node]]):
            continue
        count += 1
        value = max(end[before[node]], end[across[node]] + hop_s[hop[node]]) + duration[code[node]]
        touched[node] = value != end[node]
        end[node] = value
    return count


@dataclass(eq=False)
class Chain:
    """A walk over the plans of some candidates."""

    problem: Problem
    candidates: list[Candidate]
    generator: Random

    def __post_init__(self) -> None:
        self._simulations: dict[Candidate, DeltaSimulation] = {}

    def cost(self, state: tuple[Candidate, Partition]) -> float:
        """Return the simulated step; infinite where the plan does not fit."""
        candidate, partition = state
        if not self.problem.fits(candidate, partition):
            return float("inf")
        if candidate not in self._simulations:
            self._simulations[candidate] = DeltaSimulation(self.problem.order(candidate))
        makespan = self._simulations[candidate].makespan(self.problem.pipeline(candidate, partition))
        return makespan + self.problem.profile.step_overhead_s

    def start(self, candidate: Candidate) -> tuple[Candidate, Partition]:
        """Return even stages with the weakest level that fits, the strongest when none does."""
        stages = candidate.configuration.num_ranks * candidate.num_chunks
        bounds = even_bounds(self.problem.costs(candidate.configuration).time_s, stages)
        layers = self.problem.profile.num_layers
        for level in self.problem.levels:
            partition = Partition(bounds, (level,) * layers)
            if self.problem.fits(candidate, partition):
                return candidate, partition
        return candidate, Partition(bounds, (self.problem.levels[-1],) * layers)

    def propose(self, state: tuple[Candidate, Partition]) -> tuple[Candidate, Partition]:
        """Return a neighbour, drawn uniformly over what may change."""
        candidate, partition = state
        draw = self.generator
        if len(self.candidates) > 1 and draw.random() < 0.1:
            return self.start(draw.choice(self.candidates))
        stages = len(partition.bounds) - 1
        if stages > 1 and (len(self.problem.levels) == 1 or draw.random() < 0.5):
            index = draw.randrange(1, stages)
            low, high = partition.bounds[index - 1] + 1, partition.bounds[index + 1] - 1
            bounds = list(partition.bounds)
            bounds[index] = min(max(bounds[index] + draw.choice((-2, -1, 1, 2)), low), high)
            return candidate, Partition(tuple(bounds), partition.levels)
        levels = list(partition.levels)
        levels[draw.randrange(len(levels))] = draw.choice(self.problem.levels)
        return candidate, Partition(partition.bounds, tuple(levels))

    def walk(
        self,
        state: tuple[Candidate, Partition],
        num_proposals: int,
        limits: Limits,
        *,
        beta: float = 200.0,
        cool: float = 1.0,
    ) -> tuple[float, tuple[Candidate, Partition]]:
        """Return the best plan of a walk; `beta` grows by the factor `cool` over it (1: Metropolis, more: annealing)."""
        cost = best_cost = self.cost(state)
        best, last_gain = state, 0
        for step in range(num_proposals):
            if step % 32 == 0 and limits.reached() is not None:
                break
            if step > 2 * last_gain and step > num_proposals // 2:
                break
            proposed = self.propose(state)
            trial = self.cost(proposed)
            heat = beta * cool ** (step / num_proposals)
            if trial <= cost or (np.isfinite(trial) and self.generator.random() < exp(heat * (1 - trial / cost))):
                state, cost = proposed, trial
            if cost < best_cost:
                best, best_cost, last_gain = state, cost, step
        return best_cost, best


def walk_candidates(
    problem: Problem, limits: Limits, seed: int, *, num_starts: int = NUM_STARTS, cool: float = 1.0
) -> list[tuple[Candidate, Partition]]:
    """Return the best plans of walks from the most promising of a seeded sample of candidates."""
    generator = Random(seed)
    candidates = [item for item in _sample(problem, generator) if problem.takes(item)]
    chain = Chain(problem, candidates, generator)
    starts = sorted(((chain.cost(state), index) for index, state in enumerate(map(chain.start, candidates))))
    found = []
    for _, index in starts[:num_starts]:
        state = chain.start(candidates[index])
        found.append(chain.walk(state, NUM_PROPOSALS // num_starts, limits, cool=cool)[1])
        if limits.reached() is not None:
            break
    return found


def _sample(problem: Problem, generator: Random, most: int = 60) -> list[Candidate]:
    candidates = problem.candidates()
    full = [item for item in candidates if item.configuration.num_devices == problem.num_devices] or candidates
    return generator.sample(full, min(most, len(full)))


def solve(problem: Problem, limits: Limits) -> PlanOutcome:
    """Return the best plan of the walks."""
    return candidates_outcome(problem, limits, walk_candidates(problem, limits, seed=0), PLANNER.name)


PLANNER = NamedPlanner(
    "flexflow",
    "Jia et al., Beyond Data and Model Parallelism for Deep Neural Networks, MLSys 2019",
    solve,
    objective="simulated step time",
    aliases=("mcmc",),
)
