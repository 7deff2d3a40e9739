"""The longest span's certificate: maximum cycle mean."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from stagewright.planner.schedules.auto.climbing import climb_targets
from stagewright.planner.schedules.auto.span import least_longest_span, maximum_cycle_mean
from stagewright.planner.schedules.auto.sweep import end_times, longest_span
from stagewright.planner.schedules.auto.word import words_of
from stagewright.planner.schedules.family import ScheduleRequest
from stagewright.planner.schedules.registry import generate


@pytest.mark.parametrize("seed", range(10))
def test_cycle_mean_equals_the_best_of_all_simple_cycles(seed):
    weight = np.random.default_rng(seed).uniform(0, 10, (4, 4))
    cycles = [cycle for size in range(1, 5) for cycle in itertools.permutations(range(4), size)]
    best = max(sum(weight[a, b] for a, b in zip(c, (*c[1:], c[0]), strict=True)) / len(c) for c in cycles)
    assert maximum_cycle_mean(weight) == pytest.approx(best)


def test_zb_h2_has_no_idle_time_in_its_span(uniform_instance):
    # O9: 4 ranks, 8 microbatches, unit costs: the longest span is the ideal, 24.
    instance = uniform_instance(4, 8)
    words = words_of(generate("zb-h2", ScheduleRequest(4, 8)), instance)
    assert words is not None
    assert least_longest_span(instance, words) == pytest.approx(24.0)


@pytest.mark.parametrize("seed", range(10))
def test_certificate_lies_between_work_and_the_left_shifted_span(seed, random_instance):
    instance = random_instance(np.random.default_rng(seed), 4, 6, 1 + seed % 2)
    _, words = climb_targets(instance, evaluations=40, seed=seed)
    _, end_s = end_times(instance, words)
    span_s = least_longest_span(instance, words)
    assert instance.work_s.max() * (1 - 1e-9) <= span_s <= longest_span(instance, words, end_s) * (1 + 1e-9)
