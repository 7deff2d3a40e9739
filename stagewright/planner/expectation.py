"""What a run of a plan is expected to take, beyond the simulation in which every action takes its median.

A step is a longest path over actions whose seconds vary, so its mean lies above the step of the medians: sums of skewed
seconds grow like their means, and a rank waits for whichever of its predecessors was slower this time. The profile holds
how single pieces of work differ from their median (`Jitter`): with `ratios` r_1 .. r_n of pieces of `piece_s`, an action of
t seconds takes

    t * mean of max(1, round(t / piece_s)) draws from r

and the step is the mean of simulations of the order with such draws. Draws are independent between actions: what changes
slowly, for many actions or for all ranks at once, is another speed and not jitter. Where devices carry their messages
themselves (processors: `LinkLevel.processor_latency_s`), an action takes longer by what those cost at this end that it
receives and sends. Peaks are those of `simulation.peak`.

The draws come from one seed, so the same plan and profile give the same expectation. O(draws * actions).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from stagewright.planner.documents.plan import Expectation, Plan
from stagewright.planner.documents.profile import Jitter, ModelProfile
from stagewright.planner.errors import InvalidArgument, InvalidSchedule
from stagewright.planner.prediction import Evaluation, Floats, evaluate, makespan_with
from stagewright.planner.schedules.action import Kind
from stagewright.planner.schedules.lowering import lower
from stagewright.planner.schedules.schedule import KIND, REPLICA, SLICE, STAGE, Schedule
from stagewright.planner.search.order import Layout, layout_of
from stagewright.planner.search.pipeline_costs import slowest_link
from stagewright.planner.simulation.implied_shares import implied_shares
from stagewright.planner.simulation.network import Shares
from stagewright.planner.simulation.peak import message_bytes_beside, peak_activations, reductions_behind
from stagewright.planner.tile_shards import unlike_members

_SEED = 0
_MOST_DRAWS, _FEWEST_DRAWS = 32, 4
_MOST_ROWS = 400_000  # of all draws together, unless that leaves too few
_MOST_PIECES = 64  # the mean of more draws hardly differs from that of these

_BACKWARDS = (int(Kind.B), int(Kind.I))


def with_expectation(evaluation: Evaluation, plan: Plan, profile: ModelProfile) -> Evaluation:
    """Return the evaluation with the expectation in its prediction."""
    layout = layout_of(evaluation.schedule)
    ends = message_ends(plan, layout)
    prediction = evaluation.prediction

    def shares_of(schedule: Schedule) -> Shares:
        return replace(implied_shares(schedule), row_extra_s=message_seconds(schedule, evaluation, ends))

    with_messages_s = makespan_with(evaluation, layout, shares_of)
    draws: list[float] = []
    if profile.jitter is not None:
        num_rows = sum(len(order) for order in evaluation.schedule.orders)
        generator = np.random.default_rng(_SEED)
        for _ in range(max(_FEWEST_DRAWS, min(_MOST_DRAWS, _MOST_ROWS // max(num_rows, 1)))):
            drawn = _drawn(shares_of, evaluation, profile.jitter, generator)
            draws.append(makespan_with(evaluation, layout, drawn))
    message_s = with_messages_s - evaluation.timeline.makespan_s
    jitter_s = float(np.mean(draws)) - with_messages_s if draws else 0.0
    expectation = Expectation(
        step_time_s=prediction.step_time_s + message_s + jitter_s,
        message_s=max(message_s, 0.0),
        jitter_s=jitter_s,
        num_draws=len(draws),
        peak_memory_bytes=tuple(peak_bytes(evaluation).tolist()),
    )
    return replace(evaluation, prediction=prediction.model_copy(update={"expectation": expectation}))


def peak_bytes(evaluation: Evaluation) -> Floats:
    """Return the peak of one device of each pipeline rank, [D], action by action where the schedule is synchronous.

    The optimizer's step is an action too: where few activations live, what it needs beside the states is the most.
    """
    pipeline, schedule = evaluation.pipeline, evaluation.schedule
    unlike = evaluation.unlike_bytes.sum(axis=0)
    held = None
    if schedule.is_synchronous:
        lowered = _lowered(evaluation)
        beside = reducing = None
        if lowered is not None:
            beside = message_bytes_beside(lowered, np.asarray(evaluation.links.boundary_bytes))
            reducing = reductions_behind(lowered, evaluation.reductions)
        held = peak_activations(schedule, evaluation.stage_bytes, beside, reducing)
    if held is None:
        return np.asarray(pipeline.peak_bytes + unlike)
    above = np.maximum(held, evaluation.step_bytes)
    static = pipeline.static_bytes.sum(axis=0) + unlike
    return np.asarray(static + pipeline.version_bytes + above + pipeline.base_bytes)


def _lowered(evaluation: Evaluation) -> Schedule | None:
    """Return the actions that ranks execute; None for a schedule that no runtime does."""
    try:
        return lower(evaluation.schedule, evaluation.costs, data_parallel=True, merge="none")
    except (InvalidArgument, InvalidSchedule):
        return None


def peaks_by_device(plan: Plan, profile: ModelProfile) -> list[float] | None:
    """Return the peak of each device by global rank; None where the devices of a pipeline rank hold as much.

    They don't where replicas take uneven shares of samples or states, and where ZeRO cuts matrices between bands of tiles.
    """
    found = [0.0] * plan.num_devices
    unlike = unlike_members(plan)
    for places in unlike:
        peaks = peak_bytes(evaluate(plan, profile, member=places[0]))
        for rank, devices in enumerate(plan.mapping.pipeline_ranks):
            for place in places:
                if place < len(devices):
                    found[devices[place]] = float(peaks[rank])
    return found if unlike else None


def message_ends(plan: Plan, layout: Layout) -> tuple[Floats, Floats]:
    """Return what a message between two pipeline ranks takes of each of its ends, [D, D]: seconds, and seconds a byte."""
    ranks = layout.num_ranks
    width = max(map(len, plan.mapping.pipeline_ranks))
    device = np.array([np.resize(row, width) for row in plan.mapping.pipeline_ranks], dtype=np.int64)
    latency_s, byte_s = np.zeros((ranks, ranks)), np.zeros((ranks, ranks))
    pairs = np.unique(np.sort(layout.hop_pairs, axis=1), axis=0)
    for first, second in pairs[pairs[:, 0] != pairs[:, 1]].tolist():
        link = slowest_link(device[first], device[second], plan.cluster)
        if link is not None:
            latency_s[first, second] = latency_s[second, first] = link.processor_latency_s
            byte_s[first, second] = byte_s[second, first] = 1.0 / (link.processor_bytes_per_s or math.inf)
    return latency_s, byte_s


def message_seconds(schedule: Schedule, evaluation: Evaluation, ends: tuple[Floats, Floats]) -> Floats:
    """Return what each action of all ranks spends on the messages that it receives and sends, [num_rows]."""
    rows = np.concatenate(schedule.orders).reshape(-1, 6)
    sizes = np.broadcast_to(np.asarray(evaluation.links.boundary_bytes, dtype=np.float64), (len(schedule.edges),))
    edges = np.array(schedule.edges, dtype=np.int64).reshape(-1, 2)
    by_stage = np.zeros(schedule.placement.shape)  # of one pass through a stage, forwards or backwards
    for replica, place in enumerate(schedule.placement):
        for (source, target), size in zip(edges.tolist(), sizes.tolist(), strict=True):
            here, there = place[source], place[target]
            if here != there:
                seconds = ends[0][here, there] + size / max(schedule.num_slices, 1) * ends[1][here, there]
                by_stage[replica, source] += seconds
                by_stage[replica, target] += seconds
    kind = rows[:, KIND]
    passes = (kind == int(Kind.F)) | np.isin(kind, _BACKWARDS)
    return np.asarray(passes * by_stage[np.maximum(rows[:, REPLICA], 0), np.maximum(rows[:, STAGE], 0)])


def _drawn(
    shares_of: Callable[[Schedule], Shares], evaluation: Evaluation, jitter: Jitter, generator: np.random.Generator
) -> Callable[[Schedule], Shares]:
    """Return the shares of one draw."""

    def shares(schedule: Schedule) -> Shares:
        seconds = action_seconds(schedule, evaluation)
        return replace(shares_of(schedule), row_factor=drawn_factors(seconds, jitter, generator))

    return shares


def drawn_factors(seconds: Floats, jitter: Jitter, generator: np.random.Generator) -> Floats:
    """Return what each action's median is multiplied with in one draw, [num_actions]."""
    pieces = np.clip(np.rint(seconds / jitter.piece_s), 1, _MOST_PIECES).astype(np.int64)
    ratios = np.array(jitter.ratios)
    drawn = ratios[generator.integers(0, len(ratios), size=int(pieces.sum()))]
    sums: npt.NDArray[np.float64] = np.add.reduceat(drawn, np.concatenate(([0], np.cumsum(pieces)[:-1])))
    return sums / pieces


def action_seconds(schedule: Schedule, evaluation: Evaluation) -> Floats:
    """Return the median seconds of each action of all ranks, [num_rows]; 0 for what is no computation."""
    rows = np.concatenate(schedule.orders).reshape(-1, 6)
    costs = evaluation.costs
    table = np.zeros((len(Kind), costs.num_stages))
    table[Kind.F] = costs.forward_s
    table[Kind.I] = costs.input_grad_s + costs.recompute_s
    table[Kind.W] = costs.weight_grad_s
    table[Kind.B] = table[Kind.I] + table[Kind.W]
    table[Kind.R] = costs.recompute_s
    whole = table[rows[:, KIND], np.maximum(rows[:, STAGE], 0)]
    return np.where(rows[:, SLICE] < 0, whole, whole / schedule.num_slices)
