"""Point-to-point messages between pipeline ranks.

With NCCL, one process group for each direction (to a higher rank, to a lower one): a communicator is then used by one side
for sends only and by the other for receives only, so a receive never stands in front of a send. Each message has a tag of
its own, (direction, replica, source stage, target stage, microbatch, slice): on gloo a wrong order then hangs in a test
instead of corrupting a gradient; NCCL ignores tags and relies on the checked order. Gloo tells messages apart by their
tags alone, so the group of all ranks carries them both ways: each further one has a thread that wakes a hundred times a
second and takes the processor from the rank's own work.

A send does not copy: its buffers are held until the transfer is complete. Gloo says so only to who waits, so a thread
waits for one send after the other, and their buffers are let go while the step goes on. Shapes are not sent with each message. The
first message of each shape of batch publishes them in the store, where the receiver reads them; both ends see the
batch, so both know when a shape is new.
"""

from __future__ import annotations

import json
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from stagewright.runtime.groups import Groups

TensorSpec = tuple[tuple[int, ...], str]


@dataclass(frozen=True, slots=True)
class Message:
    """The address of one message; `backward` is for gradients, which travel from target stage to source stage."""

    backward: bool
    replica: int
    source: int
    target: int
    microbatch: int
    slice: int


@dataclass
class Pending:
    """A receive under way."""

    buffers: tuple[Tensor, ...]
    works: list[dist.Work] = field(default_factory=list)

    def wait(self) -> tuple[Tensor, ...]:
        """Return the received tensors, complete."""
        for work in self.works:
            work.wait()
        return self.buffers


class Sending:
    """A send under way.

    Parameters
    ----------
    buffer : what is sent; held, and let go by the rank's own thread, so that its release is counted there.
    waiter : waits for the transfer where only who waits is told that it is complete; None where it can be asked.
    """

    def __init__(self, work: dist.Work, buffer: Tensor, waiter: Executor | None) -> None:
        self._work: dist.Work | None = work
        self._buffer: Tensor | None = buffer
        self._waited = None if waiter is None else waiter.submit(self._wait)

    @property
    def has_left(self) -> bool:
        """Whether the transfer is complete; one that failed has not left, so that `finish` raises."""
        if self._waited is not None:
            return self._waited.done() and self._waited.exception() is None
        return self._work is None or bool(self._work.is_completed())

    def finish(self) -> None:
        """Wait until the transfer is complete, and let the buffer go."""
        if self._waited is None:
            self._wait()
        else:
            self._waited.result()
        self._buffer = None

    def _wait(self) -> None:
        """Wait for the transfer and forget it: it holds the buffer too."""
        if self._work is not None:
            self._work.wait()
            self._work = None


class ShapeBook:
    """Shapes and dtypes of the messages, by stage edge and shape of batch; read from the store when unknown here."""

    def __init__(self, store: dist.Store) -> None:
        self._store = store
        self._known: dict[str, tuple[TensorSpec, ...]] = {}

    def publish(self, key: str, tensors: tuple[Tensor, ...]) -> None:
        """Make the shapes known to the receivers, once for each key."""
        if key not in self._known:
            specs = tuple((tuple(value.shape), str(value.dtype).removeprefix("torch.")) for value in tensors)
            self.publish_specs(key, specs)

    def publish_specs(self, key: str, specs: tuple[TensorSpec, ...]) -> None:
        """Make shapes known that no tensor at hand has."""
        self._known[key] = specs
        self._store.set(key, json.dumps(specs))

    def find(self, key: str, *, wait: bool) -> tuple[TensorSpec, ...] | None:
        """Return the shapes; when they are not known yet, wait for the sender, or return None."""
        if key not in self._known:
            if not wait and not self._store.check([key]):
                return None
            self._known[key] = tuple((tuple(shape), dtype) for shape, dtype in json.loads(self._store.get(key)))
        return self._known[key]


def message_groups(groups: Groups) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    """Return the groups that carry messages to higher and to lower ranks; every rank must ask for them."""
    if dist.get_backend() == "gloo":
        return dist.group.WORLD, dist.group.WORLD
    everyone = range(dist.get_world_size())
    return groups.make("upward", everyone), groups.make("downward", everyone)


class PointToPoint:
    """Asynchronous sends and receives of one rank."""

    def __init__(self, groups: Groups, device: torch.device, num_stages: int) -> None:
        upward, downward = message_groups(groups)
        self._groups = {True: upward, False: downward}
        self._device = device
        self._rank = dist.get_rank()
        self._num_stages = num_stages
        self._waiter = ThreadPoolExecutor(1, thread_name_prefix="sends") if device.type == "cpu" else None
        self._sending: list[Sending] = []
        self.bytes_sent = 0

    def send(self, message: Message, tensors: tuple[Tensor, ...], peer: int) -> None:
        """Start to send; the buffers are held until the transfer is complete."""
        for index, value in enumerate(tensors):
            buffer = value.contiguous()
            work = dist.isend(buffer, peer, group=self._groups[peer > self._rank], tag=self._tag(message, index))
            assert work is not None
            self._sending.append(Sending(work, buffer, self._waiter))
            self.bytes_sent += buffer.numel() * buffer.element_size()

    def receive(self, message: Message, specs: tuple[TensorSpec, ...], peer: int) -> Pending:
        """Start to receive and return what to wait for."""
        pending = Pending(
            tuple(torch.empty(shape, dtype=getattr(torch, dtype), device=self._device) for shape, dtype in specs)
        )
        for index, buffer in enumerate(pending.buffers):
            work = dist.irecv(buffer, peer, group=self._groups[self._rank > peer], tag=self._tag(message, index))
            assert work is not None
            pending.works.append(work)
        return pending

    def let_go(self) -> None:
        """Forget the buffers of the sends that have left."""
        left = [sending for sending in self._sending if sending.has_left]
        for sending in left:
            sending.finish()
            self._sending.remove(sending)

    def drain(self) -> None:
        """Wait until every send has left."""
        for sending in self._sending:
            sending.finish()
        self._sending.clear()

    def _tag(self, message: Message, index: int) -> int:
        tag = message.microbatch + 1
        tag = tag * _MOST_SLICES + message.slice + 1
        tag = tag * 2 + message.backward
        tag = tag * 2 + message.replica % 2
        tag = (tag * self._num_stages + message.source) * _MOST_TENSORS + index
        return tag % (2**31 - 1)


_MOST_SLICES = 64
_MOST_TENSORS = 8
