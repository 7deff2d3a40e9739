"""The cost of one layer class on one device, analytic, with every collective it issues.

Compute is the sum over the operators of their rooflines. Traffic is derived from the operators' marks: where a
tensor-split region begins or ends, attention under context parallelism, dispatch and combine of experts. What is kept
follows Korthikanti et al. 2022 (with materialised scores) or FlashAttention (without), as the operators say:

    none       every operator's kept bytes            34 sbh + 5 a s^2 b  for their transformer layer
    selective  those recomputed only by `full`        34 sbh
    full       the layer's input                       2 sbh

Full recomputation runs the whole forward again, its collectives too; selective the operators it drops.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from stagewright.planner.cost.communication import Operation, collective_s, sent_bytes
from stagewright.planner.cost.groups import GroupShape
from stagewright.planner.cost.number import Number, is_positive, larger, smaller
from stagewright.planner.cost.operator_cost import PhaseSeconds, Setting, Work, phase_seconds, work
from stagewright.planner.cost.options import CostOptions
from stagewright.planner.cost.rank_groups import RankGroups
from stagewright.planner.cost.roofline import Roofline
from stagewright.planner.documents.operator import Operator
from stagewright.planner.documents.plan import Degrees
from stagewright.planner.documents.profile import Source


class Exchange(NamedTuple):
    """One collective that a device takes part in for each microbatch.

    `times_again` is how often full recomputation runs it in the backward. It stops at the last tensor that the backward
    needs, so what comes behind that (the sum that ends a feed-forward layer without dropout) is not run again.
    """

    forward: bool
    operation: Operation
    group_name: str
    payload_bytes: Number
    times: int = 1
    hidden_under_s: Number = 0.0
    times_again: int = 0


@dataclass(frozen=True)
class PhaseBytes:
    """A part of a backward of the whole sequence, with all gradients of the layer (`documents.profile.BackwardPhase`)."""

    ends_with: str
    begin_bytes: float
    peak_bytes: float


@dataclass(frozen=True)
class LayerCost:
    """Costs of one layer for one microbatch on one device, levels in the order none, selective, full.

    `again_link_bytes` is what full recomputation sends beside `link_bytes`, of which `forward_link_bytes` is the forward's part.
    `split_excess_s` is what the backward takes longer in two pieces. `input_bytes` is not known here: the activation of level
    full is set where the layer's predecessors are. A level whose `freed_at_input_grad` is None holds what level none holds
    after the input gradient. `frozen_parameters` stay whole under every ZeRO stage and have neither gradient nor optimizer
    state. For several microbatch sizes at once, numbers that grow with the microbatch are arrays.
    """

    forward_s: Number
    input_grad_s: Number
    weight_grad_s: Number
    recompute_s: tuple[Number, Number, Number]
    kept_bytes: tuple[Number, Number]
    workspace_bytes: Number
    output_bytes: Number
    dense_parameters: float
    expert_parameters: float
    model_flops: Number
    exposed_forward_s: Number = 0.0
    exposed_backward_s: Number = 0.0
    link_bytes: dict[str, Number] = field(default_factory=dict)
    forward_link_bytes: dict[str, Number] = field(default_factory=dict)
    again_link_bytes: dict[str, Number] = field(default_factory=dict)
    freed_at_input_grad: tuple[float, float | None, float | None] = (0.0, None, None)
    optimizer_s: float | None = None
    split_excess_s: float = 0.0
    full_kept_bytes: float | None = None
    source: Source = Source.ANALYTIC
    frozen_parameters: float = 0.0
    phases: tuple[PhaseBytes, ...] = ()
    unkept_input_bytes: float | None = None
    forward_workspace_bytes: tuple[float, float, float] | None = None
    input_grad_workspace_bytes: float | None = None
    weight_grad_workspace_bytes: float = 0.0


@dataclass(frozen=True)
class OperatorCost:
    """What one operator of a layer adds on one device, before its exchanges are priced."""

    operator: Operator
    size: Work
    seconds: PhaseSeconds
    output_bytes: Number
    dense_parameters: float
    expert_parameters: float
    model_flops: Number
    exchanges: Sequence[Exchange]


def operator_cost(operator: Operator, setting: Setting, roofline: Roofline, options: CostOptions) -> OperatorCost:
    """Return an operator's part of its layer's cost."""
    size = work(operator, setting)
    seconds = phase_seconds(operator, size, roofline)
    dense, expert = device_parameters(operator, setting)
    scale = setting.element_bytes / setting.profile_element_bytes
    return OperatorCost(
        operator,
        size,
        seconds,
        output_bytes=setting.tokens(operator) * operator.output_bytes_per_token * scale,
        dense_parameters=dense,
        expert_parameters=expert,
        model_flops=whole_flops(operator, setting),
        exchanges=operator_exchanges(operator, setting, options, seconds.forward, seconds.input_grad),
    )


@dataclass(frozen=True)
class Sight:
    """Which degrees the costs of some operators depend on, beside tensor, sequence and context parallelism."""

    vocabulary: bool
    experts: bool

    @classmethod
    def of(cls, operators: Sequence[Operator]) -> Sight:
        """Return what some operators see."""
        axes = {axis for operator in operators for axis in (*operator.split, *(operator.kept_split or ()))}
        dispatches = any(operator.kind == "dispatch" for operator in operators)
        return cls("vocab" in axes, bool(axes & {"ep", "etp"}) or dispatches)

    def seen(self, degrees: Degrees) -> tuple[object, ...]:
        """Return the degrees they depend on."""
        return (
            degrees.tp,
            degrees.cp,
            degrees.ulysses,
            degrees.sp,
            degrees.vocab_parallel if self.vocabulary else None,
            (degrees.ep, degrees.etp) if self.experts else None,
        )


def analytic_cost(
    operators: Sequence[OperatorCost], setting: Setting, groups: RankGroups, options: CostOptions
) -> LayerCost:
    """Return the cost of a layer from its operators' costs; without bytes on links for several microbatch sizes."""
    nothing: Number = 0.0
    forward_s = input_s = weight_s = selective_s = nothing
    kept_none = kept_selective = workspace = output_bytes = flops = nothing
    routed_forward_s = routed_backward_s = nothing
    dense = expert = 0.0
    last_kept = max((index for index, cost in enumerate(operators) if is_positive(cost.size.kept_bytes)), default=-1)
    for cost in operators:
        operator, size, seconds = cost.operator, cost.size, cost.seconds
        if "ep" in operator.split and operator.kind != "dispatch":
            routed_forward_s += seconds.forward
            routed_backward_s += seconds.input_grad + seconds.weight_grad
        forward_s += seconds.forward
        input_s += seconds.input_grad
        weight_s += seconds.weight_grad
        kept_none += size.kept_bytes
        workspace = larger(workspace, size.output_bytes)
        if operator.recomputed_by == "selective":
            selective_s += seconds.forward
        else:
            kept_selective += size.kept_bytes
        output_bytes += cost.output_bytes
        dense += cost.dense_parameters
        expert += cost.expert_parameters
        flops += cost.model_flops
    # Tokens in r chunks: all but the first chunk's dispatch and the last one's combine run beside experts.
    hidden = 1 - 1 / options.expert_chunks
    exchanges: list[Exchange] = []
    for index, cost in enumerate(operators):
        needed = index < last_kept if cost.operator.exits else index <= last_kept
        for item in cost.exchanges:
            under_s = item.hidden_under_s
            if item.group_name == "ep":
                under_s = hidden * (routed_forward_s if item.forward else routed_backward_s)
            again = item.times if item.forward and needed else 0
            exchanges.append(
                Exchange(item.forward, item.operation, item.group_name, item.payload_bytes, item.times, under_s, again)
            )
    traffic = price(exchanges, groups, counts_bytes=isinstance(setting.microbatch, int))
    forward_s += traffic.forward_s
    return LayerCost(
        forward_s=forward_s,
        input_grad_s=input_s + traffic.backward_s,
        weight_grad_s=weight_s,
        recompute_s=(0.0, selective_s, forward_s),
        kept_bytes=(kept_none, kept_selective),
        workspace_bytes=2 * workspace,
        output_bytes=output_bytes / setting.divisor(("sp",)),
        dense_parameters=dense,
        expert_parameters=expert,
        model_flops=flops,
        exposed_forward_s=traffic.forward_s,
        exposed_backward_s=traffic.backward_s,
        link_bytes=traffic.link_bytes,
        forward_link_bytes=traffic.forward_bytes,
        again_link_bytes=traffic.again_bytes,
    )


