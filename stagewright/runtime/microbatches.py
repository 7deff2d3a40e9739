"""How a schedule divides a batch: equal microbatches, AutoPipe's halves, several updates in one order, DynaPipe's runs.

A unit of the schedule takes some samples of the batch, and its loss counts as its share of the samples, or of the tokens,
of one optimizer update.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stagewright.modeling.batch import Batch, KeywordTuple
from stagewright.planner.documents.plan import Plan
from stagewright.planner.errors import InvalidArgument, InvalidSchedule
from stagewright.planner.schedules.action import Kind
from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.schedules.dynapipe import order_under_cap, split_batch
from stagewright.planner.schedules.family import ScheduleRequest
from stagewright.planner.schedules.lowering import lower
from stagewright.planner.schedules.schedule import KIND, REPLICA, STAGE, Schedule, WeightPolicy

IGNORED = -100  # a target that has no loss


@dataclass(frozen=True)
class Division:
    """Samples of each unit of one data-parallel replica, in the order of the batch, and the updates they make."""

    sizes: tuple[int, ...]
    num_updates: int

    @property
    def samples(self) -> int:
        """Samples of one replica in one run of the schedule."""
        return sum(self.sizes)

    def share(self, unit: int) -> float:
        """Return what a unit's loss counts in the update it belongs to."""
        return self.sizes[unit] * self.num_updates / self.samples


def division_of(plan: Plan, schedule: Schedule) -> Division:
    """Return how a lowered schedule divides its batch; raises InvalidSchedule when it is none of this plan's."""
    size, halved = plan.schedule.microbatch, int(schedule.parameters.get("halved", 0))
    if halved and size % 2:
        raise InvalidSchedule(
            f"{schedule.name} halves {halved} microbatches of {size} samples",
            field="schedule.microbatch",
            hint="take an even number of samples a microbatch",
        )
    periods = int(schedule.parameters.get("updates", schedule.parameters.get("pipelines", 1)))
    expected = plan.schedule.num_microbatches * periods + halved
    if schedule.num_microbatches != expected:
        raise InvalidSchedule(
            f"{schedule.name} runs {schedule.num_microbatches} microbatches, the plan has {expected}",
            hint="make the schedule of this plan",
        )
    sizes = (size // 2,) * (2 * halved) + (size,) * (schedule.num_microbatches - 2 * halved)
    return Division(sizes, _num_updates(schedule))


def _num_updates(schedule: Schedule) -> int:
    if schedule.weight_policy is WeightPolicy.ELASTIC:
        return schedule.num_replicas
    steps = [row for order in schedule.orders for row in order.tolist() if row[KIND] == Kind.OPT and row[STAGE] == 0]
    if schedule.weight_policy is WeightPolicy.STASH:
        return max(1, len(steps))  # each of a minibatch on its own, which workers of a stage average
    return max(1, sum(row[REPLICA] == 0 for row in steps))


def samples_of(plan: Plan, schedule: Schedule) -> int:
    """Return the samples of the batch that one run of a schedule takes, over all data-parallel replicas."""
    return samples_over_replicas(plan, division_of(plan, schedule))


def samples_over_replicas(plan: Plan, division: Division) -> int:
    """Return the samples of all data-parallel replicas in one run of a division."""
    shares = plan.stages[0].batch_shares
    return len(division.sizes) * sum(shares) if shares else division.samples * plan.stages[0].degrees.dp


@dataclass(frozen=True)
class DynamicIteration:
    """One iteration that was planned for its batch.

    Parameters
    ----------
    schedule : lowered, for as many microbatches as there are.
    microbatches : parts of the batch, each padded to its longest sample; weights : their shares of the batch's tokens.
    """

    schedule: Schedule
    microbatches: tuple[Batch, ...]
    weights: tuple[float, ...]


def plan_iteration(plan: Plan, batch: Batch) -> DynamicIteration:
    """Return the microbatches and the order that DynaPipe makes for a batch; the same on every rank.

    Lengths are where a sample's last target stands. A microbatch costs its padded tokens and `overhead_tokens` (the
    longest sample unless told); a rank holds at most `cap_tokens` padded tokens.
    """
    lengths = sample_lengths(batch)
    told = plan.schedule.parameters
    overhead, cap = float(told.get("overhead_tokens", max(lengths))), float(told.get("cap_tokens", np.inf))
    ranks = plan.schedule.num_ranks
    groups = split_batch(lengths, ranks, lambda count, longest: count * longest + overhead, lambda n, m: n * m, cap)
    held = np.array([len(group) * max(lengths[index] for index in group) for group in groups], dtype=np.float64)
    order = order_under_cap(ScheduleRequest(ranks, len(groups)), held, None if np.isinf(cap) else cap)
    parts = tuple(_part(batch, group, max(lengths[index] for index in group)) for group in groups)
    tokens = [num_targets(part) for part in parts]
    return DynamicIteration(
        lower(order, StageCosts.uniform(len(plan.stages)), data_parallel=True),
        parts,
        tuple(count / sum(tokens) for count in tokens),
    )


def sample_lengths(batch: Batch) -> list[int]:
    """Return the length of each sample: up to its last target, or its last unmasked position."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    kept = _targets(batch) != IGNORED if mask is None else mask != 0
    positions = torch.arange(1, kept.shape[1] + 1, device=kept.device)
    return [max(1, int(length)) for length in (kept * positions).amax(dim=1).tolist()]


def num_targets(batch: Batch) -> int:
    """Return how many targets have a loss; a mapping's labels are shifted by the model, as Hugging Face's are."""
    targets = _targets(batch)
    return int(((targets[:, 1:] if isinstance(batch, Mapping) else targets) != IGNORED).sum())


def _targets(batch: Batch) -> Tensor:
    found = batch.get("labels") if isinstance(batch, Mapping) else batch[-1] if isinstance(batch, tuple) else None
    if not isinstance(found, Tensor) or found.dim() != 2 or found.is_floating_point():
        raise InvalidArgument(
            "microbatches of different lengths need targets by token, [samples, tokens]",
            field="data",
            hint=f"yield (tokens, targets) or a mapping with labels, {IGNORED} where there is none",
        )
    return found


def _part(batch: Batch, samples: tuple[int, ...], length: int) -> Batch:
    """Return some samples of a batch, cut to a length."""
    whole = _targets(batch).shape

    def change(value: object) -> object:
        if not isinstance(value, Tensor) or not value.dim():
            return value
        chosen = value[torch.tensor(samples, device=value.device)]
        return chosen[:, :length].contiguous() if value.shape[:2] == whole else chosen

    if isinstance(batch, Mapping):
        return {key: change(value) for key, value in batch.items()}
    assert isinstance(batch, tuple)
    values = tuple(change(value) for value in batch)
    return KeywordTuple(values, batch.keywords) if isinstance(batch, KeywordTuple) else values
