"""Mixtures of experts as a load histogram: who sends what to whom, what waits for the busiest, what is dropped.

Dispatch and combine of one MoE layer send 2 k cf bsh (e-1)/e elements a device forward, and the same backward (GShard,
Lepikhin et al. 2020). An expert's capacity is C = cf k tokens / E; a dropless layer rounds each expert's tokens up to
blocks (MegaBlocks, Gale et al. 2022). Everything here works on counts[d][x], the tokens that device d sends to expert x,
and on a placement that names the devices of each expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import numpy as np
import numpy.typing as npt

from stagewright.planner.errors import InvalidArgument

Floats = npt.NDArray[np.float64]
Placement = tuple[tuple[int, ...], ...]

BLOCK_TOKENS = 128


def exchange_elements(tokens: float, hidden: float, *, top_k: int, degree: int, capacity_factor: float = 1.0) -> float:
    """Return the elements one device sends for dispatch and combine of one forward: 2 k cf bsh (e-1)/e."""
    return 2 * top_k * capacity_factor * tokens * hidden * (degree - 1) / degree


def capacity(tokens: int, num_experts: int, *, top_k: int, capacity_factor: float) -> int:
    """Return the tokens one expert takes, ceil(cf k tokens / E)."""
    return ceil(capacity_factor * top_k * tokens / num_experts)


def dropped_tokens(loads: Sequence[int], expert_capacity: int) -> int:
    """Return how many token copies exceed their expert's capacity."""
    return sum(max(0, load - expert_capacity) for load in loads)


def padded_tokens(loads: Sequence[int], *, block: int = BLOCK_TOKENS) -> int:
    """Return the rows a grouped product computes without drops: each expert's tokens rounded up to whole blocks."""
    return sum(ceil(load / block) * block for load in loads)


def capacity_rows(num_experts: int, expert_capacity: int) -> int:
    """Return the rows computed with a capacity: every expert's buffer whole, filled or not."""
    return num_experts * expert_capacity


def balance_loss(fractions: Sequence[float], probabilities: Sequence[float], *, weight: float = 0.01) -> float:
    """Return Switch's auxiliary loss alpha E sum f_i P_i; alpha when both are uniform (Fedus et al. 2021)."""
    return weight * len(fractions) * sum(f * p for f, p in zip(fractions, probabilities, strict=True))


def imbalance(loads: Sequence[float]) -> float:
    """Return the busiest over the mean."""
    return max(loads) * len(loads) / sum(loads) if sum(loads) else 1.0


