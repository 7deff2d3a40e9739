"""Bytes that are there for a time beside states and activations: what optimizer steps make, what ZeRO has on its way.

An optimizer's step: Adam and AdamW make the square roots of the second moment and their quotient: on processors, where a
tensor is stepped after the other, two copies of the largest of them; on accelerators, which step all together, one copy of
all. Under ZeRO, and where weights narrower than 32 bits have masters, a tensor is a whole bucket's shard: a stage's at
stage 1, a layer's beyond. Where gradients are narrower than what is stepped they are widened, a piece after the other, and
what is made of them is there for a piece too. So it is of states that come from the host, beside them; masters come whole, those of
a stage together. What Muon and Shampoo make `matrix_step_bytes` says.
Gradients that are scattered to equal shards arrive in a shard of their own, and gloo sums them in a copy of all; equal
shards of the weights leave in a copy.

A backward under ZeRO-2 and 3: whole gradients of the layer at work, and what the layer behind it has on its way. Where weight
gradients run later, those of experts in stacks, which nothing defers, are whole from the input gradient on: until the rest of
their layer is complete, or less where they are divided and leave by themselves. Under
ZeRO-3 the weights of the layer at work are whole, and the next one's come: on gloo in a copy, and from masters in a shard of
their own type.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf

import numpy as np
import numpy.typing as npt

from stagewright.planner.cost.layer_cost import PhaseBytes
from stagewright.planner.cost.matrix_optimizer import MATRIX_OPTIMIZERS
from stagewright.planner.cost.memory import expert_shards
from stagewright.planner.cost.memory_actions import PIECE_ELEMENTS, widened_elements
from stagewright.planner.documents.plan import Degrees, Plan
from stagewright.planner.documents.profile import LayerClass, ModelProfile
from stagewright.planner.link_bytes import (
    gathers_by_run,
    has_even_shards,
    num_shards,
    reduced_parameters,
    sharding_group,
    shared_weights,
    state_share,
    unit_parameters,
)
from stagewright.planner.matrix_step_bytes import (
    SteppedBucket,
    matrix_step_bytes,
    stepped_part,
    stepped_tensors,
)
from stagewright.planner.search.layer_costs import LayerCosts
from stagewright.planner.simulation.peak import GradientPhase, Reduction
from stagewright.planner.tile_shards import owned_buckets

Floats = npt.NDArray[np.float64]

_COPIES_ONE_BY_ONE, _COPIES_TOGETHER = 2, 1
Shards = list[tuple[float, int]]


def _stepped_bytes(
    plan: Plan,
    profile: ModelProfile,
    index: int,
    row: LayerCosts,
    bounds: Sequence[int],
    member: int | None,
    kinds: tuple[Shards, Shards],
) -> float:
    """Return what a step makes once gradients are where it looks, given the shards of its buckets, those of divided experts apart."""
    shards = [*kinds[0], *kinds[1]]
    if plan.job.optimizer.name in MATRIX_OPTIMIZERS:
        buckets = _owned(plan, profile, index, bounds, member)
        if buckets is None:
            buckets = _buckets(plan, profile, index, row, bounds, kinds)
        need = matrix_step_bytes(plan.job.optimizer, buckets, is_cpu=_is_cpu(plan, index))
    else:
        need = _elementwise_bytes(plan, index, [size for size, _ in shards])
    return max(need, _gathered_bytes(plan, index, shards)) + _fetched_bytes(plan, index, shards)


def reductions(
    plan: Plan, profile: ModelProfile, layers: Sequence[LayerCosts], bounds: Sequence[int], member: int | None = None
) -> list[Reduction]:
    """Return what one device of each stage holds while its gradients are reduced at the end of an iteration and stepped, [stages].

    Only under ZeRO-1 do gradients arrive elsewhere than they were summed. Shards that other devices own too are waited for at
    once, to be summed over these; others when the optimizer steps. Where devices hold unlike shares of the states, those of the one
    with this place in its pipeline rank.
    """
    has_other_owners = len(plan.schedule.placement) > 1 or sharding_group(plan) is not None
    found = []
    for index, row in enumerate(layers):
        kinds = _tensors(plan, profile, index, row, bounds, member)
        most = _scattered_bytes(plan, index, [*kinds[0], *kinds[1]])
        stepped = _stepped_bytes(plan, profile, index, row, bounds, member, kinds)
        found.append(Reduction(most, 0.0 if has_other_owners else most, stepped))
    return found


def _scattered_bytes(plan: Plan, index: int, shards: Sequence[tuple[float, int]]) -> float:
    """Return the bytes in which all of a stage's gradients arrive, given the elements of shards and how many there are of each."""
    if plan.stages[index].degrees.zero != 1 or not has_even_shards(plan, index):
        return 0.0
    copies = _is_cpu(plan, index)
    elements = sum(size * (1 + count if copies else 1) for size, count in shards if count > 1)
    return elements * plan.job.optimizer.gradient_bytes


