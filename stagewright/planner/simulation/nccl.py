"""A static check of lowered schedules under NCCL's semantics, which gloo is too lenient to show.

NCCL knows no tags. The point-to-point operations of two ranks run on one stream (or one for each direction, when the
runtime makes a communicator for each), in the order in which each rank issued them, and an operation ends only when
both sides have reached it (rendezvous). A rank's list is issued in order; a SEND or RECV does not block the list, but
it starts behind the compute that stands before it, and compute that uses a message waits for its RECV. Reductions over
the replicas of a stage run on one stream of each rank, in order, and end together.

The check replays the lists under these rules. It refuses: a send and a receive that meet in the wrong order (the data
would be swapped, or the ranks hang), a message without its other half, compute that uses what was never received, and
any state in which no rank can go on. With `blocking`, the list itself waits for each SEND and RECV, which is what plain
`torch.distributed.send` does. O(N) for N rows. `simulate` times lowered schedules; this only says whether they can run.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from stagewright.planner.errors import InvalidSchedule
from stagewright.planner.schedules.action import RECV_KINDS, SEND_KINDS, Action, Kind
from stagewright.planner.schedules.schedule import KIND, MICROBATCH, REPLICA, SLICE, STAGE, Schedule
from stagewright.planner.simulation.text_grid import draw_order

_FORWARD = (Kind.SEND_F, Kind.RECV_F)

Channel = tuple[int, int]
Message = tuple[Kind, int, int, int, int, int]  # SEND kind, replica, from stage, to stage, microbatch, slice


@dataclass(frozen=True)
class _Graph:
    earlier: list[list[int]]  # stages that feed each stage
    later: list[list[int]]  # stages that each stage feeds
    placement: list[list[int]]


@dataclass
class _Rank:
    steps: list[tuple[Action, ...]]
    rows: list[int]  # row of each step's first action, for drawing
    position: int = 0
    received: set[Message] = field(default_factory=set)
    posted: set[Message] = field(default_factory=set)
    queues: dict[Channel, deque[tuple[bool, Message]]] = field(default_factory=dict)
    open_messages: int = 0
    reductions: deque[Action] = field(default_factory=deque)


def check_nccl(schedule: Schedule, *, per_direction: bool = True, blocking: bool = False) -> None:
    """Raise InvalidSchedule, with rank and action, when NCCL would hang or mix up messages.

    `per_direction`: one communicator for each direction of a pair of ranks; otherwise one for both.
    """
    ranks = [_rank(schedule, rank) for rank in range(schedule.num_ranks)]
    graph = _graph(schedule)
    ready = deque(range(len(ranks)))
    while ready:
        index = ready.popleft()
        for other in _advance(schedule, graph, ranks, index, per_direction, blocking):
            if other not in ready:
                ready.append(other)
    for index, rank in enumerate(ranks):
        if rank.position < len(rank.steps):
            raise _stuck(schedule, ranks, index)
    for index, rank in enumerate(ranks):
        for channel, queue in sorted(rank.queues.items()):
            if queue:
                raise _unmatched(schedule, index, channel, queue[0])
        if rank.reductions:
            raise InvalidSchedule(
                f"rank {index}: {rank.reductions[0]} waits for ranks that never reduce it, or reduce in another order",
                hint="issue the reductions of replicas in one order on all ranks",
            )


def _graph(schedule: Schedule) -> _Graph:
    earlier: list[list[int]] = [[] for _ in range(schedule.num_stages)]
    later: list[list[int]] = [[] for _ in range(schedule.num_stages)]
    for source, target in schedule.edges:
        earlier[target].append(source)
        later[source].append(target)
    return _Graph(earlier, later, schedule.placement.tolist())


def _rank(schedule: Schedule, rank: int) -> _Rank:
    steps, rows, row = [], [], 0
    for step in schedule.actions(rank):
        steps.append(step)
        rows.append(row)
        row += len(step)
    return _Rank(steps, rows)


def _advance(
    schedule: Schedule, graph: _Graph, ranks: list[_Rank], index: int, per_direction: bool, blocking: bool
) -> list[int]:
    """Issue the rank's steps as far as they go; return the ranks that may go on because of it, this one included."""
    rank, woken = ranks[index], []
    while rank.position < len(rank.steps):
        if blocking and rank.open_messages:
            break
        step = rank.steps[rank.position]
        action = step[0]
        if action.kind in SEND_KINDS or action.kind in RECV_KINDS:
            for peer, message in _messages(graph, action, index):
                sends = action.kind in SEND_KINDS
                source, target = (index, peer) if sends else (peer, index)
                channel = (source, target) if per_direction else (min(index, peer), max(index, peer))
                rank.queues.setdefault(channel, deque()).append((sends, message))
                rank.open_messages += 1
                if not sends:
                    rank.posted.add(message)
                if _meet(schedule, ranks, index, peer, channel):
                    woken.append(peer)
        elif action.kind is Kind.REDUCE_GRAD and schedule.num_replicas > 1:
            rank.reductions.append(action)
            woken += _reduce(schedule, ranks, action.stage)
        elif action.kind is Kind.OPT and any(
            (waiting.replica, waiting.stage) == (action.replica, action.stage) for waiting in rank.reductions
        ):
            break
        elif any(needed not in rank.received for part in step for needed in _inputs(schedule, graph, part, index)):
            _require_posted(schedule, graph, rank, index)
            break
        rank.position += 1
    return woken


