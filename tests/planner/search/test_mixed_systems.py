"""Published systems for devices that differ: what each of them gains is found by the search over pools."""

from __future__ import annotations

import pytest

from stagewright.planner.documents import Cluster, Plan, Recompute, TrainingJob
from stagewright.planner.documents.job import Pins, SearchSpace
from stagewright.planner.documents.outcome import PlanOutcome
from stagewright.planner.errors import InvalidArgument, InvalidDocument
from stagewright.planner.plan_check import plan_violations
from stagewright.planner.planning import make_plan
from stagewright.planner.prediction import evaluate, with_prediction
from stagewright.planner.schedules.action import Kind
from stagewright.planner.schedules.schedule import KIND
from stagewright.planner.search.verify import verify_certificate
from stagewright.testing.mocked_cluster import cluster_factory, mixed_cluster_factory
from stagewright.testing.mocked_profile import profile_factory


def _cluster(speed: float, *, memory_bytes: float = 80e9, devices: int = 2) -> Cluster:
    return cluster_factory(devices, 1, device=f"device-{speed}", flops=300e12 * speed, memory_bytes=memory_bytes)


def _mixed(speed: float, *, memory_bytes: float = 80e9) -> Cluster:
    return mixed_cluster_factory([_cluster(1.0), _cluster(speed, memory_bytes=memory_bytes)], bytes_per_s=10e9)


def _job(**space: object) -> TrainingJob:
    return TrainingJob(
        global_batch=32,
        sequence_length=128,
        precision="fp32",
        space=SearchSpace(**{"schedules": ("1f1b", "gpipe"), **space}),  # type: ignore[arg-type]
    )


PROFILE = profile_factory(
    12, forward_s=1e-3, parameters=20_000_000, activation_bytes=4e6, output_bytes=1e6, microbatches=(1, 2, 4, 8)
)


def _best(outcome: PlanOutcome) -> Plan:
    assert outcome.plan is not None
    return outcome.plan


def _on(plan: Plan, cluster: Cluster) -> Plan:
    """Return a plan made for equal devices as it runs on a mixed cluster, stage by stage on the groups in order."""
    groups = [cluster.group_of(ranks[0]).name for ranks in plan.mapping.pipeline_ranks]
    stages = tuple(
        stage.model_copy(update={"group": groups[rank]})
        for stage, rank in zip(plan.stages, plan.schedule.placement[0], strict=True)
    )
    return with_prediction(plan.model_copy(update={"cluster": cluster, "stages": stages, "certificate": None}), PROFILE)


def test_metis_gives_the_slower_group_fewer_layers_and_beats_the_plan_for_equal_devices() -> None:
    cluster = _mixed(0.5)
    found = make_plan(PROFILE, cluster, _job(), gap=0.0)
    plan = _best(found)
    equal = _best(make_plan(PROFILE, _cluster(1.0, devices=4), _job(pins=Pins(pp=2)), gap=0.0))
    assert found.status == "optimal"
    assert plan.prediction.step_time_s < 0.85 * _on(equal, cluster).prediction.step_time_s
    by_group = {stage.group: 0 for stage in plan.stages}
    for stage in plan.stages:
        by_group[stage.group] += stage.num_layers
    fast, slow = (group.name for group in cluster.groups)
    assert by_group[fast] == 8
    assert by_group[slow] == 4
    verify_certificate(plan, PROFILE)


