"""Closed forms of a step: against the simulator, and the compiled path against the scalar one."""

from itertools import product

import numpy as np
import pytest

from stagewright.planner.catalog import resolve_cluster, resolve_model
from stagewright.planner.cost import CostModel
from stagewright.planner.cost.batch import Choices, estimate_all
from stagewright.planner.cost.step_time import (
    FAMILIES,
    Choice,
    RankTimes,
    estimate,
    live_microbatches,
    pipeline_seconds,
)
from stagewright.planner.documents import Degrees, Recompute, TrainingJob
from stagewright.planner.errors import InvalidArgument
from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.schedules.family import ScheduleRequest
from stagewright.planner.schedules.registry import generate, peak_activations
from stagewright.planner.simulation.simulate import simulate


def simulated(name, d, count, costs, chunks=1):
    return simulate(generate(name, ScheduleRequest(d, count, num_chunks=chunks)), costs).makespan_s


def closed(family, d, count, times, chunks=1, first=None, last=None):
    return pipeline_seconds(
        family,
        first or times,
        times,
        last or times,
        num_ranks=d,
        num_microbatches=count,
        num_chunks=chunks,
        hop_s=0.0,
    )


@pytest.mark.parametrize(("d", "count"), [(1, 3), (2, 2), (4, 4), (4, 16), (8, 12)])
def test_gpipe_and_one_forward_one_backward_are_the_simulated_makespan_of_equal_stages(d, count):
    times = RankTimes(1.0, 1.2, 0.8)
    costs = StageCosts.uniform(d, forward_s=1.0, input_grad_s=1.2, weight_grad_s=0.8)
    for family in ("gpipe", "1f1b"):
        assert closed(family, d, count, times) == pytest.approx(simulated(family, d, count, costs))


@pytest.mark.parametrize(("d", "count", "v"), [(4, 8, 2), (4, 16, 2), (8, 16, 4)])
def test_interleaved_is_the_simulated_makespan_of_equal_stages(d, count, v):
    times = RankTimes(1.0, 1.0, 1.0)
    costs = StageCosts.uniform(d * v, num_chunks=v)
    assert closed("interleaved", d, count, times, v) == pytest.approx(simulated("interleaved", d, count, costs, v))


@pytest.mark.parametrize("d", [4, 8])
def test_zero_bubble_families_are_their_published_bubbles(d):
    costs = StageCosts.uniform(d, forward_s=1.0, input_grad_s=1.2, weight_grad_s=0.8)
    times = RankTimes(1.0, 1.2, 0.8)
    count = 2 * d
    assert closed("zb-h1", d, count, times) == pytest.approx(simulated("zb-h1", d, count, costs))
    assert closed("zb-h1", d, count, times) == pytest.approx(3.0 * count + (d - 1) * 1.4)
    assert closed("zb-h2", d, count, times) == pytest.approx(3.0 * count + (d - 1) * 0.6)


def test_a_heavy_last_stage_is_bounded_by_the_simulator():
    for d, count in ((4, 16), (8, 32)):
        heavy = RankTimes(1.5, 1.8, 1.2)
        times = RankTimes(1.0, 1.2, 0.8)
        costs = StageCosts.of([1.0] * (d - 1) + [1.5], [1.2] * (d - 1) + [1.8], [0.8] * (d - 1) + [1.2])
        for family, tolerance in (("gpipe", 1e-9), ("1f1b", 0.02)):
            found = closed(family, d, count, times, last=heavy)
            assert found == pytest.approx(simulated(family, d, count, costs), rel=tolerance)


@pytest.mark.parametrize("family", ["gpipe", "1f1b", "zb-h1", "zb-h2"])
def test_live_microbatches_are_the_peaks_of_the_schedule(family):
    for d, count in ((2, 8), (4, 8), (4, 3)):
        if family == "zb-h2" and count < 2 * d - 1:
            continue
        peaks = peak_activations(generate(family, ScheduleRequest(d, count)))
        first, last = live_microbatches(family, d, count, 1)
        assert first == pytest.approx(peaks[0])
        assert last >= peaks[-1] - 1e-9


