"""Every schedule, executed: gradients and weights are those of one process."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
from runtime_cases import Case

pytestmark = pytest.mark.ranks


def assert_equal_to_one_process(pools, case: Case) -> None:
    limit = 1e-10 if case.dtype == "float64" else 1e-5
    results = pools(case.world).run("gradients_and_weights", case)
    for result in results:
        assert result["gradients"].max_relative_error <= limit, result
        assert result["weights"].max_relative_error <= limit, result
        assert result["live"] == 0


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "naive", "dapple-pb"])
def test_pipelines_with_data_parallel_replicas_equal_one_process(rank_pools, schedule, dtype):
    assert_equal_to_one_process(rank_pools, Case(schedule, 2, 4, dp=2, dtype=dtype))


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_pipelines_equal_one_process(rank_pools, schedule):
    assert_equal_to_one_process(rank_pools, Case(schedule, 2, 5))
    assert_equal_to_one_process(rank_pools, Case(schedule, 4, 3, tied=False))
