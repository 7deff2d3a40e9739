"""What each layer costs in one configuration, as the search and the scorer both see it: one place, so that they agree.

A configuration fixes the degrees, the pipeline depth, the microbatch and the axis order. Every number of a stage but its
workspace, a maximum, is a sum over its layers, so prefix sums answer for any range.

Data-parallel communication is the cost model's: what recurs each microbatch (ZeRO-3's gathers, the scatters of ZeRO-2
and 3, which never hold full gradients) is inside the seconds of F and W, as far as compute does not hide it; what comes
once a step is `tail_s`. ZeRO-3 holds the gathered weights of the layer at work and of the next one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from stagewright.planner.cost.cost_model import CostModel
from stagewright.planner.cost.groups import DEFAULT_ORDER, AxisOrder
from stagewright.planner.cost.joined_replicas import JoinedReplicas
from stagewright.planner.cost.layer_table import LEVELS, LayerTable
from stagewright.planner.documents.plan import Degrees
from stagewright.planner.documents.profile import ModelProfile
from stagewright.planner.search.order import Layout

Floats = npt.NDArray[np.float64]

NUM_LEVELS = len(LEVELS)


@dataclass(frozen=True)
class Configuration:
    """What is fixed before stages are cut: degrees, pipeline depth, batch split, order of the axes, node group."""

    degrees: Degrees
    num_ranks: int
    microbatch: int
    num_microbatches: int
    axis_order: AxisOrder = DEFAULT_ORDER
    group: str | None = None

    @property
    def num_devices(self) -> int:
        return self.degrees.num_devices * self.num_ranks


@dataclass(frozen=True, eq=False)
class LayerCosts:
    """Costs of each of L layers on one device; arrays are [L], or [3, L] with the recomputation level first.

    Parameters
    ----------
    split_excess_s : added to the weight gradient where it runs apart from the input gradient.
    recompute_s : added to the input gradient.
    kept_bytes : kept from the forward until the backward.
    late_bytes : held between the input gradient and the weight gradient where these are apart.
    workspace_bytes : highest temporary use; `split_workspace_bytes` where every backward is split.
    cut_bytes : [L + 1], what one device sends when the model is cut before each layer: every tensor that is made
        before the cut and used behind it. In a chain, the output of the layer before.
    edges, edge_bytes : the tensors between layers, int64 [E, 2], and the bytes of each on one device, [E].
    state_bytes : parameters, gradients, optimizer on one device, [3, L].
    gradient_bytes : of the parameters on one device before ZeRO.
    tail_s, optimizer_s : once a step: reduction of the gradients, optimizer of what the device owns.
    stage_latency_s : once a step and stage.
    table : the cost model's rows, for what only a report needs.
    """

    forward_s: Floats
    input_grad_s: Floats
    weight_grad_s: Floats
    split_excess_s: Floats
    recompute_s: Floats
    kept_bytes: Floats
    late_bytes: Floats
    workspace_bytes: Floats
    split_workspace_bytes: Floats
    cut_bytes: Floats
    edges: npt.NDArray[np.int64]
    edge_bytes: Floats
    state_bytes: Floats
    gradient_bytes: Floats
    tail_s: Floats
    optimizer_s: Floats
    stage_latency_s: float
    table: LayerTable

    @property
    def num_layers(self) -> int:
        return len(self.forward_s)

    def workspace_of(self, layout: Layout) -> Floats:
        """Return the highest temporary use of each layer under a schedule, [3, L]."""
        return self.split_workspace_bytes if layout.defers else self.workspace_bytes

    def weight_grad_of(self, layout: Layout) -> Floats:
        """Return the seconds of each layer's weight gradient under a schedule, [L]."""
        return self.weight_grad_s + layout.split_share * self.split_excess_s

    @cached_property
    def static_bytes(self) -> Floats:
        """Bytes of all states of each layer, [L]."""
        return np.asarray(self.state_bytes.sum(axis=0))

    @cached_property
    def time_s(self) -> Floats:
        """Seconds of one microbatch without recomputation, the backward in one piece, [L]."""
        return self.forward_s + self.input_grad_s + self.weight_grad_s

    @cached_property
    def step_s(self) -> Floats:
        """Seconds once a step, [L]."""
        return self.tail_s + self.optimizer_s


