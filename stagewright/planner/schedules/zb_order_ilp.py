"""The zero-bubble order as an integer programme: exact for a few dozen actions, and the test oracle beyond heuristics.

One chunk on each rank, actions x = (rank d, kind, microbatch j) with times t_x and ends E_x. Microbatches keep their order
in every kind (some optimum does, see `list_scheduling`), so only these pairs of a rank have an open order, one binary
O(x, y) = "x before y" each: (F_i, I_j), (F_i, W_j) and (I_i, W_j) with i > j. Minimise M subject to

    E(d, F, j) >= E(d - 1, F, j) + c + t                                  `_link`
    E(d, I, j) >= E(d + 1, I, j) + c + t,  E(d, I, j) >= E(d, F, j) + t
    E(d, W, j) >= E(d, I, j) + t,  E(d, k, j) >= E(d, k, j - 1) + t
    E_x >= E_y + t_x - H O(x, y),  E_y >= E_x + t_y - H (1 - O(x, y))     `_order`
    i + 1 - sum over j < i of (1 - O(F_i, W_j)) <= A_d for every F_i      `_remember`
    M >= E_x

with H the horizon (the heuristic's makespan), A_d the activations that fit the rank, and c the latency between ranks.

Exponential in the binaries; up to about 40 actions take a fraction of a second. Solved by HiGHS through PuLP.
Paper: Qi et al., Zero Bubble Pipeline Parallelism, ICLR 2024, section 3 and appendix G.
"""

from __future__ import annotations

import itertools

import numpy as np
import pulp

from stagewright.planner.schedules.list_scheduling import BACKWARD, FORWARD, WEIGHT, Chains, Floats, Words

Action = tuple[int, int, int]  # rank, kind, microbatch


def solve_order(chains: Chains, cap: Floats, *, most_s: float) -> Words | None:
    """Return the order of least makespan, or None when the solver finds none below `most_s` (with a slack of 0.1 %)."""
    unit_s = float(chains.seconds.mean())
    horizon = 1.001 * most_s / unit_s
    problem = pulp.LpProblem("zero_bubble_order", pulp.LpMinimize)
    makespan = pulp.LpVariable("M", lowBound=0.0, upBound=horizon)
    problem += makespan
    count, ranks = int(chains.units[0]), len(chains.rank)
    end = {
        action: pulp.LpVariable("E_{}_{}_{}".format(*action), lowBound=0.0, upBound=horizon)
        for action in itertools.product(range(ranks), (FORWARD, BACKWARD, WEIGHT), range(count))
    }
    time = {action: float(chains.seconds[action[1], action[0]]) / unit_s for action in end}
    _link(problem, end, time, chains.latency_s / unit_s, ranks, count)
    for rank in range(ranks):
        before = _order(problem, end, time, horizon, rank, count)
        _remember(problem, before, _most_live(chains, cap, rank), rank, count)
        problem += makespan >= end[rank, WEIGHT, count - 1]
        problem += makespan >= end[rank, BACKWARD, count - 1]
    problem.solve(pulp.HiGHS(msg=False, gapRel=0.0, threads=1))
    if problem.status != pulp.LpStatusOptimal:
        return None
    return _words(end, time, ranks, count)


def _link(
    problem: pulp.LpProblem,
    end: dict[Action, pulp.LpVariable],
    time: dict[Action, float],
    latency: float,
    ranks: int,
    count: int,
) -> None:
    for rank, unit in itertools.product(range(ranks), range(count)):
        forward, backward, weight = ((rank, kind, unit) for kind in (FORWARD, BACKWARD, WEIGHT))
        problem += end[forward] >= time[forward]
        if rank > 0:
            problem += end[forward] >= end[rank - 1, FORWARD, unit] + latency + time[forward]
        if rank + 1 < ranks:
            problem += end[backward] >= end[rank + 1, BACKWARD, unit] + latency + time[backward]
        problem += end[backward] >= end[forward] + time[backward]
        problem += end[weight] >= end[backward] + time[weight]
        for action in (forward, backward, weight):
            if unit > 0:
                problem += end[action] >= end[rank, action[1], unit - 1] + time[action]


def _order(
    problem: pulp.LpProblem,
    end: dict[Action, pulp.LpVariable],
    time: dict[Action, float],
    horizon: float,
    rank: int,
    count: int,
) -> dict[tuple[Action, Action], pulp.LpVariable]:
    """Add one binary for each open pair of the rank, and return them: 1 when the first action goes first."""
    before = {}
    for later, earlier in ((FORWARD, BACKWARD), (FORWARD, WEIGHT), (BACKWARD, WEIGHT)):
        for i, j in itertools.product(range(count), range(count)):
            if i <= j:
                continue
            x, y = (rank, later, i), (rank, earlier, j)
            goes_first = pulp.LpVariable(f"O_{rank}_{later}_{i}_{earlier}_{j}", cat=pulp.LpBinary)
            problem += end[x] >= end[y] + time[x] - horizon * goes_first
            problem += end[y] >= end[x] + time[y] - horizon * (1 - goes_first)
            before[x, y] = goes_first
    return before


def _remember(
    problem: pulp.LpProblem,
    before: dict[tuple[Action, Action], pulp.LpVariable],
    most_live: int,
    rank: int,
    count: int,
) -> None:
    for i in range(most_live, count):
        freed = pulp.lpSum(1 - before[(rank, FORWARD, i), (rank, WEIGHT, j)] for j in range(i))
        problem += freed >= i + 1 - most_live


def _most_live(chains: Chains, cap: Floats, rank: int) -> int:
    held, count = float(chains.held[rank]), int(chains.units[rank])
    return count if held <= 0.0 or cap[rank] == np.inf else min(count, int(cap[rank] / held + 1e-9))


def _words(end: dict[Action, pulp.LpVariable], time: dict[Action, float], ranks: int, count: int) -> Words:
    letters = []
    for rank in range(ranks):
        actions = [action for action in end if action[0] == rank]
        actions.sort(key=lambda action: (float(end[action].value()) - 0.5 * time[action], action))
        letters.append([kind * ranks + rank for _, kind, _ in actions])
    flat = np.array([letter for word in letters for letter in word], dtype=np.int32)
    return Words(flat, np.arange(ranks + 1, dtype=np.int64) * 3 * count)
