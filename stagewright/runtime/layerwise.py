"""Runs a plan whose layers have degrees of their own on one pipeline rank, with resharding between them (`planner.layerwise`).

Every device holds its part of every layer. A microbatch's samples go through the stages in one autograd graph: inside a stage
tensor parallelism as in any plan, between stages a slice or a gather of samples. Gradients of a stage are summed over its own
replicas at the end of the batch.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stagewright.modeling.batch import Batch, batch_size, select_samples
from stagewright.modeling.chain import LayerChain
from stagewright.modeling.recomputation import recompute_layers
from stagewright.modeling.seeding import microbatch_seed
from stagewright.modeling.tensor_collectives import TensorGroup, gather_samples, slice_samples
from stagewright.modeling.tensor_parallel import TensorShards, parallelize
from stagewright.modeling.weight_gradients import WeightGradientSink
from stagewright.planner.documents.plan import Plan
from stagewright.planner.errors import InvalidArgument
from stagewright.planner.layerwise import Change, changes_of, layerwise_order, replica_of
from stagewright.planner.replica_shares import samples_by_replica, samples_of_microbatch
from stagewright.runtime.groups import Groups


def check_layerwise(plan: Plan, chain: LayerChain) -> None:
    """Raise InvalidArgument unless all stages stand behind each other on one rank, replicated and tensor-parallel only."""
    spec = plan.schedule
    if spec.num_ranks != 1 or spec.orders != (layerwise_order(len(plan.stages), spec.num_microbatches),):
        raise InvalidArgument(
            f"schedule {spec.name} has {spec.num_ranks} pipeline ranks; layers with degrees of their own run on one, each "
            "microbatch forward and back before the next",
            field="schedule",
            hint="take `layerwise_schedule`",
        )
    for index, stage in enumerate(plan.stages):
        degrees = stage.degrees
        plain = degrees.model_copy(update={"dp": 1, "tp": 1})
        if plain != type(degrees)() or stage.batch_shares or stage.state_shares or stage.optimizer_offload:
            raise InvalidArgument(
                f"stages[{index}] has {degrees.model_dump(exclude_defaults=True)}; layers with degrees of their own take dp and tp",
                field=f"stages[{index}].degrees",
            )
    stage_of = {
        chain.layers[layer].name: index for index, stage in enumerate(plan.stages) for layer in stage.layer_indices
    }
    apart = next((tie for tie in chain.ties if len({stage_of[name] for name in tie.layers}) > 1), None)
    if apart is not None or chain.named_edges is not None:
        raise InvalidArgument(
            "the model is no chain"
            if apart is None
            else f"{apart.parameter} is shared by layers {list(apart.layers)} of two stages",
            field="stages",
            hint="give layers that share a weight one stage",
        )


class LayerwiseWorker:
    """One device of such a plan.

    Parameters
    ----------
    chain : the whole model, which is cut in place.
    groups : process groups to use and add to; all ranks build their workers in the same order.
    """

    def __init__(self, plan: Plan, chain: LayerChain, groups: Groups, *, seed: int = 0) -> None:
        check_layerwise(plan, chain)
        self.plan, self.chain, self.traffic = plan, chain, dict[str, float]()
        self._seed = seed
        ranks = plan.mapping.pipeline_ranks[0]
        self._place = ranks.index(dist.get_rank())
        self._shards: list[TensorShards] = []
        self._replicas: list[dist.ProcessGroup | None] = []
        levels = {}
        for stage in plan.stages:
            size, count = stage.degrees.tp, stage.degrees.num_devices
            inside = groups.make_all("tensor", [ranks[first : first + size] for first in range(0, count, size)])
            self._replicas.append(groups.make_all("replicas", [ranks[first::size] for first in range(size)]))
            levels.update(zip(stage.layer_indices, stage.recompute_levels(), strict=True))
            if inside is None:
                self._shards.append(TensorShards())
                continue
            self._shards.append(
                parallelize(
                    chain,
                    stage.layer_indices,
                    TensorGroup(inside, self.traffic),
                    WeightGradientSink(),
                    sequence_parallel=False,
                    vocabulary_parallel=False,
                )
            )
        recompute_layers(chain, levels)
        self._changes: dict[int, tuple[Change, TensorGroup]] = {}
        for change in changes_of(plan):
            span = change.num_members * change.stride
            sets = [
                ranks[first + own : first + span : change.stride]
                for first in range(0, len(ranks), span)
                for own in range(change.stride)
            ]
            made = groups.make_all("reshard", sets)
            assert made is not None
            self._changes[change.stage] = (change, TensorGroup(made, self.traffic, "reshard"))

    def run(self, batch: Batch, step: int = 0) -> float:
        """Leave the gradients of the mean loss over the batch; returns this device's share of it."""
        spec, whole = self.plan.schedule, samples_of_microbatch(self.plan)
        if batch_size(batch) != whole * spec.num_microbatches:
            raise InvalidArgument(
                f"the batch has {batch_size(batch)} samples, the plan takes {spec.num_microbatches} microbatches of {whole}",
                field="data",
            )
        last = self.plan.stages[-1].degrees
        total = 0.0
        for microbatch in range(spec.num_microbatches):
            loss = self._forward(batch, microbatch, microbatch_seed(self._seed, step, microbatch))
            loss = loss / (spec.num_microbatches * last.dp)
            loss.backward()
            total += float(loss.detach())
        for stage, group in enumerate(self._replicas):
            for parameter in self._parameters(stage).values():
                if group is not None and parameter.grad is not None:
                    dist.all_reduce(parameter.grad, group=group)
        return total if self._place % last.tp == 0 else 0.0

    def gradients(self) -> Mapping[str, Tensor]:
        """Return the whole gradient of each parameter; a collective."""
        found: dict[str, Tensor] = {}
        for stage, shards in enumerate(self._shards):
            for name, parameter in self._parameters(stage).items():
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                found[name] = shards.whole(gradient, parameter)
        return found

    def _forward(self, batch: Batch, microbatch: int, seed: int) -> Tensor:
        whole = samples_of_microbatch(self.plan)
        values: tuple[Tensor, ...] = ()
        for index, stage in enumerate(self.plan.stages):
            replica, size = replica_of(self._place, stage.degrees), samples_by_replica(self.plan, index)[0]
            first = microbatch * whole + replica * size
            part = select_samples(batch, torch.arange(first, first + size))
            values = self.chain.segment_of(stage.layer_indices).run(part, *values, seed=seed)
            if index in self._changes:
                change, group = self._changes[index]
                resharded = slice_samples if change.grows else gather_samples
                values = tuple(resharded(value, group) for value in values)
        (loss,) = values
        return loss

    def _parameters(self, stage: int) -> dict[str, nn.Parameter]:
        segment = self.chain.segment_of(self.plan.stages[stage].layer_indices)
        return {name: value for name, value in segment.named_parameters().items() if value.requires_grad}
