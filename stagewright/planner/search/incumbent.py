"""Good completions early: balanced stages, recomputation that fits, then single layers moved (`local_search`).

`start` cuts the layers into stages of equal time, equal bytes or equal numbers, whichever fits first, or into a staircase;
`improve` moves layers off the critical path, and shakes what it reached where it is asked to. Heuristic: nothing here is proved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numba import njit

from stagewright.planner.search.candidate_costs import CandidateCosts
from stagewright.planner.search.local_search import descend
from stagewright.planner.search.order import Cut

Floats = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]

TRIES, MOST_STEPS = 30, 200
PROMISING = 1.06  # times the incumbent: a partition that takes longer is not moved


@dataclass(frozen=True, eq=False)
class Completion:
    """A completed candidate: simulated step, stage bounds, layers by level [S, K, 3], and its critical path.

    `judged` says that messages were made to wait for busy links; else links never wait.
    """

    step_s: float
    bounds: tuple[int, ...]
    counts: Longs
    cut: Cut
    judged: bool = False


def improve(
    costs: CandidateCosts,
    bounds: Sequence[int] | Longs,
    *,
    tries: int = TRIES,
    most_steps: int = MOST_STEPS,
    give_up_s: float = np.inf,
    most_moves: int = 0,
    least_s: float = 0.0,
) -> tuple[Completion | None, int]:
    """Return the completion that moves from a partition reach, None when it does not fit, and the simulations made.

    A partition that takes longer than `give_up_s` is not moved. Local optima are shaken until about `most_moves`
    moves were tried or a step is below `least_s`.
    """
    value, reached, counts, made = descend(
        costs.tables, np.asarray(bounds, dtype=np.int64), tries, most_steps, give_up_s, most_moves, least_s
    )
    if not np.isfinite(value):
        return None, made
    ends = tuple(reached.tolist())
    step_s, cut = costs.trace(counts, ends)
    return Completion(step_s, ends, counts, cut), made + 1


def start(costs: CandidateCosts) -> Completion | None:
    """Return the first of a few balanced completions that fits, or a staircase where it is better; None when none does."""
    stairs = staircase(costs)
    best = None if stairs is None else improve(costs, stairs, most_steps=0)[0]
    for load in (costs.runs.time_s, costs.runs.state_bytes + costs.runs.kept_bytes[0], np.ones(costs.runs.num_runs)):
        each = np.repeat(load, costs.runs.length)
        found, _ = improve(costs, balanced(each, costs.num_stages), most_steps=0)
        if found is not None:
            return found if best is None or found.step_s < best.step_s else best
    return best


def staircase(costs: CandidateCosts) -> Longs | None:
    """Return bounds that give the stages of several chunks a rank equal layers, one more to the later ones.

    The first stages hold most microbatches at once and fill the pipeline, so they are the smaller ones. Layers before and
    after the longest run stand on the first and the last stage. None with one chunk a rank or fewer layers than stages.
    """
    stages, longest = costs.num_stages, int(np.argmax(costs.runs.length))
    number, ahead = int(costs.runs.length[longest]), int(costs.classes.run_start[longest])
    if stages <= costs.order.num_ranks or number < stages:
        return None
    sizes = np.full(stages, number // stages, dtype=np.int64)
    sizes[stages - number % stages :] += 1
    sizes[0] += ahead
    sizes[-1] += costs.num_layers - number - ahead
    return np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(sizes)))


def balanced(each: Floats, num_stages: int) -> Longs:
    """Return bounds whose largest stage load is least, every stage at least one layer (bisection, then spreading).

    `each` [L] is the load of each layer.
    """
    before = np.concatenate((np.zeros(1), np.cumsum(each)))
    bounds: Longs = _balanced(before, num_stages, float(each.max()))
    return bounds


@njit(cache=True)
def _balanced(before: Floats, stages: int, largest: float) -> Longs:
    layers = len(before) - 1
    low, high = max(before[-1] / stages, largest), before[-1]
    for _ in range(30):
        middle = 0.5 * (low + high)
        position = 0
        for _ in range(stages):
            position = np.searchsorted(before, before[position] + middle * (1 + 1e-12), side="right") - 1
        if position >= layers:
            high = middle
        else:
            low = middle
    bounds = np.zeros(stages + 1, dtype=np.int64)
    bounds[stages] = layers
    for stage in range(stages - 1):
        left, first = stages - stage, bounds[stage]
        share = before[first] + (before[-1] - before[first]) / left
        end = np.searchsorted(before, share, side="left")
        if end > 0 and share - before[end - 1] < before[min(end, layers)] - share:
            end -= 1
        most = np.searchsorted(before, before[first] + high * (1 + 1e-12), side="right") - 1
        bounds[stage + 1] = max(first + 1, min(end, most, layers - (left - 1)))
    return bounds