def test_live_microbatches_of_interleaved_chunks():
    for d, count, v in ((4, 8, 2), (8, 16, 4)):
        peaks = peak_activations(generate("interleaved", ScheduleRequest(d, count, num_chunks=v)))
        first, last = live_microbatches("interleaved", d, count, v)
        assert first == pytest.approx(peaks[0])
        assert last >= peaks[-1] - 1e-9


def choices(experts=False):
    found = []
    for tp, cp, dp, pp in product((1, 2, 8), (1, 2), (1, 2, 8), (1, 2, 8)):
        for zero, v, microbatch, family, level in product((0, 1, 2, 3), (1, 2), (1, 2), FAMILIES, tuple(Recompute)):
            if (family == "interleaved") != (v > 1):
                continue
            ep = 4 if experts and dp * cp * tp % 4 == 0 else 1
            degrees = Degrees(dp=dp, tp=tp, cp=cp, ep=ep, sp=tp > 1, vocab_parallel=tp > 1, zero=zero)
            found.append(Choice(degrees, pp, v, microbatch, family, level))
    return found


@pytest.mark.parametrize(
    ("name", "cluster", "experts"),
    [
        ("gpt3-175b", "a100-sxm-80g:8x16", False),
        ("mixtral-8x7b", "h100-sxm:8x16", True),
        ("llama3.1-8b", "b200-sxm:8x2", False),
    ],
)
def test_the_compiled_path_equals_the_scalar_one(name, cluster, experts):
    job = TrainingJob(global_batch=64, sequence_length=2048)
    model = CostModel(resolve_model(name), resolve_cluster(cluster), job)
    rows = choices(experts)
    found = estimate_all(model, Choices.of(rows))
    legal = np.flatnonzero(np.isfinite(found.step_s))
    assert len(legal) > 500
    for row in np.random.default_rng(0).choice(legal, 150, replace=False):
        single = estimate(model, rows[row])
        assert found.step_s[row] == pytest.approx(single.step_s, rel=1e-9)
        assert found.peak_bytes[row] == pytest.approx(single.peak_bytes, rel=1e-9)
    for row in np.random.default_rng(1).choice(np.flatnonzero(np.isnan(found.step_s)), 10):
        with pytest.raises(InvalidArgument):
            estimate(model, rows[row])


def test_a_configuration_survives_the_way_through_arrays():
    rows = choices()[:50]
    arrays = Choices.of(rows)
    assert [arrays.choice(index) for index in range(len(rows))] == rows
    assert (
        len(
            estimate_all(
                CostModel(
                    resolve_model("gpt2"), resolve_cluster("a100:8x1"), TrainingJob(global_batch=8, sequence_length=128)
                ),
                Choices.of([]),
            ).step_s
        )
        == 0
    )


def test_the_estimate_is_near_the_scorers_prediction_on_a_published_run():
    job = TrainingJob(global_batch=64, sequence_length=2048, precision="fp16")
    model = CostModel(resolve_model("gpt3-175b"), resolve_cluster("a100-sxm-80g:8x8"), job)
    choice = Choice(Degrees(tp=8, vocab_parallel=True), 8, 3, 1, "interleaved", Recompute.FULL)
    assert estimate(model, choice).step_s == pytest.approx(18.13, rel=0.04)


def test_too_many_devices_are_refused_with_both_numbers():
    model = CostModel(
        resolve_model("gpt2"), resolve_cluster("a100:8x1"), TrainingJob(global_batch=8, sequence_length=128)
    )
    with pytest.raises(InvalidArgument, match=r"= 16 devices, the cluster has 8"):
        estimate(model, Choice(Degrees(dp=4), 4, 1, 1, "1f1b", Recompute.NONE))