def layer_costs(model: CostModel, configuration: Configuration, *, joined: JoinedReplicas | None = None) -> LayerCosts:
    """Return the layer costs of a configuration; `model.order` is the configuration's axis order.

    `joined` are all replicas of the stage where they reach over node groups, and the configuration speaks of those on one.
    """
    degrees, group = configuration.degrees, configuration.group
    table = (model.table if joined is None else model.shape_table)(degrees, configuration.microbatch, group=group)
    replicas = model.replica_table(
        degrees, configuration.microbatch, group=group, num_pipeline_ranks=configuration.num_ranks, replicas=joined
    )
    dense, expert = model.states(1.0, 0.0, degrees, joined), model.states(0.0, 1.0, degrees, joined)
    rows = [
        (dense.parameters, expert.parameters),
        (dense.gradients, expert.gradients),
        (dense.master_weights + dense.optimizer, expert.master_weights + expert.optimizer),
    ]
    states = np.stack([table.dense_parameters * d + table.expert_parameters * e for d, e in rows])
    states[0] += table.frozen_parameters * model.job.optimizer.parameter_bytes
    gathered = np.zeros(len(table.forward_s))
    if degrees.zero == 3:
        each = (table.dense_parameters + table.expert_parameters) * model.job.optimizer.parameter_bytes
        gathered = each + each.max(initial=0.0)
    return LayerCosts(
        forward_s=table.forward_s + replicas.forward_s,
        input_grad_s=table.input_grad_s,
        weight_grad_s=table.weight_grad_s + replicas.backward_s,
        split_excess_s=table.split_excess_s,
        recompute_s=table.recompute_s,
        kept_bytes=table.activation_bytes,
        late_bytes=table.late_bytes,
        workspace_bytes=table.workspace_bytes + gathered,
        split_workspace_bytes=table.split_workspace_bytes + gathered,
        cut_bytes=cut_bytes(model.profile, table.output_bytes, configuration.microbatch),
        edges=np.array(model.profile.edge_indices, dtype=np.int64).reshape(-1, 2),
        edge_bytes=edge_bytes(model.profile, table.output_bytes, configuration.microbatch),
        state_bytes=states,
        gradient_bytes=(table.dense_parameters + table.expert_parameters) * model.job.optimizer.gradient_bytes,
        tail_s=replicas.tail_s,
        optimizer_s=replicas.optimizer_s,
        stage_latency_s=replicas.latency_s,
        table=table,
    )


def cut_bytes(profile: ModelProfile, output_bytes: Floats, microbatch: int) -> Floats:
    """Return the bytes that cross a cut before each layer, [L + 1]; a tensor with several users crosses once."""
    count = len(output_bytes)
    if profile.edges is None:
        return np.concatenate((np.zeros(1), output_bytes[:-1], np.zeros(1)))
    told: dict[int, float] = {}
    last_use = np.zeros(count, dtype=np.int64)
    for (source, target), edge in zip(profile.edge_indices, profile.edges, strict=True):
        last_use[source] = max(last_use[source], target)
        if edge.bytes_per_sample is not None:
            told[source] = max(told.get(source, 0.0), edge.bytes_per_sample * microbatch)
    size = np.array([told.get(layer, float(output_bytes[layer])) for layer in range(count)])
    crossing = np.zeros(count + 1)
    for source in range(count):
        crossing[source + 1 : last_use[source] + 1] += size[source]
    return crossing


def edge_bytes(profile: ModelProfile, output_bytes: Floats, microbatch: int) -> Floats:
    """Return the bytes of the tensor of each edge between layers, [E]."""
    told = [None] * len(profile.edge_indices) if profile.edges is None else [e.bytes_per_sample for e in profile.edges]
    return np.array(
        [
            float(output_bytes[source]) if size is None else size * microbatch
            for (source, _), size in zip(profile.edge_indices, told, strict=True)
        ]
    )
