"""`--verify` confirms an honest certificate and refuses an edited one, naming the field."""

from __future__ import annotations

import pytest

from stagewright.planner.documents import TrainingJob
from stagewright.planner.errors import InvalidDocument
from stagewright.planner.planning import make_plan
from stagewright.planner.search.verify import verify_certificate
from stagewright.testing import cluster_factory, profile_factory


@pytest.fixture(scope="module")
def planned():
    profile = profile_factory(4)
    job = TrainingJob(global_batch=8, sequence_length=128, precision="fp32")
    return make_plan(profile, cluster_factory(2), job).plan, profile


def test_an_honest_certificate_is_confirmed(planned):
    plan, profile = planned
    assert len(verify_certificate(plan, profile)) == 4


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"objective": 0.5}, "certificate.objective"),
        ({"bound": 1e6}, "certificate.bound"),
        ({"gap": 0.5}, "certificate.gap"),
    ],
)
def test_an_edited_certificate_is_refused(planned, change, field):
    plan, profile = planned
    assert plan.certificate is not None
    edited = plan.model_copy(update={"certificate": plan.certificate.model_copy(update=change)})
    with pytest.raises(InvalidDocument) as caught:
        verify_certificate(edited, profile)
    assert caught.value.field == field
