"""The last touch on a found completion: its recomputation chosen again, exactly, rank by rank.

Local search chooses levels greedily and branching with least workspaces. With the layers of every stage as they are,
each rank's levels are a multiple-choice knapsack of its own (`recompute`), whose least seconds are found here. On a rank
with several slots the least sum may sit on the wrong slot, so a rank's choice is kept only where the simulated step does
not grow. Families with two replicas are left alone: their ranks share levels.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from stagewright.planner.search.candidate_costs import CandidateCosts
from stagewright.planner.search.incumbent import Completion
from stagewright.planner.search.recompute import LayerGroup, Recomputation, least_recompute

Longs = npt.NDArray[np.int64]

_MOST_LISTED = 2_000


def with_exact_levels(costs: CandidateCosts, found: Completion, stop: Callable[[], bool]) -> Completion:
    """Return the completion with the least recomputation on each rank, where that makes the step no longer."""
    if costs.order.num_replicas > 1 or not (found.counts[:, :, 1:] * costs.runs.recompute_s.T[None, :, 1:]).any():
        return found
    counts, value = found.counts.copy(), costs.value(found.counts, found.bounds)
    known: dict[bytes, Recomputation | None] = {}
    for rank in range(costs.order.num_ranks):
        if stop():
            break
        trial = _refitted(costs, counts, rank, known)
        if trial is None or not costs.fits(trial):
            continue
        new = costs.value(trial, found.bounds)
        if new <= value:
            counts, value = trial, new
    if (counts == found.counts).all():
        return found
    step_s, cut = costs.trace(counts, found.bounds)
    return Completion(step_s, found.bounds, counts, cut)


def _refitted(
    costs: CandidateCosts, counts: Longs, rank: int, known: dict[bytes, Recomputation | None]
) -> Longs | None:
    """Return the counts with those of one rank chosen for least seconds; None where that is no less, or not found."""
    runs, levels = costs.runs, np.flatnonzero(costs.levels)
    stages, vectors = costs.slots.stage[rank], costs.slots.live[rank]
    held = [
        (place, int(stage), run)
        for place, stage in enumerate(stages.tolist())
        if stage >= 0
        for run in range(runs.num_runs)
        if counts[stage, run].sum() > 0
    ]
    numbers = np.array([[counts[stage, run].sum(), place, run] for place, stage, run in held], dtype=np.int64)
    key = numbers.tobytes() + vectors.tobytes()
    if key not in known:
        states = sum(int(number) * float(runs.state_bytes[run]) for number, _, run in numbers.tolist())
        groups = [
            LayerGroup(
                int(number),
                runs.recompute_s[levels, run],
                np.outer(vectors[:, 0, place], runs.kept_bytes[levels, run])
                + np.outer(vectors[:, 1, place], runs.late_bytes[levels, run]),
                runs.workspace_bytes[levels, run],
            )
            for number, place, run in numbers.tolist()
        ]
        budget = np.full(len(vectors), costs.capacity_bytes - states)
        known[key] = least_recompute(groups, budget, limit=_MOST_LISTED)
    best = known[key]
    now_s = sum(float(counts[stage, run] @ runs.recompute_s[:, run]) for _, stage, run in held)
    if best is None or best.seconds >= now_s:
        return None
    trial = counts.copy()
    for (_, stage, run), chosen in zip(held, best.counts, strict=True):
        trial[stage, run] = 0
        trial[stage, run, levels] = chosen
    return trial
