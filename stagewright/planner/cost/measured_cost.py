"""The cost of one layer class from its measured table: the exact configuration, or between measured neighbours.

Inside the grid of one tensor degree, every number is interpolated linearly in the microbatch and in the sequence length
and called fitted. Outside the grid nothing is guessed: `measured_cost` returns None and the caller falls back to the
operators, or says that the configuration was not measured. Context parallelism was not measured: it divides a
causal-balanced layer by cp, and the result is called fitted.

Shards are measured without sequence parallelism. With it a block of degree t sends gathers and scatters in place of sums,
and what its ranks hold alike is split along the sequence, but for the whole inputs G that column layers gather and keep for
their weight gradients. With K_1 and K_t bytes kept at degrees 1 and t, of which C are copied and the rest is split,

    K_1 = S + C,  K_t = S / t + C   so   C = (t K_t - K_1) / (t - 1)   and with sp   K_t - (C - G) (1 - 1 / t)
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

from stagewright.planner.cost.layer_cost import Exchange, LayerCost, PhaseBytes, price
from stagewright.planner.cost.number import Number
from stagewright.planner.cost.operator_cost import Setting
from stagewright.planner.cost.rank_groups import RankGroups
from stagewright.planner.documents.profile import Collective, ConfigurationCost, LayerClass, Recompute, Source

_NUMBERS = (
    "forward_s",
    "input_grad_s",
    "weight_grad_s",
    "split_excess_s",
    "workspace_bytes",
    "output_bytes",
    "forward_flops",
    "optimizer_s",
)
_SECONDS = ("forward_s", "input_grad_s", "weight_grad_s", "split_excess_s")


@dataclass(frozen=True)
class Blend:
    """Measured entries with weights that add up to 1."""

    entries: tuple[tuple[ConfigurationCost, float], ...]

    @property
    def is_exact(self) -> bool:
        return len(self.entries) == 1


def blend(layer: LayerClass, microbatch: int, sequence_length: int, tensor_degree: int) -> Blend | None:
    """Return the entries between which a configuration lies; None outside the measured grid."""
    entries = [cost for cost in layer.costs if cost.tensor_degree == tensor_degree]
    by_key = {(cost.microbatch, cost.sequence_length): cost for cost in entries}
    exact = by_key.get((microbatch, sequence_length))
    if exact is not None:
        return Blend(((exact, 1.0),))
    corners: list[tuple[ConfigurationCost, float]] = []
    for size, size_weight in _neighbours(sorted({cost.microbatch for cost in entries}), microbatch):
        for length, length_weight in _neighbours(sorted({cost.sequence_length for cost in entries}), sequence_length):
            corner = by_key.get((size, length))
            if corner is None:
                return None
            corners.append((corner, size_weight * length_weight))
    return Blend(tuple(corners)) if corners else None


def measured_cost(layer: LayerClass, setting: Setting, groups: RankGroups) -> LayerCost | None:
    """Return the cost of a layer from its measured entries; None where the configuration lies outside them.

    Entries are of one microbatch size, so the setting has to be.
    """
    degrees = setting.degrees
    assert isinstance(setting.microbatch, int)
    split_vocabulary = degrees.vocab_parallel or layer.kind not in ("embedding", "head", "loss")
    tensor_degree = degrees.tp if split_vocabulary else 1
    found = blend(layer, setting.microbatch, setting.sequence_length, tensor_degree)
    if found is None:
        return None
    numbers = {name: _mean(found, [getattr(entry, name) for entry, _ in found.entries]) for name in _NUMBERS}
    splits_sequence = degrees.sp and layer.kind == "block"
    if splits_sequence and layer.expert_parameters:
        numbers = _with_divided_tokens(layer, setting, numbers)
    tokens = 1.0 / degrees.cp
    exchanges = [
        exchange
        for entry, weight in found.entries
        for item in entry.collectives
        if degrees.vocab_parallel or not item.of_vocabulary
        for exchange in (
            _sequence_exchanges(item, weight * tokens) if splits_sequence else (_exchange(item, weight * tokens),)
        )
    ]
    traffic = price(exchanges, groups)
    # Of what goes from layer to layer the hidden state is split, and what else there is (a bias of positions) is whole.
    split_away = 0.0
    if splits_sequence:
        hidden = hidden_bytes(found)
        of_hidden = numbers["output_bytes"] if hidden is None else min(hidden, numbers["output_bytes"])
        split_away = tokens * of_hidden * (1.0 - 1.0 / tensor_degree)
    forward_s = numbers["forward_s"] * tokens + traffic.forward_s
    levels = (Recompute.NONE, Recompute.SELECTIVE, Recompute.FULL)
    kept = [_level(found, level) * tokens for level in levels]
    spared = [0.0] * len(levels)
    if splits_sequence:
        spared = [tokens * _spared_bytes(layer, setting, found, level) for level in levels]
        kept = [bytes - less for bytes, less in zip(kept, spared, strict=True)]
    dense, expert = _parameters(layer, tensor_degree, setting)
    return LayerCost(
        forward_s=forward_s,
        input_grad_s=numbers["input_grad_s"] * tokens + traffic.backward_s,
        weight_grad_s=numbers["weight_grad_s"] * tokens,
        split_excess_s=numbers["split_excess_s"] * tokens,
        recompute_s=_recompute(found, tokens, forward_s),
        kept_bytes=(kept[0], kept[1]),
        full_kept_bytes=kept[2] if _has(found, Recompute.FULL) else None,
        workspace_bytes=numbers["workspace_bytes"] * tokens,
        forward_workspace_bytes=_forward_workspaces(found, tokens),
        input_grad_workspace_bytes=_told(
            found, [entry.input_grad_workspace_bytes for entry, _ in found.entries], tokens
        ),
        weight_grad_workspace_bytes=_told(found, [entry.weight_grad_workspace_bytes for entry, _ in found.entries])
        or 0.0,
        phases=_phases(found, spared[0] / tokens),
        output_bytes=numbers["output_bytes"] * tokens - split_away,
        unkept_input_bytes=_unkept_input(found, tokens, split_away),
        dense_parameters=dense,
        expert_parameters=expert,
        model_flops=numbers["forward_flops"],
        exposed_forward_s=traffic.forward_s,
        exposed_backward_s=traffic.backward_s,
        link_bytes=traffic.link_bytes,
        forward_link_bytes=traffic.forward_bytes,
        again_link_bytes=traffic.again_bytes,
        freed_at_input_grad=_freed(found),
        optimizer_s=numbers["optimizer_s"] or None,
        source=_source(found, divided=degrees.cp > 1 or splits_sequence),
    )


def hidden_bytes(found: Blend | None) -> float | None:
    """Return the size of a measured layer's hidden state, the widest that its shards add up; None where nothing says it."""
    if found is None:
        return None
    sums = [
        [item.payload_bytes for item in entry.collectives if _is_sum(item) and item.phase == "forward"]
        for entry, _ in found.entries
    ]
    return _mean(found, [max(sizes) for sizes in sums]) if all(sums) else None


