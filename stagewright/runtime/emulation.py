"""Emulated runs: each action waits its planned time instead of computing, while communication is real.

Waiting takes no processor, so many ranks run on few cores, and what differs from the simulation is what the simulation
leaves out: the cost of messages, of waking up, and of the interpreter itself. No model is imported. Messages have the
profile's boundary sizes, lent activations (BPipe) those that are kept, and gradients those of the cost model; collectives inside layers are part of the planned times.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stagewright.modeling.batch import Batch
from stagewright.planner.documents.plan import Plan
from stagewright.planner.documents.profile import ModelProfile
from stagewright.planner.prediction import Evaluation
from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.schedules.schedule import Schedule
from stagewright.runtime.communication import PointToPoint, ShapeBook
from stagewright.runtime.groups import Groups
from stagewright.runtime.interpreter import Interpreter, UnitInput
from stagewright.runtime.mailbox import Mailbox
from stagewright.runtime.peer_swap import make_swap, traffic_of
from stagewright.runtime.recorder import Recorder, now_s
from stagewright.runtime.reduction import BucketSet, ReplicatedBucket
from stagewright.runtime.stage import Unit, Values
from stagewright.runtime.stage_graph import make_stage_graph
from stagewright.runtime.topology import StageKey, Topology


class EmulatedStage:
    """A stage that waits; `value_bytes` is the size of each layer value that leaves it."""

    def __init__(self, index: int, costs: StageCosts, value_bytes: Mapping[int, float], num_slices: int) -> None:
        share = 1.0 / num_slices
        self._forward_s = float(costs.forward_s[index]) * share
        self._input_grad_s = float(costs.input_grad_s[index] + costs.recompute_s[index]) * share
        self._weight_grad_s = float(costs.weight_grad_s[index]) * share
        self._kept_bytes = round(float(costs.activation[index]) * share)
        self._values = {layer: (torch.zeros(max(1, round(size * share / 4))),) for layer, size in value_bytes.items()}
        self._received: dict[Unit, Values] = {}

    def forward(self, unit: Unit, batch: Batch, received: Mapping[int, tuple[Tensor, ...]], seed: int | None) -> Values:
        """Wait for the planned time and return values of the planned size."""
        self._received[unit] = dict(received)
        _wait(self._forward_s)
        return self._values

    def backward(
        self, unit: Unit, gradients: Mapping[int, tuple[Tensor, ...]], *, loss_weight: float, split: bool
    ) -> Values:
        """Wait and return gradients of what was received."""
        _wait(self._input_grad_s if split else self._input_grad_s + self._weight_grad_s)
        return self._received.pop(unit)

    def weight_gradients(self, unit: Unit) -> None:
        """Wait."""
        _wait(self._weight_grad_s)

    def activations(self, unit: Unit) -> list[torch.UntypedStorage]:
        """Return a storage as large as what a unit keeps; it is there only to be lent."""
        return [torch.empty(self._kept_bytes, dtype=torch.uint8).untyped_storage()]


class EmulatedWorker:
    """Runs emulated iterations of one rank."""

    def __init__(
        self,
        plan: Plan,
        profile: ModelProfile,
        schedule: Schedule,
        evaluation: Evaluation,
        *,
        store: dist.Store,
        at_action: Callable[[int], None],
        groups: Groups | None = None,
    ) -> None:
        self.topology = Topology(plan, dist.get_rank())
        self.recorder = Recorder()
        self.steps = tuple(schedule.actions(self.topology.pipeline_rank))
        self._traffic: dict[str, float] = {}
        self._at_action = at_action
        groups = groups or Groups()
        graph = make_stage_graph(plan, self.topology, profile.edge_indices, ())
        sent = {layer for layers in graph.layers.values() for layer in layers}
        self._stages = {
            key: EmulatedStage(
                key[1],
                evaluation.costs,
                {
                    layer: value_bytes(profile, plan, layer)
                    for layer in plan.stages[key[1]].layer_indices
                    if layer in sent
                },
                max(plan.schedule.num_slices, 1),
            )
            for key in self.topology.stages
        }
        self._optimizer_s = evaluation.prediction.optimizer_s / max(len(self.topology.stages), 1)
        self._transport = PointToPoint(groups, torch.device("cpu"), len(plan.stages))
        self._mailbox = Mailbox(graph, self._transport, ShapeBook(store), self.recorder)
        self._swap = make_swap(schedule, self.topology, groups, torch.device("cpu"))
        self._buckets = BucketSet(self._bucket(plan, profile, groups, stage) for stage in range(len(plan.stages)))

    def run(self, batch: Batch | None, step: int) -> float | None:
        """Run one iteration; there is no loss."""
        units = {
            (action.stage, (action.microbatch, action.slice)): UnitInput(torch.zeros(1), 1.0)
            for each in self.steps
            for action in each
            if action.microbatch >= 0
        }
        interpreter = Interpreter(
            self._stages,
            self._mailbox,
            self._buckets,
            optimize=lambda key, microbatch: _wait(self._optimizer_s),
            recorder=self.recorder,
            at_action=self._at_action,
            swap=self._swap,
        )
        self.recorder.clear()
        interpreter.run(self.steps, units)
        return None

    def traffic(self) -> dict[str, float]:
        """Return the bytes this rank has sent so far, by operation and group."""
        return {"send-receive/pp": float(self._transport.bytes_sent), **traffic_of(self._swap), **self._traffic}

    def _bucket(self, plan: Plan, profile: ModelProfile, groups: Groups, stage: int) -> ReplicatedBucket:
        sets = []
        for rank in range(dist.get_world_size()):
            view = Topology(plan, rank)
            if any(other == stage for _, other in view.stages):
                sets.append(view.gradient_ranks(stage))
        group = groups.make_all(f"gradients {stage}", sets)
        holders: frozenset[StageKey] = frozenset(key for key in self.topology.stages if key[1] == stage)
        parameters: dict[str, nn.Parameter] = {}
        if holders and group is not None:
            count = sum(profile.classes[profile.layer_classes[i]].parameters for i in plan.stages[stage].layer_indices)
            parameters["all"] = nn.Parameter(torch.zeros(max(1, count // plan.stages[stage].degrees.tp)))
        return ReplicatedBucket("all-reduce/dp", parameters, group, holders, self._traffic)


def value_bytes(profile: ModelProfile, plan: Plan, layer: int) -> float:
    """Return the bytes of a layer's output for one microbatch of the plan; scaled from the nearest measured one."""
    costs = profile.classes[profile.layer_classes[layer]].costs
    size, length = plan.schedule.microbatch, plan.job.sequence_length
    if not costs:
        return 4.0
    near = min(
        costs, key=lambda cost: (cost.tensor_degree, abs(cost.sequence_length - length), abs(cost.microbatch - size))
    )
    return near.output_bytes * size / near.microbatch * length / near.sequence_length


def _wait(seconds: float) -> None:
    end = now_s() + seconds
    if seconds > 0:
        time.sleep(seconds)
    while now_s() < end:
        time.sleep(0)
