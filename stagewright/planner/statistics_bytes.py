"""What a run with Shampoo holds beyond the ledger, which like the search counts every parameter as one of a square tile.

With b bytes a number, a parameter is counted with 6 b: two moments, and of L, R and their roots four numbers. A run holds the
moments of all parameters, and statistics of blocks' matrices only, 2 (p^2 + q^2) numbers for each tile of p x q: thin tiles have more
than four for each of their elements, embeddings, heads, norms and biases none. ZeRO gives each tile to one of its n devices, and a group
that splits a matrix to one of its own,

    (2 b Psi + sum over tiles 2 b (p^2 + q^2) - 6 b Psi) / n        of a layer with Psi parameters on a device

the mean over them: shares of a bucket differ by up to a band of tiles. A block that states neither tensors nor operators is
left as counted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from stagewright.planner.cost.matrix_optimizer import is_matrix, shampoo_state_bytes
from stagewright.planner.cost.memory import MASTER_BYTES, expert_shards
from stagewright.planner.documents.plan import Degrees, Plan
from stagewright.planner.documents.profile import LayerClass, ModelProfile
from stagewright.planner.passing_bytes import num_shards
from stagewright.planner.search.layer_costs import LayerCosts

_MOMENTS, _COUNTED = 2, 6


def unlike_statistics_bytes(plan: Plan, profile: ModelProfile, layers: Sequence[LayerCosts]) -> npt.NDArray[np.float64]:
    """Return the bytes on one device of each stage, [stages]; may be negative, and 0 for other optimizers than Shampoo."""
    found = np.zeros(len(plan.stages))
    if plan.job.optimizer.name != "shampoo":
        return found
    width = max(MASTER_BYTES, plan.job.optimizer.parameter_bytes)
    for index, (stage, row) in enumerate(zip(plan.stages, layers, strict=True)):
        divided = stage.degrees.ep * stage.degrees.etp > 1
        shards = num_shards(plan, index)
        owners = expert_shards(stage.degrees) if divided and stage.degrees.zero else shards
        for layer in stage.layer_indices:
            kind = profile.classes[profile.layer_classes[layer]]
            if kind.kind == "block" and not (kind.operators or kind.tensors):
                continue
            dense, experts = (
                width / MASTER_BYTES * _statistics(kind, stage.degrees, of_experts=own) for own in (False, True)
            )
            dense -= (_COUNTED - _MOMENTS) * width * float(row.table.dense_parameters[layer])
            experts -= (_COUNTED - _MOMENTS) * width * float(row.table.expert_parameters[layer])
            found[index] += dense / shards + experts / owners
    return found


def _statistics(layer: LayerClass, degrees: Degrees, *, of_experts: bool) -> float:
    """Return the bytes of statistics and roots of a layer's matrices on one device, in fp32."""
    if layer.kind != "block" or layer.backward != "full":
        return 0.0
    if layer.tensors:
        tensors = [each for each in layer.tensors if each.is_matrix and each.of_experts == of_experts]
        share = degrees.ep * degrees.etp if of_experts else degrees.tp
        return sum(shampoo_state_bytes(*each.shape[-2:]) * each.num_matrices * each.count / share for each in tensors)
    return sum(
        shampoo_state_bytes(operator.output_features, operator.inner_features)
        * operator.num_groups
        / (degrees.ep * degrees.etp if of_experts else degrees.tp if {"tp", "kv"} & set(operator.split) else 1)
        for operator in layer.operators
        if is_matrix(operator) and ("ep" in operator.split) == of_experts
    )
