"""Renting nodes under quotas: the choice of most tokens for a dollar, of every choice."""

from __future__ import annotations

import pytest

from stagewright.planner.documents import Cluster, TrainingJob
from stagewright.planner.documents.job import SearchSpace
from stagewright.planner.errors import Infeasible, InvalidArgument
from stagewright.planner.planning import make_plan
from stagewright.planner.quotas import dollars_per_hour, node_choices, on_part, rent, rented
from stagewright.testing.mocked_cluster import cluster_factory, mixed_cluster_factory
from stagewright.testing.mocked_profile import profile_factory

PROFILE = profile_factory(
    8, forward_s=1e-3, parameters=20_000_000, activation_bytes=4e6, output_bytes=1e6, microbatches=(1, 2, 4, 8)
)
JOB = TrainingJob(
    global_batch=16, sequence_length=128, precision="fp32", space=SearchSpace(schedules=("1f1b",), zero=(0,))
)


def _zone(name: str, speed: float, price: float | None, quota: int) -> Cluster:
    return cluster_factory(
        1, quota, name=name, device=name, flops=300e12 * speed, price_per_hour=price, node_bytes_per_s=10e9
    )


def _zones(slow_price: float | None = 0.5, *, quotas: tuple[int, int] = (2, 2)) -> Cluster:
    return mixed_cluster_factory(
        [_zone("fast", 1.0, 2.0, quotas[0]), _zone("slow", 0.5, slow_price, quotas[1])], bytes_per_s=1e9
    )


def test_the_rental_is_the_best_of_every_choice_and_pays_only_devices_in_use() -> None:
    zones = _zones()
    found = rent(PROFILE, zones, JOB, gap=0.0)
    earned = []
    for nodes in node_choices(zones):
        part = rented(zones, nodes)
        plan = make_plan(on_part(PROFILE, zones, part, JOB), part, JOB, gap=0.0).plan
        assert plan is not None
        earned.append(16 * 128 * 3600 / (plan.prediction.step_time_s * dollars_per_hour(plan)))
    assert found.tokens_per_dollar == pytest.approx(max(earned))
    assert found.searched == found.choices == len(earned) == 8
    assert dollars_per_hour(found.plan) == sum(
        {"fast-0": 2.0, "slow-1": 0.5}[found.plan.cluster.group_of(rank).name]
        for ranks in found.plan.mapping.pipeline_ranks
        for rank in ranks
    )


def test_a_zone_is_left_when_its_price_rises_and_used_for_its_speed_when_a_step_is_limited() -> None:
    cheap = rent(PROFILE, _zones(0.5), JOB)
    assert set(cheap.nodes) == {"slow-1"}  # half the speed for a quarter of the price
    assert set(rent(PROFILE, _zones(2.0), JOB).nodes) == {"fast-0"}
    step_s = cheap.plan.prediction.step_time_s
    hurried = rent(PROFILE, _zones(0.5), JOB, most_step_s=0.4 * step_s)
    assert "fast-0" in hurried.nodes
    assert hurried.plan.prediction.step_time_s <= 0.4 * step_s
    assert hurried.tokens_per_dollar < cheap.tokens_per_dollar


def test_a_quota_bounds_the_nodes_of_a_zone() -> None:
    one = rent(PROFILE, _zones(0.5, quotas=(2, 1)), JOB)
    assert one.nodes.get("slow-1", 0) <= 1
    assert [sorted(nodes.items()) for nodes in node_choices(_zones(quotas=(1, 1)))] == [
        [("slow-1", 1)],
        [("fast-0", 1)],
        [("fast-0", 1), ("slow-1", 1)],
    ]


def test_limits_that_nothing_meets_and_zones_without_price_are_said() -> None:
    with pytest.raises(Infeasible, match=r"at most 0.001 dollars an hour"):
        rent(PROFILE, _zones(), JOB, most_dollars_per_hour=1e-3)
    with pytest.raises(InvalidArgument, match="zone slow-1 has no price"):
        rent(PROFILE, _zones(None), JOB)
