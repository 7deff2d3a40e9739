"""Random schedules that can run, and a second simulator to compare with, written for reading rather than speed."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from stagewright.planner.schedules.action import Action, Kind
from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.schedules.schedule import Schedule, chain_edges, encode


def one_f_one_b(num_ranks: int, num_microbatches: int) -> Schedule:
    """1F1B, written down again here so that these tests stand alone."""
    orders = []
    for rank in range(num_ranks):
        warmup = min(num_ranks - rank, num_microbatches)
        steps = [Action(Kind.F, rank, microbatch) for microbatch in range(warmup)]
        for microbatch in range(num_microbatches):
            steps.append(Action(Kind.B, rank, microbatch))
            if warmup + microbatch < num_microbatches:
                steps.append(Action(Kind.F, rank, warmup + microbatch))
        orders.append(encode(steps))
    return Schedule("1f1b", num_microbatches, np.arange(num_ranks, dtype=np.int32)[None, :], tuple(orders))


def gpipe(num_ranks: int, num_microbatches: int) -> Schedule:
    orders = tuple(
        encode([Action(kind, rank, m) for kind in (Kind.F, Kind.B) for m in range(num_microbatches)])
        for rank in range(num_ranks)
    )
    return Schedule("gpipe", num_microbatches, np.arange(num_ranks, dtype=np.int32)[None, :], orders)


def random_schedule(
    rng: random.Random,
    *,
    replicas: int = 1,
    slices: int = 1,
    dag: bool = False,
    fused: bool = False,
    ranks: int | None = None,
) -> Schedule:
    """Return a schedule made by running random executable actions on random ranks until everything is done."""
    num_ranks = ranks or rng.randint(1, 4)
    num_stages, num_microbatches = rng.randint(num_ranks, 6), rng.randint(1, 5)
    placement = np.array(
        [
            rng.sample(range(num_ranks), num_ranks) + [rng.randrange(num_ranks) for _ in range(num_stages - num_ranks)]
            for _ in range(replicas)
        ],
        dtype=np.int32,
    )
    edges = _random_edges(rng, num_stages) if dag else chain_edges(num_stages)
    replica_of = [rng.randrange(replicas) for _ in range(num_microbatches)]
    split = [[rng.random() < 0.5 for _ in range(num_microbatches)] for _ in range(num_stages)]
    parts = list(range(slices)) if slices > 1 else [-1]
    todo: list[list[tuple[Action, list[tuple[str, Action]]]]] = [[] for _ in range(num_ranks)]
    for m, replica in enumerate(replica_of):
        for stage in range(num_stages):
            rank = int(placement[replica, stage])
            for part in parts:
                forward = Action(Kind.F, stage, m, part, replica)
                needs = [("f", Action(Kind.F, source, m, part, replica)) for source, target in edges if target == stage]
                if part > 0:
                    needs.append(("f", Action(Kind.F, stage, m, part - 1, replica)))
                todo[rank].append((forward, needs))
                back = [("f", forward)] + [
                    ("g", Action(Kind.F, target, m, part, replica)) for source, target in edges if source == stage
                ]
                if 0 <= part < slices - 1:
                    back.append(("g", Action(Kind.F, stage, m, part + 1, replica)))
                kind = Kind.I if split[stage][m] else Kind.B
                todo[rank].append((forward.with_kind(kind), back))
                if split[stage][m]:
                    todo[rank].append((forward.with_kind(Kind.W), [("g", forward)]))
    done: set[tuple[str, Action]] = set()
    orders: list[list[Action | tuple[Action, ...]]] = [[] for _ in range(num_ranks)]
    while any(todo):
        rank = rng.choice([r for r in range(num_ranks) if todo[r]])
        able = [entry for entry in todo[rank] if all(need in done for need in entry[1])]
        if not able:
            continue
        chosen = [rng.choice(able)]
        if fused and rng.random() < 0.5:
            wanted = (Kind.B, Kind.I) if chosen[0][0].kind is Kind.F else (Kind.F,)
            mates = [entry for entry in able if entry[0].kind in wanted and chosen[0][0].kind is not Kind.W]
            chosen += [rng.choice(mates)] if mates else []
        for entry in chosen:
            todo[rank].remove(entry)
            action = entry[0]
            if action.kind is not Kind.W:
                done.add(("f" if action.kind is Kind.F else "g", action.with_kind(Kind.F)))
        actions = tuple(entry[0] for entry in chosen)
        orders[rank].append(actions if len(actions) > 1 else actions[0])
    return Schedule(
        "random", num_microbatches, placement, tuple(encode(order) for order in orders), num_slices=slices, edges=edges
    )


def _random_edges(rng: random.Random, num_stages: int) -> tuple[tuple[int, int], ...]:
    edges = {(rng.randrange(stage), stage) for stage in range(1, num_stages) if rng.random() < 0.9}
    edges |= {(a, b) for a in range(num_stages) for b in range(a + 1, num_stages) if rng.random() < 0.25}
    return tuple(sorted(edges)) or chain_edges(num_stages)


def random_costs(rng: random.Random, num_stages: int) -> StageCosts:
    """Return uneven costs on a coarse grid, so that equal times happen."""
    times = lambda: [rng.randint(1, 8) / 4 for _ in range(num_stages)]  # noqa: E731
    return StageCosts.of(
        times(),
        times(),
        times(),
        activation=[rng.randint(1, 4) for _ in range(num_stages)],
        freed_at_input_grad=[rng.choice([-1.5, 0.0, 0.25, 1.0]) for _ in range(num_stages)],
        recompute_s=[rng.choice([0.0, 0.5]) for _ in range(num_stages)],
    )


@st.composite
def schedules(
    draw: st.DrawFn, *, dag: bool = True, fused: bool = True, slices: int = 3, replicas: int = 2
) -> tuple[Schedule, StageCosts, random.Random]:
    """A random schedule, costs for it, and the generator that made them."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    schedule = random_schedule(
        rng,
        replicas=rng.randint(1, replicas),
        slices=rng.randint(1, slices),
        dag=dag and rng.random() < 0.5,
        fused=fused and rng.random() < 0.5,
    )
    return schedule, random_costs(rng, schedule.num_stages), rng


