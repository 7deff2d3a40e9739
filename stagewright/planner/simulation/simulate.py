"""The event-exact simulator: a schedule, its costs and its network in, a timeline out.

A schedule is timed as it is. Compute-only orders send a message wherever a stage edge crosses ranks, at the end of the
action that makes it; lowered orders send where their SEND rows stand. Collectives and optimizer steps run where their
rows stand (`schedules.lowering` inserts them). A fused pair starts when both of its actions can, and its results leave
at its end. Everything is deterministic: no clock, no random number, ties in program order.

What is modelled: compute in list order on each rank; links as latency plus bytes over bandwidth with occupancy of each
directed pair; sends beside compute or blocking it; collectives on a lane of their own, reductions of a stage with
several replicas starting when all its ranks are there; EVICT/LOAD and OFFLOAD/RELOAD on their own lanes; the ledger of
`memory`. Not modelled here: contention between different pairs of ranks, and priorities between messages and
collectives; `contention` does that.

Plain orders on chains take the compiled sweep of `chain_sweep`, everything else the graph of `event_graph`; where both
apply they agree. O(N) for the first, O(N log N) for the second; benchmarks/schedules.py says how fast.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from stagewright.planner.errors import InvalidArgument
from stagewright.planner.schedules.action import Kind
from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.schedules.schedule import FUSED, KIND, MICROBATCH, SLICE, STAGE, Schedule, WeightPolicy
from stagewright.planner.simulation.chain_sweep import Hops, Swept, empty_columns, is_chain, number_nodes, sweep_chain
from stagewright.planner.simulation.deadlock import explain_deadlock
from stagewright.planner.simulation.event_graph import Costed, Solved, solve
from stagewright.planner.simulation.implied_shares import implied_shares
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
from stagewright.planner.simulation.spans import chain_spans, graph_spans
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
    tails = spread("tail_s", tail_s, (schedule.num_ranks,))
    timed = _time(schedule, costs, links, collectives or Collectives(), shares or implied_shares(schedule), tails)
    times_s, values = _memory(schedule, timed, links, memory, costs)
    if isinstance(timed.result, Swept):
        spans = chain_spans(schedule, timed.program, timed.result, tails, trace=trace)
        sent_bytes = timed.result.message_bytes
    else:
        split = timed.result
        if timed.program.has_fused:
            split = _split_fused(timed.program, timed.work.row_s, split)
        spans = graph_spans(schedule, timed.program, split, tails, trace=trace)
        sent_bytes = split.message_bytes
    return Timeline(
        "simulated",
        schedule.num_ranks,
        spans.rank,
        spans.lane,
        spans.action,
        spans.start_s,
        spans.end_s,
        times_s,
        values,
        {"p2p": sent_bytes} if sent_bytes else {},
        spans.critical_path,
    )


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
    no_tails = np.zeros(schedule.num_ranks)
    timed = _time(
        schedule, costs, links or Links(), collectives or Collectives(), shares or implied_shares(schedule), no_tails
    )
    offset = timed.program.offset
    rows = np.arange(offset[-1]) + np.repeat(timed.shift, np.diff(offset))
    return timed.start_s[rows], timed.end_s[rows]


class _Work(NamedTuple):
    """Seconds [num_kinds, num_stages], shares by slice + 1 (whole at 0) and factors by microbatch."""

    seconds: Floats
    time_share: Floats
    size_share: Floats
    time_factor: Floats
    size_factor: Floats
    scaled: bool
    row_s: Floats  # by row, before fusing; empty for a chain


class _Timed(NamedTuple):
    """What a schedule's timing found; row i of rank r has its times at `i + shift[r]` of `start_s` and `end_s`."""

    program: Program
    work: _Work
    result: Swept | Solved
    shift: Ints
    start_s: Floats
    end_s: Floats


def _time(
    schedule: Schedule, costs: StageCosts, links: Links, collectives: Collectives, shares: Shares, tails: Floats
) -> _Timed:
    if costs.num_stages != schedule.num_stages:
        raise InvalidArgument(
            f"{costs.num_stages} stage costs were given, schedule {schedule.name} has {schedule.num_stages} stages",
            field="costs",
            hint="give one entry for each virtual stage, in model order",
        )
    program = flatten(schedule)
    work = _work(schedule, program, costs, collectives, shares)
    hops = _hops(schedule, links)
    if links.overlap and is_chain(program) and not shares.has_rows:
        nodes = number_nodes(program, hops, tails > 0.0)
        swept = sweep_chain(
            program,
            hops,
            work.seconds,
            work.time_share,
            work.time_factor,
            work.size_share,
            work.size_factor,
            work.scaled,
            nodes,
            empty_columns(int(nodes.first_row[-1])),
        )
        if (swept.position < program.offset[1:]).any():
            raise explain_deadlock(schedule, (swept.position - program.offset[:-1]).tolist())
        shift = nodes.first_row[:-1] - program.offset[:-1]
        return _Timed(program, work, swept, shift, swept.columns.start_s, swept.columns.end_s)
    work = work._replace(row_s=_row_seconds(program, work, shares))
    solved = solve(program, _costed(schedule, program, costs, links, collectives, shares, work, hops))
    if not solved.rows_done.all():
        raise explain_deadlock(schedule, _stopped(program, solved.rows_done))
    shift = np.zeros(schedule.num_ranks, dtype=np.int32)
    return _Timed(program, work, solved, shift, solved.row_start_s, solved.row_end_s)


