"""From raw measurements to numbers by layer: medians, spreads and shares, still without documents.

All measurements of one configuration give, for every layer, the median over measurements. The medians are scaled so
that they add up to the median of the whole microbatch, since medians of parts add up to less than the median of their
sum. Before that each measurement is brought to one speed of the machine, where it knows the one it was made at. What the hooks at the layers' boundaries take, seen in microbatches without them, is taken off each boundary
first. The input gradient is what was measured of it, the weight gradient the rest of the fused backward.

What both take longer apart than together stands beside them, for the schedules that split: over pairs k of a backward in
one piece and one in two, made one after the other, e_k = (I + W) / B - 1, and of the median of e as much is believed as
lies beyond its standard error, 1.2533 * 1.4826 * median |e_k - e| / sqrt(number of pairs).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from stagewright.planner.documents import BackwardPhase, Jitter, Recompute
from stagewright.profiler.jitter import jitter_of
from stagewright.profiler.tensor_sums import TensorSum

Floats = npt.NDArray[np.float64]
Numbers = dict[str, Any]

_WORTHWHILE = 0.005
_LEAST_SHARE = 0.25


@dataclass(frozen=True)
class LayerNumbers:
    """Numbers of one layer in one configuration; spreads are (p20, p80), a level that saves nothing is left out."""

    forward_s: float
    input_grad_s: float
    weight_grad_s: float
    split_excess_s: float
    optimizer_s: float
    recompute_s: Mapping[Recompute, float]
    kept_bytes: Mapping[Recompute, float]
    output_bytes: float
    unkept_input_bytes: float
    workspace_bytes: float
    forward_workspace_bytes: Mapping[Recompute, float]
    input_grad_workspace_bytes: float
    weight_grad_workspace_bytes: float
    backward_phases: tuple[BackwardPhase, ...]
    forward_flops: float
    unused_parameters: int
    sums: tuple[TensorSum, ...]
    freed_at_input_grad: float
    forward_spread_s: tuple[float, float]
    backward_spread_s: tuple[float, float]


@dataclass(frozen=True)
class ConfigurationNumbers:
    """All layers of one configuration and what belongs to none of them.

    `empty_step_s` is what any optimizer step takes beside its parameters. `split_overhead` is (I + W) / B - 1; `drift` the
    relative change between the earlier and the later half. `speed_range` is how far the probes' 20th and 80th percentiles lie
    apart, relative to their median; 0 where no probes were made. `copy_bytes_per_s` is how fast parameters are copied, None
    where there are none.
    """

    layers: tuple[LayerNumbers, ...]
    outside_s: float
    entrance_s: float
    empty_step_s: float
    split_overhead: float | None
    drift: float
    speed_range: float
    busy_shares: tuple[float, ...]
    jitter: Jitter | None = None
    copy_bytes_per_s: float | None = None


def reference_probe_seconds(samples: Iterable[Numbers]) -> float | None:
    """Return the median of the measurements' probes; None where none was made."""
    found = [float(item["probe_s"]) for item in samples if item.get("probe_s")]
    return statistics.median(found) if found else None


