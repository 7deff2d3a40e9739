"""A candidate as flat arrays, and the compiled step of one of its partitions: what local search evaluates.

`prepare` and `swept` do in two calls what `CandidateCosts` does in several: layers of each stage, recomputation that fits
(`memory_fit`, greedily), stage seconds, hops, tails; one sweep over the order. Tests hold the two together. Between them
stands `path_bound`: a path of the order is a path for every partition, so its length there is a bound without a sweep.
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
    """A candidate's costs and order as numba takes them, names as in `CandidateCosts` and `Order`; few fields, because
    compiled code copies all of them at each call and each use.

    `by_run` holds forward, input gradient and weight gradient seconds, state bytes, seconds at the step's end and those
    of a sum over two replicas, [6, K]; `by_level` recompute seconds, kept, late and workspace bytes, [4, 3, K];
    `hop_lines` latency and seconds a byte, [2, num_hops]. `replica_latency_s` is [S], zero for one replica;
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
    by_run: Floats
    by_level: Floats
    levels: Bools
    hop_lines: Floats
    cut_bytes: Floats
    constant_tail_s: Floats
    tie_layers: Longs
    tie_s: Floats
    replica_latency_s: Floats
    stage_latency_s: float
    overhead_s: float
    split: bool
    capacity_bytes: float
    step_overhead_s: float
    microbatches_each: float


FORWARD, INPUT_GRAD, WEIGHT_GRAD, STATE, STEP, REPLICA = range(6)
RECOMPUTE, KEPT, LATE, WORKSPACE = range(4)


class Scratch(NamedTuple):
    """Arrays that evaluations overwrite: layers [S, K], seconds by code [4 S + 1], hops behind a zero, tails, ends."""

    layers: Longs
    seconds: Floats
    hop_s: Floats
    tail_s: Floats
    end: Floats


@njit(cache=True, no_cpython_wrapper=True)
def scratch_of(tables: CompletionTables) -> Scratch:
    """Return scratch for a candidate."""
    stages = tables.placement.shape[1]
    return Scratch(
        np.zeros((stages, tables.by_run.shape[1]), dtype=np.int64),
        np.zeros(4 * stages + 1),
        np.zeros(tables.hop_lines.shape[1] + 1),
        np.zeros(len(tables.slot_stage)),
        np.empty(len(tables.before)),
    )


@njit(cache=True, no_cpython_wrapper=True)
def prepare(tables: CompletionTables, bounds: Longs, weight: Floats, counts: Longs, scratch: Scratch) -> bool:
    """Fill `counts` [S, K, 3] with recomputation that fits, and the scratch up to the sweep; False when none was found.

    `weight` [S] says how much a second of recomputation costs on each stage.
    """
    stages, runs = counts.shape[0], counts.shape[1]
    layers, run_start = scratch.layers, tables.run_start
    for stage in range(stages):
        for run in range(runs):
            low = max(bounds[stage], run_start[run])
            high = min(bounds[stage + 1], run_start[run + 1])
            layers[stage, run] = max(high - low, 0)
    if not _fit(
        len(tables.placement),
        tables.slot_stage,
        tables.live,
        tables.by_level,
        tables.by_run[STATE],
        tables.levels,
        tables.capacity_bytes,
        layers,
        weight,
        counts,
    ):
        return False
    _fill_seconds(tables.by_run, tables.by_level, tables.overhead_s, tables.split, layers, counts, scratch.seconds)
    _fill_hops(tables.hop_lines, tables.cut_bytes, bounds, scratch.hop_s)
    _fill_tails(
        tables.by_run,
        tables.placement,
        tables.constant_tail_s,
        tables.stage_latency_s,
        tables.replica_latency_s,
        tables.tie_layers,
        tables.tie_s,
        layers,
        bounds,
        scratch.tail_s,
    )
    return True


@njit(cache=True, no_cpython_wrapper=True)
def swept(tables: CompletionTables, scratch: Scratch) -> float:
    """Return the step of a prepared partition."""
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


@njit(cache=True, no_cpython_wrapper=True)
def path_bound(tables: CompletionTables, scratch: Scratch, paths: Ints, ends: Longs, known: int) -> float:
    """Return the longest of `known` paths of the order at a prepared partition, seconds: no more than its step.

    `paths` [P, 3 S + 1 + hops] counts forwards, input gradients, weight gradients and hops (`trace_back`), `ends` [P] is
    the rank where each ends.
    """
    stages = tables.placement.shape[1]
    seconds, hop_s = scratch.seconds, scratch.hop_s
    most = 0.0
    for place in range(known):
        path = paths[place]
        length = scratch.tail_s[ends[place]]
        for stage in range(stages):
            length += path[stage] * seconds[stage]
            length += path[stages + stage] * seconds[2 * stages + stage]
            length += path[2 * stages + stage] * seconds[3 * stages + stage]
        for hop in range(1, len(hop_s)):
            length += path[3 * stages + hop] * hop_s[hop]
        most = max(most, length)
    return most + tables.step_overhead_s


