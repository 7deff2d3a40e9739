"""Levels chosen again for a finished completion are the least ones of its stages."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np

from stagewright.planner.search.exact_levels import with_exact_levels
from stagewright.planner.search.incumbent import Completion, start
from stagewright.planner.search.joint_search import JointSearch
from stagewright.planner.search.limits import Limits

sys.path.insert(0, str(Path(__file__).parent))

from random_problems import random_problem


def test_with_one_chunk_a_rank_no_levels_of_the_same_stages_are_faster() -> None:
    checked = improved = 0
    for seed in range(60):
        problem = random_problem(seed, most_layers=5)
        search = JointSearch.of(problem, Limits(gap=0.0))
        seen = set()
        for index in range(search.space.num_candidates if len(problem.priced) else 0):
            costs = search.costs.of(index)
            key = (search.space.rule(index).name, search.space.key(index).num_ranks)
            if costs is None or key in seen or costs.order.num_replicas > 1 or costs.slots.stage.shape[1] > 1:
                continue
            found = start(costs)
            if found is None or not found.counts[:, :, 1:].any():
                continue
            seen.add(key)
            layers = costs.layers_of(found.bounds)
            heavy = np.zeros_like(found.counts)
            heavy[:, :, int(np.flatnonzero(costs.levels)[-1])] = layers
            if costs.fits(heavy):
                step_s, cut = costs.trace(heavy, found.bounds)
                found = Completion(step_s, found.bounds, heavy, cut)
            best = with_exact_levels(costs, found, lambda: False)
            least = np.inf
            for levels in itertools.product(np.flatnonzero(costs.levels).tolist(), repeat=problem.profile.num_layers):
                counts, layer = np.zeros_like(found.counts), 0
                for stage, run in itertools.product(*map(range, layers.shape)):
                    for _ in range(layers[stage, run]):
                        counts[stage, run, levels[layer]] += 1
                        layer += 1
                if costs.fits(counts):
                    least = min(least, costs.value(counts, found.bounds))
            assert costs.fits(best.counts)
            assert abs(best.step_s - least) <= 1e-9 * least, (seed, search.space.candidate(index).summary)
            checked += 1
            improved += best.step_s < found.step_s * (1 - 1e-9)
        if checked >= 40:
            break
    assert checked >= 10
    assert improved >= 1
