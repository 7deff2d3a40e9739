"""The one object that answers what layers cost under degrees: compute, communication, memory.

`table` gives the costs of all layers for one combination of degrees and microbatch; what depends on the pipeline
(boundaries, gradient reduction, states) stands in methods beside it. Each number comes from the best source: a measured
entry of the exact configuration, an interpolation between measured ones, the operators' rooflines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from stagewright.planner.cost import legality as rules
from stagewright.planner.cost.communication import collective_s
from stagewright.planner.cost.data_parallel import ReplicaTraffic, replica_traffic
from stagewright.planner.cost.groups import DEFAULT_ORDER, AxisOrder, GroupShape, Tier, widest_link
from stagewright.planner.cost.joined_replicas import JoinedReplicas
from stagewright.planner.cost.layer_cost import (
    LayerCost,
    OperatorCost,
    Sight,
    analytic_cost,
    frozen_cost,
    operator_cost,
)
from stagewright.planner.cost.layer_table import Floats, LayerTable
from stagewright.planner.cost.matrix_optimizer import MATRIX_OPTIMIZERS, matrix_step_s
from stagewright.planner.cost.measured_cost import measured_cost, on_other_device, worst_source
from stagewright.planner.cost.memory import (
    ParameterBytes,
    StateBytes,
    device_state_bytes,
    state_bytes,
    state_divisors,
)
from stagewright.planner.cost.number import Number
from stagewright.planner.cost.operator_cost import Setting
from stagewright.planner.cost.options import DEFAULT_OPTIONS, CostOptions
from stagewright.planner.cost.rank_groups import RankGroups
from stagewright.planner.cost.roofline import Roofline, peak_flops
from stagewright.planner.documents.cluster import Cluster, LinkLevel, NodeGroup
from stagewright.planner.documents.job import Optimizer, TrainingJob, element_bytes
from stagewright.planner.documents.operator import Architecture, Operator
from stagewright.planner.documents.plan import Degrees
from stagewright.planner.documents.profile import LayerClass, ModelProfile
from stagewright.planner.errors import InvalidArgument

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Boundary:
    """The way between two pipeline ranks: seconds = latency_s + bytes / bytes_per_s, bytes as in `output_bytes`."""

    latency_s: float
    bytes_per_s: float

    def seconds(self, size_bytes: float) -> float:
        """Return the seconds of one boundary tensor of one device."""
        return self.latency_s + size_bytes / self.bytes_per_s


# Data-parallel seconds are linear in the parameters; their slope is taken at this many.
UNIT = 2.0**30
RECOMPUTED_KINDS = ("block", "convolution", "other")
SAME_DEVICE = Boundary(0.0, float("inf"))


@dataclass(frozen=True, eq=False)
class ReplicaTable:
    """Data-parallel seconds of each layer, linear in the layers so that they add up over a stage; shape [L].

    Parameters
    ----------
    forward_s, backward_s : exposed, for each microbatch: ZeRO-3's gathers, ZeRO-2's reductions.
    tail_s : once an iteration, after the last backward of the stage.
    optimizer_s : optimizer step after ZeRO divided it.
    latency_s : once an iteration and stage, whatever its layers.
    """

    forward_s: Floats
    backward_s: Floats
    tail_s: Floats
    optimizer_s: Floats
    latency_s: float


@dataclass(frozen=True, eq=False)
class CostModel:
    """Costs of a model on a cluster for a job.

    Parameters
    ----------
    order : axes from the fastest varying device number to the slowest.
    """

    profile: ModelProfile
    cluster: Cluster
    job: TrainingJob
    options: CostOptions = DEFAULT_OPTIONS
    order: AxisOrder = DEFAULT_ORDER
    _tables: dict[tuple[object, ...], LayerTable] = field(default_factory=dict, repr=False)
    _class_costs: dict[tuple[object, ...], LayerCost] = field(default_factory=dict, repr=False)
    _operator_costs: dict[tuple[object, ...], OperatorCost] = field(default_factory=dict, repr=False)
    _groups: dict[tuple[object, ...], RankGroups] = field(default_factory=dict, repr=False)

    def legality(self, degrees: Degrees, microbatch: int) -> str | None:
        """Return why the model cannot be split so, with both numbers; None when it can."""
        return rules.legality(self.profile, self.cluster, self.job, degrees, microbatch)

    def split_legality(self, degrees: Degrees, microbatch: int) -> str | None:
        """Return the same for the model alone, whatever the batch and the number of devices are."""
        return rules.split_legality(self.profile, self.job, degrees, microbatch)

    def table(self, degrees: Degrees, microbatch: int, *, group: str | None = None) -> LayerTable:
        """Return the costs of all layers for one microbatch on one device of a node group (the first one by default).

        Raises InvalidArgument for degrees that `legality` refuses.
        """
        reason = self.legality(degrees, microbatch)
        if reason is not None:
            raise InvalidArgument(reason, field="degrees")
        return self.shape_table(degrees, microbatch, group=group)

    def shape_table(self, degrees: Degrees, microbatch: int, *, group: str | None = None) -> LayerTable:
        """Return the same without asking whether batch and devices allow it; memoised by what a table depends on.

        Neither ZeRO nor dp changes a microbatch's cost, except that expert groups reach over data-parallel replicas.
        """
        node_group = self.node_group(group)
        inner = degrees.tp * degrees.cp
        experts = degrees.expert_split
        reach = degrees.dp if experts > 1 and (self.order[-1] != "pp" or degrees.dp * inner % experts) else 1
        key = (
            degrees.tp,
            degrees.cp,
            degrees.ulysses,
            degrees.ep,
            degrees.etp,
            degrees.sp,
            degrees.vocab_parallel,
            reach if experts > 1 else 1,
            microbatch,
            node_group.name,
        )
        found = self._tables.get(key)
        if found is None:
            found = self._tables[key] = self._make_table(self.setting(degrees, microbatch), node_group)
        return found

    def size_table(self, degrees: Degrees, microbatches: Sequence[int]) -> LayerTable:
        """Return the tables of several microbatch sizes at once, sizes before layers: [M, L] and [3, M, L].

        On the first node group, without bytes on links or asking what `legality` does, for a model without measured layers.
        """
        setting = self.setting(degrees, np.array(microbatches, dtype=np.float64))
        return self._make_table(setting, self.node_group(None))

    def node_group(self, name: str | None) -> NodeGroup:
        """Return a node group by name, the first one for None; raises InvalidArgument for an unknown name."""
        if name is None:
            return self.cluster.groups[0]
        for group in self.cluster.groups:
            if group.name == name:
                return group
        known = ", ".join(group.name for group in self.cluster.groups)
        raise InvalidArgument(f"the cluster has no group {name!r}", field="group", hint=f"its groups: {known}")

    def roofline(self, group: str | None = None) -> Roofline:
        """Return the rates of a group's device at the job's precision."""
        return Roofline.of(self.node_group(group).device, self.job.precision)

    def slowness(self, group: NodeGroup) -> float:
        """Return how many times longer a group's device computes than the one the profile was measured on.

        The ratio of peak rates at the job's precision; the measured device is the one its pedigree names, where a mixed
        cluster has it, else the fastest.
        """
        if not self.cluster.is_mixed:
            return 1.0
        devices = [other.device for other in self.cluster.groups]
        named = [device for device in devices if device.name == self.profile.pedigree.device]
        rates = [peak_flops(device, self.job.precision) for device in named or devices]
        return max(rates) / peak_flops(group.device, self.job.precision)

    def rank_groups(self, degrees: Degrees, *, group: str | None = None, num_pipeline_ranks: int = 1) -> RankGroups:
        """Return the communication groups of one pipeline rank."""
        return RankGroups(degrees, self.node_group(group), self.order, num_pipeline_ranks)

    def scattering_group(
        self, degrees: Degrees, *, group: str | None = None, num_pipeline_ranks: int = 1
    ) -> GroupShape:
        """Return the devices that hold one boundary tensor and may each send a part of it; a group of one if none do."""
        if degrees.tp == 1 or degrees.sp or not self.options.scatter_gather:
            return GroupShape(())
        return self.rank_groups(degrees, group=group, num_pipeline_ranks=num_pipeline_ranks).tp

    def states(
        self,
        dense_parameters: float,
        expert_parameters: float,
        degrees: Degrees,
        replicas: JoinedReplicas | None = None,
    ) -> StateBytes:
        """Return parameters, gradients and optimizer of a device that holds so many parameters before ZeRO."""
        if replicas is not None:
            parameters, sizes = dense_parameters + expert_parameters, ParameterBytes.of(self.job.optimizer)
            return state_bytes(parameters, zero=degrees.zero, num_shards=replicas.num_shards, sizes=sizes)
        return device_state_bytes(
            dense_parameters, expert_parameters, degrees, self.job.optimizer, shard_size=self.options.sharding_group
        )

    def state_divisors(self, degrees: Degrees, replicas: JoinedReplicas | None = None) -> tuple[float, float]:
        """Return what ZeRO divides the optimizer step of (dense, expert) parameters by."""
        if replicas is not None:
            return (replicas.num_shards if degrees.zero else 1.0,) * 2
        return state_divisors(degrees, self.options.sharding_group)

    @cached_property
    def base_bytes(self) -> float:
        """What framework and driver hold on a device before the first tensor, bytes."""
        return self.profile.framework_bytes + self.cluster.groups[0].device.reserved_bytes

    def boundary(
        self, degrees: Degrees, source_rank: int, target_rank: int, *, target: Degrees | None = None
    ) -> Boundary:
        """Return the link from one pipeline rank to another, the slowest over their devices.

        Ranks are blocks of dp * cp * tp devices in order. Where tensor parallelism replicates the boundary tensor, each
        of its devices sends 1/tp of it and gathers the rest inside (Narayanan et al. 2021); the gather is in the line.
        """
        if source_rank == target_rank:
            return SAME_DEVICE
        other = target or degrees
        count = np.arange(max(degrees.num_devices, other.num_devices))
        first = self._devices(source_rank, count % degrees.num_devices, degrees)
        second = self._devices(target_rank, count % other.num_devices, other)
        slowest = _line(widest_link(first, second, self.cluster))
        if not other.sp and other.tp > 1 and self.options.scatter_gather:
            inside = self.rank_groups(other).tp
            slowest = Boundary(
                slowest.latency_s + inside.ring_latency_s,
                other.tp / (1 / slowest.bytes_per_s + (other.tp - 1) / inside.ring_bytes_per_s),
            )
        return slowest

    def _devices(self, rank: int, index: Ints, degrees: Degrees) -> Ints:
        return np.asarray((rank * degrees.num_devices + index) % self.cluster.num_devices)

    def traffic(
        self,
        dense_parameters: float,
        expert_parameters: float,
        degrees: Degrees,
        *,
        group: str | None = None,
        num_pipeline_ranks: int = 1,
        replicas: JoinedReplicas | None = None,
    ) -> ReplicaTraffic:
        """Return the data-parallel communication of a device with so many parameters before ZeRO, without overlap.

        `replicas` are the devices that hold the same weights where they reach over node groups.
        """
        if replicas is not None:
            padding = replicas.padding if degrees.zero else 1.0
            return self._traffic((dense_parameters + expert_parameters) * padding, replicas.shape, degrees)
        groups = self.rank_groups(degrees, group=group, num_pipeline_ranks=num_pipeline_ranks)
        return self._traffic(dense_parameters, groups.replicas, degrees) + self._traffic(
            expert_parameters, groups.expert_replicas, degrees
        )

    def gradient_sync_s(
        self,
        dense_parameters: float,
        expert_parameters: float,
        degrees: Degrees,
        *,
        group: str | None = None,
        num_pipeline_ranks: int = 1,
        backward_s: float = 0.0,
    ) -> float:
        """Return the exposed seconds after the last backward: gradients reduced, weights gathered under ZeRO-1.

        `backward_s` is the compute of the stage's last backward, under which reduction hides when the options overlap.
        """
        traffic = self.traffic(
            dense_parameters, expert_parameters, degrees, group=group, num_pipeline_ranks=num_pipeline_ranks
        )
        if not self.options.gradient_overlap:
            return traffic.tail_s
        gradient_bytes = (dense_parameters + expert_parameters) * self.job.optimizer.gradient_bytes
        last = min(1.0, self.options.bucket_bytes / gradient_bytes) if gradient_bytes else 0.0
        exposed_s = max(traffic.tail_s * last, traffic.tail_s - backward_s)
        slowdown = max((level.overlap_slowdown for level in self.node_group(group).links), default=1.0)
        return exposed_s + (traffic.tail_s - exposed_s) * (slowdown - 1)

    def replica_table(
        self,
        degrees: Degrees,
        microbatch: int,
        *,
        group: str | None = None,
        num_pipeline_ranks: int = 1,
        replicas: JoinedReplicas | None = None,
    ) -> ReplicaTable:
        """Return the data-parallel seconds of each layer: what ZeRO adds to each microbatch, and the tail.

        With `replicas`, which reach over node groups, whether they divide the batch is not asked.
        """
        table = (self.table if replicas is None else self.shape_table)(degrees, microbatch, group=group)

        def traffic(dense_parameters: float, expert_parameters: float) -> ReplicaTraffic:
            return self.traffic(
                dense_parameters,
                expert_parameters,
                degrees,
                group=group,
                num_pipeline_ranks=num_pipeline_ranks,
                replicas=replicas,
            )

        dense, expert, latency = traffic(UNIT, 0.0), traffic(0.0, UNIT), traffic(1.0, 0.0)
        dense_share, expert_share = table.dense_parameters / UNIT, table.expert_parameters / UNIT
        forward_s = dense_share * dense.forward_s + expert_share * expert.forward_s
        backward_s = dense_share * dense.backward_s + expert_share * expert.backward_s
        if self.options.prefetch:
            forward_s = np.maximum(0.0, forward_s - table.forward_s)
            backward_s = np.maximum(0.0, backward_s - table.input_grad_s - table.weight_grad_s)
        dense_divisor, expert_divisor = self.state_divisors(degrees, replicas)
        total = np.maximum(table.dense_parameters + table.expert_parameters, 1.0)
        share = (table.dense_parameters / dense_divisor + table.expert_parameters / expert_divisor) / total
        return ReplicaTable(
            forward_s=forward_s,
            backward_s=backward_s,
            tail_s=dense_share * dense.tail_s + expert_share * expert.tail_s,
            optimizer_s=table.optimizer_s * share,
            latency_s=latency.tail_s,
        )

    def tied_sync_s(self, degrees: Degrees, first_rank: int, last_rank: int) -> float:
        """Return the seconds of reducing the gradient of tied embeddings between two pipeline ranks."""
        total = 0.0
        for tie in self.profile.trained_ties:
            divisor = degrees.tp if degrees.vocab_parallel else 1
            size = tie.num_parameters / divisor * self.job.optimizer.gradient_bytes
            ends = np.arange(degrees.num_devices)
            link = widest_link(
                self._devices(first_rank, ends, degrees), self._devices(last_rank, ends, degrees), self.cluster
            )
            total += collective_s("all-reduce", size, GroupShape((Tier(2, link),))) if link else 0.0
        return total

    def _traffic(self, parameters: float, shape: GroupShape, degrees: Degrees) -> ReplicaTraffic:
        optimizer, options = self.job.optimizer, self.options
        return replica_traffic(
            parameters * optimizer.gradient_bytes,
            parameters * optimizer.parameter_bytes,
            shape,
            zero=degrees.zero,
            shard_size=options.sharding_group,
            accumulate=options.accumulate_sharded,
            gather_once=options.gather_once,
            update_bytes=parameters * optimizer.gathered_bytes,
        )

    @cached_property
    def _architecture(self) -> Architecture:
        return self.profile.architecture or Architecture()

    def setting(self, degrees: Degrees, microbatch: int | Floats) -> Setting:
        """Return what operators see of degrees and a microbatch, or of several sizes of it."""
        return Setting(
            degrees=degrees,
            microbatch=microbatch,
            sequence_length=self.job.sequence_length,
            element_bytes=activation_bytes(self.job.precision),
            architecture=self._architecture,
            expert_imbalance=self.job.expert_imbalance,
            profile_element_bytes=activation_bytes(self.profile.dtype),
            operand_bytes=1.0 if self.job.precision == "fp8" else None,
        )

    @cached_property
    def _sights(self) -> dict[str | int, Sight]:
        """What each class sees, by name, and each operator, by identity."""
        found: dict[str | int, Sight] = {}
        for name, layer in self.profile.classes.items():
            found[name] = Sight.of(layer.operators)
            found |= {id(operator): Sight.of((operator,)) for operator in layer.operators}
        return found

    @cached_property
    def _alike(self) -> dict[int, int]:
        """The first operator that differs from each in nothing but its name, by identity: the profile keeps both, so ids stay."""
        operators = [operator for layer in self.profile.classes.values() for operator in layer.operators]
        first: dict[str, int] = {}
        return {id(one): first.setdefault(one.model_dump_json(exclude={"name"}), id(one)) for one in operators}

    def _make_table(self, setting: Setting, group: NodeGroup) -> LayerTable:
        degrees = setting.degrees
        key = (degrees.tp, degrees.cp, degrees.dp, degrees.ulysses, degrees.ep, degrees.etp, group.name)
        if key not in self._groups:
            self._groups[key] = RankGroups(degrees, group, self.order)
        groups = self._groups[key]
        roofline = Roofline.of(group.device, self.job.precision)
        costs = {
            name: self._class_cost(name, layer, setting, roofline, groups)
            for name, layer in self.profile.classes.items()
        }
        whole_s = {
            name: matrix_step_s(self.job.optimizer, layer, groups, roofline)
            for name, layer in self.profile.classes.items()
        }
        return self._assemble(costs, whole_s, roofline, np.shape(setting.microbatch))

    def _class_cost(
        self, name: str, layer: LayerClass, setting: Setting, roofline: Roofline, groups: RankGroups
    ) -> LayerCost:
        """Return the cost of a class, computed once for all degrees that its operators do not see."""
        seen = (setting.degrees,) if layer.costs else self._sights[name].seen(setting.degrees)
        key = (name, setting.size_key, groups.group.name, *seen)
        found = self._class_costs.get(key)
        if found is None:
            found = self._class_costs[key] = self._layer_cost(layer, setting, roofline, groups)
        return found

    def _layer_cost(self, layer: LayerClass, setting: Setting, roofline: Roofline, groups: RankGroups) -> LayerCost:
        cost = measured_cost(layer, setting, groups) if layer.costs else None
        if cost is not None:
            cost = on_other_device(cost, self.slowness(groups.group))
        else:
            operators = [self._operator_cost(operator, setting, roofline, groups) for operator in layer.operators]
            cost = analytic_cost(operators, setting, groups, self.options)
        return frozen_cost(cost, layer.backward)

    def _operator_cost(
        self, operator: Operator, setting: Setting, roofline: Roofline, groups: RankGroups
    ) -> OperatorCost:
        """Return the cost of an operator, computed once for all degrees that it does not see."""
        place = self._alike[id(operator)]
        key = (place, setting.size_key, groups.group.name, *self._sights[place].seen(setting.degrees))
        found = self._operator_costs.get(key)
        if found is None:
            found = self._operator_costs[key] = operator_cost(operator, setting, roofline, self.options)
        return found

    def _assemble(
        self, costs: dict[str, LayerCost], whole_s: dict[str, float], roofline: Roofline, sizes: tuple[int, ...]
    ) -> LayerTable:
        """Return the table of all layers from the costs of their classes; `whole_s` is what steps on whole matrices add.

        `sizes` (M,) stand before the layers.
        """
        names = list(costs)
        index = np.array([names.index(name) for name in self.profile.layer_classes], dtype=np.intp)
        values = list(costs.values())

        def column(numbers: Sequence[Number]) -> Floats:
            of_class = np.empty((*sizes, len(numbers)))
            for place, number in enumerate(numbers):
                of_class[..., place] = number
            return np.asarray(of_class[..., index])

        none = column([cost.kept_bytes[0] for cost in values])
        selective = np.minimum(none, column([cost.kept_bytes[1] for cost in values]))
        output = column([cost.output_bytes for cost in values])
        # Only layers of a repeated kind are ever recomputed: an embedding, a head and a loss offer no level.
        offers = column([float(self.profile.classes[name].kind in RECOMPUTED_KINDS) for name in names])
        selective = np.where(offers > 0, selective, none)
        inputs = self._inputs(output)
        full = np.where(offers > 0, self._full_kept(values, index, inputs, selective), none)
        kept = np.stack([none, selective, full])
        late = _late_bytes(kept, [column(_shares(values, level)) for level in range(3)], offers)
        workspace = column([cost.workspace_bytes for cost in values])
        dense = column([cost.dense_parameters for cost in values])
        expert = column([cost.expert_parameters for cost in values])
        split_workspace = workspace + np.maximum(none - np.maximum(kept, late), 0.0)
        return LayerTable(
            forward_s=column([cost.forward_s for cost in values]),
            input_grad_s=column([cost.input_grad_s for cost in values]),
            weight_grad_s=column([cost.weight_grad_s for cost in values]),
            split_excess_s=column([cost.split_excess_s for cost in values]),
            recompute_s=np.stack([offers * column([cost.recompute_s[level] for cost in values]) for level in range(3)]),
            activation_bytes=kept,
            late_bytes=late,
            # Recomputed tensors live again while the layer's backward runs.
            workspace_bytes=workspace + none - kept,
            split_workspace_bytes=split_workspace,
            forward_workspace_bytes=self._forward_workspaces(values, index, workspace + none - kept),
            input_grad_workspace_bytes=self._input_grad_workspaces(values, index, kept, late, split_workspace),
            weight_grad_workspace_bytes=column([cost.weight_grad_workspace_bytes for cost in values]),
            output_bytes=output,
            dense_parameters=dense,
            expert_parameters=expert,
            frozen_parameters=column([cost.frozen_parameters for cost in values]),
            optimizer_s=self._optimizer_s(values, index, dense + expert, roofline)
            + column([whole_s[name] for name in names]),
            logits_bytes=none * column([float(self.profile.classes[name].kind == "loss") for name in names]),
            model_flops=column([cost.model_flops for cost in values]),
            link_bytes={
                name: column([cost.link_bytes.get(name, 0.0) for cost in values])
                for name in sorted({name for cost in values for name in cost.link_bytes})
            },
            again_link_bytes={
                name: offers * column([cost.again_link_bytes.get(name, 0.0) for cost in values])
                for name in sorted({name for cost in values for name in cost.again_link_bytes})
            },
            unkept_input_bytes=self._unkept_inputs(values, index, inputs, kept),
            phases=tuple(values[place].phases for place in index.tolist()),
            source=worst_source([costs[name].source for name in set(self.profile.layer_classes)]),
        )

    def _inputs(self, output: Floats) -> Floats:
        """Return the bytes of what each layer is given by others."""
        inputs = np.zeros(output.shape)
        for source, target in self.profile.edge_indices:
            inputs[..., target] += output[..., source]
        return inputs

    def _forward_workspaces(
        self, values: list[LayerCost], index: np.ndarray[tuple[int], np.dtype[np.intp]], otherwise: Floats
    ) -> Floats:
        """Return what the forward of each layer holds for a time at each level, [3, L], and otherwise where nobody looked."""
        found = otherwise.copy()
        for layer, position in enumerate(index):
            measured = values[position].forward_workspace_bytes
            if measured is not None:
                is_recomputed = self.profile.classes[self.profile.layer_classes[layer]].kind in RECOMPUTED_KINDS
                for level in range(3):
                    found[level, ..., layer] = measured[level if is_recomputed else 0]
        return found

    def _input_grad_workspaces(
        self,
        values: list[LayerCost],
        index: np.ndarray[tuple[int], np.dtype[np.intp]],
        kept: Floats,
        late: Floats,
        otherwise: Floats,
    ) -> Floats:
        """Return what an input gradient that runs apart holds for a time at each level, [3, L]: recomputed tensors live again."""
        found, held = otherwise.copy(), np.maximum(kept, late)
        for layer, position in enumerate(index):
            measured = values[position].input_grad_workspace_bytes
            if measured is not None:
                found[..., layer] = measured + np.maximum(held[0, ..., layer] - held[..., layer], 0.0)
        return found

    def _unkept_inputs(
        self, values: list[LayerCost], index: np.ndarray[tuple[int], np.dtype[np.intp]], inputs: Floats, kept: Floats
    ) -> Floats:
        """Return what each layer does not keep of its input, at each level: nothing where it runs again as a whole.

        Where nobody looked, a loss keeps what it makes of its input, and any other layer its input.
        """
        unkept = np.zeros(inputs.shape)
        for layer, (position, name) in enumerate(zip(index, self.profile.layer_classes, strict=True)):
            measured = values[position].unkept_input_bytes
            if measured is not None:
                unkept[..., layer] = measured
            elif self.profile.classes[name].kind == "loss":
                unkept[..., layer] = inputs[..., layer]
        return np.stack([unkept, unkept, np.where(kept[2] < kept[1], 0.0, unkept)])

    def _full_kept(
        self, values: list[LayerCost], index: np.ndarray[tuple[int], np.dtype[np.intp]], inputs: Floats, weaker: Floats
    ) -> Floats:
        """Return the bytes of each layer's input, all that full recomputation keeps."""
        kept = np.minimum(weaker, inputs)
        for layer, position in enumerate(index):
            measured = values[position].full_kept_bytes
            if measured is not None:
                kept[..., layer] = np.minimum(measured, weaker[..., layer])
        return kept

    def _optimizer_s(
        self,
        values: list[LayerCost],
        index: np.ndarray[tuple[int], np.dtype[np.intp]],
        parameters: Floats,
        roofline: Roofline,
    ) -> Floats:
        """Return the optimizer step of each layer, from the bytes it moves."""
        moved = optimizer_traffic(self.job.optimizer, self.job.precision)
        rate = roofline.bytes_per_s * roofline.memory(1e9)
        seconds = parameters * moved / rate
        for layer, position in enumerate(index):
            measured = values[position].optimizer_s
            if measured is not None and self.job.optimizer.name not in MATRIX_OPTIMIZERS:
                seconds[..., layer] = measured
        return seconds


