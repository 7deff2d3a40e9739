"""Caps with an order's own live activations: how many layers each rank can hold at a target, several chunks a rank.

Given a target X, rank r with slots c (stages s_c, live vectors (a_v, b_v) over the slots) holds at most the largest n with

    down_r + T / R (n t + rho(n) + others) + max(tail, up_r) <= X

where down_r is what microbatch 0 spends above the rank's first stage, up_r what the last gradient spends there again
(nothing with split backwards: the last action may be a W), R the replicas, and rho(n) the least recomputation of n layers of the largest class under every live vector: layers
choose levels by number, exactly, and chunks freely, except that every chunk holds at least one layer. Layers that are
sure to be on a rank (the first and the last of the model) are added. If the caps do not sum to the layers of the class,
every completion takes longer than X. Where another layer has to be on some rank, the best rank for it decides.

All parts are lower bounds, so `order_caps` proves; tests hold it against simulated completions.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from stagewright.planner.search.rank_reach import next_try

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


class RankTables(NamedTuple):
    """What caps depend on: who holds what and how much lives at once, and the costs of one layer of each run.

    `slot_stage` is [D, V] with -1 for no slot, `live` [D, vectors, 2, V], `stage_latency_s` [1]; the rest as in
    `CandidateCosts`. For `caps_reach` costs of runs and `stage_latency_s` are of n configurations, which come first.
    """

    placement: Ints
    slot_stage: Longs
    live: Floats
    run_start: Longs
    run_class: Ints
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
    stage_latency_s: Floats
    overhead_s: float
    split: bool
    constant_tail_s: Floats
    capacity_bytes: float
    step_overhead_s: float


@njit(cache=True)
def order_caps(tables: RankTables, num_microbatches: int, target_s: float) -> tuple[bool, Longs]:
    """Tell whether a completion of at most `target_s` is left, and the caps [D] on layers of the largest class."""
    ranks = len(tables.slot_stage)
    replicas = len(tables.placement)
    runs = len(tables.forward_s)
    bulk, number, like = _bulk_runs(tables)
    each = float(num_microbatches) / replicas
    caps = np.zeros(ranks, dtype=np.int64)
    forced = np.zeros(runs)
    inner_low, inner_high = _bulk_stages(tables, like)
    for rank in range(ranks):
        _forced(tables, rank, forced)
        guess = (
            caps[rank - 1] if rank > 0 else replicas * number // ranks + 1
        )  # ranks mostly hold what their neighbour does
        caps[rank] = _cap(tables, rank, bulk, like, forced, inner_low, inner_high, number, each, target_s, guess)
        if caps[rank] < 0:
            return False, caps
    total = caps.sum()
    if total < replicas * number:
        return False, caps
    for run in range(runs):
        if like[run] or run == 0 or run == runs - 1:
            continue
        most = -1
        for rank in range(ranks - 1, -1, -1):
            _forced(tables, rank, forced)
            if forced[run] == 0.0:
                forced[run] = 1.0
                guess = caps[rank]
                beside = _cap(tables, rank, bulk, like, forced, inner_low, inner_high, number, each, target_s, guess)
            else:
                beside = caps[rank]
            if beside >= 0:
                most = max(most, total - caps[rank] + beside)
            if most >= replicas * number:
                break
        if most < replicas * number:
            return False, caps
    return True, caps


@njit(cache=True, nogil=True)
def caps_reach(tables: RankTables, num_microbatches: Longs, target_s: float) -> Bools:
    """Tell of n configurations under one layout whether a completion of at most `target_s` is left, [n]."""
    reached = np.empty(len(num_microbatches), dtype=np.bool_)
    for place in range(len(num_microbatches)):
        reached[place] = order_caps(_one_of(tables, place), num_microbatches[place], target_s)[0]
    return reached


@njit(cache=True, no_cpython_wrapper=True)
def _one_of(tables: RankTables, place: int) -> RankTables:
    return RankTables(
        tables.placement,
        tables.slot_stage,
        tables.live,
        tables.run_start,
        tables.run_class,
        tables.forward_s[place],
        tables.input_grad_s[place],
        tables.weight_grad_s[place],
        tables.recompute_s[place],
        tables.kept_bytes[place],
        tables.late_bytes[place],
        tables.workspace_bytes[place],
        tables.state_bytes[place],
        tables.step_s[place],
        tables.levels,
        tables.stage_latency_s[place : place + 1],
        tables.overhead_s,
        tables.split,
        tables.constant_tail_s,
        tables.capacity_bytes,
        tables.step_overhead_s,
    )


@njit(cache=True)
def recompute_floors(tables: RankTables, low: Longs, high: Longs) -> Floats:
    """Return the least recomputation a microbatch of each rank with low, low + 1, ... layers of the largest class, [D, n].

    Entries beyond `high`, and numbers that never fit, are infinite.
    """
    runs = len(tables.forward_s)
    bulk, _, like = _bulk_runs(tables)
    inner_low, inner_high = _bulk_stages(tables, like)
    forced = np.zeros(runs)
    floors = np.full((len(low), (high - low).max() + 1), np.inf)
    for rank in range(len(low)):
        _forced(tables, rank, forced)
        states = 0.0
        for run in range(runs):
            if not like[run]:
                states += forced[run] * tables.state_bytes[run]
        held = _rank_bytes(tables, rank, bulk, like, forced, inner_low, inner_high)
        for number in range(low[rank], high[rank] + 1):
            floors[rank, number - low[rank]] = _least_levels(tables, held, bulk, number, states, np.inf)
    return floors


@njit(cache=True, no_cpython_wrapper=True)
def _bulk_runs(tables: RankTables) -> tuple[int, int, Bools]:
    """Return a run of the class with most layers, how many layers the class has, and which runs are of it."""
    run_class = tables.run_class
    bulk, number = largest_class(run_class, tables.run_start[1:] - tables.run_start[:-1])
    like = np.zeros(len(run_class), dtype=np.bool_)
    for run in range(len(run_class)):
        like[run] = run_class[run] == run_class[bulk]
    return bulk, number, like


@njit(cache=True)
def largest_class(run_class: npt.NDArray[np.int32], length: Longs) -> tuple[int, int]:
    """Return a run of the class with most layers, and how many layers the class has."""
    best, most = 0, 0
    for run in range(len(run_class)):
        total = 0
        for other in range(len(run_class)):
            if run_class[other] == run_class[run]:
                total += length[other]
        if total > most:
            best, most = run, total
    return best, most


@njit(cache=True, no_cpython_wrapper=True)
def _bulk_stages(tables: RankTables, like: Bools) -> tuple[int, int]:
    """Return the range of stages that can hold nothing but the largest class, whatever the partition."""
    runs, stages = len(like), tables.placement.shape[1]
    front, back = 0, 0
    run = 0
    while run < runs and not like[run]:
        front += tables.run_start[run + 1] - tables.run_start[run]
        run += 1
    last = runs - 1
    while last >= run and not like[last]:
        back += tables.run_start[last + 1] - tables.run_start[last]
        last -= 1
    for inner in range(run, last + 1):
        if not like[inner]:
            return stages, stages
    return front, stages - back


@njit(cache=True, no_cpython_wrapper=True)
def _forced(tables: RankTables, rank: int, forced: Floats) -> None:
    """Fill how many layers of each run are sure to be on a rank: the first and the last one of the model."""
    stages = tables.placement.shape[1]
    forced[:] = 0.0
    for replica in range(len(tables.placement)):
        if tables.placement[replica, 0] == rank:
            forced[0] += 1.0
        if tables.placement[replica, stages - 1] == rank:
            forced[len(forced) - 1] += 1.0


@njit(cache=True, no_cpython_wrapper=True)
def _cap(
    tables: RankTables, rank: int, bulk: int, like: Bools, forced: Floats, inner_low: int, inner_high: int,
    number: int, each: float, target_s: float, guess: int,
) -> int:  # fmt: skip
    """Return the most layers of the largest class on a rank beside `forced` ones; -1 when not even none.

    `guess` is a number to try first.
    """
    width, runs = tables.slot_stage.shape[1], len(forced)
    slots, first = 0, tables.placement.shape[1]
    for place in range(width):
        if tables.slot_stage[rank, place] >= 0:
            slots += 1
            first = min(first, tables.slot_stage[rank, place])
    pair_s = (3.0 if tables.split else 2.0) * tables.overhead_s
    step, states, seconds, sure = (
        slots * tables.stage_latency_s[0] + tables.constant_tail_s[rank],
        0.0,
        slots * pair_s,
        0,
    )
    for run in range(runs):
        if forced[run] > 0.0:
            if like[run]:
                sure += int(forced[run])
                continue
            seconds += forced[run] * (tables.forward_s[run] + tables.input_grad_s[run] + tables.weight_grad_s[run])
            seconds += forced[run] * _least_recompute(tables, run)
            step += forced[run] * tables.step_s[run]
            states += forced[run] * tables.state_bytes[run]
    ahead, back = _way(tables, first)
    time = tables.forward_s[bulk] + tables.input_grad_s[bulk] + tables.weight_grad_s[bulk]
    limit = target_s * (1.0 + 1e-12) - tables.step_overhead_s - ahead - each * seconds
    if min(limit - step, limit - back) < 0.0:
        return -1
    unit = each * time + tables.step_s[bulk]
    held = _rank_bytes(tables, rank, bulk, like, forced, inner_low, inner_high)
    low, high, tries = -1, number * len(tables.placement), 0
    while low < high:
        middle = next_try(low, high, guess, tries)
        tries += 1
        spare = min(limit - step - middle * unit, limit - back - middle * each * time) / each
        if spare >= -1e-15 and np.isfinite(_least_levels(tables, held, bulk, middle, states, spare)):
            low = middle
        else:
            high = middle - 1
    return low if low >= sure else -1


@njit(cache=True, no_cpython_wrapper=True)
def _least_recompute(tables: RankTables, run: int) -> float:
    least = np.inf
    for level in range(3):
        if tables.levels[level]:
            least = min(least, tables.recompute_s[level, run])
    return least


@njit(cache=True, no_cpython_wrapper=True)
def _way(tables: RankTables, first: int) -> tuple[float, float]:
    """Return the least seconds of a microbatch down to stage `first`, and of its gradient up again, zero when split.

    A rank starts after the first, and where backwards are whole, its last action's gradient still goes up.
    """
    down, up = first * tables.overhead_s, first * tables.overhead_s
    layers, run = first, 0
    while layers > 0 and run < len(tables.forward_s):
        taken = min(layers, tables.run_start[run + 1] - tables.run_start[run])
        down += taken * tables.forward_s[run]
        up += taken * (tables.input_grad_s[run] + tables.weight_grad_s[run])
        layers -= taken
        run += 1
    return down, 0.0 if tables.split else up


class _RankBytes(NamedTuple):
    """Bytes on a rank under each of its live vectors.

    `light` [vectors, 3] is a layer of the largest class in the lightest chunk by level, `more` [vectors, 3] what the layers that
    heavier chunks must hold take beyond it, `fixed` [vectors] layers of other classes, `workspace` what these need.
    """

    light: Floats
    more: Floats
    fixed: Floats
    workspace: float


@njit(cache=True, no_cpython_wrapper=True)
def _rank_bytes(
    tables: RankTables, rank: int, bulk: int, like: Bools, forced: Floats, inner_low: int, inner_high: int
) -> _RankBytes:
    """Return the bytes of layers on a rank that holds `forced` ones of each run for sure."""
    width, vectors = tables.slot_stage.shape[1], tables.live.shape[1]
    floor = 0.0
    for run in range(len(forced)):
        if forced[run] > 0.0 and not like[run]:
            floor = max(floor, _least_workspace(tables, run))
    light = np.zeros((vectors, 3))
    more = np.zeros((vectors, 3))
    fixed = np.zeros(vectors)
    for vector in range(vectors):
        for level in range(3):
            if not tables.levels[level]:
                continue
            least = np.inf
            for place in range(width):
                if tables.slot_stage[rank, place] >= 0:
                    least = min(least, _bytes(tables, rank, vector, place, level, bulk))
            light[vector, level] = least
        for place in range(width):
            stage = tables.slot_stage[rank, place]
            if stage < 0:
                continue
            if inner_low <= stage < inner_high:
                excess = np.inf
                for level in range(3):
                    if tables.levels[level]:
                        own = _bytes(tables, rank, vector, place, level, bulk) - light[vector, level]
                        excess = min(excess, own)
                        more[vector, level] += excess
                    else:
                        more[vector, level] += max(min(excess, 1e300), 0.0)
            for run in (0, len(forced) - 1):
                if forced[run] > 0.0 and not like[run]:
                    at = 0 if run == 0 else tables.placement.shape[1] - 1
                    if stage == at:
                        least = np.inf
                        for level in range(3):
                            if tables.levels[level]:
                                least = min(least, _bytes(tables, rank, vector, place, level, run))
                        fixed[vector] += least
    return _RankBytes(light, more, fixed, floor)


@njit(cache=True, no_cpython_wrapper=True)
def _least_levels(tables: RankTables, held: _RankBytes, bulk: int, number: int, states: float, spare_s: float) -> float:
    """Return the least recomputation a microbatch with which `number` layers can fit; infinite when none does.

    With a finite `spare_s`, any recomputation of at most that much will do, and the first found is returned.
    """
    light, more, fixed = held.light, held.more, held.fixed
    room = tables.capacity_bytes * (1.0 + 1e-9) - states - number * tables.state_bytes[bulk]
    best = np.inf
    for full in range(number + 1):
        if full > 0 and (not tables.levels[2] or full * tables.recompute_s[2, bulk] > min(spare_s + 1e-15, best)):
            break
        for half in range(number - full + 1):
            if half > 0 and not tables.levels[1]:
                break
            none = number - full - half
            if none > 0 and not tables.levels[0]:
                continue
            seconds = full * tables.recompute_s[2, bulk] + half * tables.recompute_s[1, bulk]
            seconds += none * tables.recompute_s[0, bulk]
            if seconds > spare_s + 1e-15 or seconds >= best:
                break
            workspace = held.workspace
            if none > 0:
                workspace = max(workspace, tables.workspace_bytes[0, bulk])
            if half > 0:
                workspace = max(workspace, tables.workspace_bytes[1, bulk])
            if full > 0:
                workspace = max(workspace, tables.workspace_bytes[2, bulk])
            strongest = 2 if full > 0 else 1 if half > 0 else 0
            fits = True
            for vector in range(len(fixed)):
                used = fixed[vector] + more[vector, strongest] if number > 0 else fixed[vector]
                used += none * light[vector, 0] + half * light[vector, 1] + full * light[vector, 2]
                if used + workspace > room:
                    fits = False
                    break
            if fits:
                best = seconds
                if np.isfinite(spare_s):
                    return float(best)
                break
    return float(best)


@njit(cache=True, no_cpython_wrapper=True, inline="always")
def _bytes(tables: RankTables, rank: int, vector: int, place: int, level: int, run: int) -> float:
    before = tables.live[rank, vector, 0, place] * tables.kept_bytes[level, run]
    behind = tables.live[rank, vector, 1, place] * tables.late_bytes[level, run]
    return float(before + behind)


@njit(cache=True, no_cpython_wrapper=True)
def _least_workspace(tables: RankTables, run: int) -> float:
    least = np.inf
    for level in range(3):
        if tables.levels[level]:
            least = min(least, tables.workspace_bytes[level, run])
    return least
