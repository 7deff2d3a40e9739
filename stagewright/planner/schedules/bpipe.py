"""BPipe: 1F1B whose early ranks lend activations to the late ones, so that no rank holds more than ceil((D + 2) / 2).

Rank d pairs with rank D - 1 - d. A rank that 1F1B would fill beyond the cap keeps cap - 1 activations and one in
transit: before a forward that finds cap - 1, the newest is evicted to the pair (`EVICT`), and it is loaded back
(`LOAD`) when a backward has made room, one step before its own backward. With D = 4 and cap 3, on rank 0 (E and L run
beside compute):

    F0 F1 E1 F2 E2 F3 B0 L1 E3 F4 B1 L2 ...

The order of compute is 1F1B's, so the makespan is 1F1B's wherever a transfer fits in the time of an action. The
acceptor holds at most D + 2 - cap <= cap activations, its own included.

Paper: Kim et al., BPipe: Memory-Balanced Pipeline Parallelism for Training Large Language Models, ICML 2023.
"""

from __future__ import annotations

from stagewright.planner.schedules.action import Action, Kind
from stagewright.planner.schedules.family import ScheduleFamily, ScheduleRequest
from stagewright.planner.schedules.one_f_one_b import one_f_one_b
from stagewright.planner.schedules.schedule import KIND, MICROBATCH, Orders, Schedule, encode
from stagewright.planner.schedules.sizes import require


def bpipe(request: ScheduleRequest) -> Schedule:
    """Return 1F1B with evictions and loads."""
    base = one_f_one_b(request)
    cap = activation_cap(request.num_ranks)
    orders = tuple(_balanced(rank, request.num_ranks, order, cap) for rank, order in enumerate(base.orders))
    return Schedule("bpipe", base.num_microbatches, base.placement, orders, parameters={"cap": cap})


def activation_cap(num_ranks: int) -> int:
    """Return the most activations a rank holds, its own and accepted ones, ceil((D + 2) / 2)."""
    require(num_ranks >= 1, f"num_ranks is {num_ranks}, a pipeline has at least 1", field="num_ranks")
    return -(-(num_ranks + 2) // 2)


def _balanced(rank: int, num_ranks: int, order: Orders, cap: int) -> Orders:
    most = min(num_ranks - rank, len(order) // 2)
    resident = cap - 1 if most > cap else cap
    here: list[int] = []
    away: list[int] = []
    actions: list[Action] = []
    for row in order:
        microbatch = int(row[MICROBATCH])
        if row[KIND] == Kind.F:
            if most > cap and len(here) == resident:
                away.append(here.pop())
                actions.append(Action(Kind.EVICT, rank, away[-1]))
            here.append(microbatch)
            actions.append(Action(Kind.F, rank, microbatch))
            continue
        if microbatch in away:
            _load(rank, microbatch, here, away, actions)
        here.remove(microbatch)
        actions.append(Action(Kind.B, rank, microbatch))
        following = microbatch + 1
        if following in away and len(here) < resident:
            _load(rank, following, here, away, actions)
    return encode(actions)


def _load(rank: int, microbatch: int, here: list[int], away: list[int], actions: list[Action]) -> None:
    away.remove(microbatch)
    here.insert(0, microbatch)
    actions.append(Action(Kind.LOAD, rank, microbatch))


FAMILY = ScheduleFamily(
    "bpipe",
    "Kim et al., BPipe: Memory-Balanced Pipeline Parallelism for Training Large Language Models, ICML 2023",
    bpipe,
    plain=False,
)