def _unkept_input(found: Blend, tokens: float, split_away: float) -> float | None:
    """Return what of its input a layer does not keep; `split_away` is what sequence parallelism spares of a hidden state."""
    told = _told(found, [entry.unkept_input_bytes for entry, _ in found.entries], tokens)
    return None if told is None else told - split_away if told > split_away else told


def _with_divided_tokens(layer: LayerClass, setting: Setting, numbers: dict[str, float]) -> dict[str, float]:
    """Return the numbers of a shard whose experts work on its own part of the sequence, where the whole layer was measured.

    Without sequence parallelism each shard runs whole experts on all tokens.
    """
    assert isinstance(setting.microbatch, int)
    whole = blend(layer, setting.microbatch, setting.sequence_length, 1)
    if whole is None:
        return numbers
    divided = {
        name: _mean(whole, [getattr(entry, name) for entry, _ in whole.entries]) / setting.degrees.tp
        for name in _SECONDS
    }
    return {name: min(value, divided.get(name, value)) for name, value in numbers.items()}


def _told(found: Blend, values: Sequence[float | None], share: float = 1.0) -> float | None:
    """Return a share of what the entries say; None where one says nothing."""
    told = [value for value in values if value is not None]
    return _mean(found, told) * share if len(told) == len(values) else None


