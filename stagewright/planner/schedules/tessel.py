"""Tessel: a repeating unit ("repetend") of few microbatches with the shortest period, then unrolled.

Every action b of a microbatch (F, I, W of each virtual stage, on the rank that holds it) gets a start t[b]; microbatch m runs it
at t[b] + m P. With o[b] the place of b within the period of its rank, t[b] = o[b] modulo P, so a period holds actions of
t[b] // P earlier microbatches, and

    t[c] >= t[b] + d[b] (+ latency)      for b before c
    o                                    the actions of a rank follow each other without overlap

Any cyclic order of a rank's actions will do, since an action can wait until its place comes round. So the busiest rank's work,
which no period can undercut, is always reached; what the orders decide is how many microbatches are in flight, and so the
memory. A seeded search over the cyclic orders and the phases of the ranks lowers

    excess over the cap, microbatches in flight, summed lives of the activations      (in this order)

at the least period, then at growing ones until the caps hold, at last one microbatch at a time; bisection goes back from there. Sorting the unrolled starts gives each rank's order,
which is free of deadlock because it is the order of a schedule with times; warm-up and cool-down hold subsets of the
repetend's activations, so they keep the cap.

The period is the least one without a cap; with one it is not claimed to be, nor are the microbatches in flight (the paper's SMT solver
proves them on small placements). O(S) for each of at most 40,000 orders of a period.

Paper: Lin et al., Tessel: Boosting Distributed Execution of Large DNN Models via Flexible Schedule Search, HPCA 2024.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from stagewright.planner.errors import Infeasible
from stagewright.planner.schedules.action import Kind
from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.schedules.family import ScheduleFamily, ScheduleRequest
from stagewright.planner.schedules.list_scheduling import Floats, Ints
from stagewright.planner.schedules.random_moves import RandomState, shift, uniform
from stagewright.planner.schedules.schedule import KIND, MICROBATCH, SLICE, STAGE, Schedule, wave_placement
from stagewright.planner.schedules.sizes import costs_of, effort_of, require, sizes_of

FIRST_STEP, STEP_GROWTH = 0.04, 1.5  # of the period, while no repetend keeps the caps
BISECTIONS = 3  # between the last period without a repetend and the first with one
STARTS = 2  # of the search at one period
MOST_ORDERS = 20_000  # of one start
LEAST_ORDERS = 50
_KINDS = (Kind.F, Kind.I, Kind.W)
_FORWARD, _INPUT_GRAD, _WEIGHT_GRAD = 0, 1, 2


class Problem(NamedTuple):
    """The actions of one microbatch by letter, 3 * stage + (0 for F, 1 for I, 2 for W).

    Parameters
    ----------
    rank, duration_s : of each letter.
    chain : letters in an order that puts predecessors first.
    before : predecessor of each letter, -1 for none.
    delay_s : latency from the predecessor.
    activation, freed : of each stage: held from F, and the share freed at I.
    cap : most live activation of each rank.
    """

    rank: Ints
    duration_s: Floats
    chain: Ints
    before: Ints
    delay_s: Floats
    activation: Floats
    freed: Floats
    cap: Floats

    @property
    def least_period_s(self) -> float:
        """The busiest rank's work for one microbatch."""
        return float(np.bincount(self.rank, weights=self.duration_s).max())


@dataclass(frozen=True, eq=False)
class Repetend:
    """Period and start of each letter of microbatch 0."""

    period_s: float
    start_s: Floats

    @property
    def num_in_flight(self) -> int:
        """Microbatches of which one period runs actions."""
        return int(np.floor(self.start_s.max() / self.period_s + 1e-9)) + 1


def tessel(request: ScheduleRequest) -> Schedule:
    """Return the unrolled repetend on the request's placement, or on a V of two chunks."""
    chunks = 2 if request.num_chunks is None and request.placement is None else None
    sizes = sizes_of(request, "tessel", default_chunks=chunks or 1, most_chunks=None)
    placement = wave_placement(sizes.num_ranks, sizes.num_chunks) if request.placement is None else request.placement
    require(
        placement.shape == (1, sizes.num_stages),
        f"placement has shape {placement.shape}, {sizes.num_stages} stages need (1, {sizes.num_stages})",
        field="placement",
    )
    costs = costs_of(request, sizes).without_growth()
    cap = np.inf if request.memory_cap is None else request.memory_cap
    problem = make_problem(placement[0], costs, latency_s=request.latency_s, cap=cap)
    held = np.bincount(placement[0], weights=costs.activation)
    orders = int(np.clip(effort_of(request, actions=3e5) / len(problem.rank), LEAST_ORDERS, MOST_ORDERS))
    repetend = shortest_repetend(problem, orders=orders)
    if repetend is None:
        raise Infeasible(
            f"one microbatch holds {float(held.max()):g} activations on a rank, the cap is {cap:g}",
            field="memory_cap",
            hint=f"give a cap of at least {float(held.max()):g}",
        )
    return unrolled(repetend, placement, sizes.num_microbatches)


