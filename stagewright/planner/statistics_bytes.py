"""What a run with Shampoo holds beyond the ledger, which like the search counts every parameter as one of a square tile.

With b bytes a number, a parameter is counted with 6 b: two moments, and of L, R and their roots four numbers. A run holds the
moments of all parameters, and statistics of blocks' matrices only, 2 (p^2 + q^2) numbers for each tile of p x q: thin tiles have more
than four for each of their elements, embeddings, heads, norms and biases none. ZeRO gives each tile to one of n devices, which
steps o of the Psi elements of its stage (`tile_shards`); the ledger counts Psi / n of them in whatever is divided:

    optimizer   2 b o + sum over its tiles 2 b (p^2 + q^2) - 6 b Psi / n
    gradients and, under ZeRO-3, weights        o - Psi / n, as wide as each is

Where it is not known how tensors are cut, and where a group splits matrices, o is Psi / n and the tiles are all, over n and the
devices of the group. A block that states neither tensors nor
operators is left as counted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from stagewright.planner.cost.matrix_optimizer import is_matrix, shampoo_state_bytes
from stagewright.planner.cost.memory import ParameterBytes, expert_shards
from stagewright.planner.documents.job import MASTER_BYTES
from stagewright.planner.documents.plan import Degrees, Plan
from stagewright.planner.documents.profile import LayerClass, ModelProfile
from stagewright.planner.link_bytes import (
    reduced_parameters,
    shared_weights,
    state_share,
    tied_members,
    unit_parameters,
)
from stagewright.planner.search.layer_costs import LayerCosts
from stagewright.planner.tile_shards import OwnedBucket, owned_buckets

Floats = npt.NDArray[np.float64]

_MOMENTS, _COUNTED = 2, 6


def unlike_statistics_bytes(
    plan: Plan, profile: ModelProfile, layers: Sequence[LayerCosts], bounds: Sequence[int], member: int | None = None
) -> Floats:
    """Return the bytes of parameters, gradients and optimizer on a device of each stage, [3, stages]; may be negative.

    Of the device with this place in its pipeline rank, or the mean over them; 0 for other optimizers than Shampoo.
    """
    found = np.zeros((3, len(plan.stages)))
    optimizer = plan.job.optimizer
    if optimizer.name != "shampoo":
        return found
    width = optimizer.stepped_bytes
    for index, row in enumerate(layers):
        share = state_share(plan, index, member)
        counted = _counted_parameters(plan, profile, index, row, bounds, share)
        found[2, index] = -(_COUNTED - _MOMENTS) * width * (counted + _met_elsewhere(plan, profile, index))
        buckets = None if member is None else owned_buckets(plan, profile, index, bounds, member)
        if buckets is None:
            found[2, index] += width / MASTER_BYTES * _mean_statistics(plan, profile, index, share)
            continue
        zero = plan.stages[index].degrees.zero
        more = sum(bucket.owned - bucket.size * bucket.share for bucket in buckets)
        sizes = ParameterBytes.of(optimizer)
        found[0, index] = more * sizes.parameter * (zero == 3 and not sizes.master)
        found[1, index] = more * sizes.gradient * (zero >= 2)
        found[2, index] += more * (_MOMENTS * width + sizes.master) + width * sum(map(_statistics_of, buckets))
    return found


def _counted_parameters(
    plan: Plan, profile: ModelProfile, index: int, row: LayerCosts, bounds: Sequence[int], share: float
) -> float:
    """Return the parameters of a stage whose states the ledger counts on one device, without those that other stages share.

    The device has this share of them.
    """
    degrees, inside = plan.stages[index].degrees, slice(bounds[index], bounds[index + 1])
    classes = [profile.classes[name] for name in profile.layer_classes[inside]]
    known = [float(kind.kind != "block" or bool(kind.operators or kind.tensors)) for kind in classes]
    together, experts = (
        [size * is_known for size, is_known in zip(each, known, strict=True)]
        for each in reduced_parameters(row, inside, degrees)
    )
    owners = expert_shards(degrees) if degrees.zero else 1
    dense = sum(unit_parameters(together, inside.start, shared_weights(plan, profile)))
    return dense * share + sum(experts) / owners


def _met_elsewhere(plan: Plan, profile: ModelProfile, index: int) -> float:
    """Return the parameters that a stage shares with others, as the ledger divides their states."""
    return sum(
        tie.num_parameters / (tied_members(plan, tie) if plan.stages[min(tie.stages)].degrees.zero else 1)
        for tie in shared_weights(plan, profile)
        if len(tie.stages) > 1 and index in tie.stages
    )


def _statistics_of(bucket: OwnedBucket) -> float:
    """Return the numbers of statistics and roots of what a device steps of a bucket."""
    return sum(
        2.0 * count * (height**2 + width**2)
        for each in bucket.tensors
        for (height, width), count in each.tile_sizes.items()
    )


def _mean_statistics(plan: Plan, profile: ModelProfile, index: int, share: float) -> float:
    """Return the bytes of statistics and roots on a device of a stage in fp32, given its share of all that ZeRO divides."""
    stage = plan.stages[index]
    divided = stage.degrees.expert_split > 1
    own = 1.0 / expert_shards(stage.degrees) if divided and stage.degrees.zero else share
    classes = [profile.classes[profile.layer_classes[layer]] for layer in stage.layer_indices]
    return sum(
        _statistics(kind, stage.degrees, of_experts=False) * share
        + _statistics(kind, stage.degrees, of_experts=True) * own
        for kind in classes
    )


def _statistics(layer: LayerClass, degrees: Degrees, *, of_experts: bool) -> float:
    """Return the bytes of statistics and roots of a layer's matrices on one device, in fp32."""
    if layer.kind != "block" or layer.backward != "full":
        return 0.0
    if layer.tensors:
        tensors = [each for each in layer.tensors if each.is_matrix and each.of_experts == of_experts]
        share = degrees.expert_split if of_experts else degrees.tp
        return sum(shampoo_state_bytes(*each.shape[-2:]) * each.num_matrices * each.count / share for each in tensors)
    return sum(
        shampoo_state_bytes(operator.output_features, operator.inner_features)
        * operator.num_groups
        / (degrees.expert_split if of_experts else degrees.tp if {"tp", "kv"} & set(operator.split) else 1)
        for operator in layer.operators
        if is_matrix(operator) and ("ep" in operator.split) == of_experts
    )
