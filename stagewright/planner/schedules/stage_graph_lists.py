"""Greedy orders for stages that form a graph, several of them on a rank: what no chain's list scheduler takes.

Whenever a rank is free it runs, of the actions whose inputs are there first, the one of least priority number; a stage never
has more than `most_ahead` forwards without their backward. Microbatches of a stage keep their order. Of all ranks the one whose
action starts first is served, so no input can arrive before an action that was passed over. Deadlock-free: the oldest
unfinished microbatch always has an action that may run. O(N * actions of a rank that could be next), in plain Python.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stagewright.planner.schedules.action import Kind
from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.schedules.schedule import Orders

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float64]
Edges = tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class GraphRule:
    """Priorities [len(Kind), num_stages], the lower first; forwards ahead [num_stages]; which stages run I and W [num_stages]."""

    priority: Floats
    most_ahead: Ints
    splits: npt.NDArray[np.bool_]


class _Lists:
    def __init__(
        self, placement: Ints, edges: Edges, costs: StageCosts, count: int, latency_s: float, rule: GraphRule
    ) -> None:
        stages, ranks = len(placement), int(placement.max()) + 1
        self.placement, self.count, self.latency_s, self.rule = placement.tolist(), count, latency_s, rule
        self.sources: list[list[int]] = [[] for _ in range(stages)]
        self.targets: list[list[int]] = [[] for _ in range(stages)]
        for source, target in edges:
            self.sources[target].append(source)
            self.targets[source].append(target)
        backward_s = costs.input_grad_s + costs.recompute_s
        self.seconds = {
            Kind.F: costs.forward_s.tolist(),
            Kind.B: (backward_s + costs.weight_grad_s).tolist(),
            Kind.I: backward_s.tolist(),
            Kind.W: costs.weight_grad_s.tolist(),
        }
        self.back = [Kind.I if split else Kind.B for split in rule.splits]
        self.kinds = [(Kind.F, Kind.I, Kind.W) if split else (Kind.F, Kind.B) for split in rule.splits]
        self.end_s: dict[tuple[Kind, int], list[float]] = {
            (kind, stage): [] for stage in range(stages) for kind in self.kinds[stage]
        }
        self.on_rank = [[stage for stage in range(stages) if placement[stage] == rank] for rank in range(ranks)]
        self.free_s = [0.0] * ranks
        self.rows: list[list[tuple[int, int, int, int, int, int]]] = [[] for _ in range(ranks)]

    def ready_s(self, kind: Kind, stage: int) -> float:
        """Return when the next action of this kind has its inputs; infinite when that is not known yet."""
        done = len(self.end_s[kind, stage])
        if done == self.count:
            return np.inf
        if kind is Kind.W:
            before = self.end_s[Kind.I, stage]
            return before[done] if len(before) > done else np.inf
        ready_s = 0.0
        forward = kind is Kind.F
        if forward and done - len(self.end_s[self.back[stage], stage]) >= self.rule.most_ahead[stage]:
            return np.inf
        if not forward:
            made = self.end_s[Kind.F, stage]
            if len(made) <= done:
                return np.inf
            ready_s = made[done]
        for other in self.sources[stage] if forward else self.targets[stage]:
            ends = self.end_s[Kind.F if forward else self.back[other], other]
            if len(ends) <= done:
                return np.inf
            hop_s = self.latency_s if self.placement[other] != self.placement[stage] else 0.0
            ready_s = max(ready_s, ends[done] + hop_s)
        return ready_s

    def choose(self, rank: int) -> tuple[float, float, Kind, int]:
        """Return (start, priority, kind, stage) of what the rank runs next, the start infinite when it has to wait."""
        options = [
            (max(self.ready_s(kind, stage), self.free_s[rank]), float(self.rule.priority[kind, stage]), kind, stage)
            for stage in self.on_rank[rank]
            for kind in self.kinds[stage]
        ]
        first_s = min(option[0] for option in options)
        return min((option for option in options if option[0] <= first_s), key=lambda option: option[1:])

    def run(self) -> tuple[Orders, ...]:
        choices = [self.choose(rank) for rank in range(len(self.on_rank))]
        total = self.count * sum(len(kinds) for kinds in self.kinds)
        for _ in range(total):
            rank = min(range(len(choices)), key=lambda each: choices[each][0])
            start_s, _, kind, stage = choices[rank]
            assert start_s < np.inf, "the oldest microbatch can always go on"
            ends = self.end_s[kind, stage]
            self.rows[rank].append((int(kind), 0, stage, len(ends), -1, 0))
            ends.append(start_s + self.seconds[kind][stage])
            self.free_s[rank] = ends[-1]
            touched = {rank}
            if kind is not Kind.W:
                others = self.targets[stage] if kind is Kind.F else self.sources[stage]
                touched |= {self.placement[other] for other in others}
            for other in touched:
                choices[other] = self.choose(other)
        return tuple(np.array(rows, dtype=np.int32).reshape(-1, 6) for rows in self.rows)

    @property
    def makespan_s(self) -> float:
        return max(self.free_s)


def greedy_orders(
    placement: Ints, edges: Edges, costs: StageCosts, num_microbatches: int, latency_s: float, rules: list[GraphRule]
) -> tuple[Orders, ...]:
    """Return the orders of the rule with the least makespan, the first of equal ones; `placement` is [num_stages]."""
    best: tuple[Orders, ...] = ()
    best_s = np.inf
    for rule in rules:
        orders, makespan_s = order_by(placement, edges, costs, num_microbatches, latency_s, rule)
        if makespan_s < best_s * (1.0 - 1e-12):
            best, best_s = orders, makespan_s
    return best


def order_by(
    placement: Ints, edges: Edges, costs: StageCosts, num_microbatches: int, latency_s: float, rule: GraphRule
) -> tuple[tuple[Orders, ...], float]:
    """Return the orders of one rule and their makespan, seconds."""
    lists = _Lists(placement, edges, costs, num_microbatches, latency_s, rule)
    return lists.run(), lists.makespan_s