def test_replicas_of_one_stage_on_devices_of_different_speed_take_samples_in_proportion() -> None:
    """Metis' data balance: 3 samples for a device of the first kind, 1 for one a third as fast, and no bubble."""
    cluster = _mixed(1 / 3)
    found = make_plan(PROFILE, cluster, _job(pins=Pins(pp=1)), gap=0.0)
    plan = _best(found)
    (stage,) = plan.stages
    assert found.status == "optimal"
    assert stage.batch_shares == (3, 3, 1, 1)
    assert plan.schedule.num_microbatches * 8 == 32
    steps = {
        fast: with_prediction(_with_shares(plan, (fast, fast, 4 - fast, 4 - fast)), PROFILE).prediction.step_time_s
        for fast in (1, 2, 3)
    }
    assert min(steps, key=lambda fast: steps[fast]) == 3
    assert steps[3] == plan.prediction.step_time_s
    assert steps[2] > 1.9 * steps[3]  # a slow device has 2 samples in place of 1, and the fast ones wait
    layers_alone = _best(make_plan(PROFILE, cluster, _job(pins=Pins(pp=2, dp=2)), gap=0.0))
    assert [stage.batch_shares for stage in layers_alone.stages] == [(), ()]
    assert plan.prediction.step_time_s < layers_alone.prediction.step_time_s
    assert plan.prediction.link_bytes.keys() <= {"all-reduce/dp", "reduce-scatter/dp", "all-gather/dp"}
    assert plan_violations(plan, PROFILE) == []
    verify_certificate(plan, PROFILE)


def _with_shares(plan: Plan, shares: tuple[int, ...]) -> Plan:
    stages = tuple(stage.model_copy(update={"batch_shares": shares}) for stage in plan.stages)
    return plan.model_copy(update={"stages": stages, "certificate": None})


def test_a_plan_with_shares_names_the_group_that_it_fills_most_and_no_other_group_overflows() -> None:
    """Of two kinds with equal memory the one that takes three times the samples is the full one."""
    cluster = _mixed(1 / 3)
    plan = _best(make_plan(PROFILE, cluster, _job(pins=Pins(pp=1)), gap=0.0))
    fast, slow = (group.name for group in cluster.groups)
    assert plan.stages[0].group == fast
    other = plan.model_copy(update={"stages": (plan.stages[0].model_copy(update={"group": slow}),)})
    peaks = [with_prediction(each, PROFILE).prediction.peak_memory_bytes[0] for each in (plan, other)]
    assert peaks[0] - peaks[1] == pytest.approx(2 * 12 * 4e6)  # two samples more of 12 layers' activations
    small = mixed_cluster_factory([_cluster(1.0, memory_bytes=peaks[0]), _cluster(1 / 3)], bytes_per_s=10e9)
    (violation,) = plan_violations(plan, PROFILE, small)
    assert violation.code == "memory"


def test_states_lie_where_memory_is_and_samples_where_speed_is() -> None:
    """Cephalo's split of the two: equal shards overfill the small devices, shards by memory let all four compute."""
    cluster = mixed_cluster_factory(
        [_cluster(1.0, memory_bytes=4e9), _cluster(1.0, memory_bytes=1e9)], bytes_per_s=10e9
    )
    found = make_plan(PROFILE, cluster, _job(pins=Pins(pp=1), recompute=(Recompute.NONE,)), gap=0.0)
    plan = _best(found)
    (stage,) = plan.stages
    assert found.status == "optimal"
    assert len(set(stage.batch_shares)) == 1
    assert stage.state_shares[0] > 3 * stage.state_shares[-1]
    assert sum(stage.state_shares) == pytest.approx(1.0)
    equal = plan.model_copy(update={"stages": (stage.model_copy(update={"state_shares": ()}),), "certificate": None})
    assert plan_violations(plan, PROFILE) == []
    assert [violation.code for violation in plan_violations(equal, PROFILE)] == ["memory"]
    # What equal shards leave is the two large devices alone.
    alone = _best(make_plan(PROFILE, _cluster(1.0, memory_bytes=4e9), _job(recompute=(Recompute.NONE,)), gap=0.0))
    assert plan.prediction.step_time_s < 0.7 * alone.prediction.step_time_s
    # Each shard is broadcast by its owner, as many bytes as a gather of equal ones.
    sent = [with_prediction(each, PROFILE).prediction.link_bytes["all-gather/dp"] for each in (plan, equal)]
    assert sent[0] / sent[1] == pytest.approx(1.0, rel=1e-6)
    verify_certificate(plan, PROFILE)


