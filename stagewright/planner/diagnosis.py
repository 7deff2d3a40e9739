"""Why nothing fits: the plan that misses by least, what each of its ranks lacks, and the smallest changes that help."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from stagewright.planner.documents.outcome import Diagnosis, Shortfall
from stagewright.planner.documents.plan import Plan
from stagewright.planner.errors import InvalidArgument, InvalidSchedule
from stagewright.planner.objectives.min_max_memory import peak_of
from stagewright.planner.plan_summary import plan_summary
from stagewright.planner.prediction import with_prediction
from stagewright.planner.relaxations import LeastMemory, least_memory, relaxations
from stagewright.planner.search.limits import Limits
from stagewright.planner.search.pricing import PP
from stagewright.planner.search.problem import Candidate, Partition, Problem
from stagewright.planner.search.targets import target_jobs

Floats = npt.NDArray[np.float64]

_GIB = 2.0**30

MOST_TRIED, MOST_MOVED = 100, 12
NEAR = 1.02
MOST_S, LEAST_S = 20.0, 0.2


def diagnose(problem: Problem, limits: Limits | None = None) -> Diagnosis:
    """Return the diagnosis of a problem without a plan; `limits` end the searches behind it (MOST_S by default)."""
    asked = limits or Limits()

    def tell(done: int) -> None:
        asked.report("why nothing fits", done, 3, None, None)

    deadline_s = min(MOST_S, max(asked.left_s(), LEAST_S))
    tell(0)
    found = _diagnosed(problem, replace(asked, started_s=asked.clock(), deadline_s=deadline_s, progress=None), tell)
    tell(3)
    return found


def _diagnosed(problem: Problem, limits: Limits, tell: Callable[[int], None]) -> Diagnosis:
    # The search for least memory cuts anywhere, so its plan and its bound say nothing of tied layers.
    tied = bool(problem.uncut)
    half = replace(limits, deadline_s=0.5 * (limits.deadline_s or MOST_S), gap=0.01)
    least = None if tied else least_memory(problem, half)
    tell(1)
    plan = _nearest_plan(problem, least, replace(half, started_s=limits.clock()))
    tell(2)
    if plan is None:
        empty = _empty_space(problem)
        return empty.model_copy(update={"relaxations": relaxations(problem, limits, None)})
    shortfalls = _shortfalls(plan, problem.capacity_bytes)
    if not shortfalls:
        return _outside_target(problem, limits, plan)
    worst = max(shortfalls, key=lambda item: item.short_bytes)
    if least is not None:
        least = replace(least, plan=plan)
    return Diagnosis(
        message=(
            f"the nearest plan ({plan_summary(plan)}) needs {worst.needed_bytes / _GIB:.2f} GiB on "
            f"pipeline rank {worst.pipeline_rank}, a device has {problem.capacity_bytes / _GIB:.2f} GiB after "
            f"{problem.job.space.memory_headroom:.0%} headroom: short of {worst.short_bytes / _GIB:.2f} GiB"
        ),
        binding="memory",
        nearest=plan,
        shortfalls=shortfalls,
        relaxations=relaxations(problem, limits, least),
    )


def _outside_target(problem: Problem, limits: Limits, plan: Plan) -> Diagnosis:
    """Return the diagnosis where plans fit, and none of them is one that the target can express."""
    target = problem.job.space.target
    reasons = sorted(
        {reason for job in target_jobs(problem.job) or () for reason in replace(problem, job=job).refusals()}
    )
    return Diagnosis(
        message=f"{plan_summary(plan)} fits, but {target or 'the search'} has no plan of this space"
        + (": " + "; ".join(reasons[:3]) if reasons else ""),
        binding="target" if target is not None else "space",
        nearest=plan,
        relaxations=relaxations(problem, limits, None),
    )


def _nearest_plan(problem: Problem, least: LeastMemory | None, limits: Limits) -> Plan | None:
    """Return the plan whose fullest rank exceeds its device by least.

    That is the plan of least peak where it is proved to NEAR; else the better of it and of balanced stages, for which
    `limits` end the search.
    """
    if least is not None and peak_of(least.plan) <= least.bound_bytes * NEAR:
        return with_prediction(least.plan, problem.profile)
    nearest = _nearest(problem, _promising(problem), limits)
    if nearest is None:
        return None if least is None else least.plan
    plan = with_prediction(problem.plan(*nearest, "exact"), problem.profile)
    if least is not None and peak_of(least.plan) <= peak_of(plan):
        return with_prediction(least.plan, problem.profile)
    return plan


def _promising(problem: Problem) -> list[Candidate]:
    """Return at most MOST_TRIED candidates that need least: states and one microbatch over all ranks, 1F1B or the like.

    With tied layers, only those that the search of tied layers has: all devices, one stage on each pipeline rank.
    """
    tied = bool(problem.uncut)
    if tied:
        problem = problem.narrowed(counts=(problem.num_devices,))
    priced = problem.price_list.without_limit().price(problem.shapes)
    if not len(priced):
        return []
    numbers = problem.classes.counts
    kept = priced.kept_bytes[:, list(problem.levels)].min(axis=1)
    each = (priced.state_bytes + kept) @ numbers / priced.shape[:, PP]
    workspace = priced.workspace_bytes[:, list(problem.levels)].min(axis=1).max(axis=1)
    order = np.argsort(each + workspace, kind="stable")
    found: list[Candidate] = []
    for row in order.tolist():
        found += [one for one in problem.candidates(priced.shape[row : row + 1]) if one.num_chunks == 1 or not tied]
        if len(found) >= MOST_TRIED:
            break
    return found


def _shortfalls(plan: Plan, capacity_bytes: float) -> tuple[Shortfall, ...]:
    return tuple(
        Shortfall(
            pipeline_rank=rank,
            needed_bytes=needed,
            available_bytes=capacity_bytes,
            short_bytes=needed - capacity_bytes,
            items=items,
        )
        for rank, (needed, items) in enumerate(
            zip(plan.prediction.peak_memory_bytes, plan.prediction.memory, strict=True)
        )
        if needed > capacity_bytes
    )


def _nearest(problem: Problem, candidates: Sequence[Candidate], limits: Limits) -> tuple[Candidate, Partition] | None:
    """Return the completion of least peak: of the candidates with equal stages, the best MOST_MOVED of these improved."""
    begun: list[tuple[float, int, _Cut]] = []
    for place, candidate in enumerate(candidates):
        if begun and limits.reached() is not None:
            break
        try:
            cut = _evenly_cut(problem, candidate)
        except (InvalidArgument, InvalidSchedule):
            continue
        if cut is not None:
            begun.append((float(cut.peaks.max()), place, cut))
    found = [_improved(problem, cut, limits) for _, _, cut in sorted(begun, key=lambda one: one[:2])[:MOST_MOVED]]
    best = min(found, key=lambda cut: float(cut.peaks.max()), default=None)
    return None if best is None else (best.candidate, best.partition)


@dataclass(frozen=True, eq=False)
class _Cut:
    """A completion: places of the model where stages may end, which of them do, and the peak of each rank, bytes."""

    candidate: Candidate
    places: tuple[int, ...]
    chosen: tuple[int, ...]
    partition: Partition
    peaks: Floats


def _evenly_cut(problem: Problem, candidate: Candidate) -> _Cut | None:
    """Return stages of equal numbers of layers, each layer at the level that keeps least.

    None where ties leave fewer places to cut than the candidate has boundaries.
    """
    stages, count = problem.order(candidate).num_stages, problem.profile.num_layers
    places = (0, *(layer for layer in range(1, count) if layer not in problem.uncut), count)
    if len(places) <= stages:
        return None
    kept, levels = problem.costs(candidate.configuration).kept_bytes, np.array(problem.levels)
    least = levels[np.argmin(kept[levels] + 1e-9 * np.arange(len(levels))[:, None], axis=0)]
    chosen = tuple(round(index * (len(places) - 1) / stages) for index in range(stages + 1))
    return _cut(problem, candidate, places, chosen, tuple(least.tolist()))


def _cut(
    problem: Problem, candidate: Candidate, places: tuple[int, ...], chosen: tuple[int, ...], levels: tuple[int, ...]
) -> _Cut:
    partition = Partition(tuple(places[cut] for cut in chosen), levels)
    peaks = problem.pipeline(candidate, partition).peak_bytes
    return _Cut(candidate, places, chosen, partition, peaks)


def _improved(problem: Problem, cut: _Cut, limits: Limits) -> _Cut:
    """Return a completion moved on, one boundary at a time, as long as its peak falls: those of the fullest rank's stages."""
    slots = problem.order(cut.candidate).slots
    while limits.reached() is None:
        held = [slot.stage for slot in slots[int(np.argmax(cut.peaks))]]
        moves = [(stage, 1) for stage in held if stage > 0] + [(stage + 1, -1) for stage in held]
        for end, step in moves:
            chosen = (*cut.chosen[:end], cut.chosen[end] + step, *cut.chosen[end + 1 :])
            if end == len(chosen) - 1 or not chosen[end - 1] < chosen[end] < chosen[end + 1]:
                continue
            moved = _cut(problem, cut.candidate, cut.places, chosen, cut.partition.levels)
            if moved.peaks.max() < cut.peaks.max():
                cut = moved
                break
        else:
            break
    return cut


def _empty_space(problem: Problem) -> Diagnosis:
    """Return why the space holds no candidate at all: the first rule that refuses the trivial degrees."""
    reasons = sorted(set(problem.refusals()))
    blocks = problem.profile.num_layers - len(problem.uncut)
    if problem.uncut:
        held = f"tied layers leave {blocks} of {problem.profile.num_layers} to cut between, so pp = {blocks} at most"
        reasons = [held, *reasons]
    text = "; ".join(reasons[:3]) if reasons else "pins and forbids leave nothing"
    return Diagnosis(message=f"no combination of degrees, microbatch and schedule is allowed: {text}", binding="space")
