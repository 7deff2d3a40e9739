"""Bytes that a plan sends in one step, over all devices, by operation and group: what the runtime's counters must equal.

Layers' own collectives recur for each microbatch. Messages of the pipeline cross each boundary twice for each microbatch.
For the gradients of S bytes on one device, on m data- and context-parallel devices of each of R model replicas,

    stage 0    all-reduce over m R devices          2 (m R - 1) S
    stage 1    reduce-scatter and all-gather over m      (m - 1) (S + S_w) R, an all-reduce of shards over R
    stage 2    the reduce-scatter for each microbatch (and slice) that a replica runs
    stage 3    that, and two all-gathers for each; once a run of microbatches where `gather` is "run"

over all of them (S_w: bytes of the weights). Under ZeRO a buffer is padded to m equal shards: a whole stage at stage 1, a
layer at stages 2 and 3. With shards over p < m devices (`shard_size`) m / p groups scatter and gather apart, and the shards
are all-reduced over all groups once, as those of model replicas are. Uneven shards (stated ones, and those of Shampoo, whose tiles stay whole) have no padding: each goes to, or comes from, its owner by itself, which is a
reduction to one device or a broadcast in place of a scatter or a gather of all, of as many bytes. Experts are summed over the devices that own the same ones,
and their states divided over those of one model replica. BPipe lends what a stage keeps of a microbatch and gets it back: its bytes twice. A weight that layers of several stages
share is summed once over the devices of all of them (at stages above 0: reduce-scatter and all-gather); one whose layers
lie on one stage is a buffer of its own. Optimizer states that lie on the host come to the device and go back, their bytes twice
(`copy/host`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from stagewright.planner.cost.matrix_optimizer import MATRIX_OPTIMIZERS, is_matrix
from stagewright.planner.cost.measured_cost import blend, hidden_bytes
from stagewright.planner.cost.memory import expert_shards
from stagewright.planner.cost.memory_actions import offloaded_elements
from stagewright.planner.documents.operator import Operator
from stagewright.planner.documents.plan import Degrees, Plan
from stagewright.planner.documents.profile import LayerClass, ModelProfile, Recompute
from stagewright.planner.layerwise import Gather
from stagewright.planner.replica_shares import samples_by_replica, told_part
from stagewright.planner.schedules.action import Kind
from stagewright.planner.schedules.lowering.parameters import with_parameter_gathers
from stagewright.planner.schedules.schedule import KIND, STAGE, Schedule, WeightPolicy
from stagewright.planner.search.layer_costs import LayerCosts
from stagewright.planner.search.order import Layout
from stagewright.planner.search.pipeline_costs import sent_over

Totals = dict[str, float]

LENT = "send-receive/lent"  # activations on their way to a peer rank and back
UPDATE = "all-gather/update"  # momentum of matrices that ZeRO has cut
_LOSS_SUMS = 3  # maximum, sum of exponentials, logit of the target
RING = "send-receive/cp"  # keys and values
HOST_COPY = "copy/host"  # optimizer states between device and host


def link_bytes(
    plan: Plan,
    profile: ModelProfile,
    schedule: Schedule,
    layout: Layout,
    bounds: Sequence[int],
    layers: Sequence[LayerCosts],
    kept_bytes: Sequence[float],
    gathers: Sequence[Gather] = (),
) -> Totals:
    """Return the bytes by "operation/group"; names without bytes are left out.

    `kept_bytes` is what one device of each stage keeps of a microbatch, `gathers` are those of each microbatch where stages of one
    rank differ in degrees.
    """
    total: Totals = {}
    for order in schedule.orders:
        for stage in order[np.isin(order[:, KIND], (Kind.EVICT, Kind.LOAD)), STAGE].tolist():
            _add(total, LENT, kept_bytes[stage] * plan.stages[stage].degrees.num_devices)
    for stage, row in enumerate(layers):
        _own_collectives(total, plan, profile, schedule, stage, row)
    for (first, second), edge in zip(layout.hop_pairs.tolist(), layout.edges * layout.num_replicas, strict=True):
        if first != second:
            sent = sum(
                sent_over(layout, bounds, layers[stage], edge)
                * _devices(plan, stage, max(samples_by_replica(plan, stage)))
                for stage in edge
            )
            _add(total, "send-receive/pp", sent * schedule.num_microbatches / layout.num_replicas)
    for gather in gathers:
        sent = gather.sent_bytes * plan.stages[0].degrees.num_devices * schedule.num_microbatches
        _add(total, "all-gather/reshard", sent)
    ties = shared_weights(plan, profile)
    for stage, row in enumerate(layers):
        _gradients(total, plan, schedule, stage, row, bounds, ties)
        _outer_step(total, plan, stage, row, bounds, ties)
        _host_copies(total, plan, stage, row, bounds, ties)
    for tie in ties:
        if len(tie.stages) > 1:
            _shared_gradients(total, plan, tie)
    return {name: total[name] for name in sorted(total) if total[name] > 0}


def _own_collectives(
    total: Totals, plan: Plan, profile: ModelProfile, schedule: Schedule, stage: int, row: LayerCosts
) -> None:
    """Add the collectives inside one stage's layers, and those that recomputation runs again: all, or the ring of attention.

    Under sequence parallelism the sequence is split at the first block of a row and joined behind its last, which gathers
    gradients at the one and values at the other; embedding and head lie outside and sum whole tensors. Parameters of blocks that
    tensor parallelism copies see a part of the sequence each, experts that nothing divides too, so their gradients are
    summed, as are those of norms of single heads without it: once an iteration, or before each scatter of ZeRO-2 and 3 (with masters of narrow weights in each of several pipelines too).
    So are those of keys and values whose heads are fewer than the devices. A loss on logits that are split by the vocabulary
    sums three numbers a token, in fp32 at least.
    """
    degrees = plan.stages[stage].degrees
    devices, repeats = degrees.num_devices, schedule.num_microbatches
    like = _devices(plan, stage, told_part(plan, stage).samples)
    units = repeats * max(schedule.num_slices, 1)
    kinds = tuple(profile.classes[name].kind for name in profile.layer_classes)
    ends = _sequence_ends(kinds) if degrees.sp else frozenset()
    levels = plan.stages[stage].recompute_levels()
    pipelines = len(plan.schedule.placement)
    scatters = degrees.dp * degrees.cp > 1 or (plan.job.optimizer.has_masters and pipelines > 1)
    sums = units if degrees.zero >= 2 and scatters else pipelines
    for layer, level in zip(plan.stages[stage].layer_indices, levels, strict=True):
        summed = degrees.sp and kinds[layer] in ("embedding", "head", "loss")
        for name, each in row.table.again_link_bytes.items():
            if level is Recompute.FULL or (level is Recompute.SELECTIVE and name == RING):
                _add(total, name, float(each[layer]) * repeats * like)
        known = profile.classes[profile.layer_classes[layer]]
        if kinds[layer] == "loss" and degrees.vocab_parallel and _has_vocabulary(known):
            tokens = told_part(plan, stage).samples * plan.job.sequence_length / degrees.cp
            size = _LOSS_SUMS * max(4.0, plan.job.optimizer.parameter_bytes) * tokens
            _add(total, "all-reduce/tp", 2 * (degrees.tp - 1) / degrees.tp * size * repeats * like)
        for name, each in row.table.link_bytes.items():
            purpose = name.partition("/")[2]
            if kinds[layer] == "loss" and purpose == "tp":
                continue
            sent = float(each[layer]) * repeats * like
            _add(total, "all-reduce/tp" if summed and purpose == "tp" else name, sent)
        if layer in ends and kinds[layer] != "loss":
            size = _split_bytes(plan, profile, stage, row, layer - (kinds[layer] != "block"))
            _add(total, "all-gather/tp", size * (degrees.tp - 1) * repeats * like)
        if kinds[layer] == "block":
            copied = float(copied_parameters(known) if degrees.sp else summed_parameters(known))
            if degrees.sp and degrees.expert_split == 1:
                copied += float(row.table.expert_parameters[layer])
            size = copied * plan.job.optimizer.gradient_bytes
            _add(total, "all-reduce/tp", 2 * (degrees.tp - 1) / degrees.tp * size * devices * sums)
        _split_updates(total, plan, profile, stage, row, layer)
        shared, copies = shared_key_values(profile, layer, degrees.tp)
        if copies > 1:
            size = shared * plan.job.optimizer.gradient_bytes
            _add(total, "all-reduce/tp", 2 * (copies - 1) / copies * size * devices * sums)


@lru_cache(maxsize=8)  # one model's, stage by stage
def _sequence_ends(kinds: tuple[str, ...]) -> frozenset[int]:
    """Return the layers at whose entrance a sequence is split or joined: the first of each row of blocks, and what follows one."""
    before = [False, *(kind == "block" for kind in kinds)]
    return frozenset(layer for layer, kind in enumerate(kinds) if (kind == "block") != before[layer])


def _split_bytes(plan: Plan, profile: ModelProfile, stage: int, row: LayerCosts, block: int) -> float:
    """Return the bytes of one device's part of the hidden state of a block whose sequence is split.

    Beside it a measured block may pass on what is whole on each device.
    """
    degrees = plan.stages[stage].degrees
    known, samples = profile.classes[profile.layer_classes[block]], told_part(plan, stage).samples
    whole = hidden_bytes(blend(known, samples, plan.job.sequence_length, degrees.tp))
    return float(row.table.output_bytes[block]) if whole is None else whole / (degrees.tp * degrees.cp)


def _has_vocabulary(layer: LayerClass) -> bool:
    """Whether a loss is one over a vocabulary, which a plan may split."""
    is_told = any("vocab" in operator.split for operator in layer.operators)
    return is_told or any(item.group == "tp" for cost in layer.costs for item in cost.collectives)


def _split_updates(total: Totals, plan: Plan, profile: ModelProfile, stage: int, row: LayerCosts, layer: int) -> None:
    """Add what an optimizer of whole matrices exchanges of a layer's tensors that tp and etp split.

    Muon gathers updates of all of them on each replica, of experts those of matrices; Shampoo gathers matrices'
    gradients and scatters their directions, on one device of those that divide states.
    """
    degrees, optimizer = plan.stages[stage].degrees, plan.job.optimizer
    kind = profile.classes[profile.layer_classes[layer]]
    if kind.kind != "block" or optimizer.name not in MATRIX_OPTIMIZERS:
        return
    devices = degrees.num_devices * len(plan.schedule.placement)
    split = float(row.table.dense_parameters[layer]) - copied_parameters(kind)
    experts = float(row.table.expert_parameters[layer]) * _matrix_share(kind)
    if optimizer.name == "muon":
        for purpose, group, size in (("tp", degrees.tp, split), ("etp", degrees.etp, experts)):
            _add(total, f"all-gather/update-{purpose}", (group - 1) * size * devices * optimizer.gathered_bytes)
        return
    matrices = split - _split_vectors(profile, kind, degrees.tp)
    owners = expert_shards(degrees) if degrees.zero else 1
    for purpose, group, size in (
        ("tp", degrees.tp, matrices * devices / num_shards(plan, stage)),
        ("etp", degrees.etp, experts * devices / owners),
    ):
        _add(total, f"all-gather/update-{purpose}", (group - 1) * size * optimizer.gradient_bytes)
        width = optimizer.stepped_bytes
        _add(total, f"reduce-scatter/update-{purpose}", (group - 1) * size * width)


def _matrix_share(layer: LayerClass) -> float:
    """Return the share of matrices in the parameters of a layer's experts; 1 where their tensors are not known."""
    experts = [tensor for tensor in layer.tensors if tensor.of_experts]
    whole = sum(tensor.num_elements * tensor.count for tensor in experts)
    return sum(tensor.num_elements * tensor.count for tensor in experts if tensor.is_matrix) / whole if whole else 1.0