def configuration_numbers(
    samples: Mapping[str, Sequence[Numbers]], *, probe_s: float | None = None
) -> ConfigurationNumbers:
    """Return the numbers of one configuration from all its measurements by kind; `step` and `memory` must be there.

    `probe_s` is what a probe takes at the speed that all are brought to; None leaves them as they were measured.
    """
    speed_range = _speed_range([item for items in samples.values() for item in items])
    jitter = jitter_of(_rows(samples["step"], "forward_s"), _rows(samples["step"], "backward_s"))
    samples = {kind: [_at_speed(item, probe_s) for item in items] for kind, items in samples.items()}
    steps, splits, memory = samples["step"], samples.get("split", ()), samples["memory"][0]
    hook_s = _hook_seconds(steps)
    forward, backward = (
        _without_hooks(_rows(steps, "forward_s"), hook_s),
        _without_hooks(_rows(steps, "backward_s"), hook_s),
    )
    totals = forward.sum(axis=1) + backward.sum(axis=1)
    whole = float(np.median(totals))
    parts = float(np.median(forward, axis=0).sum() + np.median(backward, axis=0).sum())
    scale = whole / parts if parts > 0 else 1.0
    forward, backward = forward * scale, backward * scale
    forward_s, backward_s = np.median(forward, axis=0), np.median(backward, axis=0)
    share, excess_s, overhead = _split(splits, backward_s, hook_s)
    optimizer_s = np.median(_rows(steps, "optimizer_s"), axis=0)
    kept = {Recompute.NONE: _row(memory, "saved_bytes"), **_recomputed_bytes(memory)}
    recompute_s = {
        level: _recompute_seconds(samples.get(level.value, ()), forward_s + backward_s, hook_s) for level in kept
    }
    freed = _freed(splits, kept[Recompute.NONE])
    unused = [int(count) for count in memory["unused_parameters"]]
    outputs, unkept = (_row(memory, name) for name in ("output_bytes", "unkept_input_bytes"))
    workspace, flops = (_row(memory, name) for name in ("workspace_bytes", "forward_flops"))
    forward_workspace = {level: _row(memory["forward_workspace_bytes"], level.value) for level in kept}
    apart = [_row(memory, f"{part}_workspace_bytes") for part in ("input_grad", "weight_grad")]
    layers = tuple(
        LayerNumbers(
            forward_s=float(forward_s[index]),
            input_grad_s=float(backward_s[index] * share[index]),
            weight_grad_s=float(backward_s[index] * (1.0 - share[index])),
            split_excess_s=float(excess_s[index]),
            optimizer_s=float(optimizer_s[index]),
            recompute_s={level: float(row[index]) for level, row in recompute_s.items() if row is not None},
            kept_bytes={level: float(row[index]) for level, row in kept.items()},
            output_bytes=float(outputs[index]),
            unkept_input_bytes=float(unkept[index]),
            workspace_bytes=float(workspace[index]),
            forward_workspace_bytes={level: float(row[index]) for level, row in forward_workspace.items()},
            input_grad_workspace_bytes=max(float(apart[0][index]), 0.0),
            weight_grad_workspace_bytes=max(float(apart[1][index]), 0.0),
            backward_phases=tuple(
                BackwardPhase(ends_with=kind, begin_bytes=begin, peak_bytes=max(peak, 0.0))
                for kind, begin, peak in memory.get("backward_phases", [()] * len(forward_s))[index]
            ),
            forward_flops=float(flops[index]),
            unused_parameters=unused[index],
            sums=tuple(TensorSum(*each) for each in memory["sums"][index]),
            freed_at_input_grad=float(freed[index]),
            forward_spread_s=_spread(forward[:, index]),
            backward_spread_s=_spread(backward[:, index]),
        )
        for index in range(len(forward_s))
    )
    return ConfigurationNumbers(
        layers=layers,
        outside_s=_median(steps, "outside_s"),
        entrance_s=_median(steps, "entrance_s"),
        empty_step_s=_median(steps, "empty_step_s"),
        split_overhead=overhead,
        drift=_drift(totals),
        speed_range=speed_range,
        busy_shares=tuple(_number(item, "busy_share") for item in steps),
        jitter=jitter,
        copy_bytes_per_s=_copy_rate(steps),
    )


def _copy_rate(steps: Sequence[Numbers]) -> float | None:
    """Return bytes of parameters copied in a second; None where nothing was copied."""
    seconds = statistics.median(float(item.get("copy_s", 0.0)) for item in steps)
    return float(steps[0]["copied_bytes"]) / seconds if seconds > 0 and steps[0]["copied_bytes"] else None


def _at_speed(item: Numbers, probe_s: float | None) -> Numbers:
    """Return a measurement with all its seconds as they would be where a probe takes `probe_s`."""
    if probe_s is None or not item.get("probe_s"):
        return item
    factor = probe_s / float(item["probe_s"])
    seconds = {name for name, value in item.items() if name.endswith("_s") and value is not None}
    return {
        name: (np.asarray(value, dtype=float) * factor).tolist() if name in seconds else value
        for name, value in item.items()
    }


def _speed_range(samples: Sequence[Numbers]) -> float:
    found = [float(item["probe_s"]) for item in samples if item.get("probe_s")]
    if not found:
        return 0.0
    low, middle, high = np.percentile(found, [20, 50, 80])
    return float((high - low) / middle)


def _hook_seconds(steps: Sequence[Numbers]) -> float:
    """Return what the hook at one boundary of a layer takes: two for each layer, in its forward and its backward."""
    whole_s = [float(item["whole_s"]) for item in steps if item.get("whole_s") is not None]
    if not whole_s:
        return 0.0
    hooked_s = [sum(item["forward_s"]) + sum(item["backward_s"]) + _number(item, "outside_s") for item in steps]
    count = 2 * len(steps[0]["forward_s"])
    return max(statistics.median(hooked_s) - statistics.median(whole_s), 0.0) / count


def _without_hooks(rows: Floats, hook_s: float) -> Floats:
    """Return seconds [samples, layers] less a hook's each, the sums exactly so, and no layer less than a part of its own."""
    wanted = np.maximum(rows.sum(axis=1) - rows.shape[1] * hook_s, _LEAST_SHARE * rows.sum(axis=1))
    parts = np.maximum(rows - hook_s, _LEAST_SHARE * rows)
    sums = parts.sum(axis=1)
    return parts * np.divide(wanted, sums, out=np.ones_like(sums), where=sums > 0)[:, None]