def _gathered_bytes(plan: Plan, index: int, shards: Sequence[tuple[float, int]]) -> float:
    """Return the bytes of the copy in which even shards of weights leave, one tensor after the other."""
    divided = [size for size, count in shards if count > 1]
    if not divided or not has_even_shards(plan, index):
        return 0.0
    return max(divided) * plan.job.optimizer.parameter_bytes


def _fetched_bytes(plan: Plan, index: int, shards: Sequence[tuple[float, int]]) -> float:
    """Return the bytes of masters that come from the host for a step of the stage, all of them."""
    stage, optimizer = plan.stages[index], plan.job.optimizer
    if optimizer.name in MATRIX_OPTIMIZERS or not optimizer.has_masters:
        return 0.0
    return sum(size for size, _ in shards) * stage.optimizer_offload * optimizer.stepped_bytes


def _elementwise_bytes(plan: Plan, index: int, tensors: Sequence[float]) -> float:
    """Return what a step holds, given the elements of what one device's optimizer steps, beside masters from the host.

    Those move what stays of a tensor's, for which there are two places meanwhile.
    """
    stage, optimizer = plan.stages[index], plan.job.optimizer
    width, is_cpu = optimizer.stepped_bytes, _is_cpu(plan, index)
    makes_copies, widens = optimizer.name in ("adam", "adamw", "custom"), optimizer.has_masters
    copies = (_COPIES_ONE_BY_ONE if is_cpu else _COPIES_TOGETHER) * makes_copies
    staying = [size * (1.0 - stage.optimizer_offload) for size in tensors]
    most = max(staying, default=0.0)
    most_widened = min(widened_elements("cpu" if is_cpu else "cuda"), most)
    needed = (1 + copies) * most_widened if widens else copies * (most if is_cpu else sum(staying))
    piece = min(PIECE_ELEMENTS, max(tensors, default=0.0) * stage.optimizer_offload)
    moments = optimizer.state_bytes - width * widens
    moved = width * most * (widens and stage.optimizer_offload > 0)
    return max(width * needed, piece * (moments + (copies + widens) * width), moved)


def _owned(
    plan: Plan, profile: ModelProfile, index: int, bounds: Sequence[int], member: int | None
) -> list[SteppedBucket] | None:
    """Return what a device steps tensor by tensor where it is known how tensors are cut between bands of tiles."""
    buckets = None if member is None else owned_buckets(plan, profile, index, bounds, member)
    if buckets is None:
        return None
    return [SteppedBucket(tuple(map(stepped_part, bucket.tensors)), inf, 1, is_even=False) for bucket in buckets]


def _buckets(
    plan: Plan,
    profile: ModelProfile,
    index: int,
    row: LayerCosts,
    bounds: Sequence[int],
    shards: tuple[Shards, Shards],
) -> list[SteppedBucket]:
    """Return what one device steps tensor by tensor, given the shards of its buckets, those of divided experts apart."""
    degrees, is_even = plan.stages[index].degrees, has_even_shards(plan, index)
    by_layer = []
    for layer in range(bounds[index], bounds[index + 1]):
        kind = profile.classes[profile.layer_classes[layer]]
        by_layer.append(stepped_tensors(kind, degrees, float(row.table.dense_parameters[layer])))
    found = []
    for sizes, each in zip(shards, zip(*by_layer, strict=True), strict=True):
        together = tuple(tensor for tensors in each for tensor in tensors)
        if num_shards(plan, index) == 1:
            found.append(SteppedBucket(together, inf, 1, is_even))
        elif len(sizes) == 1:
            found.append(SteppedBucket(together, *sizes[0], is_even))
        else:  # a layer after the other, then weights that several share
            found += [
                SteppedBucket(tensors, size, count, is_even)
                for tensors, (size, count) in zip(each, sizes, strict=False)
            ]
    return found


