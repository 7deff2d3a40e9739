"""A certificate is checked again, and one that was tampered with is refused."""

from __future__ import annotations

import pytest

from stagewright.planner.documents import TrainingJob
from stagewright.planner.errors import InvalidDocument
from stagewright.planner.planning import make_plan
from stagewright.planner.search.verify import verify_certificate
from stagewright.testing.mocked_cluster import cluster_factory
from stagewright.testing.mocked_profile import profile_factory


def test_a_certificate_holds_and_a_changed_one_does_not() -> None:
    profile = profile_factory(4, jitter=0.3)
    job = TrainingJob(global_batch=4, sequence_length=128, precision="fp32")
    plan = make_plan(profile, cluster_factory(2), job).plan
    assert plan is not None and plan.certificate is not None
    verify_certificate(plan, profile)
    for change in ({"objective": 1e-9}, {"gap": 0.5}, {"bound": 1e9}):
        changed = plan.model_copy(update={"certificate": plan.certificate.model_copy(update=change)})
        with pytest.raises(InvalidDocument, match=r"certificate|bound|gap"):
            verify_certificate(changed, profile)
