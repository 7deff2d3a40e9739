"""A step taken before the norm of the whole model is known, and amended where it was wrong, is the synchronous step."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
from runtime_cases import Case, prepare

from stagewright.runtime.step_rule import StepRule

pytestmark = pytest.mark.ranks

CASES = [  # clip norm, step whose loss is no number, whether steps are amended, whether steps are taken back
    (Case("zb-h2", 4, 7, tied=False), 1e6, -1, False, False),
    (Case("zb-h2", 4, 7, tied=False), 0.5, -1, True, True),
    (Case("zb-h2", 2, 4, degrees={"dp": 2}), None, 1, True, False),
    (Case("zb-h2", 2, 4, degrees={"dp": 2, "zero": 1}, tied=False), 0.3, 2, True, True),
]


@pytest.mark.parametrize(("case", "clip_norm", "broken", "amends", "takes_back"), CASES, ids=str)
def test_post_validation_is_bit_equal_to_the_synchronous_step(rank_pools, case, clip_norm, broken, amends, takes_back):
    pool = rank_pools(4)
    prepared = prepare(case, pool.next_number())
    results = pool.run("post_validated_and_synchronous", (prepared, clip_norm, broken))
    assert all(same for same, _, _ in results)
    assert len({amended for _, amended, _ in results}) == 1
    assert (results[0][1] > 0) == amends
    assert (sum(back for _, _, back in results) > 0) == takes_back


def test_a_rule_says_whether_gradients_stay_are_scaled_or_are_thrown_away():
    assert StepRule().factor(4.0) == 1.0
    assert StepRule(clip_norm=3.0).factor(4.0) == 1.0
    assert StepRule(clip_norm=1.0).factor(4.0) == pytest.approx(0.5)
    assert StepRule(skip_nonfinite=True).factor(float("nan")) is None
    assert StepRule(clip_norm=1.0, skip_nonfinite=True).factor(float("inf")) is None