def frozen_cost(cost: LayerCost, backward: Literal["full", "input", "none"]) -> LayerCost:
    """Return the cost of a layer whose weights are not trained, from that of the trained layer.

    Without weight gradients a forward and an input gradient are left; without gradients at all, a forward that keeps nothing.
    A step counts three times `model_flops` for forward and backward, so a frozen layer has two thirds or one third of them.
    What a layer with frozen weights keeps is taken as unchanged, which is at least what it needs.
    """
    if backward == "full":
        return cost
    frozen = replace(
        cost,
        weight_grad_workspace_bytes=0.0,
        dense_parameters=0.0,
        expert_parameters=0.0,
        weight_grad_s=0.0,
        split_excess_s=0.0,
        optimizer_s=0.0,
        frozen_parameters=cost.dense_parameters + cost.expert_parameters,
        model_flops=cost.model_flops * 2 / 3,
    )
    if backward == "input":
        return frozen
    return replace(
        frozen,
        input_grad_s=0.0,
        recompute_s=(0.0, 0.0, 0.0),
        kept_bytes=(0.0, 0.0),
        full_kept_bytes=0.0,
        unkept_input_bytes=0.0,
        model_flops=cost.model_flops / 3,
        exposed_backward_s=0.0,
        link_bytes=cost.forward_link_bytes,
        again_link_bytes={},
    )