def saves_anything(memory: Numbers, level: Recompute) -> bool:
    """Whether a level of recomputation keeps noticeably less than none."""
    return bool(_row(memory, f"{level.value}_bytes").sum() < (1.0 - _WORTHWHILE) * _row(memory, "saved_bytes").sum())


def _recomputed_bytes(memory: Numbers) -> dict[Recompute, Floats]:
    levels = (Recompute.SELECTIVE, Recompute.FULL)
    return {level: _row(memory, f"{level.value}_bytes") for level in levels if saves_anything(memory, level)}


def _split(splits: Sequence[Numbers], backward_s: Floats, hook_s: float) -> tuple[Floats, Floats, float | None]:
    """Return the input gradient's share of each backward, what its parts take longer apart, and (I + W) / B - 1 in all.

    Layers that seem faster apart make the others' excess smaller, so that the sum is what is believed of the pairs' excess.
    Where the input gradient apart seems to take as long as both together, the two parts' own proportion is the share.
    """
    if not splits:
        return np.full(len(backward_s), 0.5), np.zeros(len(backward_s)), None
    inputs = np.median(_without_hooks(_rows(splits, "input_grad_s"), hook_s), axis=0)
    weights = np.median(_rows(splits, "weight_grad_s"), axis=0)
    both = inputs + weights
    own_share = np.divide(inputs, both, out=np.ones_like(both), where=both > 0)
    share = np.divide(inputs, backward_s, out=own_share.copy(), where=backward_s > inputs)
    total = float(backward_s.sum())
    longer_s = np.maximum(both - backward_s, 0.0)
    excess, error = _paired_excess(splits, hook_s)
    believed_s = max(excess - error, 0.0) * total
    excess_s = (
        longer_s * (believed_s / float(longer_s.sum()))
        if longer_s.any()
        else believed_s * backward_s / max(total, 1e-300)
    )
    return share, excess_s, excess if total > 0 else None


def _paired_excess(splits: Sequence[Numbers], hook_s: float) -> tuple[float, float]:
    """Return the median of (I + W) / B - 1 over the pairs, and its standard error."""
    apart = _without_hooks(_rows(splits, "input_grad_s"), hook_s).sum(axis=1) + _rows(splits, "weight_grad_s").sum(
        axis=1
    )
    count = len(splits[0]["input_grad_s"])
    fused = np.array([_number(item, "fused_s") for item in splits])
    fused = np.maximum(fused - count * hook_s, _LEAST_SHARE * fused)
    ratios = np.divide(apart, fused, out=np.ones_like(apart), where=fused > 0) - 1.0
    middle = float(np.median(ratios))
    spread = 1.4826 * float(np.median(np.abs(ratios - middle)))  # the standard deviation of a normal one
    return middle, 1.2533 * spread / len(ratios) ** 0.5


def _recompute_seconds(fulls: Sequence[Numbers], layer_s: Floats, hook_s: float) -> Floats | None:
    """Return what recomputation adds to each layer, never less than nothing."""
    if not fulls:
        return None
    parts = (_without_hooks(_rows(fulls, name), hook_s) for name in ("forward_s", "backward_s"))
    again = sum(np.median(part, axis=0) for part in parts)
    return np.maximum(again - layer_s, 0.0)


def _freed(splits: Sequence[Numbers], saved: Floats) -> Floats:
    """Return the share of the kept bytes that is free after I; negative where queued weight gradients hold more."""
    if not splits:
        return np.zeros(len(saved))
    held = np.median(_rows(splits, "held_bytes"), axis=0)
    return 1.0 - np.divide(held, saved, out=np.ones_like(saved), where=saved > 0)


def _drift(totals: Floats) -> float:
    if len(totals) < 6:
        return 0.0
    half = len(totals) // 2
    earlier, later = float(np.median(totals[:half])), float(np.median(totals[-half:]))
    return abs(later / earlier - 1.0) if earlier > 0 else 0.0


def _spread(samples: Floats) -> tuple[float, float]:
    low, high = np.percentile(samples, [20, 80])
    return float(low), float(high)


def _rows(items: Sequence[Numbers], name: str) -> Floats:
    return np.array([item[name] for item in items], dtype=float)


def _row(item: Numbers, name: str) -> Floats:
    return np.array(item[name], dtype=float)


def _number(item: Numbers, name: str) -> float:
    return float(np.asarray(item[name], dtype=float))


def _median(items: Sequence[Numbers], name: str) -> float:
    return statistics.median(_number(item, name) for item in items)
