"""Values and gradients on their way between stages, on one rank.

For each edge (source stage, target stage) of the stage graph, a message is the values of those layers of the source that
the target needs, in layer order; a gradient message is the gradients of the same tensors. Two stages on one rank hand
over without a copy; where their degrees differ samples and sequences are divided anew (`resharding`). Where several targets use one
value its gradients are summed. Between stages of different numbers of
replicas a microbatch's samples are split over the ranks that take them and put one behind the other where they come from several.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import groupby

import torch
from torch import Tensor

from stagewright.modeling.batch import Batch, sample_key, shape_key
from stagewright.planner.schedules.action import Action, Kind
from stagewright.planner.simulation.timeline import SEND_LANE
from stagewright.runtime.communication import Message, Pending, PointToPoint, ShapeBook, TensorSpec
from stagewright.runtime.recorder import Recorder
from stagewright.runtime.resharding import Resharding
from stagewright.runtime.stage import Unit
from stagewright.runtime.topology import Part

Values = Mapping[int, tuple[Tensor, ...]]
Arriving = tuple[tuple[Part, Pending], ...]


@dataclass(frozen=True)
class StageGraph:
    """Which stage sends which layers' values to which stage, and where the stages are.

    Parameters
    ----------
    layers : for each edge (source, target), the layers whose values travel.
    peers : from whom this rank receives a stage's messages, by (replica, stage); this rank for its own.
    is_divided : whether stages have different numbers of replicas or tensor degrees, so that messages are parts of a
        microbatch.
    takers : to whom this rank sends a stage's messages, where those are others than its peers.
    lengths : what part of a sequence a device of the source of an edge has, where that is not all.
    reshardings : what happens on edges between stages of this rank with unlike degrees.
    """

    layers: Mapping[tuple[int, int], tuple[int, ...]]
    peers: Mapping[tuple[int, int], tuple[Part, ...]]
    is_divided: bool = False
    takers: Mapping[tuple[int, int], tuple[Part, ...]] = field(default_factory=dict)
    lengths: Mapping[tuple[int, int], Fraction] = field(default_factory=dict)
    reshardings: Mapping[tuple[int, int], Resharding] = field(default_factory=dict)

    def sources(self, stage: int) -> tuple[int, ...]:
        """Stages whose values a stage takes."""
        return tuple(source for source, target in self.layers if target == stage)

    def targets(self, stage: int) -> tuple[int, ...]:
        """Stages that take a stage's values."""
        return tuple(target for source, target in self.layers if source == stage)