def _forward_workspaces(found: Blend, tokens: float) -> tuple[float, float, float] | None:
    """Return the forward's highest use at each level, as `_level` finds it; None where it was not measured."""
    if not all(entry.forward_workspace_bytes for entry, _ in found.entries):
        return None
    none, selective, full = (
        tokens * _mean(found, [entry.forward_workspace_bytes[level] for entry, _ in found.entries])
        for level in (_offered(found, level) for level in (Recompute.NONE, Recompute.SELECTIVE, Recompute.FULL))
    )
    return none, selective, full


def _phases(found: Blend, spared_bytes: float) -> tuple[PhaseBytes, ...]:
    """Return the phases of the layer's backward; none where they were not measured alike."""
    rows = [entry.backward_phases for entry, _ in found.entries]
    if len({tuple(phase.ends_with for phase in phases) for phases in rows}) > 1:
        return ()
    result: list[PhaseBytes] = []
    for phases in zip(*rows, strict=True):
        less = 0.0 if result else spared_bytes  # what the layer keeps is there as its backward begins
        begin = _mean(found, [phase.begin_bytes for phase in phases])
        peak = _mean(found, [phase.peak_bytes for phase in phases])
        result.append(PhaseBytes(phases[0].ends_with, max(begin - less, 0.0), max(peak - less, 0.0)))
    return tuple(result)


def on_other_device(cost: LayerCost, slowness: float) -> LayerCost:
    """Return a measured cost on a device that takes `slowness` times as long for every computation.

    Exchanges keep their seconds, because they are priced on the links; the result is called fitted at best.
    """
    if slowness == 1.0:
        return cost
    forward_s = cost.forward_s - cost.exposed_forward_s
    backward_s = cost.input_grad_s - cost.exposed_backward_s
    return replace(
        cost,
        forward_s=forward_s * slowness + cost.exposed_forward_s,
        input_grad_s=backward_s * slowness + cost.exposed_backward_s,
        weight_grad_s=cost.weight_grad_s * slowness,
        split_excess_s=cost.split_excess_s * slowness,
        recompute_s=(0.0, cost.recompute_s[1] * slowness, cost.recompute_s[2] * slowness),
        optimizer_s=None if cost.optimizer_s is None else cost.optimizer_s * slowness,
        source=worst_source([cost.source, Source.FITTED]),
    )


def _neighbours(values: Sequence[int], wanted: int) -> list[tuple[int, float]]:
    """Return the one or two grid values round `wanted` with their weights; none outside the grid."""
    if wanted in values:
        return [(wanted, 1.0)]
    after = bisect_left(values, wanted)
    if after in (0, len(values)):
        return []
    left, right = values[after - 1], values[after]
    weight = (wanted - left) / (right - left)
    return [(left, 1 - weight), (right, weight)]


def _mean(found: Blend, values: Sequence[float]) -> float:
    return sum(value * weight for value, (_, weight) in zip(values, found.entries, strict=True))


def _has(found: Blend, level: Recompute) -> bool:
    return all(level in entry.activation_bytes for entry, _ in found.entries)


def _level(found: Blend, level: Recompute) -> float:
    """Return the kept bytes of a level; a level that was not measured keeps what the next weaker one keeps."""
    offered = _offered(found, level)
    return _mean(found, [entry.activation_bytes[offered] for entry, _ in found.entries])


def _offered(found: Blend, level: Recompute) -> Recompute:
    weaker = {Recompute.FULL: Recompute.SELECTIVE, Recompute.SELECTIVE: Recompute.NONE}
    while not _has(found, level):
        level = weaker[level]
    return level


def _recompute(found: Blend, tokens: float, forward_s: Number) -> tuple[Number, Number, Number]:
    """Return the seconds of each level; full repeats the forward where it was not measured, an absent level costs 0."""

    def seconds(level: Recompute, otherwise: Number) -> Number:
        if not _has(found, level):
            return 0.0
        if not all(level in entry.recompute_s for entry, _ in found.entries):
            return otherwise
        return tokens * _mean(found, [entry.recompute_s[level] for entry, _ in found.entries])

    selective = seconds(Recompute.SELECTIVE, 0.0)
    full = seconds(Recompute.FULL, forward_s) if _has(found, Recompute.FULL) else selective
    return (0.0, selective, full)


