"""Varuna: the knee, and the best balanced depth by simulation."""

from __future__ import annotations

from stagewright.planner.planners.varuna import knee


def test_the_knee_is_the_smallest_microbatch_that_is_nearly_as_fast_a_sample():
    assert knee({1: 1.0, 2: 1.2, 4: 2.1, 8: 4.0}) == 4
    assert knee({1: 1.0, 2: 2.0, 4: 4.0}) == 1