def _split_vectors(profile: ModelProfile, layer: LayerClass, tp: int) -> float:
    """Return the elements of vectors that tensor parallelism splits, on one device: biases.

    A layer that was measured is taken to have no other matrices than those that are split.
    """
    if layer.operators:
        heads = tp if profile.architecture is None else profile.architecture.num_kv_heads or tp
        return sum(
            (operator.parameters - _matrix_elements(operator)) / (min(heads, tp) if "kv" in operator.split else tp)
            for operator in layer.operators
            if {"tp", "kv"} & set(operator.split)
        )
    dense = [tensor for tensor in layer.tensors if tensor.is_matrix and not tensor.of_experts]
    if not dense:
        return 0.0
    split = layer.parameters - layer.expert_parameters - copied_parameters(layer)
    return max(split - sum(tensor.num_elements * tensor.count for tensor in dense), 0.0) / tp


def _matrix_elements(operator: Operator) -> int:
    return operator.output_features * operator.inner_features * operator.num_groups if is_matrix(operator) else 0


def _devices(plan: Plan, stage: int, samples: int) -> float:
    """Return how many devices with `samples` of a microbatch send as much as a stage does with its shares."""
    degrees = plan.stages[stage].degrees
    return degrees.tp * degrees.cp * sum(samples_by_replica(plan, stage)) / samples


