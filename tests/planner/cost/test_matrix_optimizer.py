"""Muon and Shampoo against their algorithms, run and counted, and against the papers' communication and memory."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from stagewright.planner.catalog import resolve_cluster, resolve_model
from stagewright.planner.cost.data_parallel import replica_traffic
from stagewright.planner.cost.groups import GroupShape, Tier
from stagewright.planner.cost.matrix_optimizer import newton_schulz_flops, shampoo_flops, shampoo_state_bytes
from stagewright.planner.documents import Optimizer, Plan, TrainingJob
from stagewright.planner.documents.job import Pins, SearchSpace
from stagewright.planner.errors import InvalidArgument
from stagewright.planner.planning import make_plan

GPT2 = resolve_model("gpt2")
CLUSTER = resolve_cluster("a100-sxm-80g:8x1")


@dataclass
class Counted:
    """Matrix products that count their FLOP."""

    flops: int = 0
    shapes: list[tuple[int, int, int]] = field(default_factory=list)

    def product(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        self.flops += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        return left @ right


@pytest.mark.parametrize("shape", [(20, 36), (16, 40), (48, 12)])
def test_newton_schulz_makes_a_matrix_orthogonal_in_the_flops_that_are_priced(shape: tuple[int, int]) -> None:
    """The quintic iteration with Muon's coefficients, on the side that is shorter."""
    a, b, c = 3.4445, -4.7750, 2.0315
    drawn = np.random.default_rng(0).normal(size=shape)
    count = Counted()
    x = drawn / np.linalg.norm(drawn)
    x = x.T if shape[0] > shape[1] else x
    for _ in range(5):
        square = count.product(x, x.T)
        x = a * x + count.product(b * square + c * count.product(square, square), x)
    assert count.flops == newton_schulz_flops(*shape)
    assert newton_schulz_flops(64, 64) == 30 * 64**3
    assert np.linalg.svd(x, compute_uv=False) == pytest.approx(1.0, abs=0.35)  # the iteration aims at [0.7, 1.2]


def test_shampoo_counts_statistics_and_direction_of_each_block_and_holds_sixteen_bytes_a_parameter() -> None:
    gradient = np.random.default_rng(0).normal(size=(30, 20))
    count = Counted()
    left, right = count.product(gradient, gradient.T), count.product(gradient.T, gradient)
    count.product(count.product(left, gradient), right)
    roots = 25 * (30**3 + 20**3) / 100
    assert shampoo_flops(30, 20) == count.flops + roots
    assert shampoo_state_bytes(2048, 3072) == 16 * 2048 * 3072
    assert shampoo_state_bytes(64, 2048) > 16 * 64 * 2048  # a thin matrix has a wide side too
    blocks = 2 * shampoo_flops(1024, 1024) + shampoo_flops(1024, 100)
    assert shampoo_flops(2148, 1024) == pytest.approx(blocks, rel=1e-12)


def test_sharded_muon_sends_a_quarter_more_than_adamw_where_gradients_and_weights_travel_in_four_bytes() -> None:
    """Liu et al. 2025: (4 + 4 + 2) / (4 + 4); without ZeRO every device has whole matrices and nothing is gathered."""
    group = GroupShape((Tier(8, CLUSTER.groups[0].links[0]),))
    parameters = 1e9

    def sent(name: str, zero: int) -> float:
        optimizer = Optimizer.standard(name, "fp32")  # type: ignore[arg-type]
        sizes = (parameters * optimizer.gradient_bytes, parameters * optimizer.parameter_bytes)
        updates = parameters * optimizer.gathered_bytes if zero else 0.0
        return replica_traffic(*sizes, group, zero=zero, update_bytes=updates).iteration_bytes

    assert sent("muon", 1) / sent("adamw", 1) == pytest.approx(1.25)
    assert sent("muon", 0) == sent("adamw", 0)
    assert sent("shampoo", 1) == sent("adamw", 1)


def _planned(name: str, **pins: int) -> Plan:
    job = TrainingJob(
        global_batch=64,
        sequence_length=1024,
        optimizer=Optimizer.standard(name, "bf16"),  # type: ignore[arg-type]
        space=SearchSpace(schedules=("1f1b",), pins=Pins(**pins)),
    )
    outcome = make_plan(GPT2, CLUSTER, job)
    assert outcome.plan is not None
    return outcome.plan


def test_a_plan_with_muon_holds_one_moment_less_pays_its_products_and_gathers_updates_under_zero() -> None:
    fixed = {"tp": 1, "pp": 1, "cp": 1, "dp": 8, "zero": 1, "microbatch": 8}
    adamw, muon, shampoo = (_planned(name, **fixed) for name in ("adamw", "muon", "shampoo"))
    states = [plan.prediction.memory[0].optimizer for plan in (adamw, muon, shampoo)]
    assert states[1] / states[0] == pytest.approx(8 / 12)
    assert states[2] / states[0] == pytest.approx(28 / 12)
    sent = muon.prediction.link_bytes
    assert sent["all-gather/update"] == sent["all-gather/dp"]  # 2 bytes of weight, 2 of update
    assert "all-gather/update" not in adamw.prediction.link_bytes
    assert muon.prediction.step_time_s > adamw.prediction.step_time_s
    # 12 blocks of (768 x 2304, 768 x 768, twice 768 x 3072), an eighth on each device
    h = 768
    flops = 12 * (newton_schulz_flops(h, 3 * h) + newton_schulz_flops(h, h) + 2 * newton_schulz_flops(h, 4 * h)) / 8
    more_s = muon.prediction.optimizer_s - adamw.prediction.optimizer_s
    moved_s = 8 * 2 * GPT2.num_parameters / 8 / 2e12
    assert flops / 312e12 - moved_s < more_s < 3 * flops / 312e12


def test_tensor_parallel_matrices_are_whole_on_each_device_for_muon_and_shared_out_for_shampoo() -> None:
    fixed = {"pp": 1, "cp": 1, "zero": 0, "microbatch": 8}
    whole, cut = _planned("muon", tp=1, dp=8, **fixed), _planned("muon", tp=4, dp=2, **fixed)
    assert cut.prediction.optimizer_s > whole.prediction.optimizer_s  # same products on each device, and the gathers
    blocks = _planned("shampoo", tp=4, dp=2, **fixed), _planned("shampoo", tp=1, dp=8, **fixed)
    shared_s, whole_s = (plan.prediction.optimizer_s for plan in blocks)
    assert 0.25 * whole_s < shared_s < whole_s  # a quarter of the products, and gradients and directions on their way


def test_bytes_of_a_custom_optimizer_are_not_guessed() -> None:
    with pytest.raises(InvalidArgument, match="'custom' has no usual bytes"):
        Optimizer.standard("custom", "bf16")