def device_parameters(operator: Operator, setting: Setting) -> tuple[float, float]:
    """Return (dense, expert) parameters of an operator on one device, before ZeRO."""
    if "ep" in operator.split:
        return 0.0, operator.parameters / setting.degrees.expert_split
    return operator.parameters / setting.divisor([axis for axis in operator.split if axis != "sp"]), 0.0


def whole_flops(operator: Operator, setting: Setting) -> Number:
    """Return the forward FLOP of the matrix products of a microbatch over all devices, attention counted in full."""
    if operator.kind not in ("matmul", "attention", "convolution", "router"):
        return 0.0
    length = setting.length(operator)
    attended = min(length, operator.window or length)
    per_token = operator.flops_per_token + operator.flops_per_token_per_position * attended
    return setting.microbatch * length * per_token


def operator_exchanges(
    operator: Operator, setting: Setting, options: CostOptions, forward_s: Number, input_grad_s: Number
) -> list[Exchange]:
    """Return the collectives an operator issues, and the compute each may hide under."""
    found = _tensor_exchanges(operator, setting, options, forward_s, input_grad_s)
    if operator.summed_features:
        payload = setting.tokens(operator) * operator.summed_features * _SUM_BYTES
        found += [Exchange(forward, "all-reduce", "tp", payload) for forward in (True, False)]
    if operator.kind == "attention" and setting.degrees.cp > 1:
        found += _context_exchanges(operator, setting, options, forward_s, input_grad_s)
    if operator.kind == "dispatch":
        found += _expert_exchanges(operator, setting, options)
    return found


@dataclass(frozen=True)
class Traffic:
    """Exposed seconds of a layer's exchanges, and the bytes one device sends by "operation/group".

    `again_bytes` is what full recomputation sends beside `link_bytes`, of which `forward_bytes` is the forward's part.
    """

    forward_s: Number
    backward_s: Number
    link_bytes: dict[str, Number]
    forward_bytes: dict[str, Number]
    again_bytes: dict[str, Number]


def price(exchanges: Sequence[Exchange], groups: RankGroups, *, counts_bytes: bool = True) -> Traffic:
    """Return what a layer's exchanges cost; their bytes are left out where they do not count.

    What hides under compute slows it down by the link's `overlap_slowdown`, and that counts as exposed.
    """
    exposed: list[Number] = [0.0, 0.0]
    sent: dict[str, Number] = {}
    sent_forward: dict[str, Number] = {}
    sent_again: dict[str, Number] = {}
    for exchange in exchanges:
        shape = _SHAPES[exchange.group_name](groups)
        if shape.size == 1:
            continue
        seconds = exchange.times * collective_s(exchange.operation, exchange.payload_bytes, shape)
        slowdown = max(tier.link.overlap_slowdown for tier in shape.tiers)
        slowed_s = smaller(seconds, exchange.hidden_under_s) * (slowdown - 1)
        exposed[0 if exchange.forward else 1] += larger(0.0, seconds - exchange.hidden_under_s) + slowed_s
        if not counts_bytes:
            continue
        name = f"{exchange.operation}/{_LINK_NAMES.get(exchange.group_name, exchange.group_name)}"
        once = sent_bytes(exchange.operation, exchange.payload_bytes, shape.size)
        sent[name] = sent.get(name, 0.0) + exchange.times * once
        if exchange.forward:
            sent_forward[name] = sent_forward.get(name, 0.0) + exchange.times * once
        if exchange.times_again:
            sent_again[name] = sent_again.get(name, 0.0) + exchange.times_again * once
    return Traffic(exposed[0], exposed[1], sent, sent_forward, sent_again)


