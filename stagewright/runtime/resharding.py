"""What happens to a tensor between two stages of one pipeline rank whose degrees differ (`planner.layerwise`).

Parts of a sequence are joined, samples sliced or gathered, and the sequence is divided again as the later stage has it; gradients
take the way back, transposed. Tensors without a sequence keep all but their samples' way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stagewright.modeling.tensor_collectives import TensorGroup
from stagewright.planner.documents.plan import Plan
from stagewright.planner.layerwise import changes_of
from stagewright.runtime.groups import Groups

PURPOSE = "reshard"  # in the names of the traffic


@dataclass(frozen=True)
class Resharding:
    """One rank's part of a change.

    Parameters
    ----------
    joins, samples, splits : the devices that hold the parts of a sequence before, that gather samples from each other, and that
        divide the sequence after; None where nothing of that kind happens.
    grows : whether replicas become more.
    """

    joins: TensorGroup | None
    samples: TensorGroup | None
    splits: TensorGroup | None
    grows: bool

    def values(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return what the later stage takes of what the earlier one made; a collective."""
        return tuple(self._changed(value, self.joins, self.grows, self.splits) for value in tensors)

    def gradients(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the gradients of what the earlier stage made; a collective."""
        return tuple(self._changed(value, self.splits, not self.grows, self.joins) for value in tensors)

    def _changed(self, value: Tensor, joins: TensorGroup | None, slices: bool, splits: TensorGroup | None) -> Tensor:
        has_sequence = value.dim() > 2
        if joins is not None and has_sequence:
            value = joins.all_gather(value)
        if self.samples is not None:
            size = self.samples.size
            value = (
                value.chunk(size)[self.samples.index].clone()
                if slices
                else self.samples.gather_rows(value, [len(value)] * size)
            )
        return splits.part(value) if splits is not None and has_sequence else value


def make_reshardings(
    plan: Plan, kinds: Sequence[str], groups: Groups, traffic: dict[str, float]
) -> dict[tuple[int, int], Resharding]:
    """Return what happens between stages of this rank, by (earlier, later) stage; all ranks make the same groups."""
    found: dict[tuple[int, int], Resharding] = {}
    for change in changes_of(plan, kinds):
        ranks = plan.mapping.pipeline_ranks[plan.schedule.placement[0][change.stage]]

        def made(members: int, stride: int, ranks: tuple[int, ...] = ranks) -> TensorGroup | None:
            group = groups.make_all("reshard", _strided(ranks, members, stride))
            return None if group is None else TensorGroup(group, traffic, PURPOSE)

        resharding = Resharding(
            made(change.joins, 1), made(change.num_members, change.stride), made(change.splits, 1), change.grows
        )
        if torch.distributed.get_rank() in ranks:
            found[change.stage, change.stage + 1] = resharding
    return found


def _strided(ranks: Sequence[int], num_members: int, stride: int) -> list[Sequence[int]]:
    """Return the sets of `num_members` ranks at a distance that divide all of them."""
    span = num_members * stride
    return [ranks[first + own : first + span : stride] for first in range(0, len(ranks), span) for own in range(stride)]
