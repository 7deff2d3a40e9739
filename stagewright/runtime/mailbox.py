"""Values and gradients on their way between stages, on one rank.

For each edge (source stage, target stage) of the stage graph, a message is the values of those layers of the source that
the target needs, in layer order; a gradient message is the gradients of the same tensors. Two stages on one rank hand
over without a copy; where their degrees differ samples and sequences are divided anew (`resharding`). Where several targets use one
value its gradients are summed. Between stages of different numbers of
replicas a microbatch's samples are split over the ranks that take them and put one behind the other where they come from several.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor

from stagewright.modeling.batch import Batch, sample_key, shape_key
from stagewright.planner.errors import InvalidArgument
from stagewright.planner.schedules.action import Action, Kind
from stagewright.planner.simulation.timeline import SEND_LANE
from stagewright.runtime.communication import Message, Pending, PointToPoint, ShapeBook, TensorSpec
from stagewright.runtime.recorder import Recorder
from stagewright.runtime.stage import Unit
from stagewright.runtime.stage_graph import StageGraph
from stagewright.runtime.topology import Part

Values = Mapping[int, tuple[Tensor, ...]]
Arriving = tuple[tuple[Part, Pending], ...]


class Mailbox:
    """Messages of one rank; keys are `communication.Message`."""

    def __init__(self, graph: StageGraph, transport: PointToPoint, shapes: ShapeBook, recorder: Recorder) -> None:
        self._graph = graph
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
        alike, is_divided = self._graph.has_one_length, self._graph.is_divided
        self._keys = {unit: "" if alike else batch_key(batch, is_divided=is_divided) for unit, batch in batches.items()}

    def finish(self) -> None:
        """Wait until all sends have left; nothing may be left over."""
        self._transport.drain()
        assert not self._pending and not self._ready, f"left over: {[*self._pending, *self._ready]}"
        self._posted.clear()
        self._taken.clear()

    def messages_here(self, action: Action) -> set[Message]:
        """Return the messages of a SEND_F of another rank that come to this one."""
        if self._graph.is_remote(action.replica, action.stage):
            return {
                _message(action, action.stage, target, backward=False)
                for target in self._graph.targets(action.stage)
                if not self._graph.is_remote(action.replica, target)
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
            if self._graph.is_remote(action.replica, target):
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
            if self._graph.is_remote(action.replica, target):
                self._send(_message(action, action.stage, target, backward=False), action)

    def send_gradients(self, action: Action) -> None:
        """Send a stage's input gradients to every stage on another rank that they belong to."""
        for source in self._graph.sources(action.stage):
            if self._graph.is_remote(action.replica, source):
                self._send(_message(action, source, action.stage, backward=True), action)

    def post(self, action: Action, *, wait: bool) -> bool:
        """Post the receives of a RECV action, unless they are posted; False when shapes are unknown and `wait` is not."""
        backward = action.kind is Kind.RECV_B
        stages = self._graph.targets(action.stage) if backward else self._graph.sources(action.stage)
        for other in stages:
            if not self._graph.is_remote(action.replica, other):
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
                for part in self._graph.peers[action.replica, *edge]
            )
            self._posted.add(message)
        return True

    def _send(self, message: Message, action: Action) -> None:
        start = self._recorder.clock()
        tensors = self._ready.pop(message)
        hop = (message.replica, message.source, message.target)
        for part in self._graph.takers.get(hop, self._graph.peers[hop]):
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

    def _values_of(self, part: Part, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(_part_of(value, part) for value in tensors) if self._graph.is_divided else tensors

    def _specs_of(self, part: Part, specs: tuple[TensorSpec, ...], edge: tuple[int, int]) -> tuple[TensorSpec, ...]:
        """Return the shapes of a part, given those that a device of the edge's source has."""
        if not self._graph.is_divided:
            return specs
        there = self._graph.source_pieces.get(edge, 1)
        return tuple((_shape_of(part, shape, there), dtype) for shape, dtype in specs)

    def _shape_key(self, edge: tuple[int, int], action: Action) -> str:
        return f"shapes/{edge[0]}/{edge[1]}/{self._keys[action.microbatch, action.slice]}"


def batch_key(batch: Batch, *, is_divided: bool) -> str:
    """Return what sender and receiver of a message both know of its shapes from their batch."""
    return repr(sample_key(batch) if is_divided else shape_key(batch))


def _shape_of(part: Part, shape: Sequence[int], num_there: int) -> tuple[int, ...]:
    """Return the shape of a part, given that of a device with so many pieces of a sequence.

    Raises InvalidArgument for a part of a tensor that has no sequence.
    """
    if len(shape) > 2:
        return (part.count, shape[1] * len(part.pieces) // num_there, *shape[2:])
    if len(part.pieces) < part.held:
        raise InvalidArgument(
            f"a tensor of shape {tuple(shape)} goes from one stage to another that divides sequences unlike, and has none",
            field="stages.degrees",
            hint="plan with equal tp, sp and cp for both stages",
        )
    return (part.count, *shape[1:])


def _part_of(value: Tensor, part: Part) -> Tensor:
    """Return the samples and the pieces of the sequence that go to another rank."""
    rows = value.narrow(0, part.first, part.count)
    if len(part.pieces) == part.held or value.dim() < 3:
        return rows
    pieces = rows.unflatten(1, (part.held, -1))
    first, count = part.pieces[0], len(part.pieces)
    if part.pieces == tuple(range(first, first + count)):
        return pieces.narrow(1, first, count).flatten(1, 2)
    return pieces[:, list(part.pieces)].flatten(1, 2)


def _wait(parts: Arriving) -> tuple[Tensor, ...]:
    """Return the received tensors, complete: pieces of sequences in their places, and then samples, one behind the other."""
    received = [(part, pending.wait()) for part, pending in parts]
    runs = groupby(received, key=lambda each: each[0].first)
    return _behind_each_other([_complete(list(run)) for _, run in runs], 0)


def _complete(run: Sequence[tuple[Part, tuple[Tensor, ...]]]) -> tuple[Tensor, ...]:
    """Return some samples' tensors from those that hold pieces of their sequences."""
    order = tuple(piece for part, _ in run for piece in part.pieces)
    if order == tuple(range(len(order))):
        return _behind_each_other([tensors for _, tensors in run], 1)
    return tuple(
        _in_places([(part, value) for (part, _), value in zip(run, values, strict=True)])
        for values in zip(*(tensors for _, tensors in run), strict=True)
    )


def _in_places(run: Sequence[tuple[Part, Tensor]]) -> Tensor:
    part, value = run[0]
    each = value.shape[1] // len(part.pieces)
    whole = value.new_empty((value.shape[0], part.held, each, *value.shape[2:]))
    for part, value in run:
        whole[:, list(part.pieces)] = value.unflatten(1, (len(part.pieces), each))
    return whole.flatten(1, 2)


def _behind_each_other(parts: Sequence[tuple[Tensor, ...]], dimension: int) -> tuple[Tensor, ...]:
    if len(parts) == 1:
        return parts[0]
    return tuple(torch.cat(values, dim=dimension) for values in zip(*parts, strict=True))


def _message(action: Action, source: int, target: int, *, backward: bool) -> Message:
    return Message(backward, action.replica, source, target, action.microbatch, action.slice)