def _stopped(program: Program, done: npt.NDArray[np.bool_]) -> list[int]:
    """Return, for each rank, how many of its first rows are done."""
    parts = [done[start:stop] for start, stop in zip(program.offset[:-1], program.offset[1:], strict=True)]
    return [len(part) if part.all() else int(np.argmin(part)) for part in parts]


def _work(schedule: Schedule, program: Program, costs: StageCosts, collectives: Collectives, shares: Shares) -> _Work:
    stages = schedule.num_stages
    recompute_s = costs.recompute_s * ~_has_recompute(program, stages)
    seconds = np.zeros((len(Kind), stages))
    seconds[Kind.F] = costs.forward_s
    seconds[Kind.B] = costs.input_grad_s + costs.weight_grad_s + recompute_s
    seconds[Kind.I] = costs.input_grad_s + recompute_s
    seconds[Kind.W] = costs.weight_grad_s
    seconds[Kind.R] = costs.recompute_s
    seconds[Kind.REDUCE_GRAD] = spread("reduce_grad_s", collectives.reduce_grad_s, (stages,))
    seconds[Kind.UNSHARD] = spread("unshard_s", collectives.unshard_s, (stages,))
    seconds[Kind.OPT] = spread("optimizer_s", collectives.optimizer_s, (stages,))
    given = (shares.slice_time, shares.slice_activation, shares.microbatch_time, shares.microbatch_activation)
    return _Work(
        seconds,
        _slice_shares("slice_time", shares.slice_time, schedule.num_slices),
        _slice_shares("slice_activation", shares.slice_activation, schedule.num_slices),
        _factors("microbatch_time", shares.microbatch_time, schedule.num_microbatches),
        _factors("microbatch_activation", shares.microbatch_activation, schedule.num_microbatches),
        schedule.num_slices > 1 or any(each is not None for each in given),
        np.zeros(0),
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


def _hops(schedule: Schedule, links: Links) -> Hops:
    """Return where each stage edge leads, both ways, for every replica."""
    ranks, edges = schedule.num_ranks, np.array(schedule.edges, dtype=np.int64).reshape(-1, 2)
    latency_s = spread("latency_s", links.latency_s, (ranks, ranks))
    bytes_per_s = spread("bytes_per_s", links.bytes_per_s, (ranks, ranks))
    forward = spread("boundary_bytes", links.boundary_bytes, (len(edges),))
    back = forward if links.gradient_bytes is None else spread("gradient_bytes", links.gradient_bytes, (len(edges),))
    here, there = schedule.placement[:, edges[:, 0]].ravel(), schedule.placement[:, edges[:, 1]].ravel()
    source, target = np.stack((here, there)), np.stack((there, here))
    crosses = source != target
    size = np.stack((np.tile(forward, schedule.num_replicas), np.tile(back, schedule.num_replicas)))
    pairs, link = np.unique(source.astype(np.int64) * ranks + target, return_inverse=True)
    return Hops(
        np.where(crosses, target, -1).astype(np.int32),
        np.where(crosses, link.reshape(source.shape), -1).astype(np.int32),
        np.where(crosses, latency_s[source, target], 0.0),
        np.where(crosses, size / bytes_per_s[source, target], 0.0),
        np.where(crosses, size, 0.0),
        len(pairs),
    )


def _row_shares(program: Program, by_slice: Floats, by_microbatch: Floats) -> Floats:
    """Return each row's share of a whole microbatch, 1 for rows without one."""
    microbatch = program.rows[:, MICROBATCH]
    known = (microbatch >= 0) & (microbatch < len(by_microbatch))
    return by_slice[program.rows[:, SLICE] + 1] * np.where(known, by_microbatch[np.where(known, microbatch, 0)], 1.0)


def _row_seconds(program: Program, work: _Work, shares: Shares) -> Floats:
    kind, stage = program.rows[:, KIND], program.rows[:, STAGE]
    row_s = work.seconds[kind, stage]
    compute = kind <= Kind.R
    row_s = np.where(compute, row_s * _row_shares(program, work.time_share, work.time_factor), row_s)
    if shares.row_factor is not None:
        row_s = np.where(compute, row_s * spread("row_factor", shares.row_factor, row_s.shape), row_s)
    if shares.row_extra_s is not None:
        row_s = np.where(compute, row_s + spread("row_extra_s", shares.row_extra_s, row_s.shape), row_s)
    fills = np.flatnonzero(kind == Kind.FILL)
    if len(fills):
        items = program.rows[fills, MICROBATCH]
        count = 0 if shares.fill_s is None else len(shares.fill_s)
        if shares.fill_s is None or count <= items.max():
            raise InvalidArgument(
                f"the schedule fills bubbles with {int(items.max()) + 1} work items, shares.fill_s has {count}",
                field="fill_s",
                hint="give the seconds of each work item",
            )
        row_s[fills] = shares.fill_s[items]
    return row_s


def _fused_seconds(program: Program, work: _Work, overlap_s: Floats | None) -> Floats:
    """Return row seconds with a fused group's on its first row: the table's for a pair, scaled as it is, else the sum."""
    row_s = work.row_s.copy()
    if not program.has_fused:
        return row_s
    fused = program.rows[:, FUSED] == 1
    opens = np.flatnonzero(fused & ~np.concatenate(([False], fused[:-1])))
    closes = np.flatnonzero(~fused & np.concatenate(([False], fused[:-1])))
    for first, last in zip(opens.tolist(), closes.tolist(), strict=True):
        kinds, stages = program.rows[first : last + 1, KIND], program.rows[first : last + 1, STAGE]
        total = float(row_s[first : last + 1].sum())
        forward = np.flatnonzero(kinds == Kind.F)
        if overlap_s is not None and len(kinds) == 2 and len(forward) == 1:
            table = float(overlap_s[stages[forward[0]], stages[1 - forward[0]]])
            total *= table / float(work.seconds[kinds, stages].sum())
        row_s[first : last + 1] = 0.0
        row_s[first] = total
    return row_s


def _costed(
    schedule: Schedule,
    program: Program,
    costs: StageCosts,
    links: Links,
    collectives: Collectives,
    shares: Shares,
    work: _Work,
    hops: Hops,
) -> Costed:
    overlap_s = shares.overlap_s
    if overlap_s is not None:
        overlap_s = spread("overlap_s", overlap_s, (schedule.num_stages, schedule.num_stages))
    row_s, kind = _fused_seconds(program, work, overlap_s), program.rows[:, KIND]
    size_share = _row_shares(program, work.size_share, work.size_factor)
    to_peer, to_host = np.isin(kind, (Kind.EVICT, Kind.LOAD)), np.isin(kind, (Kind.OFFLOAD, Kind.RELOAD))
    size = costs.activation[program.rows[:, STAGE]] * size_share
    moved_s = np.where(to_peer, size / links.peer_bytes_per_s, np.where(to_host, size / links.host_bytes_per_s, 0.0))
    latency_s = np.where(to_peer, links.peer_latency_s, np.where(to_host, links.host_latency_s, 0.0))
    sends = program.kind_counts[Kind.SEND_F] + program.kind_counts[Kind.SEND_B]
    return Costed(
        row_s + moved_s + latency_s,
        moved_s,
        size_share,
        hops,
        links.overlap,
        collectives.overlap,
        bool(sends),
        schedule.num_replicas > 1 and schedule.weight_policy is not WeightPolicy.ELASTIC,
    )


def _split_fused(program: Program, row_s: Floats, solved: Solved) -> Solved:
    """Divide each fused group's span between its actions, by their own seconds, so that busy time counts once."""
    start_s, end_s = solved.row_start_s.copy(), solved.row_end_s.copy()
    fused = program.rows[:, FUSED] == 1
    opens = np.flatnonzero(fused & ~np.concatenate(([False], fused[:-1])))
    closes = np.flatnonzero(~fused & np.concatenate(([False], fused[:-1])))
    for first, last in zip(opens.tolist(), closes.tolist(), strict=True):
        own = row_s[first : last + 1]
        cuts = start_s[first] + (end_s[first] - start_s[first]) * np.cumsum(own) / own.sum()
        end_s[first:last] = start_s[first + 1 : last + 1] = cuts[:-1]
    return solved._replace(row_start_s=start_s, row_end_s=end_s)


def _memory(
    schedule: Schedule, timed: _Timed, links: Links, memory: Memory, costs: StageCosts
) -> tuple[tuple[Floats, ...], tuple[Floats, ...]]:
    stages, program, work = (schedule.num_stages,), timed.program, timed.work
    ledger = Ledger(
        np.ascontiguousarray(costs.activation),
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
    if program.kind_counts[Kind.UNSHARD :].any():
        parts.append(move_events(program, timed.start_s, timed.end_s, ledger))
    if memory.receive_buffers:
        edges = (len(schedule.edges),)
        forward = spread("boundary_bytes", links.boundary_bytes, edges)
        back = forward if links.gradient_bytes is None else spread("gradient_bytes", links.gradient_bytes, edges)
        parts.append(receive_events(program, timed.shift, timed.end_s, _arrival_s(timed.result), forward, back, ledger))
    side = SideEvents(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
    if len(side.rank):
        side = sort_events(side)
    return memory_curves(program, timed.shift, timed.start_s, timed.end_s, ledger, side)


def _arrival_s(result: Swept | Solved) -> Floats:
    """Return when the data of each edge key is there, [2, num_edge_keys]."""
    return result.columns.end_s[result.arrived - 1] if isinstance(result, Swept) else result.arrival_s


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