@njit(cache=True, no_cpython_wrapper=True)
def _fit(
    replicas: int,
    slot_stage: Longs,
    live: Floats,
    by_level: Floats,
    state_bytes: Floats,
    levels: Bools,
    capacity_bytes: float,
    layers: Longs,
    weight: Floats,
    counts: Longs,
) -> bool:
    """Fill `counts` with the levels of `layers`; False when the greedy search finds none that fit."""
    recompute_s, kept_bytes = by_level[RECOMPUTE], by_level[KEPT]
    late_bytes, workspace_bytes = by_level[LATE], by_level[WORKSPACE]
    if replicas > 1:
        replicas_fit: bool = fit_replicas(
            layers,
            recompute_s,
            kept_bytes,
            late_bytes,
            workspace_bytes,
            state_bytes,
            levels,
            slot_stage,
            live,
            weight,
            capacity_bytes,
            counts,
        )
        return replicas_fit
    ranks, width = slot_stage.shape
    runs = layers.shape[1]
    here = np.zeros((width, runs), dtype=np.int64)
    local = np.zeros((width, runs, 3), dtype=np.int64)
    costs = np.ones(width)
    for rank in range(ranks):
        states = 0.0
        for place in range(width):
            stage = slot_stage[rank, place]
            for run in range(runs):
                here[place, run] = layers[stage, run] if stage >= 0 else 0
                states += here[place, run] * state_bytes[run]
            if stage >= 0:
                costs[place] = weight[stage]
        if not fit_rank(
            here,
            recompute_s,
            kept_bytes,
            late_bytes,
            workspace_bytes,
            levels,
            live[rank],
            costs,
            capacity_bytes - states,
            local,
        ):
            return False
        for place in range(width):
            stage = slot_stage[rank, place]
            for run in range(runs if stage >= 0 else 0):
                for level in range(3):
                    counts[stage, run, level] = local[place, run, level]
    return True


@njit(cache=True, no_cpython_wrapper=True)
def _fill_seconds(
    by_run: Floats, by_level: Floats, overhead_s: float, split: bool, layers: Longs, counts: Longs, seconds: Floats
) -> None:
    """Fill seconds by code, [4 S + 1], for chosen levels."""
    stages, runs = layers.shape
    for stage in range(stages):
        forward, input_grad, weight_grad = overhead_s, overhead_s, overhead_s if split else 0.0
        for run in range(runs):
            number = layers[stage, run]
            forward += number * by_run[FORWARD, run]
            input_grad += number * by_run[INPUT_GRAD, run]
            weight_grad += number * by_run[WEIGHT_GRAD, run]
            for level in range(3):
                input_grad += counts[stage, run, level] * by_level[RECOMPUTE, level, run]
        seconds[stage] = forward
        seconds[stages + stage] = input_grad + weight_grad
        seconds[2 * stages + stage] = input_grad
        seconds[3 * stages + stage] = weight_grad


@njit(cache=True, no_cpython_wrapper=True)
def _fill_hops(hop_lines: Floats, cut_bytes: Floats, bounds: Longs, hop_s: Floats) -> None:
    """Fill the seconds of a message over each hop, behind the zero of `pad`."""
    boundaries = len(bounds) - 2
    for index in range(hop_lines.shape[1]):
        size = cut_bytes[bounds[index % boundaries + 1]]
        hop_s[index + 1] = hop_lines[0, index] + hop_lines[1, index] * size


@njit(cache=True, no_cpython_wrapper=True)
def _fill_tails(
    by_run: Floats,
    placement: Ints,
    constant_tail_s: Floats,
    stage_latency_s: float,
    replica_latency_s: Floats,
    tie_layers: Longs,
    tie_s: Floats,
    layers: Longs,
    bounds: Longs,
    tail_s: Floats,
) -> None:
    """Fill the seconds of each rank behind its last action."""
    replicas, stages = placement.shape
    ends = np.zeros(2, dtype=np.int64)
    for rank in range(len(tail_s)):
        tail_s[rank] = constant_tail_s[rank]
    for stage in range(stages):
        own = stage_latency_s + replica_latency_s[stage]
        for run in range(by_run.shape[1]):
            own += layers[stage, run] * (by_run[STEP, run] + by_run[REPLICA, run])
        for replica in range(replicas):
            tail_s[placement[replica, stage]] += own
    for tie in range(len(tie_layers)):
        for end in range(2):
            ends[end] = 0
            while bounds[ends[end] + 1] <= tie_layers[tie, end]:
                ends[end] += 1
        for replica in range(replicas):
            a, b = placement[replica, ends[0]], placement[replica, ends[1]]
            if a != b:
                tail_s[a] += tie_s[tie, a, b]
                tail_s[b] += tie_s[tie, a, b]


@njit(cache=True, no_cpython_wrapper=True)
def crowding(tables: CompletionTables, scratch: Scratch, step_s: float) -> float:
    """Return a power mean of the ranks' own work over the step, in 0 to about 1: what many equally full ranks hide.

    Moves that leave the step alone but take work from one of several fullest ranks lower it.
    """
    total = 0.0
    for rank in range(len(tables.slot_stage)):
        total += (_work_s(tables, scratch, rank) / step_s) ** _POWER
    return float(total / len(tables.slot_stage))


@njit(cache=True, no_cpython_wrapper=True)
def fullest(tables: CompletionTables, scratch: Scratch) -> float:
    """Return the own work of the rank that has most, seconds."""
    most = 0.0
    for rank in range(len(tables.slot_stage)):
        most = max(most, _work_s(tables, scratch, rank))
    return most


@njit(cache=True, no_cpython_wrapper=True)
def _work_s(tables: CompletionTables, scratch: Scratch, rank: int) -> float:
    stages, each = tables.placement.shape[1], tables.microbatches_each
    work = scratch.tail_s[rank]
    for place in range(tables.slot_stage.shape[1]):
        stage = tables.slot_stage[rank, place]
        if stage >= 0:
            work += each * (scratch.seconds[stage] + scratch.seconds[stages + stage])
    return float(work)