def make_problem(placement: npt.NDArray[np.int32], costs: StageCosts, *, latency_s: float, cap: float) -> Problem:
    """Return the letters of a chain of stages on ranks [num_stages]."""
    stages = np.arange(len(placement))
    forward, input_grad, weight_grad = (3 * stages + kind for kind in range(3))
    before = np.full(3 * len(stages), -1, dtype=np.int64)
    before[forward[1:]] = forward[:-1]
    before[input_grad[-1]] = forward[-1]
    before[input_grad[:-1]] = input_grad[1:]
    before[weight_grad] = input_grad
    rank = np.repeat(placement, 3).astype(np.int64)
    seconds = np.stack((costs.forward_s, costs.input_grad_s + costs.recompute_s, costs.weight_grad_s), axis=1).ravel()
    return Problem(
        rank,
        seconds,
        np.concatenate((forward, input_grad[::-1], weight_grad[::-1])),
        before,
        np.where((before >= 0) & (rank != rank[before]), latency_s, 0.0),
        costs.activation,
        costs.freed_at_input_grad,
        np.full(int(placement.max()) + 1, cap * (1.0 + 1e-9)),
    )


def shortest_repetend(problem: Problem, *, orders: int) -> Repetend | None:
    """Return the repetend of the shortest period at which one within the caps is found, the least period tried first.

    None when one microbatch at a time, which is the last period tried, is over a cap.
    """
    serial_s = _serial_starts(problem)
    last_s = float((serial_s + problem.duration_s).max())

    def repetend_of(period_s: float) -> Repetend | None:
        start_s = np.empty(len(problem.rank))
        for seed in range(STARTS):
            if search(problem, period_s, orders, np.array([seed], dtype=np.uint64), start_s) <= 0.0:
                return Repetend(period_s, start_s)
        return None

    low_s, period_s, step = 0.0, problem.least_period_s, FIRST_STEP
    best: Repetend | None = None
    while period_s < last_s and best is None:
        best = repetend_of(period_s)
        if best is None:
            low_s, period_s, step = period_s, period_s * (1.0 + step), STEP_GROWTH * step
    if best is None:
        held = np.bincount(problem.rank[::3], weights=problem.activation)
        return Repetend(last_s, serial_s) if (held <= problem.cap).all() else None
    for _ in range(BISECTIONS if low_s > 0.0 else 0):
        middle_s = (low_s + best.period_s) / 2
        found = repetend_of(middle_s)
        best, low_s = (best, middle_s) if found is None else (found, low_s)
    return best


def _serial_starts(problem: Problem) -> Floats:
    """Return starts of the letters, one after the other along the chain."""
    start_s = np.zeros(len(problem.rank))
    time_s = 0.0
    for letter in problem.chain.tolist():
        start_s[letter] = time_s + problem.delay_s[letter]
        time_s = start_s[letter] + problem.duration_s[letter]
    return start_s


@njit(cache=True)
def search(problem: Problem, period_s: float, orders: int, state: RandomState, best_start_s: Floats) -> float:
    """Return the excess over the caps of the best repetend of this period; `best_start_s` [letters] becomes its starts."""
    letters, ranks = len(problem.rank), len(problem.cap)
    first = np.zeros(ranks + 1, dtype=np.int64)
    for letter in range(letters):
        first[problem.rank[letter] + 1] += 1
    first = np.cumsum(first)
    order = np.empty(letters, dtype=np.int64)
    spare_s = np.full(ranks, period_s)
    filled = first[:-1].copy()
    for letter in problem.chain:
        rank = problem.rank[letter]
        order[filled[rank]] = letter
        filled[rank] += 1
        spare_s[rank] -= problem.duration_s[letter]
    # The phase of a rank, and how much of its spare time stands in front of each letter.
    gap = np.zeros(letters)
    phase_s = np.zeros(ranks)
    for rank in range(1, ranks):
        phase_s[rank] = phase_s[rank - 1] + problem.duration_s[order[first[rank - 1]]]
    start_s, offset_s = np.empty(letters), np.empty(letters)
    best = _value(problem, order, first, gap, spare_s, phase_s, period_s, offset_s, start_s)
    best_start_s[:] = start_s
    for _ in range(orders):
        if best[0] <= 0.0 and best[1] == 0.0:
            break
        rank = int(uniform(state) * ranks)
        low, high = first[rank], first[rank + 1]
        source, target = low + int(uniform(state) * (high - low)), low + int(uniform(state) * (high - low))
        draw = uniform(state)
        old_phase_s, old_gap = phase_s[rank], gap[source]
        if draw < 0.6:
            shift(order, source, target)
        elif draw < 0.8 and spare_s[rank] > 1e-9 * period_s:
            gap[source] = 0.0 if uniform(state) < 0.5 else uniform(state)
        else:
            # Mostly such that the letter starts when its input arrives.
            letter = order[source]
            arrival_s = uniform(state) * period_s
            if problem.before[letter] >= 0 and uniform(state) < 0.8:
                earlier = problem.before[letter]
                arrival_s = start_s[earlier] + problem.duration_s[earlier] + problem.delay_s[letter]
            phase_s[rank] = (phase_s[rank] + arrival_s - start_s[letter]) % period_s
        value = _value(problem, order, first, gap, spare_s, phase_s, period_s, offset_s, start_s)
        if value <= best:
            best = value
            best_start_s[:] = start_s
        else:
            phase_s[rank], gap[source] = old_phase_s, old_gap
            if draw < 0.6:
                shift(order, target, source)
            start_s[:] = best_start_s
    return float(best[0])


