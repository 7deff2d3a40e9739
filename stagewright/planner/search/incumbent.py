"""Good completions early: balanced stages, recomputation that fits, then single layers moved off the critical path.

`start` cuts the layers into stages of equal time (or equal numbers, or what memory admits) and simulates; `improve`
moves one layer between two stages at a time. A critical path of the simulation says where a layer costs most: the
coefficients of its cut are the gradient of the makespan, so the most promising moves are tried first and the first
better one is taken. Heuristic: nothing here is proved.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stagewright.planner.search.candidate_costs import CandidateCosts
from stagewright.planner.search.order import Cut

Floats = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]


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


def complete(costs: CandidateCosts, bounds: tuple[int, ...], weight: Floats | None = None) -> Completion | None:
    """Return the completion of a partition with greedy recomputation; None when none was found that fits."""
    counts = costs.fit(bounds, weight)
    if counts is None:
        return None
    value, cut = costs.trace(counts, bounds)
    return Completion(value, bounds, counts, cut)


def start(costs: CandidateCosts) -> Completion | None:
    """Return the best of a few balanced completions; None when none of them fits."""
    best: Completion | None = None
    for load in (costs.runs.time_s, costs.runs.state_bytes + costs.runs.kept_bytes[0], np.ones(costs.runs.num_runs)):
        found = complete(costs, balanced(costs, load))
        if found is not None and (best is None or found.step_s < best.step_s):
            best = found
        if best is not None:
            break
    return best


def balanced(costs: CandidateCosts, load: Floats) -> tuple[int, ...]:
    """Return bounds whose largest stage load is least, every stage at least one layer (bisection, then spreading)."""
    each = load[np.repeat(np.arange(costs.runs.num_runs), costs.runs.length)]
    before = np.concatenate((np.zeros(1), np.cumsum(each)))
    stages, layers = costs.num_stages, costs.num_layers
    low, high = max(float(before[-1]) / stages, float(each.max())), float(before[-1])
    for _ in range(30):
        middle = 0.5 * (low + high)
        if _fill(before, stages, middle) >= layers:
            high = middle
        else:
            low = middle
    return _spread(before, stages, high)


def _fill(before: Floats, stages: int, most: float) -> int:
    """Return how many layers `stages` stages of at most `most` load take."""
    position = 0
    for _ in range(stages):
        position = int(np.searchsorted(before, before[position] + most * (1 + 1e-12), side="right")) - 1
    return position


def _spread(before: Floats, stages: int, most: float) -> tuple[int, ...]:
    """Return bounds of stages of at most `most`, as close to equal shares of what is left as that allows."""
    layers = len(before) - 1
    bounds = [0]
    for stage in range(stages - 1):
        left = stages - stage
        first = bounds[-1]
        share = before[first] + (before[-1] - before[first]) / left
        end = int(np.searchsorted(before, share, side="left"))
        if end > 0 and share - before[end - 1] < before[min(end, layers)] - share:
            end -= 1
        cap = int(np.searchsorted(before, before[first] + most * (1 + 1e-12), side="right")) - 1
        end = max(first + 1, min(end, cap, layers - (left - 1)))
        bounds.append(end)
    return (*bounds, layers)


def improve(costs: CandidateCosts, found: Completion, *, tries: int = 12, most_steps: int = 60) -> Completion:
    """Return a completion after single-layer moves; each step takes the first of `tries` moves that is better."""
    best = found
    weight = _weights(best.cut)
    for _ in range(most_steps):
        better = _step(costs, best, tries, weight)
        if better is None:
            return best
        best = better
    return best


def _weights(cut: Cut) -> Floats:
    """Return how much a second of backward costs on each stage, at least a little everywhere, [S]."""
    return np.asarray(cut.counts[1] + 0.05 * max(float(cut.counts[1].max()), 1.0), dtype=np.float64)


def _step(costs: CandidateCosts, found: Completion, tries: int, weight: Floats) -> Completion | None:
    for bounds in _moves(costs, found, tries):
        trial = complete(costs, bounds, weight)
        if trial is not None and trial.step_s < found.step_s * (1 - 1e-9):
            return trial
    return None


def _moves(costs: CandidateCosts, found: Completion, tries: int) -> list[tuple[int, ...]]:
    """Return the bounds of the most promising moves of one layer from a stage to another."""
    sizes = np.diff(found.bounds)
    layers = found.counts.sum(axis=2)
    runs = costs.runs
    forward, input_grad, weight_grad = found.cut.counts
    price = (
        forward[:, None] * runs.forward_s
        + input_grad[:, None] * runs.input_grad_s
        + weight_grad[:, None] * runs.weight_grad_s
    )
    mean = np.where(sizes > 0, (price * layers).sum(axis=1) / np.maximum(sizes, 1), 0.0)
    gain = mean[:, None] - mean[None, :]
    gain[sizes <= 1, :] = -np.inf
    np.fill_diagonal(gain, -np.inf)
    order = np.argsort(-gain, axis=None, kind="stable")[:tries]
    moves = []
    for place in order.tolist():
        giver, taker = divmod(place, len(sizes))
        if not np.isfinite(gain[giver, taker]) or gain[giver, taker] <= 0:
            break
        bounds = list(found.bounds)
        if giver < taker:
            for index in range(giver + 1, taker + 1):
                bounds[index] -= 1
        else:
            for index in range(taker + 1, giver + 1):
                bounds[index] += 1
        moves.append(tuple(bounds))
    return moves
