"""Layers of one stage with tensor and data parallel degrees of their own, resharded between them (Galvatron)."""

from __future__ import annotations

from itertools import pairwise

import pytest

pytest.importorskip("torch")
from runtime_cases import Case, make_model, prepare
from runtime_documents import profile_of
from runtime_models import LENGTH

from stagewright.modeling import split
from stagewright.planner.documents import Degrees, Plan, RankMapping, StagePlan
from stagewright.planner.errors import InvalidArgument
from stagewright.planner.layerwise import layerwise_schedule
from stagewright.planner.prediction import evaluate
from stagewright.runtime.layerwise import check_layerwise
from stagewright.runtime.support import check_supported
from stagewright.testing.mocked_cluster import cluster_factory

pytestmark = pytest.mark.ranks

CASE = Case("gpipe", 1, 1, dropout=0.0, dtype="float64", num_blocks=4, tied=False, clip_norm=0.05)
MICROBATCHES, SAMPLES = 2, 8
BOUNDARY_BYTES = LENGTH * 16 * 8.0  # of one sample: 16 numbers of fp64 a token


def _plan(pool, splits: tuple[tuple[int, int], ...]) -> tuple[object, Plan]:
    """Six layers of a model cut evenly into stages of these (tp, dp)."""
    prepared = prepare(CASE, pool.next_number())
    count, layers = len(splits), prepared.plan.num_layers
    bounds = [index * layers // count for index in range(count + 1)]
    stages = tuple(
        StagePlan(layers=pair, degrees=Degrees(tp=tp, dp=dp))
        for pair, (tp, dp) in zip(pairwise(bounds), splits, strict=True)
    )
    devices = splits[0][0] * splits[0][1]
    job = prepared.plan.job.model_copy(update={"global_batch": MICROBATCHES * SAMPLES})
    update = {
        "stages": stages,
        "cluster": cluster_factory(devices),
        "job": job,
        "mapping": RankMapping(pipeline_ranks=(tuple(range(devices)),)),
        "schedule": layerwise_schedule(count, MICROBATCHES, SAMPLES // splits[0][1]),
    }
    return prepared, prepared.plan.model_copy(update=update)


@pytest.mark.parametrize(
    "splits",
    [((2, 1), (1, 2)), ((1, 2), (2, 1)), ((4, 1), (1, 4)), ((2, 2), (1, 4), (4, 1), (2, 2))],
    ids=str,
)
def test_layers_with_degrees_of_their_own_train_as_one_process(rank_pools, splits):
    pool = rank_pools(splits[0][0] * splits[0][1])
    prepared, plan = _plan(pool, splits)
    results = pool.run("layerwise_training", (prepared, plan))
    for result in results:
        assert result.gradients.max_relative_error <= 1e-10
        assert result.weights.max_relative_error <= 1e-10
    model = make_model(CASE, 2)
    assert results[-1].states == {name: tuple(value.shape) for name, value in model.named_parameters()}
    profile = profile_of(split(model), microbatches=(1, 2, 4, 8), output_bytes=BOUNDARY_BYTES, tensor_degrees=(1, 2, 4))
    predicted = evaluate(plan.model_copy(update={"profile_digest": profile.digest}), profile).prediction.link_bytes
    sent = sum(result.sent["all-gather/reshard"] for result in results)
    assert sent == predicted["all-gather/reshard"]
    assert sum(result.loss or 0.0 for result in results) == pytest.approx(results[0].reference_loss, rel=1e-10)


def test_other_degrees_and_weights_shared_by_two_stages_are_refused(rank_pools):
    prepared, plan = _plan(rank_pools(2), ((2, 1), (1, 2)))
    chain = split(make_model(CASE, 2))
    check_layerwise(plan, chain)
    check_supported(plan)
    first, second = plan.stages
    sharded = second.model_copy(update={"degrees": Degrees(dp=2, zero=1)})
    with pytest.raises(InvalidArgument, match=r"stages\[1\] has \{'dp': 2, 'zero': 1\}"):
        check_layerwise(plan.model_copy(update={"stages": (first, sharded)}), chain)
    with pytest.raises(InvalidArgument, match=r"stages\[1\] has \{'dp': 2, 'zero': 1\}"):
        check_supported(plan.model_copy(update={"stages": (first, sharded)}))
    with pytest.raises(InvalidArgument, match="is shared by layers"):
        check_layerwise(plan, split(make_model(Case("gpipe", 1, 1, num_blocks=4), 2)))
    with pytest.raises(InvalidArgument, match="pipeline ranks; layers with degrees of their own run on one"):
        check_layerwise(prepared.plan, chain)
