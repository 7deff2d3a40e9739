"""A leader costs no more in any column, and the columns speak of every message that a family sends."""

from __future__ import annotations

import numpy as np
import pytest

from stagewright.planner.errors import InvalidArgument
from stagewright.planner.schedules.family import ScheduleRequest
from stagewright.planner.schedules.registry import generate
from stagewright.planner.search.cut_program import lower_hulls
from stagewright.planner.search.dominance import leaders_of
from stagewright.planner.search.order import layout_of
from stagewright.planner.search.space import RULES, FamilyRule


@pytest.mark.parametrize("seed", range(20))
def test_leaders_lead_themselves_and_cost_no_more_and_no_other_row_is_led_by_a_follower(seed: int) -> None:
    draw = np.random.default_rng(seed)
    features = draw.integers(0, 3, size=(30, 3)).astype(np.float64)
    leaders = leaders_of(features)
    assert (leaders[leaders] == leaders).all()
    assert (features[leaders] <= features).all()
    alone = np.flatnonzero(leaders == np.arange(len(features)))
    for row in alone:
        below = (features[alone] <= features[row]).all(axis=1)
        assert below.sum() == 1, "of two leaders none undercuts the other"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_families_send_between_neighbours_on_the_ring_and_sum_replicas_between_its_ends(rule: FamilyRule) -> None:
    checked = 0
    for ranks, count in ((2, 8), (4, 8), (6, 12)):
        for chunks in rule.chunks(4):
            if not rule.fits(ranks, count, chunks):
                continue
            request = ScheduleRequest(ranks, count, num_chunks=chunks, parameters=dict(rule.parameters))
            try:
                layout = layout_of(generate(rule.name, request))
            except InvalidArgument:
                continue
            apart = (layout.hop_pairs[:, 0] - layout.hop_pairs[:, 1]) % ranks
            assert set(apart.tolist()) <= {0, 1, ranks - 1}
            if layout.num_replicas == 2:
                assert set(layout.placement[:, 0].tolist()) == {0, ranks - 1}
            checked += 1
    assert checked


def test_the_hull_is_at_most_every_value_and_meets_the_ends() -> None:
    draw = np.random.default_rng(0)
    for _ in range(50):
        numbers = np.flatnonzero(draw.random(12) < 0.6) + 3
        if not len(numbers):
            continue
        values = np.sort(draw.random(len(numbers))) * draw.integers(0, 2)
        known = np.full((1, numbers[-1] - numbers[0] + 1), np.inf)
        known[0, numbers - numbers[0]] = values
        _, slopes, constants, most = lower_hulls(known, numbers[:1])
        assert most.tolist() == [values.max()]
        least = np.max([slopes * n + constants for n in numbers], axis=1, initial=0.0)
        assert (least <= values + 1e-12).all()
        if values.max() > 0:
            assert least[-1] == pytest.approx(values[-1])