_SHAPES: dict[str, Callable[[RankGroups], GroupShape]] = {
    "tp": lambda groups: groups.tp,
    "ulysses": lambda groups: groups.ulysses,
    "ring": lambda groups: groups.ring,
    "cp": lambda groups: groups.context,
    "ep": lambda groups: groups.ep,
    "etp": lambda groups: groups.etp,
    "dp": lambda groups: groups.replicas,
}
_SUM_BYTES = 4.0
_LINK_NAMES = {"ulysses": "cp", "ring": "cp"}


def _tensor_exchanges(
    operator: Operator, setting: Setting, options: CostOptions, forward_s: Number, input_grad_s: Number
) -> list[Exchange]:
    """Return the conjugate pair of a split region: nothing forward and a sum backward where it begins, the reverse at
    its end; a gather and a scatter instead under sequence parallelism (Korthikanti et al., figure 5)."""
    routed = "ep" in operator.split
    degree = setting.degrees.etp if routed else setting.divisor([a for a in operator.split if a in ("tp", "vocab")])
    if degree == 1 or not (operator.enters or operator.exits):
        return []
    tokens = setting.tokens(operator)
    group = "tp"
    if routed:
        group = "etp"
        tokens *= max(setting.architecture.experts_per_token, 1) * degree / setting.degrees.tp
    scatters = setting.degrees.sp or routed
    features = operator.inner_features if operator.enters else operator.output_features
    payload = tokens * features * setting.element_bytes
    share = options.tensor_overlap
    whole: Operation = "all-reduce"
    if not scatters:
        hidden = share * (input_grad_s if operator.enters else forward_s)
        return [Exchange(operator.exits, whole, group, payload, hidden_under_s=hidden)]
    gathers_forward = operator.enters
    return [
        Exchange(gathers_forward, "all-gather", group, payload, hidden_under_s=share * forward_s),
        Exchange(not gathers_forward, "reduce-scatter", group, payload, hidden_under_s=share * forward_s),
    ]


def _context_exchanges(
    operator: Operator, setting: Setting, options: CostOptions, forward_s: Number, input_grad_s: Number
) -> list[Exchange]:
    """Return head exchange inside groups of u and the ring of keys and values over the r = cp / u groups (USP)."""
    degrees = setting.degrees
    tokens, element = setting.tokens(operator), setting.element_bytes
    queries = tokens * operator.output_features / degrees.tp * element
    keys_values = tokens * operator.kv_features / setting.divisor(("kv",)) * element
    found: list[Exchange] = []
    if degrees.ulysses > 1:
        for forward in (True, False):
            found.append(Exchange(forward, "all-to-all", "ulysses", queries, times=2))
            found.append(Exchange(forward, "all-to-all", "ulysses", keys_values / 2, times=2))
    hops = degrees.cp // degrees.ulysses - 1
    if hops > 0:
        overlapped = options.context_overlap
        found.append(Exchange(True, "send-receive", "ring", keys_values, hops, overlapped * forward_s))
        found.append(Exchange(False, "send-receive", "ring", 2 * keys_values, hops, overlapped * input_grad_s))
    return found


def _expert_exchanges(operator: Operator, setting: Setting, options: CostOptions) -> list[Exchange]:
    """Return dispatch and combine, forward and backward: 2 k cf bsh (e-1)/e elements each way (GShard).

    Each tensor-parallel device dispatches its share of the tokens; without sequence parallelism it holds them all, so the
    results are gathered afterwards, and backwards the gradients of tokens and of their k routing weights. Where nobody
    divides experts, each device runs them on the tokens that it has.
    """
    if setting.degrees.expert_split == 1:
        return []
    payload = routed_bytes(operator, setting, options)
    found = [Exchange(forward, "all-to-all", "ep", payload, times=2) for forward in (True, False)]
    if setting.degrees.tp > 1 and not setting.degrees.sp:
        whole = setting.tokens(operator) * operator.output_features * setting.element_bytes
        weights = setting.tokens(operator) * setting.architecture.experts_per_token * setting.element_bytes
        found += [Exchange(True, "all-gather", "tp", whole), Exchange(False, "all-gather", "tp", whole + weights)]
    return found


def routed_bytes(operator: Operator, setting: Setting, options: CostOptions) -> Number:
    """Return the bytes that one device sends to experts: k copies of each of its tokens, or cf k with a capacity."""
    tokens = setting.tokens(operator) / setting.degrees.tp
    copies = max(setting.architecture.experts_per_token, 1) * (options.expert_capacity or setting.expert_imbalance)
    return tokens * copies * operator.output_features * setting.product_bytes
