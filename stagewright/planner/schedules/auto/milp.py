"""The integer programme of a small instance, modelled in PuLP and solved by HiGHS.

    minimise  C
    C >= t_a + d_a                                        for all actions a
    t_b >= t_a + d_a + delay                              chain arcs
    t_b >= t_a + d_a - M_ab (1 - x_ab)                    for each pair of a rank that is open at the root; M_ab = latest a + d_a - earliest b
    t_a >= t_b + d_b - M_ba x_ab
    x(a, y_k) <= x(a, y_k+1),  x(y_k+1, a) <= x(y_k, a)   letters keep their microbatches in order
    sum of held_a x_af over actions a of the rank + held_f <= cap      at each forward f

Pairs that the relaxed graph fixes (see `precedence`) are constants. Practical to about 40 actions; branch and bound goes
further. It serves as an independent check and where a solver's own proof is wanted.
"""

from __future__ import annotations

import numpy as np
import pulp

from stagewright.planner.schedules.auto.instance import Instance
from stagewright.planner.schedules.auto.precedence import Layout, Node, layout_of, root_node

RELATIVE_SLACK = 1e-3  # the incumbent as an upper bound needs room for the solver's tolerances


def solve_milp(instance: Instance, makespan_s: float, *, most_nodes: int = 100_000) -> float | None:
    """Return the least makespan of any order, given one that is known; None when the solver stopped without a proof."""
    if makespan_s <= 0.0:
        return None
    problem, end = _model(instance, makespan_s * (1.0 + RELATIVE_SLACK))
    solver = pulp.HiGHS(msg=False, threads=1, gapRel=1e-9, gapAbs=1e-9, mip_max_nodes=most_nodes)
    problem.solve(solver)
    if problem.sol_status != pulp.LpSolutionOptimal:
        return None
    return float(end.value())


def _model(instance: Instance, limit_s: float) -> tuple[pulp.LpProblem, pulp.LpVariable]:
    tables, microbatches = instance.tables, instance.num_microbatches
    layout = layout_of(instance)
    root = root_node(instance, layout)
    duration_s = np.repeat(tables.duration_s, microbatches)
    earliest_s, latest_s = root.head_s, limit_s - root.tail_s - duration_s
    problem = pulp.LpProblem("order", pulp.LpMinimize)
    end = pulp.LpVariable("end", float((root.head_s + duration_s + root.tail_s).max()) * (1.0 - 1e-9), limit_s)
    start = [
        pulp.LpVariable(
            f"t{action}",
            float(earliest_s[action]) * (1.0 - 1e-9),
            max(float(latest_s[action]), float(earliest_s[action])),
        )
        for action in range(instance.num_actions)
    ]
    problem += end
    for action in range(instance.num_actions):
        letter, microbatch = divmod(action, microbatches)
        problem += end >= start[action] + float(duration_s[action])
        before = int(tables.predecessor[letter])
        if before >= 0:
            source = before * microbatches + microbatch
            problem += start[action] >= start[source] + float(duration_s[source] + tables.delay_s[letter])
    for rank in range(instance.num_ranks):
        _add_rank(problem, instance, rank, layout, root, start, earliest_s.tolist(), latest_s.tolist())
    return problem, end


def _add_rank(
    problem: pulp.LpProblem,
    instance: Instance,
    rank: int,
    layout: Layout,
    root: Node,
    start: list[pulp.LpVariable],
    earliest_s: list[float],
    latest_s: list[float],
) -> None:
    """Add the disjunctions, the order of equal letters and the cap of one rank."""
    tables, microbatches = instance.tables, instance.num_microbatches
    own = [
        letter * microbatches + microbatch
        for letter in layout.letters[rank].tolist()
        if letter >= 0
        for microbatch in range(microbatches)
    ]
    before: dict[tuple[int, int], pulp.LpAffineExpression | int] = {}
    for row, first in enumerate(own):
        for second in own[:row]:
            letter, microbatch = divmod(second, microbatches)
            column = layout.column[letter]
            one_s = float(tables.duration_s[first // microbatches])
            two_s = float(tables.duration_s[second // microbatches])
            if microbatch >= root.most[first, column]:
                before[first, second], before[second, first] = 1, 0
                problem += start[second] >= start[first] + one_s
            elif microbatch < root.least[first, column]:
                before[first, second], before[second, first] = 0, 1
                problem += start[first] >= start[second] + two_s
            else:
                choice = pulp.LpVariable(f"x{first}_{second}", cat="Binary")
                before[first, second], before[second, first] = choice, 1 - choice
                ahead_s = max(0.0, latest_s[first] + one_s - earliest_s[second])
                behind_s = max(0.0, latest_s[second] + two_s - earliest_s[first])
                problem += start[second] >= start[first] + one_s - ahead_s * (1 - choice)
                problem += start[first] >= start[second] + two_s - behind_s * choice
    for action in own:
        for letter in sorted({other // microbatches for other in own} - {action // microbatches}):
            for microbatch in range(microbatches - 1):
                this = letter * microbatches + microbatch
                now, later = before[action, this], before[action, this + 1]
                if not (isinstance(now, int) and isinstance(later, int)):
                    problem += now <= later
    cap = float(tables.cap[rank])
    if not np.isfinite(cap):
        return
    for action in own:
        if (action // microbatches) % 3 == 0:
            held = pulp.lpSum(
                float(tables.held[other // microbatches]) * before[other, action] for other in own if other != action
            )
            problem += held + float(tables.held[action // microbatches]) <= cap
