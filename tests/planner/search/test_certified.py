"""However early a search is stopped, what it answers has a bound above zero and a finite gap."""

from __future__ import annotations

import math
from itertools import count

import pytest

from stagewright.planner.catalog import resolve_cluster, resolve_model
from stagewright.planner.documents import TrainingJob
from stagewright.planner.planning import make_plan


@pytest.mark.parametrize("cluster", ["a100-sxm-80g:8x1", "a100-sxm-80g:2x1+v100-sxm-32g:2x1"])
def test_a_search_by_stage_that_is_stopped_at_any_look_has_a_finite_gap(cluster) -> None:
    job = TrainingJob(global_batch=16, sequence_length=512, space={"per_stage_degrees": True, "schedules": ["1f1b"]})
    model, machines = resolve_model("gpt2"), resolve_cluster(cluster)
    answered = 0
    for looks in (1, 3, 6, 10, 20, 40, 80):
        seen = count()
        outcome = make_plan(model, machines, job, should_stop=lambda seen=seen, looks=looks: next(seen) >= looks)
        if outcome.plan is None:
            continue
        certificate = outcome.plan.certificate
        assert 0.0 < certificate.bound <= certificate.objective
        assert math.isfinite(certificate.gap)
        answered += 1
    assert answered