def shared_key_values(profile: ModelProfile, layer: int, tp: int) -> tuple[float, int]:
    """Return a layer's key-value parameters on one of `tp` devices, and how many devices hold the same and sum their gradients."""
    heads = tp if profile.architecture is None else profile.architecture.num_kv_heads or tp
    if heads >= tp:
        return 0.0, 1
    operators = profile.classes[profile.layer_classes[layer]].operators
    return sum(op.parameters for op in operators if "kv" in op.split) / heads, tp // heads


def copied_parameters(layer: LayerClass) -> int:
    """Return the parameters of a layer that tensor parallelism does not split."""
    if not layer.operators:
        return layer.replicated_parameters
    return sum(op.parameters for op in layer.operators if not set(op.split) & {"tp", "kv", "vocab", "ep"})


def summed_parameters(layer: LayerClass) -> int:
    """Return the parameters of a layer that work on what tensor parallelism leaves a device, and are whole on each."""
    if not layer.operators:
        return layer.summed_parameters
    return sum(operator.parameters for operator in layer.operators if operator.sums_gradients)


@dataclass(frozen=True)
class SharedWeight:
    """A weight of several layers.

    Parameters
    ----------
    layers : indices of the layers; stages : the stages that hold them.
    num_parameters : on one device.
    """

    layers: tuple[int, ...]
    stages: frozenset[int]
    num_parameters: float


