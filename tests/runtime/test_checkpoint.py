"""A run that is saved under one plan and continued under another ends with the weights of one never interrupted."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
from runtime_cases import Case, prepare

pytestmark = pytest.mark.ranks

PAIRS = [
    (Case("1f1b", 2, 4, degrees={"dp": 2}), Case("zb-h1", 4, 8)),
    (Case("zb-h1", 4, 8), Case("1f1b", 2, 4, degrees={"dp": 2, "zero": 1})),
    (Case("gpipe", 1, 4, degrees={"dp": 2, "tp": 2, "zero": 3}), Case("1f1b", 2, 8, degrees={"tp": 2, "sp": True})),
]


@pytest.mark.parametrize(("before", "after"), PAIRS, ids=lambda case: f"{case.schedule}-{case.num_ranks}")
def test_a_run_continued_under_another_plan_equals_one_never_interrupted(rank_pools, tmp_path, before, after):
    pool = rank_pools(4)
    cases = [
        prepare(type(case)(**{**vars(case), "dropout": 0.0, "dtype": "float64", "num_blocks": 3}), pool.next_number())
        for case in (before, after)
    ]
    for error in pool.run("continue_under_another_plan", (*cases, str(tmp_path / "saved"))):
        assert error <= 1e-9