def _messages(graph: _Graph, action: Action, rank: int) -> list[tuple[int, Message]]:
    """Return (peer, message) for each stage edge that the SEND or RECV row serves."""
    sends = action.kind in SEND_KINDS
    forward = action.kind in _FORWARD
    kind = Kind.SEND_F if forward else Kind.SEND_B
    towards_later = forward == sends
    found = []
    for other in (graph.later if towards_later else graph.earlier)[action.stage]:
        producer, consumer = (action.stage, other) if sends else (other, action.stage)
        peer = graph.placement[action.replica][other]
        if peer != rank:
            found.append((peer, (kind, action.replica, producer, consumer, action.microbatch, action.slice)))
    return found


def _meet(schedule: Schedule, ranks: list[_Rank], first: int, second: int, channel: Channel) -> bool:
    """Complete what stands at the head of both sides of the channel; return whether anything completed."""
    mine, theirs = ranks[first].queues[channel], ranks[second].queues.setdefault(channel, deque())
    met = False
    while mine and theirs:
        (mine_sends, here), (theirs_send, there) = mine[0], theirs[0]
        if here != there or mine_sends == theirs_send:
            raise InvalidSchedule(
                f"rank {first} and rank {second} meet in different orders: rank {first} is at {_text(mine_sends, here)}, "
                f"rank {second} at {_text(theirs_send, there)}\n"
                f"{draw_order(schedule, first, ranks[first].rows[ranks[first].position])}",
                hint="insert a send and its receive at the same place in both ranks' lists, as schedules.lowering does",
            )
        mine.popleft()
        theirs.popleft()
        for rank, sends in ((ranks[first], mine_sends), (ranks[second], theirs_send)):
            rank.open_messages -= 1
            if not sends:
                rank.received.add(here)
        met = True
    return met


def _reduce(schedule: Schedule, ranks: list[_Rank], stage: int) -> list[int]:
    """End the reductions at the head of all their members; return the ranks that took part."""
    woken: list[int] = []
    waiting = [stage]
    while waiting:
        members = sorted({int(rank) for rank in schedule.placement[:, waiting[0]]})
        heads = [ranks[member].reductions[0].stage if ranks[member].reductions else -1 for member in members]
        if any(head != waiting[0] for head in heads):
            waiting.pop(0)
            continue
        for member in members:
            ranks[member].reductions.popleft()
        woken += members
        waiting += [ranks[member].reductions[0].stage for member in members if ranks[member].reductions]
    return woken


def _inputs(schedule: Schedule, graph: _Graph, action: Action, rank: int) -> list[Message]:
    """Return the messages that a compute action needs on its rank."""
    if action.kind not in (Kind.F, Kind.B, Kind.I):
        return []
    recv = Kind.RECV_F if action.kind is Kind.F else Kind.RECV_B
    needed = [message for _, message in _messages(graph, action.with_kind(recv), rank)]
    if schedule.num_slices == 1:
        return needed
    return [part for message in needed for part in _parts(schedule, message)]


def _parts(schedule: Schedule, message: Message) -> list[Message]:
    """Return the messages that bring the action's input: the whole microbatch, its slice, or all of its slices."""
    kind, replica, producer, consumer, microbatch, wanted = message
    rows = schedule.orders[int(schedule.placement[replica, producer])]
    kinds = (Kind.F,) if kind is Kind.SEND_F else (Kind.B, Kind.I)
    same = (rows[:, REPLICA] == replica) & (rows[:, STAGE] == producer) & (rows[:, MICROBATCH] == microbatch)
    slices = sorted({int(row[SLICE]) for row in rows[same & np.isin(rows[:, KIND], kinds)]})
    return [
        (kind, replica, producer, consumer, microbatch, part) for part in slices if wanted < 0 or part in (wanted, -1)
    ]


def _require_posted(schedule: Schedule, graph: _Graph, rank: _Rank, index: int) -> None:
    for part in rank.steps[rank.position]:
        for message in _inputs(schedule, graph, part, index):
            if message not in rank.posted:
                raise InvalidSchedule(
                    f"rank {index}: {part} stands before {_text(False, message)}\n"
                    f"{draw_order(schedule, index, rank.rows[rank.position])}",
                    hint="every input from another rank needs a RECV row in front of the action that uses it",
                )


def _stuck(schedule: Schedule, ranks: list[_Rank], index: int) -> InvalidSchedule:
    at = "; ".join(
        f"rank {other} at {rank.steps[rank.position][0]}"
        for other, rank in enumerate(ranks)
        if rank.position < len(rank.steps)
    )
    return InvalidSchedule(
        f"NCCL would hang: no rank can go on, {at}\n"
        f"{draw_order(schedule, index, ranks[index].rows[ranks[index].position])}",
        hint="each waits for a message that stands behind another wait; lower the schedule with schedules.lowering",
    )


def _unmatched(schedule: Schedule, index: int, channel: Channel, entry: tuple[bool, Message]) -> InvalidSchedule:
    other = channel[0] if channel[1] == index else channel[1]
    return InvalidSchedule(
        f"rank {index}: {_text(*entry)} is never met by rank {other}",
        hint="every SEND row needs its RECV row on the other rank, and the other way round",
    )


def _text(sends: bool, message: Message) -> str:
    kind, replica, producer, consumer, microbatch, part = message
    recv = Kind.RECV_F if kind is Kind.SEND_F else Kind.RECV_B
    action = Action(kind if sends else recv, producer if sends else consumer, microbatch, part, replica)
    return str(action)