@dataclass
class Reference:
    """Start and end of every action, and of every message by (producer, consuming stage)."""

    start: dict[Action, float]
    end: dict[Action, float]
    messages: dict[tuple[Action, int], tuple[float, float]]

    @property
    def makespan(self) -> float:
        return max(self.end.values())


def reference(
    schedule: Schedule,
    costs: StageCosts,
    *,
    latency: np.ndarray | float = 0.0,
    bytes_per_s: float = float("inf"),
    edge_bytes: np.ndarray | float = 0.0,
    overlap: bool = True,
) -> Reference:
    """Simulate by looking again and again for a rank whose next step has all it needs."""
    ranks, slices = schedule.num_ranks, schedule.num_slices
    latency = np.broadcast_to(latency, (ranks, ranks))
    edge_bytes = np.broadcast_to(edge_bytes, (len(schedule.edges),))
    steps = [list(schedule.actions(rank)) for rank in range(ranks)]
    result = Reference({}, {}, {})
    free, link_free = [0.0] * ranks, np.zeros((ranks, ranks))
    arrival: dict[
        tuple[bool, int, int, int, int, int], float
    ] = {}  # (forward, replica, edge, microbatch, slot, consumer)

    def share(action: Action) -> float:
        return 1.0 / slices if slices > 1 and action.slice >= 0 else 1.0

    def slots(action: Action) -> range:
        return range(slices) if action.slice < 0 else range(action.slice, action.slice + 1)

    def seconds(action: Action) -> float:
        s = action.stage
        whole = {
            Kind.F: costs.forward_s[s],
            Kind.B: costs.input_grad_s[s] + costs.weight_grad_s[s] + costs.recompute_s[s],
            Kind.I: costs.input_grad_s[s] + costs.recompute_s[s],
            Kind.W: costs.weight_grad_s[s],
        }[action.kind]
        return float(whole) * share(action)

    def inputs(action: Action) -> list[float] | None:
        found = []
        for number, (source, target) in enumerate(schedule.edges):
            wanted = target if action.kind is Kind.F else source
            if action.kind is Kind.W or action.stage != wanted:
                continue
            for slot in slots(action):
                key = (action.kind is Kind.F, action.replica, number, action.microbatch, slot, action.stage)
                if key not in arrival:
                    return None
                found.append(arrival[key])
        return found

    progress = True
    while progress:
        progress = False
        for rank in range(ranks):
            while steps[rank]:
                group = steps[rank][0]
                waits = [inputs(action) for action in group]
                if any(found is None for found in waits):
                    break
                progress = True
                steps[rank].pop(0)
                start = max([free[rank], *(time for found in waits if found for time in found)])
                end = start + sum(seconds(action) for action in group)
                free[rank] = end
                for action in group:
                    result.start[action], result.end[action] = start, end
                for action in group:
                    if action.kind is Kind.W:
                        continue
                    forward = action.kind is Kind.F
                    for number, (source, target) in enumerate(schedule.edges):
                        mine, other = (source, target) if forward else (target, source)
                        if mine != action.stage:
                            continue
                        there = int(schedule.placement[action.replica, other])
                        time = end
                        if there != rank:
                            busy = edge_bytes[number] * share(action) / bytes_per_s
                            begin = end if overlap else max(end, free[rank])
                            if busy > 0:
                                begin = max(begin, link_free[rank, there])
                                link_free[rank, there] = begin + busy
                            time = begin + latency[rank, there] + busy
                            result.messages[action, other] = (begin, time)
                            if not overlap:
                                free[rank] = max(free[rank], time)
                        for slot in slots(action):
                            arrival[forward, action.replica, number, action.microbatch, slot, other] = time
    assert not any(steps), "the reference deadlocked"
    return result
