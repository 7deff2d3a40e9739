"""Paths as rows of a program over cuts, and points of a program as costs of an order, compiled.

Columns are theta, the layers of each run on each stage that it reaches (a *cell*), the raised layers of some cells by level, and
at the end, in some forms, others: floors of recomputation that paths visit, or ones that no path sees. Seconds are scaled by the
program's scale throughout.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from stagewright.planner.search.copying import copy_into
from stagewright.planner.search.dual_simplex import ABOVE, KNOWN, NONE, OPTIMAL, STOPPED, Table, proved, solution, solve
from stagewright.planner.search.order import trace

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]


_BEYOND = 1.0 + 1e-6


class Columns(NamedTuple):
    """What columns stand for, and what they cost along a path.

    `stage_of` and `run_of` [C] of each cell; `raised` [E] cells with columns of raised layers, by level [R]. `each` holds the seconds
    of a forward, an input gradient at the weakest level, a weight gradient, and of the step's end, [4, K]; `extra` the
    recomputation of raised layers above the weakest level's, [R, K]; `end_s` [D] the constant part of tails, `hop_s` least
    hops behind a zero. `first_floor` is the first of the columns with the ranks' recomputation, -1 for none; `held` [D, S]
    how often a rank holds a stage, `slot_stage` [D, V] which.
    """

    stage_of: Longs
    run_of: Longs
    raised: Longs
    each: Floats
    extra: Floats
    held: Floats
    slot_stage: Longs
    end_s: Floats
    hop_s: Floats
    overhead_s: float
    step_s: float
    split: bool
    replicas: int
    first_floor: int


class Steps(NamedTuple):
    """The actions of an order, names as in `order.Order`."""

    before: Ints
    across: Ints
    hop: Ints
    code: Ints
    last: Ints


@njit(cache=True, no_cpython_wrapper=True)
def fill_row(c: Columns, path: Ints, end: int, row: Floats) -> float:
    """Fill `row` [n] with theta less a path's length, and return the constant that it is at least."""
    stages = c.held.shape[1]
    cells, levels, marked = len(c.stage_of), len(c.extra), len(c.raised)
    row[:] = 0.0
    row[0] = 1.0
    for cell in range(cells):
        stage, run = c.stage_of[cell], c.run_of[cell]
        seconds = path[stage] * c.each[0, run] + path[stages + stage] * c.each[1, run]
        seconds += path[2 * stages + stage] * c.each[2, run] + c.held[end, stage] * c.each[3, run]
        row[1 + cell] = -seconds
    for level in range(levels):
        for place in range(marked):
            cell = c.raised[place]
            visits = path[stages + c.stage_of[cell]]
            row[1 + cells + level * marked + place] = -visits * c.extra[level, c.run_of[cell]]
    if c.first_floor >= 0:
        for rank in range(len(c.slot_stage)):
            row[c.first_floor + rank] = -_least_visits(c, path, rank)
    constant = c.step_s + float(c.end_s[end])
    actions = 0
    for place in range(3 * stages if c.split else 2 * stages):
        actions += path[place]
    constant += actions * c.overhead_s
    for hop in range(len(c.hop_s)):
        constant += path[3 * stages + hop] * c.hop_s[hop]
    return constant


@njit(cache=True, inline="always", no_cpython_wrapper=True)
def _least_visits(c: Columns, path: Ints, rank: int) -> float:
    """Return how often a path pays a rank's recomputation at least: each replica would count a stage again."""
    stages = c.held.shape[1]
    least = np.inf
    for place in range(c.slot_stage.shape[1]):
        stage = c.slot_stage[rank, place]
        if stage >= 0:
            least = min(least, path[stages + stage])
    return float(least / c.replicas)


@njit(cache=True, no_cpython_wrapper=True)
def fill_seconds(c: Columns, values: Floats, seconds: Floats, tail_s: Floats) -> None:
    """Fill seconds by code [4 S + 1] and tails [D] at a point; a rank's floor is spread over its stages by their layers."""
    ranks, stages = c.held.shape
    cells, levels, marked = len(c.stage_of), len(c.extra), len(c.raised)
    layers, step = np.zeros(stages), np.zeros(stages)
    forward, back, weight = np.zeros(stages), np.zeros(stages), np.zeros(stages)
    for cell in range(cells):
        stage, run, number = c.stage_of[cell], c.run_of[cell], values[1 + cell]
        layers[stage] += number
        forward[stage] += number * c.each[0, run]
        back[stage] += number * c.each[1, run]
        weight[stage] += number * c.each[2, run]
        step[stage] += number * c.each[3, run]
    for level in range(levels):
        for place in range(marked):
            cell = c.raised[place]
            number = values[1 + cells + level * marked + place]
            back[c.stage_of[cell]] += number * c.extra[level, c.run_of[cell]]
    if c.first_floor >= 0:
        extra = np.zeros(stages)
        for rank in range(ranks):
            on_rank = 0.0
            for stage in range(stages):
                on_rank += c.held[rank, stage] * layers[stage]
            share = values[c.first_floor + rank] / max(on_rank, 1e-9)
            for stage in range(stages):
                extra[stage] = max(extra[stage], c.held[rank, stage] * share)
        for stage in range(stages):
            back[stage] += layers[stage] * extra[stage]
    for stage in range(stages):
        seconds[stage] = forward[stage] + c.overhead_s
        seconds[2 * stages + stage] = back[stage] + c.overhead_s
        seconds[3 * stages + stage] = weight[stage] + (c.overhead_s if c.split else 0.0)
        seconds[stages + stage] = seconds[2 * stages + stage] + seconds[3 * stages + stage]
    seconds[4 * stages] = 0.0
    for rank in range(ranks):
        tail_s[rank] = c.end_s[rank]
        for stage in range(stages):
            tail_s[rank] += c.held[rank, stage] * step[stage]


