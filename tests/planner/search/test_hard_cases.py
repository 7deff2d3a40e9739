"""Problems whose linear programs leave much open are closed by branching on, not left with the first bound."""

from __future__ import annotations

import pytest

from stagewright.planner.catalog import resolve_cluster, resolve_model
from stagewright.planner.documents import TrainingJob
from stagewright.planner.planning import make_plan


@pytest.mark.soak
@pytest.mark.parametrize(
    ("model", "cluster", "batch", "length"),
    [
        ("llama2-13b", "b200-sxm:8x96", 192, 1024),  # 40 layers on up to 32 stages, as many microbatches as ranks
        ("gpt3-175b", "a100-sxm-40g:4x32", 512, 4096),  # memory decides almost everything
    ],
)
def test_a_case_that_needs_many_nodes_is_closed_to_one_percent(
    model: str, cluster: str, batch: int, length: int
) -> None:
    job = TrainingJob(global_batch=batch, sequence_length=length)
    outcome = make_plan(resolve_model(model), resolve_cluster(cluster), job)
    assert outcome.status in ("within_gap", "optimal")
    assert outcome.gap is not None and outcome.gap <= 0.01 + 1e-9
