"""PipeOffload: 1F1B whose activations go to host memory and come back in time, those with the longest life first.

`OFFLOAD` i stands behind F i and runs beside the action after it; `RELOAD` i stands behind the action before B i and runs
beside that one. So activation i is away during the actions in between, and in the rank's list

    F i   [OFFLOAD i]   Y   ...away...   X   [RELOAD i]   B i

an action p holds every activation whose F is at or before p and whose B is at or after p, less those that are away. Walking
through the list, whenever an action holds more than the cap, the activation that comes back last among those that are away by then
is offloaded (Belady's rule: for equal sizes no smaller number of moves does it). With D = 4, T = 5 and a cap of 3 activations on
rank 0:

    rank 0  0F0 0F1 0OFFLOAD1 0F2 0F3 0OFFLOAD3 0B0 0F4 0RELOAD1 0B1 0B2 0RELOAD3 0B3 0B4

Where a transfer takes no longer than the shortest action (the paper: half of the activations and more), every move ends
under its action, the makespan is that of 1F1B and the ledger keeps the cap; slower transfers are simulated as they are.
Without a cap in the request everything is moved that can be. O(T^2) on a rank.

Paper: Wan et al., PipeOffload: Improving Scalability of Pipeline Parallelism with Memory Optimization, ICML 2025.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from stagewright.planner.schedules.action import Action, Kind
from stagewright.planner.schedules.family import ScheduleFamily, ScheduleRequest
from stagewright.planner.schedules.one_f_one_b import one_f_one_b
from stagewright.planner.schedules.schedule import KIND, MICROBATCH, Orders, Schedule, encode
from stagewright.planner.schedules.sizes import costs_of, require, sizes_of

BEHIND_FORWARD, BEFORE_BACKWARD = 2, 2  # an activation is away from F + 2 to B - 2


def pipe_offload(request: ScheduleRequest) -> Schedule:
    """Return 1F1B with offloads and reloads that keep the request's cap, or hold as little as offloading can."""
    base = one_f_one_b(request)
    activation = costs_of(request, sizes_of(request, "pipeoffload")).activation
    orders, moved = [], 0
    for rank, order in enumerate(base.orders):
        held = float(activation[rank])
        most = np.inf if held == 0.0 else np.floor((request.memory_cap or 0.0) / held + 1e-9)
        least = least_held(order)
        require(
            request.memory_cap is None or most >= least,
            f"rank {rank} holds {least * held:g} with everything moved that can be, the cap is {request.memory_cap}",
            field="memory_cap",
            hint=f"give a cap of at least {least * held:g}",
        )
        chosen = offloads(order, least if request.memory_cap is None else int(min(most, len(order))))
        moved += len(chosen)
        orders.append(encode(with_moves(order, rank, chosen)))
    return Schedule(
        "pipeoffload", base.num_microbatches, base.placement, tuple(orders), parameters={"moved_activations": moved}
    )


def positions(order: Orders) -> tuple[list[int], list[int]]:
    """Return where the F and the B of each microbatch stand in a rank's list of one stage."""
    count = len(order) // 2
    forward, backward = [0] * count, [0] * count
    for at, (kind, microbatch) in enumerate(order[:, [KIND, MICROBATCH]].tolist()):
        (forward if kind == Kind.F else backward)[microbatch] = at
    return forward, backward


def held(order: Orders, chosen: frozenset[int]) -> list[int]:
    """Return how many activations each action of a rank holds when the chosen ones are moved."""
    forward, backward = positions(order)
    change = np.zeros(len(order) + 1, dtype=np.int64)
    for microbatch, (first, last) in enumerate(zip(forward, backward, strict=True)):
        change[first] += 1
        change[last + 1] -= 1
        if microbatch in chosen and last - BEFORE_BACKWARD >= first + BEHIND_FORWARD:
            change[first + BEHIND_FORWARD] -= 1
            change[last - BEFORE_BACKWARD + 1] += 1
    live: list[int] = np.cumsum(change[:-1]).tolist()
    return live


def least_held(order: Orders) -> int:
    """Return the most activations that an action holds when all are moved that can be."""
    return max(held(order, frozenset(range(len(order) // 2))))


def offloads(order: Orders, most: int) -> frozenset[int]:
    """Return the fewest microbatches whose moves let no action hold more than `most`; `most` is at least `least_held`."""
    forward, backward = positions(order)
    live = np.array(held(order, frozenset()))
    chosen: set[int] = set()
    for at in range(len(order)):
        while live[at] > most:
            latest = max(
                (
                    microbatch
                    for microbatch in range(len(forward))
                    if microbatch not in chosen
                    and forward[microbatch] + BEHIND_FORWARD <= at <= backward[microbatch] - BEFORE_BACKWARD
                ),
                key=lambda microbatch: backward[microbatch],
            )
            chosen.add(latest)
            live[forward[latest] + BEHIND_FORWARD : backward[latest] - BEFORE_BACKWARD + 1] -= 1
    return frozenset(chosen)


def with_moves(order: Orders, stage: int, chosen: frozenset[int]) -> Iterator[Action]:
    """Yield the rank's actions with the offloads and reloads of the chosen microbatches."""
    rows = order[:, [KIND, MICROBATCH]].tolist()
    forward, backward = positions(order)
    moves = {
        microbatch
        for microbatch in chosen
        if backward[microbatch] - BEFORE_BACKWARD >= forward[microbatch] + BEHIND_FORWARD
    }
    for kind, microbatch in rows:
        if kind == Kind.B and microbatch in moves:
            yield Action(Kind.RELOAD, stage, microbatch)
        yield Action(Kind(kind), stage, microbatch)
        if kind == Kind.F and microbatch in moves:
            yield Action(Kind.OFFLOAD, stage, microbatch)


FAMILY = ScheduleFamily(
    "pipeoffload",
    "Wan et al., PipeOffload: Improving Scalability of Pipeline Parallelism with Memory Optimization, ICML 2025",
    pipe_offload,
    takes_cap=True,
    plain=False,
)