def home_placement(num_experts: int, num_devices: int) -> Placement:
    """Return experts dealt out in blocks: expert x on device x // (E / e)."""
    if num_experts % num_devices:
        raise InvalidArgument(f"{num_experts} experts do not divide by {num_devices} devices", field="ep")
    each = num_experts // num_devices
    return tuple((expert // each,) for expert in range(num_experts))


def traffic_matrix(counts: Floats, placement: Placement, *, token_bytes: float) -> Floats:
    """Return bytes[source][target] of one dispatch; a device that holds an expert serves its own tokens, the others
    share a replicated expert evenly."""
    devices = counts.shape[0]
    matrix = np.zeros((devices, devices))
    for expert, holders in enumerate(placement):
        for source in range(devices):
            if source in holders:
                continue
            for target in holders:
                matrix[source, target] += counts[source, expert] * token_bytes / len(holders)
    return matrix


def device_loads(counts: Floats, placement: Placement) -> Floats:
    """Return the tokens each device computes, [e]."""
    devices = counts.shape[0]
    loads = np.zeros(devices)
    for expert, holders in enumerate(placement):
        for source in range(devices):
            if source in holders:
                loads[source] += counts[source, expert]
            else:
                for target in holders:
                    loads[target] += counts[source, expert] / len(holders)
    return loads


def exchange_s(matrix: Floats, *, latency_s: float, bytes_per_s: float | Floats) -> float:
    """Return the seconds of an uneven all-to-all: the busiest device's sends or receives.

    `bytes_per_s` is one number, or [e, e] by pair; then a device's links work one after the other.
    """
    devices = len(matrix)
    off_diagonal = matrix * (1 - np.eye(devices))
    seconds = off_diagonal / bytes_per_s
    busiest = max(float(seconds.sum(axis=1).max()), float(seconds.sum(axis=0).max()))
    return (devices - 1) * latency_s + busiest if devices > 1 else 0.0


def layer_s(
    counts: Floats, placement: Placement, *, token_bytes: float, token_s: float, latency_s: float, bytes_per_s: float
) -> float:
    """Return dispatch, the busiest device's experts, and combine, one after the other."""
    matrix = traffic_matrix(counts, placement, token_bytes=token_bytes)
    exchange = exchange_s(matrix, latency_s=latency_s, bytes_per_s=bytes_per_s)
    return 2 * exchange + float(device_loads(counts, placement).max()) * token_s


def worth_shadowing(tokens_bytes: float, expert_bytes: float) -> bool:
    """Return FasterMoE's rule: replicate an expert iff twice the bytes of the tokens that travel to it exceed its
    weights and gradients, once each (He et al. 2022)."""
    return 2 * tokens_bytes > 2 * expert_bytes


def shadowed(counts: Floats, placement: Placement, *, token_bytes: float, expert_bytes: float) -> Placement:
    """Return the placement with every hot expert replicated on all devices, where the rule says that it pays."""
    devices = counts.shape[0]
    result = list(placement)
    for expert, holders in enumerate(placement):
        away = sum(float(counts[source, expert]) for source in range(devices) if source not in holders)
        if worth_shadowing(away * token_bytes, expert_bytes):
            result[expert] = tuple(range(devices))
    return tuple(result)


def balanced_placement(loads: Sequence[float], num_devices: int) -> Placement:
    """Return an expert placement by longest processing time first with equal counts a device (SmartMoE's pools).

    Without the count limit the rule is within 4/3 - 1/(3e) of the optimum (Graham 1969).
    """
    if len(loads) % num_devices:
        raise InvalidArgument(f"{len(loads)} experts do not divide by {num_devices} devices", field="ep")
    room = [len(loads) // num_devices] * num_devices
    return _longest_first(loads, num_devices, room)


def longest_first_placement(loads: Sequence[float], num_devices: int) -> Placement:
    """Return an expert placement by longest processing time first, any number of experts a device."""
    return _longest_first(loads, num_devices, [len(loads)] * num_devices)


def _longest_first(loads: Sequence[float], num_devices: int, room: list[int]) -> Placement:
    total = [0.0] * num_devices
    chosen: dict[int, tuple[int, ...]] = {}
    for expert in sorted(range(len(loads)), key=lambda index: (-loads[index], index)):
        device = min((d for d in range(num_devices) if room[d]), key=lambda d: (total[d], d))
        total[device] += loads[expert]
        room[device] -= 1
        chosen[expert] = (device,)
    return tuple(chosen[expert] for expert in range(len(loads)))


def expanded_placement(
    loads: Sequence[float], num_devices: int, *, slots: int, threshold: float = 1.1
) -> tuple[Placement, list[int]]:
    """Return FlexMoE's placement and the copies of each expert: expand the expert whose copies are busiest, shrink the
    idlest, until the busiest device is within `threshold` of the mean or all slots are used (Nie et al. 2023).

    `slots` is the number of expert copies a device can hold. Copies share their expert's load evenly.
    """
    experts = len(loads)
    if slots * num_devices < experts:
        raise InvalidArgument(f"{num_devices} devices of {slots} slots cannot hold {experts} experts", field="slots")
    copies = [1] * experts
    best = _spread_copies(loads, copies, num_devices, slots)
    while sum(copies) < slots * num_devices and _copy_imbalance(loads, best, num_devices) > threshold:
        hottest = max(range(experts), key=lambda x: (loads[x] / copies[x], -x))
        if copies[hottest] >= num_devices:
            break
        copies[hottest] += 1
        best = _spread_copies(loads, copies, num_devices, slots)
    for coldest in sorted(range(experts), key=lambda x: loads[x] / copies[x]):
        if copies[coldest] > 1:
            fewer = [*copies[:coldest], copies[coldest] - 1, *copies[coldest + 1 :]]
            trial = _spread_copies(loads, fewer, num_devices, slots)
            if _copy_imbalance(loads, trial, num_devices) <= threshold:
                copies, best = fewer, trial
    return best, copies


def partial_replication(
    counts: Floats, placement: Placement, *, token_s: float, copy_s: float, most_copies: int
) -> Placement:
    """Return Prophet's placement: give the busiest device's hottest expert one more device, the least loaded, as long as
    the layer with its transfers becomes faster (Wang et al. 2023)."""
    devices = counts.shape[0]
    current = list(placement)

    def cost(trial: Sequence[tuple[int, ...]]) -> float:
        copies = sum(len(holders) - 1 for holders in trial)
        return float(device_loads(counts, tuple(trial)).max()) * token_s + copies * copy_s

    for _ in range(most_copies):
        loads = device_loads(counts, tuple(current))
        busiest = int(np.argmax(loads))
        held = [expert for expert, holders in enumerate(current) if busiest in holders]
        hottest = max(held, key=lambda expert: (float(counts[:, expert].sum()) / len(current[expert]), -expert))
        free = [device for device in range(devices) if device not in current[hottest]]
        if not free:
            break
        target = min(free, key=lambda device: (float(loads[device]), device))
        trial = [*current[:hottest], (*current[hottest], target), *current[hottest + 1 :]]
        if cost(trial) >= cost(current):
            break
        current = trial
    return tuple(current)


def moves_experts(
    tokens: float, hidden: float, *, top_k: int, degree: int, remote_experts: int, ffn_size: float | None = None
) -> bool:
    """Return Janus' rule: fetch experts in place of sending tokens iff E_remote 8 h^2 < 2 k bsh (e-1)/e, for experts of
    two products of h x 4h (Liu et al. 2023)."""
    weights = 2 * hidden * (4 * hidden if ffn_size is None else ffn_size)
    return remote_experts * weights < exchange_elements(tokens, hidden, top_k=top_k, degree=degree)


def fastest_expert_layout(
    tokens: float,
    hidden: float,
    expert_parameters: float,
    *,
    top_k: int,
    capacity_factor: float,
    degree: int,
    copies: int,
) -> str:
    """Return Tutel's cheaper layout of experts that `copies` devices share: "data" gathers the sharded weights on each
    copy, "tensor" repeats the tokens on every copy; both hold the same shards, so switching moves nothing.

    Elements a device receives: 2 weights (copies-1)/copies against (copies-1) 2 k cf bsh (e-1)/e.
    """
    weights = 2 * expert_parameters * (copies - 1) / copies
    repeated = (copies - 1) * exchange_elements(
        tokens, hidden, top_k=top_k, degree=degree, capacity_factor=capacity_factor
    )
    return "data" if weights < repeated else "tensor"


def kept_rows(
    tokens: float, *, top_k: int, loads: Sequence[int] = (), padded: bool = False, block: int = BLOCK_TOKENS
) -> float:
    """Return the rows of hidden size an expert layer keeps for its backward around its products.

    Sorted and padded copies of input and output (2 a routed row, MegaBlocks), or none beside the tokens themselves where
    the products scatter and gather on their own (ScatterMoE, Tan et al. 2024).
    """
    if not padded:
        return tokens
    rows = padded_tokens(loads, block=block) if loads else top_k * tokens
    return tokens + 2 * rows


def topology_aware_counts(tokens: float, bandwidths: Floats) -> Floats:
    """Return TA-MoE's target dispatch: each device sends in proportion to its bandwidth to each other one.

    It changes what the model learns: the router is trained towards these counts (Chen et al. 2022).
    """
    return np.asarray(tokens * bandwidths / bandwidths.sum(axis=1, keepdims=True))


def _spread_copies(loads: Sequence[float], copies: Sequence[int], num_devices: int, slots: int) -> Placement:
    """Return copies placed longest first on distinct devices with free slots."""
    parts = sorted(
        ((loads[expert] / copies[expert], expert) for expert in range(len(loads)) for _ in range(copies[expert])),
        key=lambda part: (-part[0], part[1]),
    )
    total, room = [0.0] * num_devices, [slots] * num_devices
    chosen: dict[int, list[int]] = {expert: [] for expert in range(len(loads))}
    for share, expert in parts:
        free = [d for d in range(num_devices) if room[d] and d not in chosen[expert]]
        if not free:
            free = [d for d in range(num_devices) if room[d]]
        device = min(free, key=lambda d: (total[d], d))
        chosen[expert].append(device)
        total[device] += share
        room[device] -= 1
    return tuple(tuple(sorted(chosen[expert])) for expert in range(len(loads)))


def _copy_imbalance(loads: Sequence[float], placement: Placement, num_devices: int) -> float:
    total = [0.0] * num_devices
    for expert, holders in enumerate(placement):
        for device in holders:
            total[device] += loads[expert] / len(holders)
    return imbalance(total)
