"""Simulation with contended channels: messages and collectives that share a wire, served by priority.

`simulate` gives each directed pair of ranks and each rank's collectives a resource of their own, whose order the lists
fix. Here several of them share one channel, by default all that a rank sends, so who comes first is decided at run time:
a channel serves the waiting job of the highest priority, first come first served within one, and a job runs to its end
unless it may be cut into pieces of `quantum_s`, between which a more urgent job goes first. That is Lina's scheduling of
all-to-all and point-to-point traffic before gradient all-reduces cut into micro-operations.

Events are taken from a heap by (time, sort, number), so ties are deterministic. O((N + M + Q) log) for N rows, M messages and Q
pieces, in plain Python: some 10^5 events a second. Fused rows, moves of activations, and reductions over replicas are not
taken. With a channel for each pair and no collectives the times are those of `simulate`.

Paper: Li et al., Accelerating Distributed MoE Training and Inference with Lina, USENIX ATC 2023.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from stagewright.planner.errors import InvalidArgument
from stagewright.planner.schedules.action import RECV_KINDS, SEND_KINDS, Action, Kind
from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.schedules.schedule import Schedule, encode
from stagewright.planner.simulation.deadlock import explain_deadlock
from stagewright.planner.simulation.network import Collectives, Links, spread
from stagewright.planner.simulation.timeline import COLLECTIVE_LANE, COMPUTE_LANE, SEND_LANE, Timeline

Ints = npt.NDArray[np.int32]

_COLLECTIVES = (Kind.REDUCE_GRAD, Kind.UNSHARD)
_COMPUTED, _ARRIVED, _PIECE = range(3)  # in this order at one time: what is ready is known before a wire chooses
_COMPUTE = (Kind.F, Kind.B, Kind.I, Kind.W, Kind.R, Kind.OPT)


@dataclass(frozen=True, eq=False)
class Channels:
    """Which traffic shares a wire, and who goes first.

    Parameters
    ----------
    send_channel : int32 [num_ranks, num_ranks], channel of each directed pair; by default its sender's.
    collective_channel : int32 [num_ranks], channel of each rank's collectives; by default the rank's.
    send_priority, collective_priority : the lower one goes first; equal ones first come, first served.
    quantum_s : collectives are cut into pieces of at most this; infinite keeps them whole.
    """

    send_channel: Ints | None = None
    collective_channel: Ints | None = None
    send_priority: int = 0
    collective_priority: int = 0
    quantum_s: float = math.inf

    def __post_init__(self) -> None:
        if not self.quantum_s > 0:
            raise InvalidArgument(f"quantum_s is {self.quantum_s:g}, a piece takes time", field="quantum_s")


@dataclass(order=True)
class _Job:
    priority: int
    number: int
    action: Action = field(compare=False)
    rank: int = field(compare=False)
    edge: int = field(compare=False)  # -1 for a collective
    remaining_s: float = field(compare=False)
    latency_s: float = field(compare=False)


class _Run:
    """The state of one simulation; `finish` returns its timeline."""

    def __init__(
        self, schedule: Schedule, costs: StageCosts, links: Links, collectives: Collectives, channels: Channels
    ) -> None:
        ranks, stages, edges = schedule.num_ranks, schedule.num_stages, len(schedule.edges)
        self.schedule, self.costs, self.channels = schedule, costs, channels
        self.steps = [[step[0] for step in schedule.actions(rank)] for rank in range(ranks)]
        self.latency_s = spread("latency_s", links.latency_s, (ranks, ranks))
        self.bytes_per_s = spread("bytes_per_s", links.bytes_per_s, (ranks, ranks))
        self.forward_bytes = spread("boundary_bytes", links.boundary_bytes, (edges,))
        back = links.boundary_bytes if links.gradient_bytes is None else links.gradient_bytes
        self.gradient_bytes = spread("gradient_bytes", back, (edges,))
        self.collective_s = {
            Kind.REDUCE_GRAD: spread("reduce_grad_s", collectives.reduce_grad_s, (stages,)),
            Kind.UNSHARD: spread("unshard_s", collectives.unshard_s, (stages,)),
            Kind.OPT: spread("optimizer_s", collectives.optimizer_s, (stages,)),
        }
        own = np.arange(ranks, dtype=np.int32)
        pairs = np.broadcast_to(own[:, None], (ranks, ranks))
        self.send_channel = pairs if channels.send_channel is None else channels.send_channel
        self.collective_channel = own if channels.collective_channel is None else channels.collective_channel
        self.sends_are_rows = any(action.kind in SEND_KINDS for steps in self.steps for action in steps)
        self.position, self.busy = [0] * ranks, [False] * ranks
        self.arrived: set[tuple[bool, int, int, int]] = set()  # forward, replica, edge, microbatch
        self.collected: set[tuple[Kind, int, int]] = set()
        self.issued: set[tuple[Kind, int, int]] = set()
        self.queues: dict[int, list[_Job]] = {}
        self.serving: set[int] = set()
        self.events: list[tuple[float, int, int, int, _Job | None]] = []
        self.count = 0
        self.spans: list[tuple[int, int, float, float, Action]] = []

    def run(self) -> Timeline:
        for rank in range(self.schedule.num_ranks):
            self.advance(rank, 0.0)
        while self.events:
            now, what, _, place, job = heapq.heappop(self.events)
            if what == _COMPUTED:
                self.busy[place] = False
                self.deliver(place, now)
            elif what == _PIECE:
                self.serving.discard(place)
                assert job is not None
                self.piece_done(job, place, now)
            elif what == _ARRIVED:
                assert job is not None
                self.land(job, now)
        if any(at < len(steps) for at, steps in zip(self.position, self.steps, strict=True)):
            raise explain_deadlock(self.schedule, self.position)
        return self.timeline()

    def push(self, time: float, what: int, place: int, job: _Job | None = None) -> None:
        self.count += 1
        heapq.heappush(self.events, (time, what, self.count, place, job))

    def advance(self, rank: int, now: float) -> None:
        """Issue the rank's steps until one has to wait or takes time."""
        while not self.busy[rank] and self.position[rank] < len(self.steps[rank]):
            action = self.steps[rank][self.position[rank]]
            cell = (action.kind, action.replica, action.stage)
            if action.kind in _COLLECTIVES:
                self.issued.add(cell)
                self.collected.discard(cell)
                seconds = float(self.collective_s[action.kind][action.stage])
                priority = self.channels.collective_priority
                self.submit(_Job(priority, 0, action, rank, -1, seconds, 0.0), int(self.collective_channel[rank]), now)
            elif action.kind in SEND_KINDS:
                self.send(rank, action, action.kind is Kind.SEND_F, now)
            elif action.kind in _COMPUTE:
                if not self.able(action, rank):
                    return
                self.busy[rank] = True
                end = now + self.seconds(action)
                self.spans.append((rank, COMPUTE_LANE, now, end, action))
                self.push(end, _COMPUTED, rank)
                return
            self.position[rank] += 1

    def able(self, action: Action, rank: int) -> bool:
        """Return whether the action has all it waits for."""
        cell = (action.replica, action.stage)
        needed = Kind.REDUCE_GRAD if action.kind is Kind.OPT else Kind.UNSHARD
        waits = (needed, *cell) in self.issued and (needed, *cell) not in self.collected
        if waits and action.kind in (Kind.OPT, Kind.F, Kind.B, Kind.I, Kind.R):
            return False
        return all(
            (forward, action.replica, edge, action.microbatch) in self.arrived
            for forward, edge, _ in self.inputs(action)
        )

    def inputs(self, action: Action) -> Iterator[tuple[bool, int, int]]:
        """Yield (forward, edge, other stage) of what the action needs."""
        for edge, (source, target) in enumerate(self.schedule.edges):
            if action.kind is Kind.F and target == action.stage:
                yield True, edge, source
            elif action.kind in (Kind.B, Kind.I) and source == action.stage:
                yield False, edge, target

    def seconds(self, action: Action) -> float:
        costs, stage = self.costs, action.stage
        if action.kind is Kind.OPT:
            return float(self.collective_s[Kind.OPT][stage])
        recompute = float(costs.recompute_s[stage])
        parts = {
            Kind.F: costs.forward_s[stage],
            Kind.B: costs.input_grad_s[stage] + costs.weight_grad_s[stage] + recompute,
            Kind.I: costs.input_grad_s[stage] + recompute,
            Kind.W: costs.weight_grad_s[stage],
        }
        return float(parts[action.kind])

    def deliver(self, rank: int, now: float) -> None:
        """Hand on what the rank's running action made, and go on."""
        action = self.steps[rank][self.position[rank]]
        self.position[rank] += 1
        if action.kind in (Kind.F, Kind.B, Kind.I):
            forward = action.kind is Kind.F
            for edge, _, there in self.outputs(action.stage, action.replica, forward):
                if there == rank:
                    self.arrived.add((forward, action.replica, edge, action.microbatch))
            if not self.sends_are_rows:
                self.send(rank, action.with_kind(Kind.SEND_F if forward else Kind.SEND_B), forward, now)
        self.advance(rank, now)

    def outputs(self, stage: int, replica: int, forward: bool) -> Iterator[tuple[int, int, int]]:
        for edge, (source, target) in enumerate(self.schedule.edges):
            mine, other = (source, target) if forward else (target, source)
            if mine == stage:
                yield edge, other, int(self.schedule.placement[replica, other])

    def send(self, rank: int, action: Action, forward: bool, now: float) -> None:
        for edge, _, there in self.outputs(action.stage, action.replica, forward):
            if there != rank:
                size = float((self.forward_bytes if forward else self.gradient_bytes)[edge])
                occupied, latency = size / float(self.bytes_per_s[rank, there]), float(self.latency_s[rank, there])
                job = _Job(self.channels.send_priority, 0, action, rank, edge, occupied, latency)
                self.submit(job, int(self.send_channel[rank, there]), now)

    def submit(self, job: _Job, channel: int, now: float) -> None:
        self.count += 1
        job.number = self.count
        if job.edge >= 0 and job.remaining_s == 0.0:  # latency only: it occupies nothing
            self.spans.append((job.rank, SEND_LANE, now, now + job.latency_s, job.action))
            self.push(now + job.latency_s, _ARRIVED, channel, job)
            return
        heapq.heappush(self.queues.setdefault(channel, []), job)
        self.serve(channel, now)

    def serve(self, channel: int, now: float) -> None:
        """Begin the next piece of the most urgent job, when the channel is free."""
        queue = self.queues.get(channel, [])
        if channel in self.serving or not queue:
            return
        self.serving.add(channel)
        job = heapq.heappop(queue)
        piece = job.remaining_s if job.edge >= 0 else min(job.remaining_s, self.channels.quantum_s)
        job.remaining_s -= piece
        if job.remaining_s < 1e-12 * piece:
            job.remaining_s = 0.0
        latency = job.latency_s if job.edge >= 0 else 0.0
        lane = SEND_LANE if job.edge >= 0 else COLLECTIVE_LANE
        self.spans.append((job.rank, lane, now, now + piece + latency, job.action))
        self.push(now + piece, _PIECE, channel, job)

    def piece_done(self, job: _Job, channel: int, now: float) -> None:
        if job.remaining_s > 0.0:
            heapq.heappush(self.queues[channel], job)
        else:
            self.push(now + job.latency_s, _ARRIVED, channel, job)
        self.serve(channel, now)

    def land(self, job: _Job, now: float) -> None:
        """Note that the job is done and let whoever waits go on."""
        action = job.action
        if job.edge < 0:
            self.collected.add((action.kind, action.replica, action.stage))
            self.advance(job.rank, now)
            return
        forward = action.kind is Kind.SEND_F
        self.arrived.add((forward, action.replica, job.edge, action.microbatch))
        source, target = self.schedule.edges[job.edge]
        self.advance(int(self.schedule.placement[action.replica, target if forward else source]), now)

    def timeline(self) -> Timeline:
        spans = sorted(
            (span for span in self.spans if span[3] > span[2] or span[1] == COMPUTE_LANE), key=lambda span: span[:3]
        )
        columns = list(zip(*spans, strict=True)) if spans else [(), (), (), (), ()]
        sends = [span for span in spans if span[1] == SEND_LANE]
        return Timeline(
            "simulated",
            self.schedule.num_ranks,
            np.array(columns[0], dtype=np.int32),
            np.array(columns[1], dtype=np.int32),
            encode(columns[4]),
            np.array(columns[2], dtype=np.float64),
            np.array(columns[3], dtype=np.float64),
            link_bytes={"p2p": self._sent_bytes()} if sends else {},
        )

    def _sent_bytes(self) -> float:
        total = 0.0
        for steps in self.steps:
            for action in steps:
                if action.kind in (Kind.F, Kind.B, Kind.I):
                    forward = action.kind is Kind.F
                    here = int(self.schedule.placement[action.replica, action.stage])
                    sizes = self.forward_bytes if forward else self.gradient_bytes
                    for edge, _, there in self.outputs(action.stage, action.replica, forward):
                        total += float(sizes[edge]) * (there != here)
        return total


