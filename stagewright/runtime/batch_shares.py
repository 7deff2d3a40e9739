"""Which samples of a batch one replica takes where replicas take uneven shares of each microbatch.

Replica d of stage 0 owns a piece of the batch, T shares of a_d samples behind the pieces of the replicas before it; microbatch m
is share m of every piece, one behind the other. Another stage divides that microbatch among its own replicas in order. A
replica's mean loss counts a_d / M, so that the sum over the replicas is the mean over all samples.
"""

from __future__ import annotations

import torch

from stagewright.modeling.batch import Batch, select_samples
from stagewright.planner.documents.plan import Plan
from stagewright.planner.replica_shares import samples_by_replica, samples_of_microbatch


def replica_part(batch: Batch, plan: Plan, stage: int, replica: int, microbatch: int) -> Batch:
    """Return a replica's samples of a microbatch at a stage."""
    pieces, begin = [], 0
    for share in samples_by_replica(plan, 0):
        pieces.append(torch.arange(share) + begin + microbatch * share)
        begin += share * plan.schedule.num_microbatches
    own = samples_by_replica(plan, stage)
    first = sum(own[:replica])
    return select_samples(batch, torch.cat(pieces)[first : first + own[replica]])


def replica_weight(plan: Plan, stage: int, replica: int) -> float:
    """Return what a replica's mean over its samples counts in the mean over a microbatch, a_d / M."""
    return samples_by_replica(plan, stage)[replica] / samples_of_microbatch(plan)
