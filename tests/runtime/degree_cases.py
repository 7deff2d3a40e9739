"""What the ranks of a pool run to look into the parallel degrees: buckets, states, traffic."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from runtime_cases import CPU, GROUPS, PreparedCase, batches_of, make_model

from stagewright.modeling import split
from stagewright.runtime.reduction import ReplicatedBucket
from stagewright.runtime.ring import ring_all_reduce
from stagewright.runtime.torch_adapter import default_store
from stagewright.runtime.worker import Worker, WorkerSettings


@dataclass(frozen=True)
class BucketCounts:
    """Bytes of gradients on one rank, in how many buckets, and how many of them started inside the last backward."""

    gradient_bytes: int
    num_buckets: int
    num_overlapped: int


def make_worker(prepared: PreparedCase) -> Worker:
    case = prepared.case
    chunks = case.num_chunks or (2 * case.num_waves if case.num_waves else 2)
    chain = split(make_model(case, case.num_ranks * chunks))
    store = dist.PrefixStore(f"case/{prepared.number}", default_store())
    return Worker(prepared.plan, prepared.schedule, chain, WorkerSettings(CPU, seed=1), store=store, groups=GROUPS)


def buckets_of_an_iteration(prepared: PreparedCase) -> BucketCounts:
    worker = make_worker(prepared)
    worker.run(batches_of(prepared.plan, 1)[0], 0)
    buckets = [bucket for bucket in worker.buckets.buckets if isinstance(bucket, ReplicatedBucket)]
    size = sum(value.numel() * value.element_size() for bucket in buckets for value in bucket.optimized())
    return BucketCounts(
        size, sum(bucket.num_buckets for bucket in buckets), sum(bucket.num_overlapped for bucket in buckets)
    )


def ring(length: int) -> tuple[int, float]:
    """Return the bytes this rank sent to sum `length` numbers over all ranks, and the largest error of the sum."""
    group = GROUPS.make("ring", range(dist.get_world_size()))
    assert group is not None
    value = torch.arange(length, dtype=torch.float64) * (dist.get_rank() + 1)
    expected = value.clone()
    dist.all_reduce(expected, group=group)
    sent = ring_all_reduce(value, group)
    return sent, float((value - expected).abs().max())
