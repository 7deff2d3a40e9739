"""Hill climbing over the targets of the list decoder.

A target is offset[letter] + k * period for microbatch k. The climb starts from a grid of classical shapes (backward first,
forward first, warm-ups of different depth, W at once or last) and changes a few offsets, the period or the patience at a time. Good
with loose memory, poor with tight; its orders are starting points for annealing. The first order of the grid always exists.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from stagewright.planner.schedules.auto.decoder import decode, empty_words, stages_by_rank
from stagewright.planner.schedules.auto.draw import State, below, normal, seeded, uniform
from stagewright.planner.schedules.auto.instance import Floats, Instance, Ints, Tables

STARTS = 64


def climb_targets(instance: Instance, *, evaluations: int, seed: int) -> tuple[float, Ints]:
    """Return the best makespan and words among `evaluations` decoded targets."""
    words = empty_words(instance)
    best_s = climb(
        instance.tables, instance.costs.activation, stages_by_rank(instance), evaluations, seeded(seed), words
    )
    return float(best_s), words


@njit(cache=True)
def climb(tables: Tables, activation: Floats, stages: Ints, evaluations: int, state: State, best_words: Ints) -> float:
    """Return the best makespan; `best_words` is overwritten with its order."""
    num_letters, microbatches = len(tables.rank), tables.num_microbatches
    work_s = np.zeros(len(tables.lengths))
    for letter in range(num_letters):
        work_s[tables.rank[letter]] += tables.duration_s[letter]
    busiest_s = work_s.max()
    words = best_words.copy()
    target_s = np.empty(num_letters * microbatches)
    best_s = np.inf
    starts = max(1, min(STARTS, evaluations // 4))
    per_start = max(1, evaluations // starts)
    for start in range(starts):
        offset_s, patience_s, period_s = _start(tables, start, busiest_s)
        current_s = np.inf
        for step in range(per_start):
            trial_s, trial_patience_s, trial_period_s = offset_s.copy(), patience_s.copy(), period_s
            if step > 0:
                for _ in range(1 + below(state, 3)):
                    trial_s[below(state, num_letters)] += busiest_s * normal(state) * 0.5
                if uniform(state) < 0.3:
                    letter = below(state, num_letters)
                    trial_patience_s[letter] = 0.3 * busiest_s * uniform(state) ** 2
                if uniform(state) < 0.2:
                    trial_period_s = busiest_s * (0.5 + uniform(state))
            for letter in range(num_letters):
                for microbatch in range(microbatches):
                    target_s[letter * microbatches + microbatch] = trial_s[letter] + microbatch * trial_period_s
            value_s = decode(tables, activation, stages, target_s, trial_patience_s, (start + step) % 2 == 1, words)
            if value_s <= current_s:
                current_s = value_s
                offset_s, patience_s, period_s = trial_s, trial_patience_s, trial_period_s
                if value_s < best_s:
                    best_s = value_s
                    best_words[:] = words
    return best_s


@njit(cache=True, no_cpython_wrapper=True)
def _start(tables: Tables, start: int, busiest_s: float) -> tuple[Floats, Floats, float]:
    """Return offsets, patience and period of one shape of the grid."""
    num_letters = len(tables.rank)
    num_stages = num_letters // 3
    in_chain = num_stages // tables.num_chains
    offset_s = np.zeros(num_letters)
    warm_up_s = busiest_s * (start // 8 % 8) * 0.75
    for stage in range(num_stages):
        depth_s = 2.0 * tables.duration_s.mean() * (in_chain - stage % in_chain)
        offset_s[3 * stage] = -depth_s if start % 2 == 0 else 0.0
        offset_s[3 * stage + 1] = warm_up_s - 1e3 * busiest_s * (start // 2 % 2 == 0)
        offset_s[3 * stage + 2] = warm_up_s + 1e6 * busiest_s * (start // 4 % 2 == 0)
    return offset_s, np.zeros(num_letters), busiest_s
