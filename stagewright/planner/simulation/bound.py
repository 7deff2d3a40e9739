"""A cheap proved lower bound on the makespan of any order of a schedule's work on its ranks.

For a rank, take the F, I and W of its stages as jobs: each cannot start before the shortest way from the sources of the
stage graph to it (its head), nor the step end sooner than the shortest way on from it (its tail), latencies included.
One rank runs one job at a time, so for all thresholds h and q

    makespan >= min head + sum of work + min tail      over the jobs with head >= h and tail >= q

A full backward counts as I and W apart, hence the bound holds for split orders too; slices may overlap along the chain,
so heads and tails step by one slice. It knows no memory: `schedules.auto.any_order_bound` is stronger on chains without
slices. O(D S^2).

Source: the one-machine bound of Carlier and Pinson, An Algorithm for Solving the Job-Shop Problem, 1989.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from stagewright.planner.schedules.action import Kind
from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.schedules.schedule import KIND, MICROBATCH, REPLICA, SLICE, STAGE, Schedule

Floats = npt.NDArray[np.float64]


def work_bound(
    schedule: Schedule, costs: StageCosts, *, latency_s: float = 0.0, microbatch_time: Floats | None = None
) -> float:
    """Return seconds below which no order of the same actions on the same ranks ends.

    `microbatch_time`, [num_microbatches], are factors on the seconds of each microbatch, 1 unless given.
    """
    factor = np.ones(schedule.num_microbatches) if microbatch_time is None else microbatch_time
    share = float(factor.min(initial=1.0)) / schedule.num_slices  # of the shortest piece that may lead the way
    heads, tails = _heads_and_tails(schedule, costs, latency_s, share)
    step = np.stack((costs.forward_s, costs.input_grad_s + costs.recompute_s, costs.weight_grad_s))
    microbatches = _microbatches(schedule, factor)
    work = step[:, None, :] * microbatches[None, :, :]
    best = float((heads + step[:, None, :] * share + tails)[:, microbatches > 0].max(initial=0.0))
    for rank in range(schedule.num_ranks):
        held = np.broadcast_to((schedule.placement == rank) & (microbatches > 0), heads.shape)
        best = max(best, _one_machine(heads[held], work[held], tails[held]))
    return best


def _heads_and_tails(schedule: Schedule, costs: StageCosts, latency_s: float, share: float) -> tuple[Floats, Floats]:
    """Return heads and tails of F, I and W, [3, num_replicas, num_stages]; stages of an edge are in ascending order."""
    shape = (3, schedule.num_replicas, schedule.num_stages)
    heads, tails = np.zeros(shape), np.zeros(shape)
    forward, backward = costs.forward_s * share, (costs.input_grad_s + costs.recompute_s) * share
    weight = costs.weight_grad_s * share
    hop = {
        (source, target): latency_s * (schedule.placement[:, source] != schedule.placement[:, target])
        for source, target in schedule.edges
    }
    order = _topological(schedule)
    sources: list[list[int]] = [[] for _ in order]
    targets: list[list[int]] = [[] for _ in order]
    for source, target in schedule.edges:
        sources[target].append(source)
        targets[source].append(target)
    for stage in order:
        for source in sources[stage]:
            arrival = heads[0, :, source] + forward[source] + hop[source, stage]
            heads[0, :, stage] = np.maximum(heads[0, :, stage], arrival)
    for stage in reversed(order):
        heads[1, :, stage] = heads[0, :, stage] + forward[stage]
        for target in targets[stage]:
            arrival = heads[1, :, target] + backward[target] + hop[stage, target]
            heads[1, :, stage] = np.maximum(heads[1, :, stage], arrival)
        heads[2, :, stage] = heads[1, :, stage] + backward[stage]
    for stage in order:
        tails[1, :, stage] = weight[stage]
        for source in sources[stage]:
            after = hop[source, stage] + backward[source] + tails[1, :, source]
            tails[1, :, stage] = np.maximum(tails[1, :, stage], after)
    for stage in reversed(order):
        tails[0, :, stage] = backward[stage] + tails[1, :, stage]
        for target in targets[stage]:
            after = hop[stage, target] + forward[target] + tails[0, :, target]
            tails[0, :, stage] = np.maximum(tails[0, :, stage], after)
    return heads, tails


def _topological(schedule: Schedule) -> list[int]:
    waiting = np.zeros(schedule.num_stages, dtype=np.int64)
    for _, target in schedule.edges:
        waiting[target] += 1
    ready = [stage for stage in range(schedule.num_stages) if not waiting[stage]]
    order: list[int] = []
    while ready:
        order.append(ready.pop())
        for source, target in schedule.edges:
            if source == order[-1]:
                waiting[target] -= 1
                if not waiting[target]:
                    ready.append(target)
    return order


def _microbatches(schedule: Schedule, factor: Floats) -> Floats:
    """Return how many whole microbatches pass each stage of each replica."""
    passed = np.zeros(schedule.placement.shape)
    for order in schedule.orders:
        rows = order[order[:, KIND] == Kind.F]
        amount = np.where(rows[:, SLICE] < 0, 1.0, 1 / schedule.num_slices) * factor[rows[:, MICROBATCH]]
        np.add.at(passed, (rows[:, REPLICA], rows[:, STAGE]), amount)
    return passed


def _one_machine(head_s: Floats, work_s: Floats, tail_s: Floats) -> float:
    best = 0.0
    for head in np.unique(head_s):
        late = head_s >= head
        for tail in np.unique(tail_s[late]):
            chosen = late & (tail_s >= tail)
            best = max(best, float(head_s[chosen].min() + work_s[chosen].sum() + tail_s[chosen].min()))
    return best
