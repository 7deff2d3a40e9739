"""Alpa's intra-operator pass on the common problem: what a layer takes on a tensor-parallel group, by integer programme.

For a transformer block on a sub-mesh of t devices, `sharding.intra_operator` chooses the strategy of every operator,
forward and backward, at least seconds: collectives priced on the group's links, work at the rate with which the cost model
runs the whole block on one device. The block's boundary tensors lie as the plan's stages hand them over, replicated or
split by sequence. Batch parallelism between replicas is another axis of the mesh, to which the batch dimension is bound
(Alpa's option of that kind), so it stays the stage's.

    t_intra(layer) = min over strategies of  sum work / workers + sum collectives      subject to  room D / L  a layer

Without a block that is a dense transformer's (experts, latent attention, convolutions, measured tables without an
architecture), on one device, or with context parallelism, a layer's seconds are the cost model's. The plan that runs
shards as Megatron does; where the programme finds something cheaper, Alpa's own objective is below what is simulated.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from stagewright.planner.documents.plan import Degrees
from stagewright.planner.errors import Infeasible
from stagewright.planner.planners.stage_table import StageTable
from stagewright.planner.sharding.intra_operator import LayerProblem, shard_layer
from stagewright.planner.sharding.layer_graphs import transformer_graph
from stagewright.planner.sharding.layout import REPLICATED, Layout, Mesh, split
from stagewright.planner.sharding.operator_graph import OperatorGraph, with_backward
from stagewright.planner.sharding.redistribution import seconds

Floats = npt.NDArray[np.float64]


@dataclass(eq=False)
class IntraOperator:
    """The programmes of one planning run, each solved once.

    Parameters
    ----------
    limit_s : of one programme; a layer it does not close takes the best found.
    """

    limit_s: float = 5.0
    _solved: dict[tuple[object, ...], tuple[float, float]] = field(default_factory=dict)

    def layer_s(self, table: StageTable) -> Floats:
        """Return the seconds of each layer for one microbatch, forward and backward, [L]; infinite where none fits."""
        found = table.costs.time_s.copy()
        blocks = block_layers(table)
        if not len(blocks):
            return found
        whole = _whole_s(table)
        rows = table.costs.table
        own = rows.forward_s + rows.input_grad_s + rows.weight_grad_s
        for layer in blocks.tolist():
            found[layer] += self.block_s(table, float(whole[layer])) - own[layer]
        return found

    def least_s(self, table: StageTable) -> Floats:
        """Return seconds that no strategy of a layer beats, [L]: its whole work shared by all devices."""
        found = table.costs.time_s.copy()
        blocks = block_layers(table)
        found[blocks] = _whole_s(table)[blocks] / table.configuration.degrees.tp
        return found

    def block_s(self, table: StageTable, whole_s: float) -> float:
        """Return the seconds of a block whose work on one device takes `whole_s`."""
        room = table.room_bytes * table.num_ranks / table.num_layers
        value, held = self._programme(table, whole_s, float("inf"))
        return value if held <= room else self._programme(table, whole_s, room)[0]

    def _programme(self, table: StageTable, whole_s: float, room_bytes: float) -> tuple[float, float]:
        """Return the cost of the best strategies and the bytes a device then holds."""
        degrees, microbatch = table.configuration.degrees, table.configuration.microbatch
        key = (degrees.tp, degrees.sp, microbatch, whole_s, room_bytes, table.configuration.group)
        if key not in self._solved:
            problem = block_problem(table, whole_s, room_bytes)
            try:
                found = shard_layer(problem, limit_s=self.limit_s)
                self._solved[key] = (found.cost, found.memory_bytes)
            except Infeasible:
                self._solved[key] = (float("inf"), float("inf"))
        return self._solved[key]


def block_layers(table: StageTable) -> npt.NDArray[np.int64]:
    """Return the layers that the programme shards; none where it does not apply."""
    profile, degrees = table.problem.profile, table.configuration.degrees
    known = profile.architecture
    dense = known is not None and known.num_heads and known.ffn_size and not (known.num_experts or known.kv_lora_rank)
    if not dense or degrees.tp == 1 or degrees.cp > 1 or degrees.ep > 1:
        return np.zeros(0, dtype=np.int64)
    kinds = [profile.classes[name].kind for name in profile.layer_classes]
    return np.flatnonzero([kind == "block" for kind in kinds])


def block_problem(table: StageTable, whole_s: float, room_bytes: float) -> LayerProblem:
    """Return the sharding problem of a block on the tensor-parallel group of a configuration, costs in seconds."""
    problem, configuration = table.problem, table.configuration
    degrees = configuration.degrees
    graph = block_graph(table)
    mesh = Mesh.of({"tp": degrees.tp})
    boundary: Layout = (split("s"),) if degrees.sp else (REPLICATED,)
    fixed = dict.fromkeys(("x", "out", "d_out"), boundary)
    groups = problem.model(configuration.axis_order).rank_groups(degrees, group=configuration.group)
    optimizer = problem.job.optimizer
    states = (optimizer.parameter_bytes + optimizer.gradient_bytes + optimizer.state_bytes) / optimizer.parameter_bytes
    flops = sum(graph.flops(operator) for operator in graph.operators)
    return LayerProblem(
        mesh,
        graph,
        fixed,
        price=seconds({0: groups.tp}),
        price_per_flop=whole_s / flops,
        memory_bytes=room_bytes,
        source_states=states,
    )


def block_graph(table: StageTable) -> OperatorGraph:
    """Return a dense transformer block of the model's sizes with its backward; a gated perceptron as one of equal weights."""
    known, job = table.problem.profile.architecture, table.problem.job
    assert known is not None
    ffn = known.ffn_size * 3 // 2 if known.gated_ffn else known.ffn_size
    share = table.configuration.degrees.tp
    graph = transformer_graph(
        batch=table.configuration.microbatch,
        sequence=job.sequence_length,
        hidden=known.hidden_size,
        heads=known.num_heads,
        ffn=-(-ffn // share) * share,
        element_bytes=job.optimizer.parameter_bytes,
    )
    return with_backward(graph)


def _whole_s(table: StageTable) -> Floats:
    """Return the seconds of each layer's microbatch on one device, [L]."""
    configuration = table.configuration
    model = table.problem.model(configuration.axis_order)
    rows = model.shape_table(Degrees(dp=configuration.degrees.dp), configuration.microbatch, group=configuration.group)
    return np.asarray(rows.forward_s + rows.input_grad_s + rows.weight_grad_s)