def _tensors(
    plan: Plan, profile: ModelProfile, index: int, row: LayerCosts, bounds: Sequence[int], member: int | None
) -> tuple[Shards, Shards]:
    """Return the elements of each tensor that one device's optimizer steps, parameters or shards of buckets, and how many shards.

    Those of divided experts stand apart, behind the others.
    """
    degrees = plan.stages[index].degrees
    inside = range(bounds[index], bounds[index + 1])
    if num_shards(plan, index) == 1 and not plan.job.optimizer.has_masters:
        classes = [profile.classes[profile.layer_classes[layer]] for layer in inside]
        dense = [float(row.table.dense_parameters[layer]) for layer in inside]
        return [(_largest(layer, degrees, own), 1) for layer, own in zip(classes, dense, strict=True)], []
    ties = shared_weights(plan, profile)
    together, experts = reduced_parameters(row, slice(inside.start, inside.stop), degrees)
    dense = unit_parameters(together, inside.start, ties)
    share = state_share(plan, index, member)
    owners = expert_shards(degrees) if degrees.zero else 1
    by_layer = degrees.zero >= 2
    found = dense if by_layer and num_shards(plan, index) > 1 else [sum(dense)]
    owned = experts if by_layer and owners > 1 else [sum(experts)]
    return [(size * share, num_shards(plan, index)) for size in found], [(size / owners, owners) for size in owned]


@dataclass(frozen=True, eq=False)
class PassingBytes:
    """Bytes of each layer of a stage under ZeRO-2 and 3; else 0.

    Parameters
    ----------
    phases : of each layer's backward; none where its gradients stay.
    whole : weights that are gathered; copied : beside them while they come, [layers].
    at_once : all weights of the stage, where a run of forwards or backwards gathers them together; else those that several
        of its layers share.
    staying : gradients that are made in an input gradient and leave with those that wait for the weight gradient, [layers].
    beside_product : what the largest product of a weight gradient that waits takes beside itself and what waits, as the profile
        measured it: a workspace, or what it is rounded from, in bf16 on processors without units for it, [layers].
    """

    phases: tuple[tuple[GradientPhase, ...], ...]
    whole: Floats
    copied: Floats
    at_once: float = 0.0
    staying: Floats | None = None
    beside_product: Floats | None = None


