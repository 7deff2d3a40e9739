"""Summing gradients over the ranks that hold the same parameters.

A bucket is the parameters of one stage, or those that several stages share (tied weights), with the group of all ranks
that hold them: data-parallel replicas, context-parallel ranks, the other replicas of a bidirectional pipeline, and for
tied weights the ranks of every stage that uses them. A bucket is reduced once each iteration, when the last of its
stages on this rank has issued REDUCE_GRAD. Gradients are flattened into buffers of at most `bucket_bytes` and summed
asynchronously; the optimizer's action waits. Never by hooks on the backward: a hook does not know of deferred weight
gradients, microbatches or replicas.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET_BYTES = 25 * 2**20

StageKey = tuple[int, int]  # (replica, stage)


@dataclass
class Bucket:
    """Parameters that are reduced together.

    Parameters
    ----------
    purpose : what the traffic counts under, `all-reduce/dp` or `all-reduce/tied`.
    parameters : by name in the model.
    group : the ranks that sum; None when this rank alone holds them.
    holders : (replica, stage) of this rank's stages that use the parameters.
    """

    purpose: str
    parameters: Mapping[str, nn.Parameter]
    group: dist.ProcessGroup | None
    holders: frozenset[StageKey]
    reported: set[StageKey] = field(default_factory=set)
    flights: list[tuple[dist.Work, Tensor, list[nn.Parameter]]] = field(default_factory=list)


class GradientReducer:
    """All buckets of one rank.

    `bytes_sent`, by purpose, counts what a ring all-reduce sends from each rank: 2 (n - 1) / n of the buffer.
    """

    def __init__(self, buckets: Iterable[Bucket], *, bucket_bytes: int = BUCKET_BYTES) -> None:
        self._buckets = tuple(buckets)
        self._bucket_bytes = bucket_bytes
        self.bytes_sent: dict[str, float] = {"all-reduce/dp": 0.0, "all-reduce/tied": 0.0}

    def report(self, stage: StageKey) -> None:
        """Take note that a stage's gradients are complete; starts the buckets of which it was the last holder."""
        for bucket in self._buckets:
            if stage in bucket.holders:
                bucket.reported.add(stage)
                if bucket.reported == bucket.holders:
                    self._start(bucket)

    def wait(self, stage: StageKey) -> None:
        """Return when the gradients of the stage's parameters are sums."""
        for bucket in self._buckets:
            if stage in bucket.holders:
                self._finish(bucket)

    def finish(self) -> None:
        """Wait for everything and prepare for the next iteration."""
        for bucket in self._buckets:
            self._finish(bucket)
            bucket.reported.clear()

    def _start(self, bucket: Bucket) -> None:
        if bucket.group is None:
            return
        for parameters in _filled(bucket.parameters.values(), self._bucket_bytes):
            for parameter in parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            flat = torch.cat([_gradient(parameter).reshape(-1) for parameter in parameters])
            work = dist.all_reduce(flat, group=bucket.group, async_op=True)
            assert work is not None
            bucket.flights.append((work, flat, parameters))
            members = bucket.group.size()
            self.bytes_sent[bucket.purpose] += 2 * (members - 1) / members * flat.numel() * flat.element_size()

    def _finish(self, bucket: Bucket) -> None:
        for work, flat, parameters in bucket.flights:
            work.wait()
            offset = 0
            for parameter in parameters:
                gradient = _gradient(parameter)
                gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
                offset += gradient.numel()
        bucket.flights.clear()


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _filled(parameters: Iterable[nn.Parameter], bucket_bytes: int) -> list[list[nn.Parameter]]:
    """Return the parameters that want gradients, in order, in lists of one dtype of at most `bucket_bytes` each."""
    result: list[list[nn.Parameter]] = []
    size = 0
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        num_bytes = parameter.numel() * parameter.element_size()
        if not result or size + num_bytes > bucket_bytes or result[-1][0].dtype != parameter.dtype:
            result.append([])
            size = 0
        result[-1].append(parameter)
        size += num_bytes
    return result