@njit(cache=True)
def add_rows(t: Table, c: Columns, paths: Ints, ends: Longs, places: Longs) -> None:
    """Let the program know the paths at some places."""
    for place in places:
        _add_row(t, c, paths[place], ends[place])


@njit(cache=True, no_cpython_wrapper=True)
def _add_row(t: Table, c: Columns, path: Ints, end: int) -> None:
    count, known = len(t.at), t.size[KNOWN]
    t.low[count + known] = fill_row(c, path, end, t.rows[known])
    t.high[count + known] = max(_BEYOND * t.high[0], t.low[count + known])  # no path is negative
    t.place[count + known] = -1
    t.size[KNOWN] = known + 1


@njit(cache=True, no_cpython_wrapper=True)
def _traced(
    c: Columns, o: Steps, values: Floats, path: Ints, seconds: Floats, tail_s: Floats, end: Floats
) -> tuple[float, int]:
    """Fill a longest path at a point; return its length and the rank where it ends."""
    fill_seconds(c, values, seconds, tail_s)
    path[:] = 0
    value, rank = trace(
        o.before, o.across, o.hop, o.code, o.last, seconds, c.hop_s, tail_s, end, c.held.shape[1], path
    )  # fmt: skip
    return value + c.step_s, rank


class Rules(NamedTuple):
    """When Kelley's method stops, and how far its points are drawn to the best one.

    `rounds` at most; from the best point's value below the limit on where `stops_below`; where the best point is as near the
    bound as `near`, a share of the limit, and below it; where a round raises the bound by less than `little`, a share of it.
    """

    rounds: int
    smoothing: float
    stops_below: bool
    near: float
    little: float


@njit(cache=True, nogil=True)
def improve_bound(
    t: Table, c: Columns, o: Steps, paths: Ints, ends: Longs, number: int, inner: Floats, inner_value: float, limit: float,
    rules: Rules,
) -> tuple[int, float, float, int, int]:  # fmt: skip
    """Solve, trace at the solution and near the best point, add their paths, and so on.

    Returns the last status of the solver, the bound, the best point's value, the paths that are known then, and the
    points that were traced. `inner` becomes the best point. There is room for two paths a round in `paths`, `ends` and `t`.
    """
    count = len(t.at)
    values, mixed = np.empty(count), np.empty(count)
    seconds, tail_s, end = np.empty(4 * c.held.shape[1] + 1), np.empty(len(c.end_s)), np.empty(len(o.before))
    bound, before, traced = -np.inf, -np.inf, 0
    for turn in range(rules.rounds + 1):
        status = solve(t, limit, 2**31 - 1)
        if status == ABOVE:
            return status, limit, inner_value, number, traced
        if status == STOPPED:
            solution(t, values)
            return status, max(bound, proved(t, limit, NONE, mixed)), inner_value, number, traced
        bound = max(bound, proved(t, limit, NONE, values))
        solution(t, values)
        if turn == rules.rounds or (turn > 1 and bound - before < rules.little * limit):
            break
        before = bound
        is_best = False
        for near in range(2):
            point = values
            if near == 1:
                if is_best:
                    break
                for place in range(count):
                    mixed[place] = rules.smoothing * inner[place] + (1.0 - rules.smoothing) * values[place]
                point = mixed
            value, ends[number] = _traced(c, o, point, paths[number], seconds, tail_s, end)
            traced += 1
            is_best = value < inner_value
            if is_best:
                inner_value = value
                copy_into(inner, point)
            if value > bound * (1.0 + 1e-7):
                _add_row(t, c, paths[number], ends[number])
                number += 1
            elif near == 0:
                return OPTIMAL, bound, inner_value, number, traced
            if rules.stops_below and inner_value < limit:
                return OPTIMAL, bound, inner_value, number, traced
        if inner_value < limit * (1.0 - 1e-6) and inner_value - bound < rules.near * limit:
            break
    return OPTIMAL, bound, inner_value, number, traced


@njit(cache=True, nogil=True)
def trace_point(c: Columns, o: Steps, paths: Ints, ends: Longs, number: int, point: Floats) -> float:
    """Write a longest path at a point behind the known ones; return its length."""
    seconds, tail_s, end = np.empty(4 * c.held.shape[1] + 1), np.empty(len(c.end_s)), np.empty(len(o.before))
    value, ends[number] = _traced(c, o, point, paths[number], seconds, tail_s, end)
    return float(value)
