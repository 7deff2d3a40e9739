"""What a run should take beyond its simulation: skew, ranks that wait for each other, messages that devices carry."""

from __future__ import annotations

import numpy as np
import pytest

from stagewright.planner.cost.even_plan import even_plan
from stagewright.planner.cost.step_time import Choice
from stagewright.planner.documents import Cluster, Degrees, Expectation, Jitter, ModelProfile, Recompute, TrainingJob
from stagewright.planner.expectation import drawn_factors, with_expectation
from stagewright.planner.prediction import evaluate, step_time_at
from stagewright.testing import cluster_factory, profile_factory

MICROBATCHES, ACTION_S = 8, 4e-3
STEADY = Jitter(piece_s=1e-3, ratios=(1.0,))
SKEWED = Jitter(piece_s=1e-3, ratios=(1.0, 1.0, 1.0, 1.2))
EVEN = Jitter(piece_s=ACTION_S, ratios=(0.8, 0.9, 1.0, 1.1, 1.2))


def profile_with(jitter: Jitter | None) -> ModelProfile:
    """Return eight equal layers; with two stages F and I and W take `ACTION_S` each."""
    profile = profile_factory(8, forward_s=ACTION_S / 4, microbatches=(1,), output_bytes=1e6)
    return profile.model_copy(update={"jitter": jitter})


def cluster_with(latency_s: float = 0.0, bytes_per_s: float | None = None) -> Cluster:
    """Return two devices whose messages take that much of each of their ends."""
    cluster = cluster_factory(2, 1)
    group = cluster.groups[0]
    ends = {"processor_latency_s": latency_s, "processor_bytes_per_s": bytes_per_s}
    links = tuple(link.model_copy(update=ends) for link in group.links)
    return cluster.model_copy(update={"groups": (group.model_copy(update={"links": links}),)})


def expected(
    jitter: Jitter | None, cluster: Cluster, *, name: str = "1f1b", ranks: int = 2, chunks: int = 1
) -> tuple[float, Expectation | None]:
    """Return the simulated step and the expectation."""
    profile = profile_with(jitter)
    job = TrainingJob(global_batch=MICROBATCHES, sequence_length=128, precision="fp32")
    choice = Choice(Degrees(dp=1), ranks, chunks, 1, name, Recompute.NONE)
    plan = even_plan(profile, cluster, job, choice)
    prediction = with_expectation(evaluate(plan, profile), plan, profile).prediction
    return prediction.step_time_s, prediction.expectation


def test_nothing_known_is_nothing_added():
    step_s, found = expected(None, cluster_with())
    assert found is not None
    assert (found.step_time_s, found.message_s, found.jitter_s) == (pytest.approx(step_s, rel=1e-12), 0.0, 0.0)


def test_steady_actions_take_their_medians():
    step_s, found = expected(STEADY, cluster_with())
    assert found is not None
    assert (found.step_time_s, found.jitter_s) == (pytest.approx(step_s, rel=1e-12), pytest.approx(0.0, abs=1e-12))


def test_a_rank_alone_takes_the_mean_of_skewed_seconds():
    """Four pieces to an action, 24 actions: the mean of the draws is the ratios' mean, 1.05, within its error."""
    step_s, found = expected(SKEWED, cluster_with(), ranks=1)
    assert found is not None
    assert found.jitter_s / step_s == pytest.approx(0.05, abs=0.004)
    assert found.num_draws == 32


def test_ranks_wait_for_each_others_longer_actions():
    """Ratios around one lengthen no rank alone, and they lengthen a pipeline."""
    alone_s, alone = expected(EVEN, cluster_with(), ranks=1)
    both_s, both = expected(EVEN, cluster_with())
    assert alone is not None and both is not None
    assert abs(alone.jitter_s) < 0.01 * alone_s
    assert both.jitter_s > 0.02 * both_s


@pytest.mark.parametrize(("name", "chunks", "ends"), [("gpipe", 1, 1), ("1f1b", 1, 1), ("zb-h1", 1, 1)])
def test_messages_take_their_time_of_both_ends(name, chunks, ends):
    """With two equal stages every F and every backward has one message: one rank's 8 of each, and one more of each to fill."""
    end_s = 1e-4 + 1e6 / 1e10
    _, found = expected(None, cluster_with(1e-4, 1e10), name=name, chunks=chunks)
    assert found is not None
    assert found.message_s == pytest.approx((MICROBATCHES + 1) * 2 * ends * end_s, rel=1e-9)
    assert (found.jitter_s, found.num_draws) == (0.0, 0)


