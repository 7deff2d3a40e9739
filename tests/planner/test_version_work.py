"""What weight versions add to a predicted step, against sums that a hand can make."""

from __future__ import annotations

import pytest

from stagewright.planner.cost.even_plan import even_plan
from stagewright.planner.cost.step_time import Choice
from stagewright.planner.documents import Degrees, Optimizer, Recompute, TrainingJob
from stagewright.planner.prediction import evaluate
from stagewright.testing import cluster_factory, profile_factory

MICROBATCHES, COPY_BYTES_PER_S, STEP_S = 6, 2e11, 1e-3


def evaluated(name, ranks, copy_bytes_per_s, *, optimizer="sgd-momentum"):
    profile = profile_factory(4, forward_s=0.1, microbatches=(1,)).model_copy(
        update={"copy_bytes_per_s": copy_bytes_per_s, "step_overhead_s": STEP_S}
    )
    job = TrainingJob(
        global_batch=MICROBATCHES,
        sequence_length=128,
        precision="fp32",
        optimizer=Optimizer.standard(optimizer, "fp32"),
    )
    choice = Choice(Degrees(), ranks, 2 if name == "wpipe" else 1, 1, name, Recompute.NONE)
    plan = even_plan(profile, cluster_factory(ranks, 1), job, choice)
    weights_s = 4.0 * sum(profile.classes[layer].parameters for layer in profile.layer_classes) / COPY_BYTES_PER_S
    return evaluate(plan, profile), weights_s


# copies of the weights in a step of one rank: of each microbatch, and of each update (of which there are so many)
CASES = [
    ("1f1b", 0.0, 0.0, 0),
    ("pipedream", -2 / 3, 1 - 2 / 3, MICROBATCHES),
    ("ampnet", -2 / 3, 1 - 2 / 3, MICROBATCHES),
    ("spectrain", 2 - 2 / 3, -2 / 3, MICROBATCHES),
    ("2bw", -2 / 3 / MICROBATCHES, 1 - 2 / 3, 1),
    ("pipemare", 1 + 4 / 3 - 2 / 3 / MICROBATCHES, 1 + 2 - 2 / 3, 1),
]


@pytest.mark.parametrize(("name", "microbatch", "update", "updates"), CASES)
def test_one_rank_pays_for_each_copy_it_makes(name, microbatch, update, updates):
    priced, weights_s = evaluated(name, 1, COPY_BYTES_PER_S)
    free, _ = evaluated(name, 1, 1e300)
    longer_s = priced.prediction.step_time_s - free.prediction.step_time_s
    assert longer_s == pytest.approx((MICROBATCHES * microbatch + updates * update) * weights_s, rel=1e-6, abs=1e-12)


def test_every_update_on_the_way_is_a_step_of_its_own():
    """With copies for nothing, six updates take the optimizer and the overhead of a step six times, one after the other."""
    free, _ = evaluated("pipedream", 1, 1e300)
    flushed, _ = evaluated("1f1b", 1, 1e300)
    optimizer_s = flushed.prediction.optimizer_s
    longer_s = free.prediction.step_time_s - flushed.prediction.step_time_s
    assert optimizer_s > 0
    assert longer_s == pytest.approx((MICROBATCHES - 1) * optimizer_s + MICROBATCHES * STEP_S, rel=1e-9)


def test_pipelines_with_weights_of_their_own_step_apart():
    free, _ = evaluated("avgpipe", 2, 1e300)
    flushed, _ = evaluated("1f1b", 2, 1e300)
    assert free.prediction.optimizer_s == pytest.approx(2 * flushed.prediction.optimizer_s, rel=1e-9)


def test_without_a_measured_rate_a_copy_reads_and_writes_at_the_devices_bandwidth():
    unknown, weights_s = evaluated("2bw", 1, None)
    free, _ = evaluated("2bw", 1, 1e300)
    bandwidth = cluster_factory(1, 1).groups[0].device.memory_bytes_per_s
    copy_s = weights_s * COPY_BYTES_PER_S * 2 / bandwidth
    assert unknown.prediction.step_time_s - free.prediction.step_time_s == pytest.approx(copy_s / 3, rel=1e-6)


@pytest.mark.parametrize("name", ["pipedream", "spectrain", "wpipe", "avgpipe"])
def test_a_slower_copy_never_shortens_a_pipeline_but_by_sums_it_is_spared(name):
    priced, _ = evaluated(name, 2, COPY_BYTES_PER_S)
    free, _ = evaluated(name, 2, 1e300)
    assert (priced.pipeline.optimizer_s >= free.pipeline.optimizer_s).all() or name == "spectrain"
    assert (priced.pipeline.costs[:2] >= free.pipeline.costs[:2]).all()
    assert (priced.pipeline.costs[2] < free.pipeline.costs[2]).all()
