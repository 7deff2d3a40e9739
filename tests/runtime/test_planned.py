"""What planners return runs as they return it: their whole plan, on a model of as many layers, equals one process."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
from runtime_cases import Case, prepare_plan

from stagewright.planner.documents import Cluster, Plan, Recompute, TrainingJob
from stagewright.planner.documents.job import Pins, SearchSpace
from stagewright.planner.planning import make_plan
from stagewright.runtime.support import check_supported
from stagewright.testing.mocked_cluster import cluster_factory, mixed_cluster_factory
from stagewright.testing.mocked_profile import profile_factory

pytestmark = pytest.mark.ranks

CASE = Case("1f1b", 4, 1, dropout=0.0, tied=False, reference_microbatch=4)
NUM_LAYERS = 8
SIZES = {"activation_bytes": 40e6, "output_bytes": 1e6, "microbatches": (1, 2, 4, 8)}


def _planned(planner: str, cluster: Cluster, *, sizes: dict[str, object] = SIZES, **space: object) -> Plan:
    profile = profile_factory(NUM_LAYERS, forward_s=2e-3, parameters=25_000_000, **sizes)
    job = TrainingJob(global_batch=16, sequence_length=128, precision="fp32", space=SearchSpace(**space))
    found = make_plan(profile, cluster, job, planner=planner)
    assert found.plan is not None
    return found.plan


def _assert_equal_to_one_process(pools, plan: Plan) -> None:
    check_supported(plan)
    pool = pools(plan.num_devices)
    case = Case(**{**vars(CASE), "num_blocks": NUM_LAYERS - 4})
    for result in pool.run("gradients_and_weights", prepare_plan(case, plan, pool.next_number())):
        assert result.gradients.max_relative_error <= 1e-5
        assert result.weights.max_relative_error <= 1e-5


def test_mists_plan_with_optimizer_states_on_the_host_of_its_first_stages_runs(rank_pools):
    cluster = cluster_factory(4, 1, memory_bytes=1.0e9, bytes_per_s=5e9)
    (group,) = cluster.groups
    device = group.device.model_copy(update={"host_bytes_per_s": 25e9})
    cluster = cluster.model_copy(update={"groups": (group.model_copy(update={"device": device}),)})
    pins = Pins(pp=4, dp=1, microbatch=1)
    plan = _planned("mist", cluster, schedules=("1f1b",), pins=pins, per_stage_degrees=True)
    assert plan.stages[0].optimizer_offload > plan.stages[-1].optimizer_offload
    _assert_equal_to_one_process(rank_pools, plan)


def test_mists_plan_with_a_zero_stage_for_each_pipeline_stage_runs(rank_pools):
    cluster = cluster_factory(4, 1, memory_bytes=1.6e9, bytes_per_s=5e9)
    pins = Pins(pp=2, dp=2, microbatch=2)
    plan = _planned("mist", cluster, schedules=("1f1b",), pins=pins, per_stage_degrees=True)
    assert len({stage.degrees.zero for stage in plan.stages}) == 2
    _assert_equal_to_one_process(rank_pools, plan)


def test_the_exact_planners_plan_with_states_where_memory_is_runs(rank_pools):
    large, small = (
        cluster_factory(2, 1, device=f"device-{size}", flops=300e12, memory_bytes=size) for size in (3.5e9, 0.9e9)
    )
    cluster = mixed_cluster_factory([large, small], bytes_per_s=10e9)
    plan = _planned("exact", cluster, schedules=("1f1b", "gpipe"), pins=Pins(pp=1, dp=4), recompute=(Recompute.NONE,))
    (stage,) = plan.stages
    assert stage.state_shares[0] > 2 * stage.state_shares[-1]
    _assert_equal_to_one_process(rank_pools, plan)


def test_the_exact_planners_plan_with_a_tensor_degree_for_each_kind_of_device_runs(rank_pools):
    """The small devices split layers and sequences, the large ones a microbatch."""
    large, small = (
        cluster_factory(2, 1, device=f"device-{size}", flops=300e12, memory_bytes=size, bytes_per_s=50e9)
        for size in (6e9, 1.2e9)
    )
    cluster = mixed_cluster_factory([large, small], bytes_per_s=10e9)
    sizes = {**SIZES, "output_bytes": 20e6, "tensor_degrees": (1, 2)}
    space = {"schedules": ("1f1b",), "zero": (0,), "pins": Pins(pp=2), "recompute": (Recompute.NONE,)}
    plan = _planned("exact", cluster, sizes=sizes, **space)
    assert [(stage.degrees.tp, stage.degrees.dp) for stage in plan.stages] == [(2, 1), (1, 2)]
    assert plan.stages[0].degrees.sp
    _assert_equal_to_one_process(rank_pools, plan)