def test_stages_on_one_rank_send_nothing():
    """zb-v keeps the middle boundary on its last rank: two of its three boundaries cost ends."""
    _, found = expected(None, cluster_with(1e-4), name="zb-v", chunks=2)
    assert found is not None
    assert found.message_s <= (2 * MICROBATCHES + 2) * 2 * 1e-4


def test_the_same_plan_has_the_same_expectation():
    first, second = (expected(EVEN, cluster_with(1e-4), name="zb-v", chunks=2)[1] for _ in range(2))
    assert first == second


def test_longer_actions_vary_less():
    generator = np.random.default_rng(1)
    short, long = (
        drawn_factors(np.full(2000, seconds), EVEN, generator).std() for seconds in (ACTION_S, 16 * ACTION_S)
    )
    assert short == pytest.approx(4 * long, rel=0.1)


def test_a_slower_run_is_expected_to_be_longer_in_every_part():
    profile = profile_with(SKEWED)
    job = TrainingJob(global_batch=MICROBATCHES, sequence_length=128, precision="fp32")
    plan = even_plan(profile, cluster_with(1e-4), job, Choice(Degrees(), 2, 1, 1, "1f1b", Recompute.NONE))
    evaluation = with_expectation(evaluate(plan, profile), plan, profile)
    found = evaluation.prediction.expectation
    assert found is not None
    assert step_time_at(evaluation, np.ones(2)) == pytest.approx(found.step_time_s, rel=1e-12)
    hops_s = (MICROBATCHES + 2) * evaluation.pipeline.hop_s.max()  # messages on their way do not become slower
    assert step_time_at(evaluation, np.full(2, 2.0)) == pytest.approx(2 * found.step_time_s, abs=hops_s)


def test_a_loss_alone_keeps_the_logits_that_it_receives():
    """Beside the 3 that it makes of them; any other layer keeps what it receives among its own 3."""
    for kind, kept in (("loss", 3e6 + 1e6), ("other", 3e6)):
        kinds = (kind, kind)
        profile = profile_factory(2, microbatches=(1,), output_bytes=1e6, activation_bytes=3e6, kinds=kinds)
        job = TrainingJob(global_batch=MICROBATCHES, sequence_length=128, precision="fp32")
        choice = Choice(Degrees(dp=1), 2, 1, 1, "1f1b", Recompute.NONE)
        first, last = evaluate(even_plan(profile, cluster_with(), job, choice), profile).stage_bytes
        assert (first.kept.tolist(), last.kept.tolist()) == ([3e6], [kept])


@pytest.mark.parametrize(
    ("recompute", "kept"), [(Recompute.NONE, 4e6 + 0.75e6), (Recompute.SELECTIVE, 2e6 + 0.75e6), (Recompute.FULL, 1e6)]
)
def test_a_stage_holds_what_its_first_layer_does_not_keep_of_what_it_receives(recompute, kept):
    """A norm that keeps wider numbers, say; a layer that runs again as a whole keeps what it is given."""
    profile = profile_factory(2, microbatches=(1,), output_bytes=1e6)
    levels = {Recompute.NONE: 4e6, Recompute.SELECTIVE: 2e6, Recompute.FULL: 1e6}
    update = {"activation_bytes": levels, "unkept_input_bytes": 0.75e6}
    classes = {
        name: layer.model_copy(update={"costs": tuple(cost.model_copy(update=update) for cost in layer.costs)})
        for name, layer in profile.classes.items()
    }
    profile = profile.model_copy(update={"classes": classes})
    job = TrainingJob(global_batch=MICROBATCHES, sequence_length=128, precision="fp32")
    plan = even_plan(profile, cluster_with(), job, Choice(Degrees(dp=1), 2, 1, 1, "1f1b", recompute))
    first, last = evaluate(plan, profile).stage_bytes
    assert (first.kept.tolist(), last.kept.tolist()) == ([levels[recompute]], [kept])
