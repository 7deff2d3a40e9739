"""A candidate as flat arrays, and the compiled step of one of its partitions: what local search evaluates.

`evaluate` does in one call what `CandidateCosts` does in several: layers of each stage, recomputation that fits
(`memory_fit`, greedily), stage seconds, hops, tails, one sweep over the order. Tests hold the two together.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from stagewright.planner.search.memory_fit import fit_rank, fit_replicas
from stagewright.planner.search.order import sweep

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

_POWER = 32


class CompletionTables(NamedTuple):
    """The fields of a candidate's costs and order, as numba takes them; names as in `CandidateCosts` and `Order`.

    `microbatches_each` run through a slot.
    """

    before: Ints
    across: Ints
    hop: Ints
    code: Ints
    last: Ints
    placement: Ints
    slot_stage: Longs
    live: Floats
    run_start: Longs
    forward_s: Floats
    input_grad_s: Floats
    weight_grad_s: Floats
    recompute_s: Floats
    kept_bytes: Floats
    late_bytes: Floats
    workspace_bytes: Floats
    state_bytes: Floats
    step_s: Floats
    levels: Bools
    hop_latency_s: Floats
    hop_s_per_byte: Floats
    cut_bytes: Floats
    stage_latency_s: float
    overhead_s: float
    split: bool
    constant_tail_s: Floats
    tie_layers: Longs
    tie_s: Floats
    replica_s: Floats
    replica_latency_s: Floats
    capacity_bytes: float
    step_overhead_s: float
    microbatches_each: float


class Scratch(NamedTuple):
    """Arrays that evaluations overwrite: layers [S, K], seconds by code [4 S + 1], hops behind a zero, tails, ends."""

    layers: Longs
    seconds: Floats
    hop_s: Floats
    tail_s: Floats
    end: Floats


@njit(cache=True)
def scratch_of(tables: CompletionTables) -> Scratch:
    """Return scratch for a candidate."""
    stages = tables.placement.shape[1]
    return Scratch(
        np.zeros((stages, len(tables.forward_s)), dtype=np.int64),
        np.zeros(4 * stages + 1),
        np.zeros(len(tables.hop_latency_s) + 1),
        np.zeros(len(tables.slot_stage)),
        np.empty(len(tables.before)),
    )


@njit(cache=True)
def evaluate(tables: CompletionTables, bounds: Longs, weight: Floats, counts: Longs, scratch: Scratch) -> float:
    """Fill `counts` [S, K, 3] with recomputation that fits and return the step; infinite when none was found.

    `weight` [S] says how much a second of recomputation costs on each stage.
    """
    stages, runs = counts.shape[0], counts.shape[1]
    layers = scratch.layers
    for stage in range(stages):
        for run in range(runs):
            low = max(bounds[stage], tables.run_start[run])
            high = min(bounds[stage + 1], tables.run_start[run + 1])
            layers[stage, run] = max(high - low, 0)
    if not _fit(tables, layers, weight, counts):
        return np.inf
    _fill_seconds(tables, bounds, counts, scratch)
    value: float = sweep(
        tables.before,
        tables.across,
        tables.hop,
        tables.code,
        tables.last,
        scratch.seconds,
        scratch.hop_s,
        scratch.tail_s,
        scratch.end,
    )
    return value + tables.step_overhead_s


@njit(cache=True)
def _fit(tables: CompletionTables, layers: Longs, weight: Floats, counts: Longs) -> bool:
    """Fill `counts` with the levels of `layers`; False when the greedy search finds none that fit."""
    if len(tables.placement) > 1:
        replicas_fit: bool = fit_replicas(
            layers,
            tables.recompute_s,
            tables.kept_bytes,
            tables.late_bytes,
            tables.workspace_bytes,
            tables.state_bytes,
            tables.levels,
            tables.slot_stage,
            tables.live,
            weight,
            tables.capacity_bytes,
            counts,
        )
        return replicas_fit
    ranks, width = tables.slot_stage.shape
    runs = layers.shape[1]
    here = np.zeros((width, runs), dtype=np.int64)
    local = np.zeros((width, runs, 3), dtype=np.int64)
    costs = np.ones(width)
    for rank in range(ranks):
        states = 0.0
        for place in range(width):
            stage = tables.slot_stage[rank, place]
            for run in range(runs):
                here[place, run] = layers[stage, run] if stage >= 0 else 0
                states += here[place, run] * tables.state_bytes[run]
            if stage >= 0:
                costs[place] = weight[stage]
        if not fit_rank(
            here,
            tables.recompute_s,
            tables.kept_bytes,
            tables.late_bytes,
            tables.workspace_bytes,
            tables.levels,
            tables.live[rank],
            costs,
            tables.capacity_bytes - states,
            local,
        ):
            return False
        for place in range(width):
            stage = tables.slot_stage[rank, place]
            if stage >= 0:
                counts[stage] = local[place]
    return True


@njit(cache=True)
def _fill_seconds(tables: CompletionTables, bounds: Longs, counts: Longs, scratch: Scratch) -> None:
    """Fill seconds by code, hops and tails for chosen levels."""
    stages, runs = counts.shape[0], counts.shape[1]
    seconds, tail_s = scratch.seconds, scratch.tail_s
    for stage in range(stages):
        forward, input_grad, weight_grad = tables.overhead_s, tables.overhead_s, 0.0
        if tables.split:
            weight_grad = tables.overhead_s
        for run in range(runs):
            number = scratch.layers[stage, run]
            forward += number * tables.forward_s[run]
            input_grad += number * tables.input_grad_s[run]
            weight_grad += number * tables.weight_grad_s[run]
            for level in range(3):
                input_grad += counts[stage, run, level] * tables.recompute_s[level, run]
        seconds[stage] = forward
        seconds[stages + stage] = input_grad + weight_grad
        seconds[2 * stages + stage] = input_grad
        seconds[3 * stages + stage] = weight_grad
    boundaries = stages - 1
    for index in range(len(tables.hop_latency_s)):
        size = tables.cut_bytes[bounds[index % boundaries + 1]]
        scratch.hop_s[index + 1] = tables.hop_latency_s[index] + tables.hop_s_per_byte[index] * size
    tail_s[:] = tables.constant_tail_s
    for replica in range(len(tables.placement)):
        for stage in range(stages):
            own = tables.stage_latency_s
            if len(tables.replica_s):
                own += tables.replica_latency_s[stage]
            for run in range(runs):
                own += scratch.layers[stage, run] * tables.step_s[run]
                if len(tables.replica_s):
                    own += scratch.layers[stage, run] * tables.replica_s[run]
            tail_s[tables.placement[replica, stage]] += own
    for tie in range(len(tables.tie_layers)):
        first = np.searchsorted(bounds, tables.tie_layers[tie, 0], side="right") - 1
        second = np.searchsorted(bounds, tables.tie_layers[tie, 1], side="right") - 1
        for replica in range(len(tables.placement)):
            a, b = tables.placement[replica, first], tables.placement[replica, second]
            if a != b:
                tail_s[a] += tables.tie_s[tie, a, b]
                tail_s[b] += tables.tie_s[tie, a, b]


@njit(cache=True)
def crowding(tables: CompletionTables, scratch: Scratch, step_s: float) -> float:
    """Return a power mean of the ranks' own work over the step, in 0 to about 1: what many equally full ranks hide.

    Moves that leave the step alone but take work from one of several fullest ranks lower it.
    """
    stages = tables.placement.shape[1]
    total = 0.0
    for rank in range(len(tables.slot_stage)):
        work = scratch.tail_s[rank]
        for place in range(tables.slot_stage.shape[1]):
            stage = tables.slot_stage[rank, place]
            if stage >= 0:
                work += tables.microbatches_each * (scratch.seconds[stage] + scratch.seconds[stages + stage])
        total += (work / step_s) ** _POWER
    return float(total / len(tables.slot_stage))