def _freed(found: Blend) -> tuple[float, float | None, float | None]:
    def share(level: Recompute) -> float | None:
        if not all(level in entry.freed_at_input_grad for entry, _ in found.entries):
            return None
        return _mean(found, [entry.freed_at_input_grad[level] for entry, _ in found.entries])

    none = _mean(found, [entry.freed_at_input_grad.get(Recompute.NONE, 0.0) for entry, _ in found.entries])
    return none, share(Recompute.SELECTIVE), share(Recompute.FULL)


def _spared_bytes(layer: LayerClass, setting: Setting, found: Blend, level: Recompute) -> float:
    """Return what sequence parallelism takes off the kept bytes of a block; 0 where the whole layer was not measured."""
    degree = setting.degrees.tp
    assert isinstance(setting.microbatch, int)
    whole = blend(layer, setting.microbatch, setting.sequence_length, 1)
    if whole is None or degree == 1:
        return 0.0
    copied = (degree * _level(found, level) - _level(whole, level)) / (degree - 1)
    recomputed = level is Recompute.FULL and _has(found, level)  # only the layer's input is kept, before it is gathered
    gathered = 0.0 if recomputed else _mean(found, [_gathered_bytes(entry) for entry, _ in found.entries])
    return max(copied - gathered, 0.0) * (1.0 - 1.0 / degree)


def _gathered_bytes(entry: ConfigurationCost) -> float:
    """Return the bytes of the inputs of column layers: in the backward each has its gradient summed."""
    return sum(
        item.payload_bytes * item.count for item in entry.collectives if _is_sum(item) and item.phase == "backward"
    )


def _is_sum(item: Collective) -> bool:
    """Whether it is a sum of activations, which sequence parallelism makes a scatter and a gather of."""
    return item.operation == "all-reduce" and item.group == "tp" and not item.of_statistics and not item.of_vocabulary


def _count_again(item: Collective) -> int:
    """Return how often full recomputation repeats a forward's collective; where nobody counted, all but the last sum."""
    if item.count_again is not None:
        return item.count_again
    behind = item.operation in ("all-reduce", "reduce-scatter") and item.group == "tp" and not item.of_statistics
    return item.count - behind


def _sequence_exchanges(item: Collective, weight: float) -> tuple[Exchange, ...]:
    """Return what stands for a sum under sequence parallelism: the scatter and the gather that transposes it."""
    if not _is_sum(item):
        return (_exchange(item, weight),)
    forward, payload_bytes = item.phase == "forward", item.payload_bytes * weight
    scattered_again = _count_again(item) if forward else 0
    gathered_again = 0 if forward else item.count
    return (
        Exchange(forward, "reduce-scatter", "tp", payload_bytes, item.count, times_again=scattered_again),
        Exchange(not forward, "all-gather", "tp", payload_bytes, item.count, times_again=gathered_again),
    )


def _exchange(item: Collective, weight: float) -> Exchange:
    """Return a collective of a measured layer."""
    forward = item.phase == "forward"
    return Exchange(
        forward,
        item.operation,
        item.group,
        item.payload_bytes * weight,
        item.count,
        times_again=_count_again(item) if forward else 0,
    )


def _parameters(layer: LayerClass, tensor_degree: int, setting: Setting) -> tuple[float, float]:
    whole = layer.whole_parameters(splits_vocabulary=setting.degrees.vocab_parallel)
    dense = whole + (layer.parameters - layer.expert_parameters - whole) / tensor_degree
    return dense, layer.expert_parameters / setting.degrees.expert_split


_ORDER = (Source.MEASURED, Source.FITTED, Source.ANALYTIC, Source.MOCKED)


def worst_source(sources: Sequence[Source]) -> Source:
    """Return the least trustworthy of some provenances."""
    return max(sources, key=_ORDER.index, default=Source.MEASURED)


def _source(found: Blend, *, divided: bool) -> Source:
    own = worst_source([entry.source for entry, _ in found.entries])
    return own if found.is_exact and not divided else worst_source([own, Source.FITTED])