def passing_bytes(
    plan: Plan, profile: ModelProfile, index: int, row: LayerCosts, bounds: Sequence[int]
) -> PassingBytes:
    """Return what one device of a stage has on its way, layer by layer."""
    stage, optimizer, is_cpu = plan.stages[index], plan.job.optimizer, _is_cpu(plan, index)
    inside = slice(bounds[index], bounds[index + 1])
    whole, copied = np.zeros((2, inside.stop - inside.start))
    if stage.degrees.zero < 2:
        return PassingBytes((), whole, copied)
    is_gathered, is_even = stage.degrees.zero == 3, has_even_shards(plan, index)
    together, experts = (np.array(each) for each in reduced_parameters(row, inside, stage.degrees))
    together = together - _met_once(plan, profile, inside)
    held, ends, waiting = _shared_inside(plan, profile, inside)
    together = together - held
    shared_bytes = float(ends.sum()) * optimizer.parameter_bytes * (is_gathered and num_shards(plan, index) > 1)
    leaving = {}
    stacks = np.array([_has_stacks(profile.classes[name]) for name in profile.layer_classes[inside]])
    staying = (
        _undeferred(row, inside, stage.degrees) * stacks * (num_shards(plan, index) > 1) * optimizer.gradient_bytes
    )
    for kind, parameters, shards in (
        ("experts", experts, expert_shards(stage.degrees)),
        ("others", together, num_shards(plan, index)),
    ):
        if shards > 1:
            gradients = (parameters + (ends if kind == "others" else 0.0)) * optimizer.gradient_bytes
            leaving[kind] = (gradients, gradients * (1.0 + 1.0 / shards + is_cpu if is_even else 1.0))
            whole += parameters * optimizer.parameter_bytes * is_gathered
            # A copy of the masters' part leaves, where they are not on the host and a copy is there always.
            narrow = 1.0 / shards if optimizer.has_masters and not stage.optimizer_offload else 0.0
            copied += parameters * optimizer.parameter_bytes * is_gathered * ((is_cpu and is_even) + narrow)
    beside_product = np.array(
        [
            _beside_product(profile, row, layer, stage.degrees, optimizer.gradient_bytes)
            for layer in range(inside.start, inside.stop)
        ]
    )
    phases = tuple(
        _phases(
            plan,
            row,
            layer,
            stage.degrees,
            {kind: (float(g[at]), float(f[at])) for kind, (g, f) in leaving.items()},
            float(waiting[at]) * optimizer.gradient_bytes,
            bool(stacks[at]),
        )
        for at, layer in enumerate(range(inside.start, inside.stop))
    )
    if gathers_by_run(plan):
        at_once = float(whole.sum()) + shared_bytes
        nothing = np.zeros(len(whole))
        return PassingBytes(phases, nothing, nothing, at_once=at_once, staying=staying, beside_product=beside_product)
    return PassingBytes(phases, whole, copied, at_once=shared_bytes, staying=staying, beside_product=beside_product)


def _has_stacks(layer: LayerClass) -> bool:
    """Whether its routed experts are stacks, as they are multiplied at once; so are those of which nothing is known."""
    own = [tensor for tensor in layer.tensors if tensor.of_experts]
    return not layer.tensors or any(tensor.num_matrices > 1 for tensor in own)


def _undeferred(row: LayerCosts, inside: slice, degrees: Degrees) -> Floats:
    """Return the parameters of experts that leave with the rest of their layer, where some of that waits, [layers]."""
    waits = row.late_bytes[0, inside] > 0
    return np.asarray(row.table.expert_parameters[inside] * waits * (degrees.expert_split == 1))


def _shared_inside(plan: Plan, profile: ModelProfile, inside: slice) -> tuple[Floats, Floats, Floats]:
    """Return the parameters that only layers among some share, three times, [layers] each.

    Those that each of the layers holds; at the first of them, where their gradients leave; and at those before the last, where
    the gradient of the last waits.
    """
    held, ends, waiting = np.zeros((3, inside.stop - inside.start))
    for tie in shared_weights(plan, profile):
        first, *_, last = tie.layers
        if len(tie.stages) > 1 or not inside.start <= first < inside.stop:
            continue
        held[[layer - inside.start for layer in tie.layers]] += tie.num_parameters
        ends[first - inside.start] += tie.num_parameters
        waiting[first - inside.start : last - inside.start] += tie.num_parameters
    return held, ends, waiting


def _met_once(plan: Plan, profile: ModelProfile, inside: slice) -> Floats:
    """Return the parameters of some layers that other stages share: whole, and reduced once an iteration, [layers]."""
    found = np.zeros(inside.stop - inside.start)
    for tie in shared_weights(plan, profile):
        for layer in tie.layers if len(tie.stages) > 1 else ():
            if inside.start <= layer < inside.stop:
                found[layer - inside.start] += tie.num_parameters
    return found


