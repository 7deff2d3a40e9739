"""Context-parallel groups that change from one batch of a step to the next (Dynamic-CP, FlexSP)."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("torch")
from runtime_cases import Case, PreparedCase, prepare

pytestmark = pytest.mark.ranks


def _with_length(prepared: PreparedCase, length: int) -> PreparedCase:
    job = prepared.plan.job.model_copy(update={"sequence_length": length})
    return replace(prepared, plan=prepared.plan.model_copy(update={"job": job}))


def test_a_long_sequence_over_four_ranks_and_short_ones_on_each_have_the_gradients_of_one_process(rank_pools):
    """One sequence of 8 tokens with cp = 4, then eight of 2 tokens with dp = 4, on the same ranks in one step."""
    pool = rank_pools(4)
    shared = {"dropout": 0.0, "dtype": "float64", "num_blocks": 3}
    long = Case("gpipe", 1, 1, microbatch=1, degrees={"cp": 4}, **shared)
    short = Case("gpipe", 1, 2, microbatch=1, degrees={"dp": 4}, **shared)
    argument = (
        _with_length(prepare(long, pool.next_number()), 8),
        _with_length(prepare(short, pool.next_number()), 2),
    )
    for error, groups in pool.run("switched_groups", argument):
        assert error <= 1e-10
        assert groups == (4, 1)
