"""Freezing: what is left of a frozen layer's cost, PipeTransformer's rule, and the shallower pipeline that then fits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stagewright.cli.main import run
from stagewright.planner.cost.cost_model import CostModel
from stagewright.planner.documents import Degrees, ModelProfile, Plan, TrainingJob
from stagewright.planner.documents.job import Pins, SearchSpace
from stagewright.planner.errors import InvalidArgument
from stagewright.planner.freezing import freeze, frozen_prefix, next_frozen
from stagewright.planner.planning import make_plan
from stagewright.planner.prediction import evaluate
from stagewright.planner.search.layer_costs import Configuration, layer_costs
from stagewright.planner.search.verify import verify_certificate
from stagewright.planner.state_layout import state_pieces
from stagewright.testing.mocked_cluster import cluster_factory
from stagewright.testing.mocked_profile import profile_factory

PROFILE = profile_factory(
    8,
    forward_s=1e-3,
    parameters=10_000_000,
    activation_bytes=4e6,
    output_bytes=1e5,
    forward_flops=1e9,
    microbatches=(1, 2, 4),
)
JOB = TrainingJob(
    global_batch=16,
    sequence_length=128,
    precision="fp32",
    space=SearchSpace(schedules=("1f1b", "gpipe"), zero=(0,), recompute=("none",)),
)


def test_a_frozen_prefix_has_a_forward_and_its_weights_and_nothing_else() -> None:
    model = CostModel(frozen_prefix(PROFILE, 3), cluster_factory(4, 1), JOB)
    costs = layer_costs(model, Configuration(Degrees(dp=2), 2, 1, 8))
    whole = layer_costs(CostModel(PROFILE, cluster_factory(4, 1), JOB), Configuration(Degrees(dp=2), 2, 1, 8))
    for name in ("input_grad_s", "weight_grad_s", "tail_s", "optimizer_s", "gradient_bytes"):
        assert not getattr(costs, name)[:3].any(), name
        assert np.array_equal(getattr(costs, name)[3:], getattr(whole, name)[3:]), name
    assert not costs.kept_bytes[:, :3].any()
    assert np.array_equal(costs.forward_s, whole.forward_s)
    assert np.array_equal(costs.state_bytes[:, 0], [4e7, 0.0, 0.0])
    assert np.array_equal(whole.state_bytes[:, 0], [4e7, 4e7, 8e7])


def test_frozen_layers_behind_trained_ones_pass_the_gradient_on() -> None:
    frozen = freeze(PROFILE, ["layer.0", "layer.3", "layer.4"])
    backwards = [frozen.classes[name].backward for name in frozen.layer_classes]
    assert backwards == ["none", "full", "full", "input", "input", "full", "full", "full"]
    costs = layer_costs(CostModel(frozen, cluster_factory(1, 1), JOB), Configuration(Degrees(), 1, 1, 16))
    assert costs.input_grad_s[3] == pytest.approx(1e-3)
    assert costs.weight_grad_s[3] == 0.0
    assert frozen.num_parameters == 50_000_000
    assert frozen.layer_names == PROFILE.layer_names
    assert frozen.layer_digest == PROFILE.layer_digest
    assert frozen.digest != PROFILE.digest
    assert ModelProfile.from_object(frozen.model_dump(mode="json")) == frozen
    assert freeze(frozen, ["layer.1", "layer.2"]) == freeze(PROFILE, [f"layer.{index}" for index in range(5)])


def test_a_smaller_pipeline_with_more_replicas_follows_where_the_frozen_model_fits_on_half_the_devices() -> None:
    """PipeTransformer's step from four ranks to two ranks and two replicas, found by planning again."""
    cluster = cluster_factory(4, 1, memory_bytes=0.45e9, bytes_per_s=20e9)
    job = JOB.model_copy(update={"space": JOB.space.model_copy(update={"pins": Pins(microbatch=1)})})
    before = make_plan(PROFILE, cluster, job, gap=0.0).plan
    frozen = frozen_prefix(PROFILE, 5)
    followed = make_plan(frozen, cluster, job, previous=before)
    after = followed.plan
    assert before is not None and after is not None and followed.migration is not None
    assert (before.schedule.num_ranks, before.stages[0].degrees.dp) == (4, 1)
    assert (after.schedule.num_ranks, after.stages[0].degrees.dp) == (2, 2)
    kept = make_plan(frozen, cluster, job.model_copy(update={"space": _pinned(4)}), gap=0.0).plan
    assert kept is not None
    assert after.prediction.step_time_s < 0.96 * kept.prediction.step_time_s
    assert after.prediction.step_time_s < 0.65 * before.prediction.step_time_s
    verify_certificate(make_plan(frozen, cluster, job, gap=0.0).plan, frozen)  # type: ignore[arg-type]
    _only_trained_layers_have_optimizer_state(after, frozen)