class Mailbox:
    """Messages of one rank; keys are `communication.Message`."""

    def __init__(
        self, graph: StageGraph, rank: int, transport: PointToPoint, shapes: ShapeBook, recorder: Recorder
    ) -> None:
        self._graph = graph
        self._rank = rank
        self._transport = transport
        self._shapes = shapes
        self._recorder = recorder
        self._keys: dict[Unit, str] = {}
        self._ready: dict[Message, tuple[Tensor, ...]] = {}
        self._pending: dict[Message, Arriving] = {}
        self._posted: set[Message] = set()
        self._taken: set[Message] = set()
        self._counts: dict[tuple[int, int], list[int]] = {}

    def begin(self, batches: Mapping[Unit, Batch]) -> None:
        """Start an iteration on these units."""
        self._keys = {unit: batch_key(batch, is_divided=self._graph.is_divided) for unit, batch in batches.items()}

    def finish(self) -> None:
        """Wait until all sends have left; nothing may be left over."""
        self._transport.drain()
        assert not self._pending and not self._ready, f"left over: {[*self._pending, *self._ready]}"
        self._posted.clear()
        self._taken.clear()

    def messages_here(self, action: Action) -> set[Message]:
        """Return the messages of a SEND_F of another rank that come to this one."""
        if self._is_remote(action.replica, action.stage):
            return {
                _message(action, action.stage, target, backward=False)
                for target in self._graph.targets(action.stage)
                if not self._is_remote(action.replica, target)
            }
        return set()

    def discard(self, messages: frozenset[Message]) -> None:
        """Forget what was made, and receive and forget these messages, so that the iteration can begin again."""
        self._ready.clear()
        for message in sorted(messages - self._taken, key=lambda each: (each.source, each.microbatch, each.slice)):
            if message not in self._pending:
                action = Action(Kind.RECV_F, message.target, message.microbatch, message.slice, message.replica)
                self.post(action, wait=True)
            _wait(self._pending.pop(message))
        self._transport.drain()
        self._posted -= messages
        self._taken.clear()

    def take_values(self, action: Action) -> dict[int, tuple[Tensor, ...]]:
        """Return what a stage receives for a forward, by layer; waits for what is on its way."""
        self._transport.let_go()
        result: dict[int, tuple[Tensor, ...]] = {}
        for source in self._graph.sources(action.stage):
            tensors = self._take(_message(action, source, action.stage, backward=False))
            result |= self._unpack((source, action.stage), tensors)
        self._transport.let_go()  # who waits long for a message has meanwhile sent its own
        return result

    def put_values(self, action: Action, values: Values) -> None:
        """Hand a forward's values to the stages that take them: at once on this rank, else when they are sent."""
        for target in self._graph.targets(action.stage):
            edge = (action.stage, target)
            tensors = tuple(value for layer in self._graph.layers[edge] for value in values[layer])
            self._counts[edge] = [len(values[layer]) for layer in self._graph.layers[edge]]
            if self._is_remote(action.replica, target):
                self._shapes.publish(self._shape_key(edge, action), tensors)
            if edge in self._graph.reshardings:
                tensors = self._graph.reshardings[edge].values(tensors)
            self._ready[_message(action, action.stage, target, backward=False)] = tensors

    def take_gradients(self, action: Action) -> dict[int, tuple[Tensor, ...]]:
        """Return the gradients of a stage's values, by layer, summed over the stages that took them."""
        self._transport.let_go()
        result: dict[int, tuple[Tensor, ...]] = {}
        for target in self._graph.targets(action.stage):
            tensors = self._take(_message(action, action.stage, target, backward=True))
            for layer, values in self._unpack((action.stage, target), tensors).items():
                before = result.get(layer)
                result[layer] = values if before is None else tuple(a + b for a, b in zip(before, values, strict=True))
        self._transport.let_go()
        return result

    def put_gradients(self, action: Action, gradients: Values) -> None:
        """Hand a backward's input gradients to the stages they belong to."""
        for source in self._graph.sources(action.stage):
            edge = (source, action.stage)
            tensors = tuple(value for layer in self._graph.layers[edge] for value in gradients[layer])
            if edge in self._graph.reshardings:
                tensors = self._graph.reshardings[edge].gradients(tensors)
            self._ready[_message(action, source, action.stage, backward=True)] = tensors

    def send_values(self, action: Action) -> None:
        """Send a stage's values to every stage on another rank that takes them."""
        for target in self._graph.targets(action.stage):
            if self._is_remote(action.replica, target):
                self._send(_message(action, action.stage, target, backward=False), target, action)

    def send_gradients(self, action: Action) -> None:
        """Send a stage's input gradients to every stage on another rank that they belong to."""
        for source in self._graph.sources(action.stage):
            if self._is_remote(action.replica, source):
                self._send(_message(action, source, action.stage, backward=True), source, action)

    def post(self, action: Action, *, wait: bool) -> bool:
        """Post the receives of a RECV action, unless they are posted; False when shapes are unknown and `wait` is not."""
        backward = action.kind is Kind.RECV_B
        stages = self._graph.targets(action.stage) if backward else self._graph.sources(action.stage)
        for other in stages:
            if not self._is_remote(action.replica, other):
                continue
            edge = (action.stage, other) if backward else (other, action.stage)
            message = _message(action, *edge, backward=backward)
            if message in self._posted:
                continue
            specs = self._shapes.find(self._shape_key(edge, action), wait=wait)
            if specs is None:
                return False
            self._pending[message] = tuple(
                (part, self._transport.receive(message, self._specs_of(part, specs, edge), part.rank))
                for part in self._graph.peers[action.replica, other]
            )
            self._posted.add(message)
        return True

    def _send(self, message: Message, other: int, action: Action) -> None:
        start = self._recorder.clock()
        tensors = self._ready.pop(message)
        key = (message.replica, other)
        for part in self._graph.takers.get(key, self._graph.peers[key]):
            self._transport.send(message, self._values_of(part, tensors), part.rank)
        self._recorder.add(SEND_LANE, action, start, self._recorder.clock())

    def _take(self, message: Message) -> tuple[Tensor, ...]:
        if message in self._ready:
            return self._ready.pop(message)
        self._taken.add(message)
        return _wait(self._pending.pop(message))

    def _unpack(self, edge: tuple[int, int], tensors: tuple[Tensor, ...]) -> dict[int, tuple[Tensor, ...]]:
        layers = self._graph.layers[edge]
        if len(layers) == 1:
            return {layers[0]: tensors}
        counts = self._counts.get(edge, [1] * len(layers))
        result, offset = {}, 0
        for layer, count in zip(layers, counts, strict=True):
            result[layer] = tensors[offset : offset + count]
            offset += count
        return result

    def _is_remote(self, replica: int, stage: int) -> bool:
        return any(part.rank != self._rank for part in self._graph.peers[replica, stage])

    def _values_of(self, part: Part, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(_part_of(value, part) for value in tensors) if self._graph.is_divided else tensors

    def _specs_of(self, part: Part, specs: tuple[TensorSpec, ...], edge: tuple[int, int]) -> tuple[TensorSpec, ...]:
        """Return the shapes of a part, given those that a device of the edge's source has."""
        if not self._graph.is_divided:
            return specs
        share = (part.sequence[1] - part.sequence[0]) / self._graph.lengths.get(edge, Fraction(1))
        return tuple(
            ((part.count, int(shape[1] * share), *shape[2:]) if len(shape) > 2 else (part.count, *shape[1:]), dtype)
            for shape, dtype in specs
        )

    def _shape_key(self, edge: tuple[int, int], action: Action) -> str:
        return f"shapes/{edge[0]}/{edge[1]}/{self._keys[action.microbatch, action.slice]}"


def batch_key(batch: Batch, *, is_divided: bool) -> str:
    """Return what sender and receiver of a message both know of its shapes from their batch."""
    return repr(sample_key(batch) if is_divided else shape_key(batch))


def _part_of(value: Tensor, part: Part) -> Tensor:
    """Return the samples and the part of the sequence that go to another rank."""
    rows = value.narrow(0, part.first, part.count)
    if part.sequence == part.held or value.dim() < 3:
        return rows
    whole = value.shape[1] / (part.held[1] - part.held[0])
    begin, end = (int((place - part.held[0]) * whole) for place in part.sequence)
    return rows.narrow(1, begin, end - begin)


def _wait(parts: Arriving) -> tuple[Tensor, ...]:
    """Return the received tensors, complete: parts of a sequence, and then samples, one behind the other."""
    received = [(part.first, pending.wait()) for part, pending in parts]
    rows = [_joined([tensors for _, tensors in run], 1) for _, run in groupby(received, key=lambda each: each[0])]
    return _joined(rows, 0)


def _joined(pieces: Sequence[tuple[Tensor, ...]], dimension: int) -> tuple[Tensor, ...]:
    if len(pieces) == 1:
        return pieces[0]
    return tuple(torch.cat(values, dim=dimension) for values in zip(*pieces, strict=True))


def _message(action: Action, source: int, target: int, *, backward: bool) -> Message:
    return Message(backward, action.replica, source, target, action.microbatch, action.slice)