def test_state_shares_that_leave_something_over_or_have_nothing_to_divide_are_refused() -> None:
    plan = _best(make_plan(PROFILE, _mixed(1 / 3), _job(pins=Pins(pp=1), zero=(1,)), gap=0.0))
    (stage,) = plan.stages
    for update in ({"state_shares": (0.5, 0.3, 0.1, 0.05)}, {"state_shares": (0.5, 0.5)}):
        with pytest.raises(InvalidDocument, match="state_shares are"):
            with_prediction(plan.model_copy(update={"stages": (stage.model_copy(update=update),)}), PROFILE)
    whole = stage.model_copy(
        update={"state_shares": (0.25,) * 4, "degrees": stage.degrees.model_copy(update={"zero": 0})}
    )
    with pytest.raises(InvalidDocument, match="dp 4 and zero 0"):
        with_prediction(plan.model_copy(update={"stages": (whole,)}), PROFILE)


def test_a_straggling_node_is_a_group_of_lower_rate_and_planning_again_moves_layers_off_it() -> None:
    healthy, straggling = _mixed(1.0), _mixed(0.6)
    before = _best(make_plan(PROFILE, healthy, _job(pins=Pins(pp=2)), gap=0.0))
    after = _best(make_plan(PROFILE, straggling, _job(pins=Pins(pp=2)), gap=0.0))
    kept = _on(before, straggling)
    assert [stage.num_layers for stage in before.stages] == [6, 6]
    assert after.prediction.step_time_s < 0.9 * kept.prediction.step_time_s
    slow = straggling.groups[1].name
    assert sum(stage.num_layers for stage in after.stages if stage.group == slow) < 6


def test_a_group_of_less_memory_holds_fewer_layers_and_no_rank_overflows() -> None:
    cluster = _mixed(1.0, memory_bytes=0.9e9)
    plan = _best(make_plan(PROFILE, cluster, _job(zero=(0,)), gap=0.0))
    limits = {group.name: group.device.memory_bytes * 0.95 for group in cluster.groups}
    groups = [plan.cluster.group_of(ranks[0]).name for ranks in plan.mapping.pipeline_ranks]
    assert all(peak <= limits[name] for peak, name in zip(plan.prediction.peak_memory_bytes, groups, strict=True))
    small = cluster.groups[1].name
    assert sum(stage.num_layers for stage in plan.stages if stage.group == small) == 4


def test_groups_take_devices_and_degrees_of_their_own_by_stage() -> None:
    cluster = mixed_cluster_factory([_cluster(1.0, devices=2), _cluster(0.8, devices=1)], bytes_per_s=10e9)
    plan = _best(make_plan(PROFILE, cluster, _job(pins=Pins(pp=2)), gap=0.0))
    sizes = {stage.group: stage.degrees.num_devices for stage in plan.stages}
    assert plan.num_devices == 3
    assert sorted(sizes.values()) in ([1, 1], [1, 2])
    samples = {stage.degrees.dp for stage in plan.stages}
    assert plan.schedule.num_microbatches * plan.schedule.microbatch * plan.stages[0].degrees.dp == 32
    assert all(plan.schedule.microbatch * plan.stages[0].degrees.dp % dp == 0 for dp in samples)


