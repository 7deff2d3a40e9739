"""Comparing, uniting and calibrating profiles, on mocked ones."""

import pytest

from stagewright.planner.documents import (
    MemoryItems,
    ModelProfile,
    Plan,
    Prediction,
    RankMapping,
    ScheduleSpec,
    Source,
    StagePlan,
    TrainingJob,
)
from stagewright.planner.errors import InvalidArgument, InvalidDocument
from stagewright.profiler.calibrate import calibrate
from stagewright.profiler.profile_diff import diff_profiles
from stagewright.profiler.profile_html import largest_configuration, profile_html
from stagewright.profiler.profile_merge import merge_profiles
from stagewright.testing import cluster_factory, profile_factory


def with_pedigree(profile, **changes):
    return profile.model_copy(update={"pedigree": profile.pedigree.model_copy(update=changes)})


def with_spread(profile, low, high):
    document = profile.model_dump(mode="json")
    for value in document["classes"].values():
        for cost in value["costs"]:
            cost["spread"] = {"forward_s": [cost["forward_s"] * low, cost["forward_s"] * high]}
    return ModelProfile.model_validate(document)


def test_equal_profiles_have_no_difference():
    found = diff_profiles(profile_factory(3), profile_factory(3))
    assert (found.same_layers, found.changes, found.versions) == (True, (), {})


def test_a_change_within_the_spread_does_not_count_and_one_beyond_it_does():
    before = with_spread(
        profile_factory(2, microbatches=(1,), forward_s=1.0, input_grad_s=1.0, weight_grad_s=1.0), 0.9, 1.1
    )
    near = with_spread(
        profile_factory(2, microbatches=(1,), forward_s=1.1, input_grad_s=1.0, weight_grad_s=1.0), 0.9, 1.1
    )
    far = with_spread(
        profile_factory(2, microbatches=(1,), forward_s=1.5, input_grad_s=1.0, weight_grad_s=1.0), 0.9, 1.1
    )
    assert [change.field for change in diff_profiles(before, near).changes] == []
    (change,) = diff_profiles(before, far).changes
    assert (change.field, change.before, change.after) == ("forward_s", 1.0, 1.5)
    assert change.relative == pytest.approx(0.5)


def test_bytes_are_counted_so_any_change_of_them_counts():
    found = diff_profiles(
        profile_factory(2, microbatches=(1,), activation_bytes=1e6),
        profile_factory(2, microbatches=(1,), activation_bytes=1e6 + 4),
    )
    assert {change.field for change in found.changes} == {
        "activation_bytes.none",
        "activation_bytes.selective",
        "activation_bytes.full",
    }


def test_other_versions_and_devices_are_named():
    first = with_pedigree(profile_factory(2), versions={"torch": "2.12.0"}, device="one")
    second = with_pedigree(profile_factory(2), versions={"torch": "2.13.0"}, device="two")
    found = diff_profiles(first, second)
    assert found.versions == {"torch": ("2.12.0", "2.13.0")}
    assert found.surroundings == {"device": ("one", "two")}


def test_merging_unites_grids_and_the_later_number_wins():
    early = with_pedigree(profile_factory(2, microbatches=(1, 2), forward_s=1.0), taken_at="2026-01-01T00:00:00+00:00")
    late = with_pedigree(profile_factory(2, microbatches=(2, 4), forward_s=2.0), taken_at="2026-01-02T00:00:00+00:00")
    merged = merge_profiles([late, early])
    costs = merged.classes["mocked-0"].costs
    assert [(cost.microbatch, cost.forward_s) for cost in costs] == [(1, 1.0), (2, 4.0), (4, 8.0)]


def test_merging_other_models_or_devices_is_refused_with_both_values():
    with pytest.raises(InvalidArgument, match="differ in layers"):
        merge_profiles([profile_factory(2), profile_factory(3)])
    with pytest.raises(InvalidArgument, match=r"differ in pedigree\.device: mocked and other"):
        merge_profiles([profile_factory(2), with_pedigree(profile_factory(2), device="other")])
    with pytest.raises(InvalidArgument, match="nothing to merge"):
        merge_profiles([])