def shared_weights(plan: Plan, profile: ModelProfile) -> list[SharedWeight]:
    """Return the profile's trained tied weights as the plan places them."""
    found = []
    for tie in profile.trained_ties:
        layers = tuple(sorted(profile.layer_names.index(name) for name in tie.layers))
        stages = [next(index for index, stage in enumerate(plan.stages) if stage.holds(layer)) for layer in layers]
        degrees = plan.stages[stages[0]].degrees
        split = degrees.tp if degrees.vocab_parallel else 1
        found.append(SharedWeight(layers, frozenset(stages), tie.num_parameters / split))
    return found


def unit_parameters(dense: Sequence[float], first: int, ties: Iterable[SharedWeight]) -> list[float]:
    """Return the parameters of the layers from `first` on without shared ones, and then those of each weight that only
    layers among them share."""
    own, shared = list(dense), []
    for tie in ties:
        inside = [layer for layer in tie.layers if first <= layer < first + len(own)]
        for layer in inside:
            own[layer - first] -= tie.num_parameters
        if inside and len(tie.stages) == 1:
            shared.append(tie.num_parameters)
    return own + shared


def reduced_parameters(row: LayerCosts, inside: slice, degrees: Degrees) -> tuple[list[float], list[float]]:
    """Return the parameters of some layers that are summed over all replicas, and those that are over their experts' owners.

    Experts that nothing divides are summed with the rest of their layer.
    """
    dense, experts = row.table.dense_parameters[inside], row.table.expert_parameters[inside]
    if degrees.expert_split == 1:
        return (dense + experts).tolist(), [0.0] * len(experts)
    return dense.tolist(), experts.tolist()


def _gradients(
    total: Totals,
    plan: Plan,
    schedule: Schedule,
    stage: int,
    row: LayerCosts,
    bounds: Sequence[int],
    ties: Sequence[SharedWeight],
) -> None:
    """Add what the gradients and sharded weights of one stage send."""
    degrees, optimizer = plan.stages[stage].degrees, plan.job.optimizer
    inside = slice(bounds[stage], bounds[stage + 1])
    together, experts = reduced_parameters(row, inside, degrees)
    dense = unit_parameters(together, bounds[stage], ties)
    members, replicas = _members(plan, stage), _replicas(plan, (stage,))
    units = schedule.num_microbatches * max(schedule.num_slices, 1)
    _expert_gradients(total, plan, schedule, stage, experts)
    if degrees.zero == 0:
        size = sum(dense) * optimizer.gradient_bytes
        stashes = schedule.weight_policy is WeightPolicy.STASH
        updates = schedule.num_microbatches // replicas if stashes else 1  # workers meet at each
        _add(total, "all-reduce/dp", 2 * (members * replicas - 1) * size * degrees.tp * updates)
        return
    shards = num_shards(plan, stage)
    filled = shards if has_even_shards(plan, stage) else 1
    padded = sum(_padded(size, filled) for size in (dense if degrees.zero >= 2 else [sum(dense)]))
    scatters = units if degrees.zero >= 2 else replicas
    gathers = replicas if degrees.zero < 3 else _gathers(plan, schedule, stage, units)
    groups = members // shards
    copies = groups * (shards - 1) * padded * degrees.tp
    if members > 1:
        _add(total, "reduce-scatter/dp", scatters * copies * optimizer.gradient_bytes)
        _add(total, "all-gather/dp", gathers * copies * optimizer.parameter_bytes)
        _add(total, UPDATE, replicas * copies * optimizer.gathered_bytes)
    _add(total, "all-reduce/dp", 2 * (groups * replicas - 1) * padded * optimizer.gradient_bytes * degrees.tp)