def test_two_branches_of_two_stages_and_a_join_run_side_by_side_at_depth_three() -> None:
    profile = profile_factory(
        5, forward_s=1e-3, output_bytes=1.0, edges=[(0, 1), (1, 4), (2, 3), (3, 4)], microbatches=(1,)
    )
    cluster = _cluster(1.0, devices=5)
    job = TrainingJob(
        global_batch=4, sequence_length=128, precision="fp32", space=SearchSpace(pins=Pins(pp=5, microbatch=1))
    )

    def planned(*schedules: str) -> Plan:
        space = job.space.model_copy(update={"schedules": schedules})
        return _best(make_plan(profile, cluster, job.model_copy(update={"space": space}), gap=0.0))

    graph, chain = planned("1f1b", "gpipe", "graphpipe"), planned("1f1b")
    assert graph.schedule.name == "graphpipe"
    assert graph.schedule.edges == ((0, 1), (1, 4), (2, 3), (3, 4))
    assert graph.prediction.bubble_over_total == pytest.approx(1 / 3, abs=2e-3)
    assert chain.prediction.bubble_over_total == pytest.approx(1 / 2, abs=2e-3)
    assert graph.prediction.step_time_s < 0.76 * chain.prediction.step_time_s
    verify_certificate(graph, profile)


def test_an_encoder_and_a_language_model_take_degrees_of_their_own_where_they_are_asked_for() -> None:
    """A heavy encoder of few parameters is worth three replicas, a light model of many parameters none."""
    profile = profile_factory(
        3,
        forward_s=[9e-3, 0.1e-3, 1e-3],
        parameters=[100_000, 100_000, 200_000_000],
        activation_bytes=2e6,
        output_bytes=1e5,
        edges=[(1, 2), (0, 2)],
        microbatches=(1, 2, 4, 8),
    )
    cluster = cluster_factory(4, 1, bytes_per_s=5e9)

    def planned(per_stage: bool) -> PlanOutcome:
        job = _job(per_stage_degrees=per_stage, zero=(0,)).model_copy(update={"global_batch": 36})
        return make_plan(profile, cluster, job, gap=0.0)

    uniform, by_stage = planned(False), planned(True)
    assert by_stage.objective_s is not None
    assert uniform.objective_s is not None
    assert by_stage.objective_s < 0.8 * uniform.objective_s
    assert [stage.degrees.dp for stage in _best(by_stage).stages] == [3, 1]
    verify_certificate(_best(by_stage), profile)


def test_towers_before_a_loss_over_the_whole_batch_take_degrees_of_their_own_and_no_backward_comes_early() -> None:
    """A heavy tower of few parameters, a light one of many, and a contrastive loss behind both."""
    profile = profile_factory(
        3,
        forward_s=[12e-3, 6e-3, 6e-3],
        parameters=[100_000, 100_000_000, 100_000_000],
        activation_bytes=1e6,
        output_bytes=1e4,
        edges=[(0, 2), (1, 2)],
        microbatches=(1, 2, 3, 4, 6),
    )
    cluster = cluster_factory(4, 1, bytes_per_s=5e9)

    def planned(*schedules: str, per_stage: bool) -> PlanOutcome:
        job = _job(per_stage_degrees=per_stage, zero=(0,), schedules=schedules).model_copy(update={"global_batch": 12})
        return make_plan(profile, cluster, job, gap=0.0)

    uniform, found = planned("gpipe", per_stage=False), planned("gpipe", "distmm", per_stage=True)
    plan = _best(found)
    assert found.objective_s is not None and uniform.objective_s is not None
    assert plan.schedule.name == "distmm"
    assert plan.schedule.edges == ((0, 2), (1, 2))
    assert [stage.degrees.dp for stage in plan.stages] == [2, 1, 1]
    assert found.objective_s < uniform.objective_s / 1.5
    timeline = evaluate(plan, profile).timeline
    kind = timeline.action[:, KIND]
    assert timeline.end_s[kind == Kind.F].max() <= timeline.start_s[kind == Kind.B].min()
    verify_certificate(plan, profile)


def test_running_side_by_side_is_refused_where_the_model_has_no_branches() -> None:
    with pytest.raises(InvalidArgument, match="has none"):
        make_plan(PROFILE, _cluster(1.0), _job(pins=Pins(schedule="graphpipe"), schedules=()))