def _shares(costs: list[LayerCost], level: int) -> list[float]:
    """Return the share each cost gives back at the end of I at a level; NaN where it holds what level none holds."""
    shares = [cost.freed_at_input_grad[level] for cost in costs]
    return [float("nan") if share is None else share for share in shares]


def _late_bytes(kept: Floats, shares: list[Floats], offers: Floats) -> Floats:
    """Return what waits for the weight gradients at each level, [3, L]: that of level none where nothing else is said."""
    none = kept[0] * (1.0 - shares[0])
    told = [np.isfinite(share) & (offers > 0) for share in shares[1:]]
    rows = [
        np.where(is_told, own * (1.0 - np.where(is_told, share, 0.0)), none)
        for is_told, own, share in zip(told, kept[1:], shares[1:], strict=True)
    ]
    return np.stack([none, *rows])


def activation_bytes(precision: str) -> float:
    """Return the bytes of one activation; in FP8 training only the operands of products are narrow, the rest is bf16."""
    return 2.0 if precision == "fp8" else float(element_bytes(precision))


def optimizer_traffic(optimizer: Optimizer, precision: str) -> float:
    """Return the bytes that a step moves for each parameter.

    Gradients are zeroed, read for their norm and for the step, and in fp16 unscaled and checked, which reads and
    writes them once more; states are read and written; weights are written, and read where they are their own master.
    """
    passes = 5 if precision == "fp16" else 3
    weights = 1 if optimizer.has_masters else 2
    return 2 * optimizer.state_bytes + passes * optimizer.gradient_bytes + weights * optimizer.parameter_bytes


def _line(link: LinkLevel | None) -> Boundary:
    if link is None:
        return SAME_DEVICE
    return Boundary(link.latency_s, link.bytes_per_s * link.achieved_share)