def _pinned(depth: int) -> SearchSpace:
    return JOB.space.model_copy(update={"pins": Pins(microbatch=1, pp=depth)})


def _only_trained_layers_have_optimizer_state(plan: Plan, frozen: ModelProfile) -> None:
    held = {piece.layer for _, piece in state_pieces(plan, frozen) if piece.item == "optimizer"}
    assert held == {5, 6, 7}
    memory = evaluate(plan, frozen).prediction.memory
    stages = [stage.layer_indices for stage in plan.stages]
    for items, layers in zip(memory, stages, strict=True):
        assert items.optimizer == pytest.approx(8e7 * sum(layer >= 5 for layer in layers))
        assert items.parameters == pytest.approx(4e7 * len(layers))


def test_the_next_frozen_layers_stop_at_the_least_gradient_and_at_a_share_of_the_rest() -> None:
    norms = [5.0, 4.0, 3.0, 0.5, 6.0, 7.0, 8.0, 9.0, 9.0, 9.0, 9.0, 9.0]
    assert next_frozen(norms, 0, alpha=0.5) == 3  # the layer of least gradient is where it stops
    assert next_frozen(norms, 0, alpha=0.2) == 2  # a fifth of the twelve layers left
    assert next_frozen(norms, 3, alpha=0.5) == 3  # the least gradient of the rest is the first one's
    assert next_frozen([9.0, 9.0, 9.0, 4.0, 3.0, 2.0, 1.0], 2) == 3
    with pytest.raises(InvalidArgument, match="alpha is"):
        next_frozen(norms, 0, alpha=1.0)


def test_freezing_everything_or_half_of_a_tie_is_refused() -> None:
    tied = profile_factory(4, tied=[(0, 3)])
    with pytest.raises(InvalidArgument, match=r"layer\.0 shares .* with layer\.3"):
        freeze(tied, ["layer.0"])
    assert freeze(tied, ["layer.0", "layer.3"]).trained_ties == ()
    with pytest.raises(InvalidArgument, match="every layer"):
        freeze(PROFILE, PROFILE.layer_names)
    with pytest.raises(InvalidArgument, match="8 of 8"):
        frozen_prefix(PROFILE, 8)
    with pytest.raises(InvalidArgument, match=r"no layer 'layer\.9'"):
        freeze(PROFILE, ["layer.9"])


def test_the_command_freezes_a_profile_for_planning(tmp_path: Path) -> None:
    profile, frozen = tmp_path / "profile.json", tmp_path / "frozen.json"
    PROFILE.save(profile)
    assert run(["profile", "freeze", str(profile), "--first", "3", "--layer", "layer.5", "-o", str(frozen)]) == 0
    assert ModelProfile.load(frozen) == freeze(PROFILE, ["layer.0", "layer.1", "layer.2", "layer.5"])
    assert run(["profile", "freeze", str(profile), "-o", str(frozen)]) == 2