def _expert_gradients(total: Totals, plan: Plan, schedule: Schedule, stage: int, experts: Sequence[float]) -> None:
    """Add what the gradients and sharded weights of a stage's divided experts send, given their parameters by layer."""
    degrees, optimizer = plan.stages[stage].degrees, plan.job.optimizer
    replicas, shards = _replicas(plan, (stage,)), expert_shards(degrees)
    parts = degrees.num_devices / shards  # of all experts, one on each of so many devices
    if degrees.zero == 0:
        size = sum(experts) * optimizer.gradient_bytes
        _add(total, "all-reduce/edp", 2 * (shards * replicas - 1) * size * parts)
        return
    filled = 1 if divides_by_tiles(plan) else shards
    padded = sum(_padded(size, filled) for size in (experts if degrees.zero >= 2 else [sum(experts)])) * parts
    units = schedule.num_microbatches * max(schedule.num_slices, 1)
    scatters = units if degrees.zero >= 2 else replicas
    gathers = replicas if degrees.zero < 3 else _gathers(plan, schedule, stage, units)
    _add(total, "reduce-scatter/edp", scatters * (shards - 1) * padded * optimizer.gradient_bytes)
    _add(total, "all-gather/edp", gathers * (shards - 1) * padded * optimizer.parameter_bytes)
    _add(total, UPDATE, replicas * (shards - 1) * padded * optimizer.gathered_bytes)
    _add(total, "all-reduce/edp", 2 * (replicas - 1) * padded * optimizer.gradient_bytes)


def _shared_gradients(total: Totals, plan: Plan, tie: SharedWeight) -> None:
    degrees, optimizer = plan.stages[min(tie.stages)].degrees, plan.job.optimizer
    members = tied_members(plan, tie)
    if degrees.zero == 0:
        _add(total, "all-reduce/tied", 2 * (members - 1) * tie.num_parameters * optimizer.gradient_bytes * degrees.tp)
        return
    filled = 1 if divides_by_tiles(plan) else members
    copies = (members - 1) * _padded(tie.num_parameters, filled) * degrees.tp
    _add(total, "reduce-scatter/tied", copies * optimizer.gradient_bytes)
    _add(total, "all-gather/tied", copies * optimizer.parameter_bytes)
    _add(total, UPDATE, copies * optimizer.gathered_bytes)


def _outer_step(
    total: Totals, plan: Plan, stage: int, row: LayerCosts, bounds: Sequence[int], ties: Sequence[SharedWeight]
) -> None:
    """Add one step's share of what replicas with local steps send when they meet: the weights' change, all-reduced."""
    every, degrees = local_steps(plan), plan.stages[stage].degrees
    if every is None:
        return
    inside = slice(bounds[stage], bounds[stage + 1])
    weights = sum(unit_parameters(reduced_parameters(row, inside, degrees)[0], bounds[stage], ties))
    weights += sum(
        tie.num_parameters for tie in ties if len(tie.stages) > 1 and stage in tie.stages
    )  # every holder of a shared weight has a copy
    width = plan.job.optimizer.stepped_bytes
    copies = degrees.tp * (1 if degrees.zero else degrees.cp)
    _add(total, "all-reduce/outer", 2 * (degrees.dp - 1) * weights * width * copies / every)


