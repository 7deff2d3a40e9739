"""The layers that one rank holds, divided as its degrees say: tensors, experts, attention over parts of the sequence.

What the rank does not hold is dropped from the model; weight gradients wait in a sink where the schedule splits backwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from stagewright.modeling.chain import LayerChain
from stagewright.modeling.context_attention import ContextAttention, ContextGroups, positions_of
from stagewright.modeling.expert_parallel import ExpertGroups, divide_experts
from stagewright.modeling.keep import keep_layers, move_to
from stagewright.modeling.recomputation import recompute_layers
from stagewright.modeling.tensor_collectives import TensorGroup
from stagewright.modeling.tensor_cut import key_value_copies
from stagewright.modeling.tensor_parallel import TensorShards, parallelize, split_logits
from stagewright.modeling.unfilled import fill_layers
from stagewright.modeling.vocabulary_loss import vocabulary_loss
from stagewright.modeling.weight_gradients import WeightGradientSink, defer_weight_gradients
from stagewright.planner.documents.plan import Degrees, Plan
from stagewright.planner.documents.profile import Recompute
from stagewright.planner.schedules.action import Action
from stagewright.runtime.groups import Groups
from stagewright.runtime.peer_swap import swaps
from stagewright.runtime.sequence_pieces import context_layout
from stagewright.runtime.stage import Stage
from stagewright.runtime.topology import StageKey, Topology


class RankLayers:
    """Cuts a model to one rank's layers and divides them.

    Parameters
    ----------
    chain : the whole model; what this rank does not hold is dropped from it.
    groups : process groups to use and add to.
    traffic : bytes sent, by collective and axis; the layers' collectives add to it.
    views : the topology as each rank of the world sees it.
    splits_backward : whether input and weight gradients are apart.

    Attributes
    ----------
    experts : ids of the parameters of divided experts.
    """

    def __init__(
        self,
        plan: Plan,
        topology: Topology,
        chain: LayerChain,
        groups: Groups,
        device: torch.device,
        traffic: dict[str, float],
        *,
        views: Sequence[Topology],
        splits_backward: bool,
    ) -> None:
        self._plan = plan
        self._topology = topology
        self._chain = chain
        self._groups = groups
        self._traffic = traffic
        self._views = views
        held = frozenset(i for _, s in topology.stages for i in plan.stages[s].layer_indices)
        keep_layers(chain, held)
        fill_layers(chain, held, device)
        move_to(chain.model, device)
        self._device = device
        self._sink = WeightGradientSink()
        self._shards = self._split_tensors()
        self.experts = self._divide_experts()
        if splits_backward:
            defer_weight_gradients(chain.model, self._sink)
        recompute_layers(chain, self._recompute_levels())

    def shards_of(self, stage: int) -> TensorShards:
        """Return how the tensors of a stage are split over its tensor-parallel group."""
        return self._shards[stage]

    def stages(self, actions: Sequence[Action]) -> dict[StageKey, Stage]:
        """Return this rank's stages by replica and stage, for these actions."""
        context = self._context_attention()
        return {
            (replica, stage): Stage(
                self._chain.segment_of(self._plan.stages[stage].layer_indices),
                stage,
                replica,
                self._sink,
                loss_context=self._loss_context(stage),
                entrance=self._entrance(stage),
                context=context,
                keeps_storages=bool(swaps(actions)),
            )
            for replica, stage in self._topology.stages
        }

    def _loss_context(self, stage: int) -> Callable[[], AbstractContextManager[object]]:
        group = self.shards_of(stage).group
        if group is None or not self._plan.stages[stage].degrees.vocab_parallel:
            return nullcontext
        return partial(vocabulary_loss, group)

    def _entrance(self, stage: int) -> Callable[[Tensor], Tensor] | None:
        """Return what a stage of the loss alone does with logits that their head has split; None for any other."""
        group = self.shards_of(stage).group
        if group is None or not self._plan.stages[stage].degrees.vocab_parallel or not self._is_loss_alone(stage):
            return None
        return split_logits(group, self._device)

    def _is_loss_alone(self, stage: int) -> bool:
        return [self._chain.layers[index].kind for index in self._plan.stages[stage].layer_indices] == ["loss"]

    def positions(self, index: int) -> Tensor:
        """Return the positions of one context-parallel part; the layout is the plan's `context_layout`."""
        return positions_of(
            index, self._topology.degrees.cp, self._plan.job.sequence_length, context_layout(self._plan)
        )

    def _divide_experts(self) -> set[int]:
        """Divide this rank's experts, where the plan does; returns the ids of their parameters."""
        experts = self._groups.make_all("experts", {view.expert_ranks for view in self._views})
        tensors = self._groups.make_all("expert tensors", {view.expert_tensor_ranks for view in self._views})
        if experts is None and tensors is None:
            return set()
        found: set[int] = set()
        for stage in sorted({stage for _, stage in self._topology.stages}):
            shards = self.shards_of(stage)
            groups = ExpertGroups(
                None if experts is None else TensorGroup(experts, self._traffic, "ep"),
                None if tensors is None else TensorGroup(tensors, self._traffic, "etp"),
                None if self._plan.stages[stage].degrees.sp else shards.group,
            )
            found |= divide_experts(self._chain, self._plan.stages[stage].layer_indices, groups, shards)
        return found

    def _context_attention(self) -> Callable[[], ContextAttention] | None:
        """Return what makes the attention over this rank's context-parallel group, where it has one."""
        heads = self._groups.make_all("heads", {view.ulysses_ranks for view in self._views})
        ring = self._groups.make_all("ring", {view.ring_ranks for view in self._views})
        degrees = self._topology.degrees
        if degrees.cp == 1:
            return None
        groups = ContextGroups(heads, ring, self._traffic)
        parts = [self.positions(index) for index in range(degrees.cp)]
        size = degrees.ulysses
        positions = [torch.cat(parts[first : first + size]) for first in range(0, degrees.cp, size)]
        return lambda: ContextAttention(groups, positions)

    def _split_tensors(self) -> dict[int, TensorShards]:
        """Split this rank's layers over the tensor-parallel groups of their stages, where they have one."""
        held = sorted({stage for _, stage in self._topology.stages})
        found = {stage: TensorShards() for stage in held}
        for kind in dict.fromkeys(_split_of(stage.degrees) for stage in self._plan.stages):
            alike = {index for index, stage in enumerate(self._plan.stages) if _split_of(stage.degrees) == kind}
            views = [view.at(stage) for view in self._views for _, stage in view.stages if stage in alike]
            group = self._groups.make_all("tensor", {view.tensor_ranks for view in views})
            copies = key_value_copies(self._chain.model, kind.tp)
            sharing = self._groups.make_all("key-value heads", {view.key_value_ranks(copies) for view in views})
            mine = [stage for stage in held if stage in alike]
            if group is None or not mine:
                continue
            shards = parallelize(
                self._chain,
                [layer for stage in mine for layer in self._plan.stages[stage].layer_indices],
                TensorGroup(group, self._traffic),
                self._sink,
                sharing=None if sharing is None else TensorGroup(sharing, self._traffic),
                sequence_parallel=kind.sp,
                vocabulary_parallel=kind.vocab_parallel,
                loss_elsewhere=self._is_loss_alone(len(self._plan.stages) - 1),
            )
            found |= dict.fromkeys(mine, shards)
        return found

    def _recompute_levels(self) -> dict[int, Recompute]:
        return {
            layer: level
            for index in sorted({stage for _, stage in self._topology.stages})
            for layer, level in zip(
                self._plan.stages[index].layer_indices, self._plan.stages[index].recompute_levels(), strict=True
            )
        }


class _Split(NamedTuple):
    """How a stage splits tensors."""

    tp: int
    sp: bool
    vocab_parallel: bool


def _split_of(degrees: Degrees) -> _Split:
    return _Split(degrees.tp, degrees.sp and degrees.tp > 1, degrees.vocab_parallel and degrees.tp > 1)
