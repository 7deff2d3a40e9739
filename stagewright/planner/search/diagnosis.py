"""Why nothing fits: the plan that misses by least, what each of its ranks lacks, and the smallest changes that help."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stagewright.planner.documents.outcome import Diagnosis, Relaxation, Shortfall
from stagewright.planner.documents.plan import Plan
from stagewright.planner.errors import InvalidArgument, InvalidSchedule
from stagewright.planner.prediction import evaluate
from stagewright.planner.search.pricing import PP
from stagewright.planner.search.problem import Candidate, Partition, Problem

_GIB = 2.0**30


MOST_TRIED = 400


def diagnose(problem: Problem) -> Diagnosis:
    """Return the diagnosis of a problem without a plan."""
    candidates = _promising(problem)
    nearest = _nearest(problem, candidates)
    if nearest is None:
        return _empty_space(problem)
    excess, candidate, partition = nearest
    plan = problem.plan(candidate, partition, "exact")
    prediction = evaluate(plan, problem.profile).prediction
    plan = plan.model_copy(update={"prediction": prediction})
    shortfalls = _shortfalls(plan, problem.capacity_bytes)
    worst = max(shortfalls, key=lambda item: item.short_bytes)
    return Diagnosis(
        message=(
            f"the nearest plan ({candidate.summary}) needs {worst.needed_bytes / _GIB:.2f} GiB on "
            f"pipeline rank {worst.pipeline_rank}, a device has {problem.capacity_bytes / _GIB:.2f} GiB after "
            f"{problem.job.space.memory_headroom:.0%} headroom: short of {worst.short_bytes / _GIB:.2f} GiB"
        ),
        binding="memory",
        nearest=plan,
        shortfalls=shortfalls,
        relaxations=_relaxations(problem, excess),
    )


def _promising(problem: Problem) -> list[Candidate]:
    """Return at most MOST_TRIED candidates that need least: states and one microbatch over all ranks, 1F1B or the like."""
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
        found += problem.candidates(priced.shape[row : row + 1])
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


def _nearest(problem: Problem, candidates: Sequence[Candidate]) -> tuple[float, Candidate, Partition] | None:
    """Return the completion whose fullest rank exceeds the capacity by least, over single-chunk candidates first."""
    best: tuple[float, Candidate, Partition] | None = None
    for candidate in candidates:
        try:
            found = _least_peak(problem, candidate)
        except (InvalidArgument, InvalidSchedule):
            continue
        if found is not None and (best is None or found[0] < best[0]):
            best = (found[0], candidate, found[1])
    if best is None:
        return None
    return best[0] - problem.capacity_bytes, best[1], best[2]


def _least_peak(problem: Problem, candidate: Candidate) -> tuple[float, Partition] | None:
    """Return the least peak over ranks among equal-count partitions moved one layer at a time, and its partition."""
    order = problem.order(candidate)
    count, stages = problem.profile.num_layers, order.num_stages
    costs = problem.costs(candidate.configuration)
    chosen = list(problem.levels)
    levels = [
        chosen[int(np.argmin(costs.kept_bytes[chosen, layer] + 1e-9 * np.arange(len(chosen))))]
        for layer in range(count)
    ]
    bounds = [round(index * count / stages) for index in range(stages + 1)]
    best = Partition(tuple(bounds), tuple(levels))
    peak = float(problem.pipeline(candidate, best).peak_bytes.max())
    improved = True
    while improved:
        improved = False
        for index in range(1, stages):
            for step in (-1, 1):
                moved = list(best.bounds)
                moved[index] += step
                if not moved[index - 1] < moved[index] < moved[index + 1]:
                    continue
                trial = Partition(tuple(moved), best.levels)
                value = float(problem.pipeline(candidate, trial).peak_bytes.max())
                if value < peak:
                    best, peak, improved = trial, value, True
    return peak, best


def _relaxations(problem: Problem, excess_bytes: float) -> tuple[Relaxation, ...]:
    device = problem.cluster.groups[0].device
    needed = problem.capacity_bytes + excess_bytes
    found = [
        Relaxation(
            change=(
                f"devices with {needed / (1.0 - problem.job.space.memory_headroom) / _GIB:.2f} GiB instead of "
                f"{device.memory_bytes / _GIB:.2f} GiB"
            )
        )
    ]
    if needed <= device.memory_bytes:
        found.append(Relaxation(change=f"memory_headroom of at most {1.0 - needed / device.memory_bytes:.3f}"))
    return tuple(found)


def _empty_space(problem: Problem) -> Diagnosis:
    """Return why the space holds no candidate at all: the first rule that refuses the trivial degrees."""
    reasons = sorted(set(problem.refusals()))
    text = "; ".join(reasons[:3]) if reasons else "pins and forbids leave nothing"
    return Diagnosis(message=f"no combination of degrees, microbatch and schedule is allowed: {text}", binding="space")
