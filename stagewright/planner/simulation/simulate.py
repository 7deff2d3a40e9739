"""The event-exact simulator: a schedule, its costs and its network in, a timeline out.

A schedule is timed as it is. Compute-only orders send a message wherever a stage edge crosses ranks, at the end of the
action that makes it; lowered orders send where their SEND rows stand. Collectives and optimizer steps run where their
rows stand (`schedules.lowering` inserts them). A fused pair starts when both of its actions can, and its results leave
at its end. Everything is deterministic: no clock, no random number, ties in program order.

What is modelled: compute in list order on each rank; links as latency plus bytes over bandwidth with occupancy of each
directed pair; sends beside compute or blocking it; collectives on a lane of their own, reductions of a stage with
several replicas starting when all its ranks are there; EVICT/LOAD and OFFLOAD/RELOAD on their own lanes; the ledger of
`memory`. Not modelled here: contention between different pairs of ranks, and priorities between messages and
collectives; `events.simulate_shared` does that.

O(N) for N rows, about 50 ns each with memory, messages and critical path (benchmarks/schedules.py).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from stagewright.planner.errors import InvalidArgument
from stagewright.planner.schedules.action import Kind
from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.schedules.schedule import FUSED, KIND, MICROBATCH, STAGE, Schedule, WeightPolicy
from stagewright.planner.simulation.deadlock import explain_deadlock
from stagewright.planner.simulation.memory import (
    Ledger,
    SideEvents,
    memory_curves,
    move_events,
    receive_events,
    sort_events,
)
from stagewright.planner.simulation.network import Collectives, Links, Memory, Shares, spread
from stagewright.planner.simulation.program import Program, flatten
from stagewright.planner.simulation.spans import spans
from stagewright.planner.simulation.sweep import Network, Swept, Work, count_messages, sweep
from stagewright.planner.simulation.timeline import Timeline
from stagewright.planner.simulation.versions import weight_versions

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]


def simulate(
    schedule: Schedule,
    costs: StageCosts,
    *,
    links: Links | None = None,
    collectives: Collectives | None = None,
    memory: Memory | None = None,
    shares: Shares | None = None,
    tail_s: float | Floats = 0.0,
    trace: bool = True,
) -> Timeline:
    """Return the simulated timeline of one iteration.

    `costs` are per virtual stage and whole microbatch. `tail_s`, one value or [num_ranks], is an optimizer step without
    a row of its own, run after the last compute of each rank. Without `trace` the critical path is left out. Raises
    InvalidSchedule for a deadlock, with the cycle, and InvalidArgument for an array of the wrong shape.
    """
    links, memory = links or Links(), memory or Memory()
    program, work, network, swept = _sweep(schedule, costs, links, collectives or Collectives(), shares or Shares())
    curves = _memory(schedule, program, swept, work, network, links, memory, costs)
    if program.has_fused:
        _split_fused(program, work.seconds, swept.start_s, swept.end_s)
    return _timeline(schedule, program, swept, spread("tail_s", tail_s, (schedule.num_ranks,)), curves, trace)


def action_times(
    schedule: Schedule,
    costs: StageCosts,
    *,
    links: Links | None = None,
    collectives: Collectives | None = None,
    shares: Shares | None = None,
) -> tuple[Floats, Floats]:
    """Return (start, end) seconds of every row, all ranks behind each other; a fused group has one start and one end.

    Raises as `simulate` does.
    """
    program, _, _, swept = _sweep(schedule, costs, links or Links(), collectives or Collectives(), shares or Shares())
    return swept.start_s[: len(program.rows)], swept.end_s[: len(program.rows)]


def _sweep(
    schedule: Schedule, costs: StageCosts, links: Links, collectives: Collectives, shares: Shares
) -> tuple[Program, Work, Network, Swept]:
    if costs.num_stages != schedule.num_stages:
        raise InvalidArgument(
            f"{costs.num_stages} stage costs were given, schedule {schedule.name} has {schedule.num_stages} stages",
            field="costs",
            hint="give one entry for each virtual stage, in model order",
        )
    program = flatten(schedule)
    work = _work(schedule, program, costs, collectives, shares)
    network = _network(schedule, program, links, collectives)
    swept = sweep(program, work, network, int(count_messages(program, network.sends_are_rows)))
    if (swept.position < program.offset[1:]).any():
        raise explain_deadlock(schedule, (swept.position - program.offset[:-1]).tolist())
    return program, work, network, swept


def _work(schedule: Schedule, program: Program, costs: StageCosts, collectives: Collectives, shares: Shares) -> Work:
    stages = schedule.num_stages
    backward = costs.recompute_s * ~_has_recompute(program, stages)
    seconds = np.zeros((len(Kind), stages))
    seconds[Kind.F] = costs.forward_s
    seconds[Kind.B] = costs.input_grad_s + costs.weight_grad_s + backward
    seconds[Kind.I] = costs.input_grad_s + backward
    seconds[Kind.W] = costs.weight_grad_s
    seconds[Kind.R] = costs.recompute_s
    seconds[Kind.REDUCE_GRAD] = spread("reduce_grad_s", collectives.reduce_grad_s, (stages,))
    seconds[Kind.UNSHARD] = spread("unshard_s", collectives.unshard_s, (stages,))
    seconds[Kind.OPT] = spread("optimizer_s", collectives.optimizer_s, (stages,))
    overlap_s = np.full((stages, stages), np.nan) if shares.overlap_s is None else shares.overlap_s
    return Work(
        seconds,
        _slice_shares("slice_time", shares.slice_time, schedule.num_slices),
        _slice_shares("slice_activation", shares.slice_activation, schedule.num_slices),
        _factors("microbatch_time", shares.microbatch_time, schedule.num_microbatches),
        _factors("microbatch_activation", shares.microbatch_activation, schedule.num_microbatches),
        np.ascontiguousarray(costs.activation),
        spread("overlap_s", overlap_s, (stages, stages)),
        _fill_seconds(program, shares.fill_s),
    )


def _has_recompute(program: Program, num_stages: int) -> npt.NDArray[np.bool_]:
    if not program.kind_counts[Kind.R]:
        return np.zeros(num_stages, dtype=np.bool_)
    stages = program.rows[program.rows[:, KIND] == Kind.R, STAGE]
    return np.bincount(stages, minlength=num_stages) > 0


def _slice_shares(name: str, shares: Floats | None, num_slices: int) -> Floats:
    parts = np.full(num_slices, 1.0 / num_slices) if shares is None else spread(name, shares, (num_slices,))
    return np.concatenate(([1.0], parts))


def _factors(name: str, factors: Floats | None, num_microbatches: int) -> Floats:
    return np.ones(num_microbatches) if factors is None else spread(name, factors, (num_microbatches,))


def _fill_seconds(program: Program, fill_s: Floats | None) -> Floats:
    if not program.kind_counts[Kind.FILL]:
        return np.zeros(1)
    rows = program.rows
    needed = int(rows[rows[:, KIND] == Kind.FILL, MICROBATCH].max()) + 1
    if fill_s is None or len(fill_s) < needed:
        raise InvalidArgument(
            f"the schedule fills bubbles with {needed} work items, shares.fill_s has {0 if fill_s is None else len(fill_s)}",
            field="fill_s",
            hint="give the seconds of each work item",
        )
    return np.ascontiguousarray(fill_s, dtype=np.float64)


def _network(schedule: Schedule, program: Program, links: Links, collectives: Collectives) -> Network:
    pairs, edges = (schedule.num_ranks, schedule.num_ranks), (len(schedule.edges),)
    counts = program.kind_counts
    moves = bool(counts[[Kind.OFFLOAD, Kind.RELOAD, Kind.EVICT, Kind.LOAD]].any())
    boundary = spread("boundary_bytes", links.boundary_bytes, edges)
    return Network(
        spread("latency_s", links.latency_s, pairs),
        1.0 / spread("bytes_per_s", links.bytes_per_s, pairs),
        boundary,
        boundary if links.gradient_bytes is None else spread("gradient_bytes", links.gradient_bytes, edges),
        links.overlap,
        collectives.overlap,
        links.peer_latency_s,
        1.0 / links.peer_bytes_per_s,
        links.host_latency_s,
        1.0 / links.host_bytes_per_s,
        bool(counts[[Kind.SEND_F, Kind.SEND_B]].any()),
        not moves and not counts[Kind.UNSHARD],
        moves,
        schedule.num_replicas > 1 and schedule.weight_policy is not WeightPolicy.ELASTIC,
    )


def _memory(
    schedule: Schedule,
    program: Program,
    swept: Swept,
    work: Work,
    network: Network,
    links: Links,
    memory: Memory,
    costs: StageCosts,
) -> tuple[tuple[Floats, ...], tuple[Floats, ...]]:
    stages = (schedule.num_stages,)
    ledger = Ledger(
        work.activation,
        np.ascontiguousarray(costs.freed_at_input_grad),
        spread("recomputed_bytes", memory.recomputed_bytes, stages),
        spread("gathered_bytes", memory.gathered_bytes, stages),
        _has_recompute(program, schedule.num_stages),
        work.size_share,
        work.size_factor,
        static_bytes(schedule, memory),
        _peers(schedule.num_ranks, links),
    )
    parts = [SideEvents(np.zeros(0, np.int32), np.zeros(0), np.zeros(0))]
    if not network.plain:
        parts.append(move_events(program, swept.start_s, swept.end_s, ledger))
    if memory.receive_buffers:
        arrived = (swept.arrived_forward, swept.arrived_gradient)
        sizes = (network.forward_bytes, network.gradient_bytes)
        parts.append(receive_events(program, swept.start_s, swept.end_s, *arrived, *sizes, ledger))
    side = SideEvents(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
    return memory_curves(program, swept.start_s, swept.end_s, ledger, sort_events(side) if len(side.rank) else side)


def static_bytes(schedule: Schedule, memory: Memory) -> Floats:
    """Return what each rank holds from start to end: weights times versions, gradients, optimizer and the rest."""
    stages = (schedule.num_stages,)
    each = weight_versions(schedule) * spread("weight_bytes", memory.weight_bytes, stages)
    each = each + spread("gradient_bytes", memory.gradient_bytes, stages)
    each = each + spread("optimizer_bytes", memory.optimizer_bytes, stages)
    static = spread("static_bytes", memory.static_bytes, (schedule.num_ranks,))
    np.add.at(static, schedule.placement.ravel(), each.ravel())
    return static


def _peers(num_ranks: int, links: Links) -> Ints:
    if links.peer is None:
        return np.arange(num_ranks - 1, -1, -1, dtype=np.int32)
    peer = np.asarray(links.peer, dtype=np.int32)
    if peer.shape != (num_ranks,) or peer.min() < 0 or peer.max() >= num_ranks:
        raise InvalidArgument(f"peer must name a rank below {num_ranks} for each of {num_ranks} ranks", field="peer")
    return peer


@njit(cache=True)
def _split_fused(program: Program, seconds: Floats, start_s: Floats, end_s: Floats) -> None:
    """Divide the span of each fused group between its actions, by their own seconds, so that busy time counts once."""
    rows, index = program.rows, 0
    while index < len(rows):
        after = index + 1
        while rows[after - 1, FUSED] == 1 and after < len(rows):
            after += 1
        if after - index > 1 and end_s[index] >= 0.0:
            total, first, last = 0.0, start_s[index], end_s[index]
            for row in range(index, after):
                total += seconds[rows[row, KIND], rows[row, STAGE]]
            so_far = 0.0
            for row in range(index, after):
                start_s[row] = first + (last - first) * (so_far / total)
                so_far += seconds[rows[row, KIND], rows[row, STAGE]]
                end_s[row] = last if row == after - 1 else first + (last - first) * (so_far / total)
        index = after


def _timeline(
    schedule: Schedule,
    program: Program,
    swept: Swept,
    tail_s: Floats,
    curves: tuple[tuple[Floats, ...], tuple[Floats, ...]],
    trace: bool,
) -> Timeline:
    rank, lane, action, start_s, end_s, path = spans(program, swept, tail_s, trace)
    messages = float(swept.message_bytes[: swept.num_messages].sum())
    link_bytes = {"p2p": messages} if messages else {}
    return Timeline(
        "simulated", schedule.num_ranks, rank, lane, action, start_s, end_s, curves[0], curves[1], link_bytes, path
    )
