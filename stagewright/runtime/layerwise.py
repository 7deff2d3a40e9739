"""Runs a plan whose layers have degrees of their own on one pipeline rank, with resharding between them (`planner.layerwise`).

Every device holds its part of every layer. A microbatch's samples go through the stages in one autograd graph: inside a stage
tensor parallelism as in any plan, between stages a slice or a gather of samples. Gradients of a stage are summed over its own
replicas at the end of the batch, and each stage's optimizer steps on its own parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stagewright.modeling.batch import Batch, batch_size, select_samples, to_device
from stagewright.modeling.chain import LayerChain
from stagewright.modeling.recomputation import recompute_layers
from stagewright.modeling.seeding import microbatch_seed
from stagewright.modeling.tensor_collectives import TensorGroup, gather_samples, slice_samples
from stagewright.modeling.tensor_parallel import TensorShards, parallelize
from stagewright.modeling.weight_gradients import WeightGradientSink
from stagewright.planner.documents.plan import Plan
from stagewright.planner.errors import InvalidArgument
from stagewright.planner.layerwise import Change, changes_of, replica_of
from stagewright.planner.replica_shares import samples_by_replica, samples_of_microbatch
from stagewright.planner.schedules.action import Action, Kind
from stagewright.planner.simulation.timeline import COMPUTE_LANE
from stagewright.runtime.groups import Groups
from stagewright.runtime.optimizers import OptimizerChoice, make_optimizer, scale_learning_rate
from stagewright.runtime.recorder import Recorder
from stagewright.runtime.reduction import BucketSet, ReplicatedBucket, Traffic
from stagewright.runtime.step_rule import scale_gradients, whole_squared_norm
from stagewright.runtime.support import check_layerwise_degrees
from stagewright.runtime.worker import WorkerSettings


def check_layerwise(plan: Plan, chain: LayerChain) -> None:
    """Raise InvalidArgument unless `check_layerwise_degrees` takes the plan and its stages share no weight."""
    check_layerwise_degrees(plan)
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
    at_action : told the position of each action in the plan's order before it runs.
    """

    def __init__(
        self,
        plan: Plan,
        chain: LayerChain,
        settings: WorkerSettings,
        *,
        groups: Groups | None = None,
        at_action: Callable[[int], None] = lambda position: None,
    ) -> None:
        check_layerwise(plan, chain)
        chain.model.to(settings.device)
        self.plan, self.chain, self.settings = plan, chain, settings
        self.recorder = Recorder(clock=settings.clock)
        self.optimizers: list[torch.optim.Optimizer] = []
        self.gradient_norm: float | None = None
        self._traffic: Traffic = {}
        self._at_action = at_action
        self._owns_groups = groups is None
        self.groups = groups = groups or Groups()
        ranks = plan.mapping.pipeline_ranks[0]
        self._place = ranks.index(dist.get_rank())
        self._shards: list[TensorShards] = []
        replicas: list[dist.ProcessGroup | None] = []
        levels = {}
        for stage in plan.stages:
            size, count = stage.degrees.tp, stage.degrees.num_devices
            inside = groups.make_all("tensor", [ranks[first : first + size] for first in range(0, count, size)])
            replicas.append(groups.make_all("replicas", [ranks[first::size] for first in range(size)]))
            levels.update(zip(stage.layer_indices, stage.recompute_levels(), strict=True))
            if inside is None:
                self._shards.append(TensorShards())
                continue
            self._shards.append(
                parallelize(
                    chain,
                    stage.layer_indices,
                    TensorGroup(inside, self._traffic),
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
            self._changes[change.stage] = (change, TensorGroup(made, self._traffic, "reshard"))
        self.buckets = BucketSet(
            ReplicatedBucket(
                "all-reduce/dp",
                self._parameters(index),
                group,
                frozenset(((0, index),)),
                self._traffic,
                self._shards[index],
            )
            for index, group in enumerate(replicas)
            if self._parameters(index)
        )

    def run(self, batch: Batch, step: int) -> float | None:
        """Run one iteration on a global batch; returns this device's share of the mean loss where it counts one.

        With an optimizer in use it steps; without one the gradients are left.
        """
        spec, whole = self.plan.schedule, samples_of_microbatch(self.plan)
        if batch_size(batch) != whole * spec.num_microbatches:
            raise InvalidArgument(
                f"the batch has {batch_size(batch)} samples, the plan takes {spec.num_microbatches} microbatches of {whole}",
                field="data",
            )
        self.recorder.clear()
        batch = to_device(batch, self.settings.device)
        last = self.plan.stages[-1].degrees
        total = 0.0
        for microbatch in range(spec.num_microbatches):
            loss = self._forward(batch, microbatch, microbatch_seed(self.settings.seed, step, microbatch))
            loss = loss / (spec.num_microbatches * last.dp)
            self._backward(loss, microbatch)
            total += float(loss.detach())
        for bucket in self.buckets.buckets:
            bucket.start()
        for bucket in self.buckets.buckets:
            bucket.finish()
        if self.optimizers:
            self._step(step)
        return total if self._place % last.tp == 0 else None

    def use_optimizer(self, choice: OptimizerChoice | None) -> None:
        """Step with this optimizer from now on; with None, iterations only leave gradients."""
        self.optimizers = [
            make_optimizer(choice, bucket.optimized()) for bucket in self.buckets.buckets if choice is not None
        ]

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the trainable parameters by their name in the model."""
        return {
            name: value for index in range(len(self.plan.stages)) for name, value in self._parameters(index).items()
        }

    def gradients(self) -> dict[str, Tensor]:
        """Return the whole gradient of each parameter; a collective."""
        return {name: value for bucket in self.buckets.buckets for name, value in bucket.gradients().items()}

    def weights(self) -> dict[str, Tensor]:
        """Return copies of the trainable parameters by name, whole; a collective."""
        return {name: value for bucket in self.buckets.buckets for name, value in bucket.values().items()}

    def load_weights(self, values: Mapping[str, Tensor]) -> None:
        """Set the trainable parameters to whole values."""
        for bucket in self.buckets.buckets:
            bucket.load(values)

    def optimizer_states(self) -> dict[str, dict[str, Tensor]]:
        """Return copies of the optimizer states by key and parameter name, whole; a collective."""
        found: dict[str, dict[str, Tensor]] = {}
        for bucket, optimizer in zip(self.buckets.buckets, self.optimizers, strict=False):
            for key, values in bucket.states(optimizer).items():
                found.setdefault(key, {}).update(values)
        return found

    def load_optimizer_states(self, values: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Set the optimizer states to whole values by key and parameter name."""
        for bucket, optimizer in zip(self.buckets.buckets, self.optimizers, strict=False):
            bucket.load_states(optimizer, values)

    def zero_gradients(self) -> None:
        """Forget all gradients."""
        for bucket in self.buckets.buckets:
            bucket.clear()

    def traffic(self) -> dict[str, float]:
        """Return the bytes this device has sent so far, by operation and group."""
        return dict(self._traffic)

    def host_bytes(self) -> float:
        """Return the bytes of optimizer states in host memory: none."""
        return 0.0

    def close(self) -> None:
        """Destroy the process groups that this worker made for itself."""
        if self._owns_groups:
            self.groups.close()

    def _step(self, step: int) -> None:
        """Step every stage's optimizer, on gradients scaled by the norm of the whole model."""
        start = self.recorder.clock()
        rule, rate = self.settings.rule, self.settings.learning_rate_factor
        factor: float | None = 1.0
        if rule.looks_at_norm:
            own = self.buckets.squared_norm()
            squared = whole_squared_norm(own, self.plan.mapping.pipeline_ranks, self.settings.device)
            self.gradient_norm, factor = squared**0.5, rule.factor(squared)
        for bucket, optimizer in zip(self.buckets.buckets, self.optimizers, strict=True):
            if rate is not None:
                scale_learning_rate(optimizer, rate(step))
            if factor is not None:
                if factor != 1.0:
                    scale_gradients(bucket.optimized(), factor)
                optimizer.step()
            bucket.clear()
        self.recorder.add(COMPUTE_LANE, Action(Kind.OPT, 0), start, self.recorder.clock())

    def _forward(self, batch: Batch, microbatch: int, seed: int) -> Tensor:
        whole = samples_of_microbatch(self.plan)
        values: tuple[Tensor, ...] = ()
        self._marks: list[float] = []
        for index, stage in enumerate(self.plan.stages):
            self._at_action(2 * len(self.plan.stages) * microbatch + index)
            start = self.recorder.clock()
            replica, size = replica_of(self._place, stage.degrees), samples_by_replica(self.plan, index)[0]
            first = microbatch * whole + replica * size
            part = select_samples(batch, torch.arange(first, first + size, device=self.settings.device))
            values = self.chain.segment_of(stage.layer_indices).run(part, *values, seed=seed)
            if index + 1 < len(self.plan.stages):
                self._mark(values)
            if index in self._changes:
                change, group = self._changes[index]
                resharded = slice_samples if change.grows else gather_samples
                values = tuple(resharded(value, group) for value in values)
            self.recorder.add(COMPUTE_LANE, Action(Kind.F, index, microbatch), start, self.recorder.clock())
        (loss,) = values
        return loss

    def _mark(self, values: tuple[Tensor, ...]) -> None:
        """Note when the backward reaches the end of a stage: when the gradient of its first output is there."""
        value = next((value for value in values if value.requires_grad), None)
        if value is not None:
            value.register_hook(lambda gradient: self._marks.append(self.recorder.clock()))

    def _backward(self, loss: Tensor, microbatch: int) -> None:
        count = len(self.plan.stages)
        self._at_action(2 * count * microbatch + count)
        start = self.recorder.clock()
        loss.backward()
        if len(self._marks) == count - 1:
            times = [start, *self._marks, self.recorder.clock()]
            for index, (begin, end) in enumerate(pairwise(times)):
                self.recorder.add(COMPUTE_LANE, Action(Kind.B, count - 1 - index, microbatch), begin, end)

    def _parameters(self, stage: int) -> dict[str, nn.Parameter]:
        segment = self.chain.segment_of(self.plan.stages[stage].layer_indices)
        return {name: value for name, value in segment.named_parameters().items() if value.requires_grad}