@njit(cache=True, no_cpython_wrapper=True)
def _value(
    problem: Problem, order: Ints, first: Ints, gap: Floats, spare_s: Floats, phase_s: Floats, period_s: float,
    offset_s: Floats, start_s: Floats,
) -> tuple[float, float, float]:  # fmt: skip
    """Time the letters and return (excess over the caps in shares of a cap, microbatches in flight, lives in periods)."""
    ranks = len(problem.cap)
    for rank in range(ranks):
        wished = 1e-9
        for at in range(first[rank], first[rank + 1]):
            wished += gap[at]
        time_s = phase_s[rank]
        for at in range(first[rank], first[rank + 1]):
            time_s += spare_s[rank] * gap[at] / max(wished, 1.0)
            offset_s[order[at]] = time_s
            time_s += problem.duration_s[order[at]]
    last_s = 0.0
    for letter in problem.chain:
        ready_s = 0.0
        earlier = problem.before[letter]
        if earlier >= 0:
            ready_s = start_s[earlier] + problem.duration_s[earlier] + problem.delay_s[letter]
        turns = np.ceil((ready_s - offset_s[letter]) / period_s - 1e-9)
        start_s[letter] = offset_s[letter] + turns * period_s
        last_s = max(last_s, start_s[letter])
    excess, lives = 0.0, 0.0
    for rank in range(ranks):
        peak = 0.0
        for at in range(first[rank], first[rank + 1]):
            if order[at] % 3 != _FORWARD:
                continue
            now_s, live = start_s[order[at]], 0.0
            for other in range(first[rank], first[rank + 1]):
                if order[other] % 3 != _FORWARD:
                    continue
                letter = order[other]
                stage = letter // 3
                half_s = start_s[letter + 1] + problem.duration_s[letter + 1]
                end_s = start_s[letter + 2] + problem.duration_s[letter + 2]
                entered = np.floor((now_s - start_s[letter]) / period_s + 1e-9) + 1.0
                half = np.floor((now_s - half_s) / period_s + 1e-9) + 1.0
                gone = np.floor((now_s - end_s) / period_s + 1e-9) + 1.0
                share = problem.freed[stage]
                live += problem.activation[stage] * (entered - share * half - (1.0 - share) * gone)
            peak = max(peak, live)
            lives += (start_s[order[at] + 2] - now_s) / period_s
        if peak > problem.cap[rank]:
            excess += (peak - problem.cap[rank]) / problem.cap[rank]
    return excess, np.floor(last_s / period_s + 1e-9), lives


def unrolled(repetend: Repetend, placement: npt.NDArray[np.int32], num_microbatches: int) -> Schedule:
    """Return the order of `num_microbatches` copies of the repetend, one period apart."""
    letters = np.arange(len(repetend.start_s))
    microbatch = np.arange(num_microbatches)
    time_s = np.round(repetend.start_s[:, None] / repetend.period_s + microbatch, 9)
    kinds = np.array(_KINDS, dtype=np.int32)
    rank_of = placement[0][letters // 3]
    orders = []
    for rank in range(int(placement.max()) + 1):
        own = letters[rank_of == rank]
        times_s, letter, index = (
            column.ravel() for column in np.broadcast_arrays(time_s[own], own[:, None], microbatch[None, :])
        )
        by_time = np.lexsort((letter, times_s))
        order = np.zeros((len(by_time), 6), dtype=np.int32)
        order[:, KIND] = kinds[letter[by_time] % 3]
        order[:, STAGE] = letter[by_time] // 3
        order[:, MICROBATCH] = index[by_time]
        order[:, SLICE] = -1
        orders.append(order)
    return Schedule(
        "tessel",
        num_microbatches,
        placement,
        tuple(orders),
        parameters={"period_s": repetend.period_s, "in_flight": repetend.num_in_flight},
    )


FAMILY = ScheduleFamily(
    "tessel",
    "Lin et al., Tessel: Boosting Distributed Execution of Large DNN Models via Flexible Schedule Search, HPCA 2024",
    tessel,
    split_backward=True,
    default_chunks=2,
    improves=True,
    takes_cap=True,
)