def plan_of(profile, cut):
    """Two stages on two devices, microbatch 1."""
    count = profile.num_layers
    return Plan(
        model=profile.name,
        profile_digest=profile.digest,
        layer_digest=profile.layer_digest,
        num_layers=count,
        cluster=cluster_factory(2),
        job=TrainingJob(global_batch=4, sequence_length=128, precision="fp32"),
        planner="by hand",
        stages=(StagePlan(layers=(0, cut)), StagePlan(layers=(cut, count))),
        mapping=RankMapping(pipeline_ranks=((0,), (1,))),
        schedule=ScheduleSpec(name="1f1b", num_ranks=2, num_microbatches=4, microbatch=1, placement=((0, 1),)),
        prediction=Prediction(
            step_time_s=1.0, tokens_per_s=1.0, samples_per_s=1.0, bubble_over_total=0.0, peak_memory_bytes=(0.0, 0.0),
            memory=(MemoryItems(), MemoryItems()), source=Source.MOCKED,
        ),
    )  # fmt: skip


def run_of(profile, plan, forward, backward):
    """A run whose layers take `forward` and `backward` times the profile's seconds, by class."""
    actions = {}
    for index, stage in enumerate(plan.stages):
        costs = [
            (name, profile.classes[name].costs[0]) for name in (profile.layer_classes[i] for i in stage.layer_indices)
        ]
        actions[f"{index}F"] = {"measured_s": sum(cost.forward_s * forward[name] for name, cost in costs)}
        actions[f"{index}B"] = {
            "measured_s": sum((cost.input_grad_s + cost.weight_grad_s) * backward[name] for name, cost in costs)
        }
    return {"checks": {"time": {"actions": actions}}}


def test_calibration_finds_the_factors_that_a_run_shows():
    """Two classes, each of which fills one stage: the run determines both factors."""
    profile = profile_factory(forward_s=[1.0, 1.0, 1.5, 1.5], microbatches=(1,))
    plan = plan_of(profile, 2)
    forward, backward = {"mocked-0": 1.2, "mocked-1": 0.9}, {"mocked-0": 1.0, "mocked-1": 1.3}
    result = calibrate(profile, plan, run_of(profile, plan, forward, backward))
    assert result.error_after < result.error_before / 10
    for name in forward:
        assert result.forward_factors[name] == pytest.approx(forward[name], rel=0.02)
        assert result.backward_factors[name] == pytest.approx(backward[name], rel=0.02)
    cost = result.profile.classes["mocked-0"].costs[0]
    assert cost.sources["forward_s"] is Source.FITTED
    assert result.profile.layer_digest == profile.layer_digest


def test_a_run_as_predicted_changes_nothing():
    profile = profile_factory(4, microbatches=(1,))
    plan = plan_of(profile, 2)
    result = calibrate(profile, plan, run_of(profile, plan, {"mocked-0": 1.0}, {"mocked-0": 1.0}))
    assert result.profile.classes["mocked-0"].costs[0].forward_s == pytest.approx(
        profile.classes["mocked-0"].costs[0].forward_s
    )
    assert result.error_after == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(
    "run",
    [
        {},
        {"checks": {}},
        {"checks": {"time": {"actions": {"0F": {"measured_s": -1.0}}}}},
        [],
        {"checks": {"time": None}},
    ],
)
def test_a_run_without_measured_actions_is_refused(run):
    profile = profile_factory(4, microbatches=(1,))
    with pytest.raises(InvalidDocument, match=r"measured|positive"):
        calibrate(profile, plan_of(profile, 2), run)


def test_calibrating_with_another_models_plan_is_refused():
    with pytest.raises(InvalidDocument, match="the plan is for 4 layers, the profile has 3"):
        calibrate(profile_factory(3), plan_of(profile_factory(4, microbatches=(1,)), 2), {})


def test_the_page_escapes_names_and_shows_every_layer():
    profile = profile_factory(3, name="<b>&", forward_s=[1e-3, 2e-3, 3e-3])
    page = profile_html(profile)
    assert "<b>&" not in page
    assert "&lt;b&gt;&amp;" in page
    assert page.count("<rect") == 3 * 3 + 3
    assert "src=" not in page and "href=" not in page


def test_the_page_shows_the_largest_configuration_that_all_classes_have():
    assert largest_configuration(profile_factory(2, microbatches=(1, 4, 2), tensor_degrees=(1, 2))) == (4, 128, 1)
