"""What a backward takes longer in two pieces is paid by the orders that split it, and by no other."""

from __future__ import annotations

import pytest

from stagewright.planner.cost import CostModel
from stagewright.planner.cost.batch import Choices, estimate_all
from stagewright.planner.cost.even_plan import even_plan
from stagewright.planner.cost.step_time import FAMILIES, Choice, estimate
from stagewright.planner.documents import Degrees, ModelProfile, Recompute, TrainingJob
from stagewright.planner.prediction import with_prediction
from stagewright.planner.schedules.family import ScheduleRequest
from stagewright.planner.schedules.registry import generate
from stagewright.planner.search.order import layout_of
from stagewright.testing.mocked_cluster import cluster_factory
from stagewright.testing.mocked_profile import profile_factory

RANKS, MICROBATCHES, LAYERS = 4, 8, 16
WEIGHT_GRAD_S, EXCESS_S = 0.9e-3, 0.2e-3
CLUSTER = cluster_factory(RANKS, 1)
JOB = TrainingJob(global_batch=MICROBATCHES, sequence_length=128, precision="fp32")


def _profile(weight_grad_s: float, excess_s: float = 0.0) -> ModelProfile:
    return profile_factory(
        LAYERS, forward_s=1e-3, input_grad_s=1.1e-3, weight_grad_s=weight_grad_s, split_excess_s=excess_s,
        microbatches=(1,), kinds=["block"] * LAYERS,
    )  # fmt: skip


def _step_s(profile: ModelProfile, name: str, chunks: int) -> float:
    choice = Choice(Degrees(), RANKS, chunks, 1, name, Recompute.NONE)
    return with_prediction(even_plan(profile, CLUSTER, JOB, choice), profile).prediction.step_time_s


@pytest.mark.parametrize(
    ("name", "chunks", "share"),
    [
        ("gpipe", 1, 0.0), ("1f1b", 1, 0.0), ("interleaved", 2, 0.0),
        ("zb-h1", 1, 1.0), ("zb-h2", 1, 1.0), ("zb-v", 2, 1.0), ("interleaved-zb", 2, 1.0),
    ],
)  # fmt: skip
def test_an_order_pays_the_excess_where_its_backwards_are_split(name: str, chunks: int, share: float) -> None:
    with_excess = _step_s(_profile(WEIGHT_GRAD_S, EXCESS_S), name, chunks)
    assert with_excess == pytest.approx(_step_s(_profile(WEIGHT_GRAD_S + share * EXCESS_S), name, chunks), rel=1e-12)


def test_an_order_that_splits_some_backwards_pays_their_share_of_the_excess() -> None:
    """DualPipeV on 4 ranks and 8 microbatches: 22 of 64 backwards are split."""
    layout = layout_of(generate("dualpipe-v", ScheduleRequest(RANKS, MICROBATCHES, num_chunks=2)))
    assert layout.split_share == 22 / 64
    found = _step_s(_profile(WEIGHT_GRAD_S, EXCESS_S), "dualpipe-v", 2)
    same = _step_s(_profile(WEIGHT_GRAD_S + layout.split_share * EXCESS_S), "dualpipe-v", 2)
    assert found == pytest.approx(same, rel=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_closed_forms_pay_what_the_simulator_pays(family: str) -> None:
    model = CostModel(_profile(WEIGHT_GRAD_S, EXCESS_S), CLUSTER, JOB)
    more = CostModel(_profile(WEIGHT_GRAD_S + (EXCESS_S if family.startswith("zb") else 0.0)), CLUSTER, JOB)
    choice = Choice(Degrees(), RANKS, 2 if family in ("interleaved", "zb-v") else 1, 1, family, Recompute.NONE)
    assert estimate(model, choice).step_s == pytest.approx(estimate(more, choice).step_s, rel=1e-12)
    assert estimate_all(model, Choices.of([choice])).step_s[0] == pytest.approx(
        estimate(model, choice).step_s, rel=1e-12
    )
