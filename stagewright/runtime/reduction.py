"""Summing gradients over the ranks that hold the same parameters, and stepping the optimizer on the sums.

A bucket is the parameters of one stage, or those that several stages share (tied weights), with the group of all ranks
that hold them: data-parallel replicas, context-parallel ranks, the other replicas of a bidirectional pipeline, and for
tied weights the ranks of every stage that uses them. A bucket is reduced once each iteration, when the last of its
stages on this rank has issued REDUCE_GRAD; reductions are asynchronous and the optimizer's action waits.

Where a stage's last action is a full backward, the interpreter announces it (`arm`), and parts of the bucket are reduced
as soon as that backward has finished their gradients, in one order on all ranks; REDUCE_GRAD reduces what is left. Hooks
are listened to inside that one action only: outside it they do not know of deferred weight gradients, microbatches or
replicas.

Two kinds of bucket: `ReplicatedBucket` here, every rank with all states, and `sharding.ShardedBucket` (ZeRO).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stagewright.modeling.tensor_collectives import TensorGroup
from stagewright.modeling.tensor_parallel import TensorShards
from stagewright.runtime.gradient_buffer import BUCKET_BYTES, GradientBuffer
from stagewright.runtime.ring import Ring
from stagewright.runtime.shampoo import Shampoo
from stagewright.runtime.tile_statistics import is_statistics, own_statistics, whole_statistics
from stagewright.runtime.used_parameters import UsedParameters

_PACKED_ELEMENTS = 2**14  # gradients of so many are summed together, larger ones where they lie
StageKey = tuple[int, int]  # (replica, stage)
Traffic = dict[str, float]
Algorithm = Literal["library", "ring"]
Purpose = Literal["dp", "tied", "edp"]


def all_reduce_bytes(values: Tensor, group: dist.ProcessGroup) -> float:
    """Return what a ring all-reduce sends from each rank, 2 (n - 1) / n of the tensor."""
    members = group.size()
    return 2 * (members - 1) / members * values.numel() * values.element_size()


def mean_over(values: Tensor, group: dist.ProcessGroup, traffic: Traffic, name: str) -> Tensor:
    """Return the mean of a tensor over the ranks of a group, summed in place, and count its bytes under `name`."""
    dist.all_reduce(values, group=group)
    traffic[name] = traffic.get(name, 0.0) + all_reduce_bytes(values, group)
    return values / group.size()


class Bucket(Protocol):
    """Parameters that are reduced and stepped together.

    `holders` are the (replica, stage) of this rank's stages that use the parameters.
    """

    holders: frozenset[StageKey]

    @property
    def renewed(self) -> Sequence[nn.Parameter]:
        """Return what of the modules' parameters updates make anew instead of changing it."""
        ...

    def before_forward(self, microbatch: int) -> None:
        """Take note of the weights that a microbatch's forward uses."""
        ...

    def before_backward(self, microbatch: int) -> None:
        """Take note that a microbatch's backward begins."""
        ...

    def before_step(self, microbatch: int) -> None:
        """Bring the gradients to what the optimizer steps on; `microbatch` is -1 for all of the iteration."""
        ...

    def arm(self) -> None:
        """Take note that the next backward is the last of the iteration to add to the gradients."""
        ...

    def start(self) -> None:
        """Start to reduce the gradients of the whole iteration."""
        ...

    def finish(self) -> None:
        """Wait until the gradients are sums."""
        ...

    def after_microbatch(self) -> None:
        """Take note that one unit's weight gradients are complete."""
        ...

    def unshard(self) -> None:
        """Make the parameters whole, where they are sharded."""
        ...

    def reshard(self) -> None:
        """Let go of what other ranks hold, where parameters are sharded."""
        ...

    def optimized(self) -> Sequence[nn.Parameter]:
        """Return what the optimizer steps on."""
        ...

    def squared_norm(self) -> Tensor:
        """Return this rank's share of the squared norm of the summed gradients; shares add up over all ranks."""
        ...

    def after_step(self) -> None:
        """Bring the stepped values to the parameters."""
        ...

    def gradients(self) -> dict[str, Tensor]:
        """Return the summed gradients by name, whole; every rank of the group calls this."""
        ...

    def values(self) -> dict[str, Tensor]:
        """Return copies of the parameters by name, whole; every rank of the group calls this."""
        ...

    def held_gradient_bytes(self) -> float:
        """Return the bytes of gradients that stay from one microbatch to the next."""
        ...

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Set the parameters to whole values."""
        ...

    def states(self, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
        """Return copies of the optimizer's states by key and name, whole; every rank of the group calls this."""
        ...

    def load_states(self, optimizer: torch.optim.Optimizer, values: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Set the optimizer's states to whole values by key and name."""
        ...

    def clear(self) -> None:
        """Forget the gradients."""
        ...


class Window(Protocol):
    """Gathers what a stage's layers need while they run; see `gathering.GatherWindow`."""

    def begin(self, direction: int) -> None:
        """Take note that a forward (1) or a backward (-1) begins."""
        ...

    def end(self) -> None:
        """Free everything."""
        ...


class BucketSet:
    """All buckets of one rank, as the interpreter drives them."""

    def __init__(self, buckets: Iterable[Bucket], windows: Mapping[StageKey, Window] | None = None) -> None:
        self.buckets = tuple(buckets)
        self._windows = windows or {}
        self._reported: dict[int, set[StageKey]] = {}

    def of(self, stage: StageKey) -> tuple[Bucket, ...]:
        """Return the buckets a stage uses."""
        return tuple(bucket for bucket in self.buckets if stage in bucket.holders)

    def before_forward(self, stage: StageKey, microbatch: int) -> None:
        """Take note of the weights that a microbatch's forward uses."""
        for bucket in self.of(stage):
            bucket.before_forward(microbatch)
        if stage in self._windows:
            self._windows[stage].begin(1)

    def before_backward(self, stage: StageKey, microbatch: int, *, is_last: bool) -> None:
        """Take note that a microbatch's backward begins; `is_last` says that it is the last of the iteration, and a full one.

        Buckets that other stages hold too do not start to be reduced in it.
        """
        for bucket in self.of(stage):
            bucket.before_backward(microbatch)
            if is_last and len(bucket.holders) == 1:
                bucket.arm()
        if stage in self._windows:  # weights come when gradients on their way have landed
            self._windows[stage].begin(-1)

    def after_pass(self, stage: StageKey) -> None:
        """Take note that a forward or a backward is over."""
        if stage in self._windows:
            self._windows[stage].end()

    def after_microbatch(self, stage: StageKey) -> None:
        """Take note that the weight gradients of one unit of a stage are complete."""
        for bucket in self.of(stage):
            bucket.after_microbatch()

    def report(self, stage: StageKey) -> None:
        """Take note that a stage's gradients are complete; starts the buckets of which it was the last holder."""
        for bucket in self.of(stage):
            reported = self._reported.setdefault(id(bucket), set())
            reported.add(stage)
            if reported == bucket.holders:
                bucket.start()

    def wait(self, stage: StageKey) -> None:
        """Return when the gradients of the stage's parameters are sums."""
        for bucket in self.of(stage):
            bucket.finish()

    def unshard(self, stage: StageKey) -> None:
        """Make a stage's parameters whole."""
        for bucket in self.of(stage):
            bucket.unshard()

    def reshard(self, stage: StageKey) -> None:
        """Let a stage's sharded parameters go."""
        for bucket in self.of(stage):
            bucket.reshard()

    def squared_norm(self) -> float:
        """Return this rank's share of the squared norm of the summed gradients, which are waited for."""
        total = torch.zeros((), dtype=torch.float64)
        for bucket in self.buckets:
            bucket.finish()
            total += bucket.squared_norm()
        return float(total)

    def finish(self) -> None:
        """Wait for everything and prepare for the next iteration."""
        for bucket in self.buckets:
            bucket.finish()
        self._reported.clear()


@dataclass
class ReplicatedBucket:
    """Parameters with gradients and states on every rank of the group; gradients are all-reduced.

    Parameters
    ----------
    purpose : what the traffic counts under, `all-reduce/dp` or `all-reduce/tied`.
    parameters : by name in the model.
    group : the ranks that sum; None when this rank alone holds them.
    holders : (replica, stage) of this rank's stages that use the parameters.
    traffic : counts what a ring all-reduce sends from each rank, 2 (n - 1) / n of the buffer.
    shards : how tensor parallelism has split the parameters.
    always : a parameter without a gradient has a zero one (experts that no token chose), so that momentum goes on.
    overlaps : reduce inside the last backward what it has finished; False where ranks of several stages must agree.
    bucket_bytes : size of what is reduced at once.
    algorithm : `library` is the process group's own all-reduce, `ring` the messages of `ring`.
    num_overlapped : how many buckets started so far while a backward still had gradients to compute.
    """

    purpose: str
    parameters: Mapping[str, nn.Parameter]
    group: dist.ProcessGroup | None
    holders: frozenset[StageKey]
    traffic: Traffic
    shards: TensorShards = field(default_factory=TensorShards)
    always: bool = False
    overlaps: bool = False
    bucket_bytes: int = BUCKET_BYTES
    algorithm: Algorithm = "library"
    num_overlapped: int = 0
    _buffers: list[GradientBuffer] = field(default_factory=list)
    _started: list[int] = field(default_factory=list)  # by buffer: buckets under way or done
    _ready: set[int] = field(default_factory=set)
    _armed: bool = False
    _open: bool = False  # reductions have started and `finish` has not seen them yet
    _works: list[dist.Work] = field(default_factory=list)
    _ring: Ring | None = None
    _hops: list[Future[int]] = field(default_factory=list)
    _used: UsedParameters | None = None  # where gradients lie in buffers, which are zero where there is none

    def __post_init__(self) -> None:
        if self.group is None:
            return
        self._used = UsedParameters(self.optimized(), self.group)
        by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter in self.optimized():
            by_dtype.setdefault(parameter.dtype, []).append(parameter)
        self._buffers = [GradientBuffer(some, bucket_bytes=self.bucket_bytes) for some in by_dtype.values()]
        self._started = [0] * len(self._buffers)
        self._ring = Ring(self.group) if self.algorithm == "ring" else None
        if self.overlaps:
            for parameter in self.optimized():
                parameter.register_post_accumulate_grad_hook(self._take_note)

    @property
    def renewed(self) -> list[nn.Parameter]:
        """Nothing: parameters are changed in place."""
        return []

    @property
    def num_buckets(self) -> int:
        """How many all-reduces an iteration takes."""
        return sum(buffer.num_buckets for buffer in self._buffers)

    def before_forward(self, microbatch: int) -> None:
        """Do nothing: one version of the weights serves the whole iteration."""

    def before_backward(self, microbatch: int) -> None:
        """Do nothing: one version of the weights serves the whole iteration."""

    def before_step(self, microbatch: int) -> None:
        """Do nothing: the gradients are where the optimizer looks."""

    def arm(self) -> None:
        """Reduce buckets as the next backward finishes them."""
        self._armed = self.overlaps

    def start(self) -> None:
        """Start the all-reduces of all buckets that are not under way."""
        self._armed = False
        self._open = True
        if self.always:
            for parameter in self.optimized():
                local_gradient(parameter)
        for index, buffer in enumerate(self._buffers):
            buffer.attach()
            self._launch(index, buffer.num_buckets)
        if self._used is not None:
            self._used.start()

    def finish(self) -> None:
        """Wait; then the gradients are sums, over the tensor-parallel group too where it sees parts of the sequence.

        What never had a gradient has none, so that no optimizer moves it; `always` says otherwise.
        """
        for work in self._works:
            work.wait()
        self._works.clear()
        for hops in self._hops:
            self._count(float(hops.result()))
        self._hops.clear()
        if self._open:
            sum_partial(self.optimized(), self.shards)
            self._started = [0] * len(self._buffers)
            self._ready.clear()
            if self._used is not None:
                self._used.finish()
                for parameter in () if self.always else self._used.unused:
                    parameter.grad = None
            self._open = False

    def _take_note(self, parameter: Tensor) -> None:
        if not self._armed:
            return
        self._ready.add(id(parameter))
        for index, buffer in enumerate(self._buffers):
            complete = buffer.num_complete(self._ready)
            if len(self._ready) < len(self.optimized()):
                self.num_overlapped += max(0, complete - self._started[index])
            self._launch(index, complete)

    def _launch(self, index: int, end: int) -> None:
        """Start the buckets of a buffer up to `end`, in order."""
        assert self.group is not None
        for number in range(self._started[index], end):
            bucket = self._buffers[index].bucket(number)
            if self._ring is not None:
                self._hops.append(self._ring.start(bucket))
            else:
                work = dist.all_reduce(bucket, group=self.group, async_op=True)
                assert work is not None
                self._works.append(work)
                self._count(all_reduce_bytes(bucket, self.group))
            self._started[index] = number + 1

    def _count(self, sent_bytes: float) -> None:
        self.traffic[self.purpose] = self.traffic.get(self.purpose, 0.0) + sent_bytes

    def after_microbatch(self) -> None:
        """Do nothing: gradients accumulate."""

    def unshard(self) -> None:
        """Do nothing: parameters are whole."""

    def reshard(self) -> None:
        """Do nothing: parameters stay whole."""

    def optimized(self) -> list[nn.Parameter]:
        """Return the trainable parameters."""
        return [parameter for parameter in self.parameters.values() if parameter.requires_grad]

    def squared_norm(self) -> Tensor:
        """Return this rank's share of the squared norm: equal copies share one count."""
        copies = 1 if self.group is None else self.group.size()
        pairs = ((value, value.grad) for value in self.optimized() if value.grad is not None)
        return squared_norm(pairs, self.shards) / copies

    def after_step(self) -> None:
        """Do nothing: the optimizer stepped on the parameters themselves."""

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients by name."""
        return {
            name: self.shards.whole(torch.zeros_like(value) if value.grad is None else value.grad, value)
            for name, value in self.parameters.items()
            if value.requires_grad
        }

    def values(self) -> dict[str, Tensor]:
        """Return copies of the trainable parameters by name."""
        return {
            name: self.shards.whole(value.detach(), value).clone()
            for name, value in self.parameters.items()
            if value.requires_grad
        }

    def held_gradient_bytes(self) -> float:
        """Return the bytes of the gradients of all trainable parameters."""
        return float(sum(value.numel() * value.element_size() for value in self.optimized()))

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Set the trainable parameters."""
        for name, parameter in self.parameters.items():
            if parameter.requires_grad:
                parameter.data.copy_(self.shards.part(values[name], parameter))

    def states(self, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
        """Return copies of the optimizer's states by key and name."""
        result: dict[str, dict[str, Tensor]] = {}
        for name, parameter in self.parameters.items():
            found = optimizer.state.get(parameter, {})
            for key, value in found.items():
                if isinstance(value, Tensor) and not is_statistics(key):
                    whole = self.shards.whole(value, parameter) if value.shape == parameter.shape else value
                    result.setdefault(key, {})[name] = whole.clone()
            if _kept_tiles(optimizer, parameter) is not None:
                statistics = {key: value for key, value in found.items() if is_statistics(key)}
                for key, value in whole_statistics(statistics, parameter, self.shards).items():
                    result.setdefault(key, {})[name] = value
        return result

    def load_states(self, optimizer: torch.optim.Optimizer, values: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Set the optimizer's states."""
        for name, parameter in self.parameters.items():
            state = {
                key: self.shards.part(found[name], parameter).clone() if found[name].dim() else found[name].clone()
                for key, found in values.items()
                if name in found and not is_statistics(key)
            }
            whole = {key: found[name] for key, found in values.items() if is_statistics(key) and name in found}
            kept = _kept_tiles(optimizer, parameter)
            if whole and kept is not None:
                mine = own_statistics(whole, parameter, self.shards, kept)
                state |= {key: value.clone() for key, value in mine.items()}
            if parameter.requires_grad and state:
                optimizer.state[parameter] = state

    def clear(self) -> None:
        """Set the gradients to zero; their memory stays, so that a step has it from its first action on."""
        for parameter in self.parameters.values() if not self._buffers else ():
            if parameter.grad is not None:
                parameter.grad.zero_()
        for buffer in self._buffers:
            buffer.clear()


def _kept_tiles(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> frozenset[int] | None:
    """Return the tiles of a matrix of which this rank keeps statistics; None for what has none."""
    if not isinstance(optimizer, Shampoo) or not parameter.requires_grad:
        return None
    (piece,) = optimizer.layout_of(parameter).pieces
    return piece.kept() if piece.is_matrix else None


def local_gradient(parameter: nn.Parameter) -> Tensor:
    """Return a parameter's gradient; one that no backward has touched becomes zeros."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def squared_norm(pairs: Iterable[tuple[nn.Parameter, Tensor]], shards: TensorShards) -> Tensor:
    """Return the squared norm of gradients, those of parameters that tensor parallelism copies divided by the copies."""
    whole = 1 if shards.group is None else shards.group.size
    total = torch.zeros((), dtype=torch.float64)
    for parameter, gradient in pairs:
        share = 1.0 / (shards.num_copies(parameter) if shards.is_split(parameter) else whole)
        total += share * gradient.detach().double().square().sum().cpu()
    return total


def sum_partial(parameters: Iterable[nn.Parameter], shards: TensorShards) -> None:
    """Sum the gradients of parameters that see only a part of the sequence, or of the queries, over the ranks with the others."""
    seen = list(parameters)
    if shards.group is not None:
        _sum_over(shards.group, [parameter for parameter in seen if id(parameter) in shards.partial])
    sharing = {id(shards.shared[id(each)]): shards.shared[id(each)] for each in seen if id(each) in shards.shared}
    for group in sharing.values():
        _sum_over(group, [each for each in seen if shards.shared.get(id(each)) is group])


def _sum_over(group: TensorGroup, chosen: Sequence[nn.Parameter]) -> None:
    """Sum gradients over a group: large ones where they lie, such as experts', and small ones together in a copy."""
    small = [parameter for parameter in chosen if parameter.numel() <= _PACKED_ELEMENTS]
    for parameter in chosen:
        if parameter.numel() > _PACKED_ELEMENTS:
            group.sum_in_place(local_gradient(parameter).detach())
    if not small:
        return
    flat = torch.cat([local_gradient(parameter).reshape(-1) for parameter in small])
    group.sum_in_place(flat)
    for parameter, total in zip(small, flat.split([parameter.numel() for parameter in small]), strict=True):
        gradient = local_gradient(parameter)
        gradient.copy_(total.view_as(gradient))