def simulate_shared(
    schedule: Schedule,
    costs: StageCosts,
    *,
    links: Links | None = None,
    collectives: Collectives | None = None,
    channels: Channels | None = None,
) -> Timeline:
    """Return the timeline of one iteration whose messages and collectives share channels; no memory, no critical path.

    Raises InvalidArgument for what only `simulate` takes, and InvalidSchedule for a deadlock.
    """
    allowed = {*_COMPUTE, *_COLLECTIVES, *SEND_KINDS, *RECV_KINDS, Kind.RESHARD} - {Kind.R}
    for rank in range(schedule.num_ranks):
        for step in schedule.actions(rank):
            if len(step) > 1 or step[0].kind not in allowed or step[0].slice >= 0:
                raise InvalidArgument(
                    f"rank {rank}: {step[0]} is fused, sliced, moved or a filler, which shared channels do not know",
                    field="schedule",
                    hint="use simulate(), where every link has its own order",
                )
            if step[0].kind is Kind.REDUCE_GRAD and schedule.num_replicas > 1:
                raise InvalidArgument(
                    f"rank {rank}: {step[0]} reduces over {schedule.num_replicas} replicas, which shared channels do not know",
                    field="schedule",
                )
    return _Run(schedule, costs, links or Links(), collectives or Collectives(), channels or Channels()).run()