def _phases(
    plan: Plan,
    row: LayerCosts,
    layer: int,
    degrees: Degrees,
    leaving: Mapping[str, tuple[float, float]],
    waiting: float,
    has_stacks: bool,
) -> tuple[GradientPhase, ...]:
    """Return the phases of a layer's backward, given whole and scattered gradients of each kind that leaves.

    Beside all of them wait the bytes of a later layer's gradient of a shared weight. Where they were not measured, the most is
    in front of the first kind: experts are the larger part.
    """
    leaving = {kind: pair for kind, pair in leaving.items() if pair[0] > 0}
    if not leaving:
        return ()
    measured = row.table.phases[layer] if row.table.phases else ()
    if not measured:
        kept, workspace = float(row.table.activation_bytes[0, layer]), float(row.table.workspace_bytes[0, layer])
        found = []
        for kind, (gradients, scattered) in leaving.items():
            by_input = has_stacks and kind == "experts"
            found.append(GradientPhase(kept, max(kept, gradients) + workspace, gradients, scattered, by_input=by_input))
            kept = workspace = 0.0
        return (*found, GradientPhase(0.0, 0.0))
    phases = _measured_phases(plan, measured, row, layer, degrees, leaving, has_stacks=has_stacks)
    return tuple(replace(phase, begin=phase.begin + waiting, peak=phase.peak + waiting) for phase in phases)


def _measured_phases(
    plan: Plan,
    measured: Sequence[PhaseBytes],
    row: LayerCosts,
    layer: int,
    degrees: Degrees,
    leaving: Mapping[str, tuple[float, float]],
    *,
    has_stacks: bool,
) -> tuple[GradientPhase, ...]:
    """Return a layer's phases as they were measured, with the gradients that one device makes of each kind.

    Experts that nothing divides leave with the rest of their layer: what comes before is one phase with it.
    """
    width, share = plan.job.optimizer.gradient_bytes, 1.0 / degrees.cp
    divided = degrees.expert_split
    experts = float(row.table.expert_parameters[layer]) * width
    is_apart = divided > 1
    kinds = [phase.ends_with for phase in measured if phase.ends_with != "none"]
    rest = leaving.get("others", (0.0, 0.0))[0] - (0.0 if is_apart else experts)
    made = {"experts": experts, "others": max(rest, 0.0), "none": 0.0}
    own = {**made, "experts": experts * divided}
    found: list[GradientPhase] = []
    begin, peak, held = None, 0.0, 0.0
    for phase in measured:
        kind = phase.ends_with
        begin = phase.begin_bytes * share + held if begin is None else begin
        peak = max(peak, (phase.peak_bytes - own[kind]) * share + made[kind] + held)
        if kind == "none":
            found.append(GradientPhase(begin, peak))
        elif is_apart or kind == kinds[-1]:
            gone = leaving.get(kind if is_apart else "others", (0.0, 0.0))
            by_input = has_stacks and is_apart and kind == "experts"
            found.append(GradientPhase(begin, peak, *gone, by_input=by_input))
            begin, peak, held = None, 0.0, 0.0
        else:
            held += made[kind]
    return tuple(found)


def _is_cpu(plan: Plan, index: int) -> bool:
    name = plan.stages[index].group
    device = next((group.device for group in plan.cluster.groups if group.name == name), None)
    return (device or plan.cluster.groups[0].device).kind == "cpu"


def _largest(layer: LayerClass, degrees: Degrees, dense: float) -> float:
    """Return the elements of a layer's largest tensor on one device, which holds `dense` of its parameters without experts'.

    Where its tensors are not known, those of its operators, or all of an embedding or head.
    """
    if layer.tensors:
        return max(tensor.size for tensors in stepped_tensors(layer, degrees, dense) for tensor in tensors)
    whole = sum(operator.parameters for operator in layer.operators)
    if whole:
        return dense * max(operator.parameters for operator in layer.operators) / whole
    return dense if layer.kind in ("embedding", "head") else 0.0


def _beside_product(profile: ModelProfile, row: LayerCosts, layer: int, degrees: Degrees, width: float) -> float:
    """Return what the largest weight gradient of a layer that may wait takes beside itself, given the bytes of its numbers.

    Those of experts in stacks never wait; 0 where no tensor is known.
    """
    kind = profile.classes[profile.layer_classes[layer]]
    waiting = tuple(tensor for tensor in kind.tensors if not (tensor.of_experts and tensor.num_matrices > 1))
    kind = kind.model_copy(update={"tensors": waiting})
    product = width * _largest(kind, degrees, float(row.table.dense_parameters[layer]))
    return max(float(row.table.weight_grad_workspace_bytes[layer]) - product, 0.0) if product else 0.0