def _host_copies(
    total: Totals, plan: Plan, stage: int, row: LayerCosts, bounds: Sequence[int], ties: Sequence[SharedWeight]
) -> None:
    """Add the optimizer states that one stage's devices fetch from the host for the step and put away again."""
    share, degrees = plan.stages[stage].optimizer_offload, plan.stages[stage].degrees
    if not share:
        return
    inside = slice(bounds[stage], bounds[stage + 1])
    together, experts = reduced_parameters(row, inside, degrees)
    dense = unit_parameters(together, bounds[stage], ties)
    members, replicas = _members(plan, stage), _replicas(plan, (stage,))
    owners = expert_shards(degrees) if degrees.zero else 1
    shards = min(sharding_group(plan) or members, members) if degrees.zero else 1
    by_layer = degrees.zero >= 2 and members * replicas > 1
    buckets = [_padded(value, shards) / shards for value in (dense if by_layer else [sum(dense)])]
    experts_by_layer = degrees.zero >= 2 and owners * replicas > 1
    buckets += [_padded(value, owners) / owners for value in (experts if experts_by_layer else [sum(experts)])]
    copies = degrees.num_devices * replicas
    away = sum(offloaded_elements(share, count) for count in buckets) * copies
    for tie in ties:
        if len(tie.stages) > 1 and stage in tie.stages:
            everyone = tied_members(plan, tie)
            divided = everyone if plan.stages[min(tie.stages)].degrees.zero else 1
            held = offloaded_elements(share, _padded(tie.num_parameters, divided) / divided)
            away += held * degrees.num_devices * len(_last_holders(plan, tie, stage))
    _add(total, HOST_COPY, 2 * away * plan.job.optimizer.state_bytes)


def _last_holders(plan: Plan, tie: SharedWeight, stage: int) -> set[int]:
    """Return the pipeline ranks on which `stage` is the last of those that share a weight."""
    held: dict[int, int] = {}
    for row in plan.schedule.placement:
        for other in tie.stages:
            held[row[other]] = max(other, held.get(row[other], -1))
    return {rank for rank, last in held.items() if last == stage}


def _gathers(plan: Plan, schedule: Schedule, stage: int, units: int) -> int:
    """Return how often a stage's weights are gathered in one step, over all replicas."""
    if gathers_by_run(plan):
        return sum(
            int(((order[:, KIND] == Kind.UNSHARD) & (order[:, STAGE] == stage)).sum())
            for order in with_parameter_gathers(schedule)
        )
    return 2 * units


def gathers_by_run(plan: Plan) -> bool:
    """Return whether ZeRO-3 gathers a whole stage for a run of its microbatches, and not each layer for each of them."""
    return plan.schedule.parameters.get("gather", "layer") == "run"


def sharding_group(plan: Plan) -> int | None:
    """Return over how many devices ZeRO divides states (HSDP, MiCS); None for all replicas."""
    told = plan.schedule.parameters.get("shard_size")
    return None if told is None else int(told)


def local_steps(plan: Plan) -> int | None:
    """Return after how many steps replicas meet (DiLoCo); None where they do in each."""
    told = plan.schedule.parameters.get("local_steps")
    return None if told is None else int(told)


def divides_by_tiles(plan: Plan) -> bool:
    """Return whether ZeRO cuts matrices between bands of tiles only, since its optimizer keeps statistics of whole ones."""
    return plan.job.optimizer.name == "shampoo"


def has_even_shards(plan: Plan, stage: int) -> bool:
    """Return whether ZeRO divides a stage's states into shards of one length, the last one padded."""
    return not plan.stages[stage].state_shares and not divides_by_tiles(plan)


def num_shards(plan: Plan, index: int) -> int:
    """Return over how many devices ZeRO divides the states of a stage."""
    degrees = plan.stages[index].degrees
    members = _members(plan, index)
    return min(sharding_group(plan) or members, members) if degrees.zero else 1


def state_share(plan: Plan, index: int, member: int | None = None) -> float:
    """Return the share of a stage's states that ZeRO leaves on a device, or on one of those that a prediction speaks of."""
    part = told_part(plan, index, member).state_share
    return 1.0 / num_shards(plan, index) if part is None else part / plan.stages[index].degrees.cp


def _members(plan: Plan, stage: int) -> int:
    """Return the devices of one model replica that sum a stage's gradients."""
    degrees = plan.stages[stage].degrees
    return degrees.cp if local_steps(plan) else degrees.dp * degrees.cp


def tied_members(plan: Plan, tie: SharedWeight) -> int:
    """Return the devices that sum the gradients of a weight that several stages share: all that hold one of these."""
    held = {row[stage]: stage for row in plan.schedule.placement for stage in tie.stages}
    return sum(_members(plan, stage) for stage in held.values())


def _replicas(plan: Plan, stages: Iterable[int]) -> int:
    return len({row[stage] for row in plan.schedule.placement for stage in stages})


def _padded(num_parameters: float, members: int) -> float:
    return math.ceil(num_parameters / members) * members


def _add(total: Totals, name: str, num_bytes: float) -> None:
    if num_bytes > 0:
        total[name] = total.get(name, 0.0) + num_bytes
