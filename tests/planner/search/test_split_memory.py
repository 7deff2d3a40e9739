"""Where backwards are split, what waits for the weight gradient counts at every level of recomputation."""

from __future__ import annotations

import numpy as np
import pytest

from stagewright.planner.documents import Recompute, TrainingJob
from stagewright.planner.documents.job import Pins, SearchSpace
from stagewright.planner.planning import make_plan
from stagewright.planner.schedules.action import Kind
from stagewright.planner.schedules.family import ScheduleRequest
from stagewright.planner.schedules.registry import generate
from stagewright.planner.schedules.schedule import Schedule
from stagewright.planner.search.brute_force import best_of_all
from stagewright.planner.search.exact import solve
from stagewright.planner.search.limits import Limits
from stagewright.planner.search.order import layout_of
from stagewright.planner.search.problem import Problem
from stagewright.planner.search.space import RULES, FamilyRule
from stagewright.testing.mocked_cluster import cluster_factory
from stagewright.testing.mocked_profile import profile_factory

KEPT, BOUNDARY = 8e6, 1e6
STATES = 3 * 4 * 1_000_000  # parameters, gradients and momentum of one layer in fp32


def _problem(schedules: tuple[str, ...], room: float, *, freed: float = 0.0, num_layers: int = 4) -> Problem:
    """Return equal layers with full recomputation on two devices with `room` bytes beside the states of half of them."""
    profile = profile_factory(
        num_layers, forward_s=1e-3, input_grad_s=1e-3, weight_grad_s=1e-3, parameters=1_000_000,
        activation_bytes=KEPT, output_bytes=BOUNDARY, freed_at_input_grad=freed, microbatches=(1,),
        kinds=["block"] * num_layers,
    )  # fmt: skip
    cluster = cluster_factory(2, 1, memory_bytes=num_layers // 2 * STATES + room)
    job = TrainingJob(
        global_batch=8,
        sequence_length=128,
        precision="fp32",
        optimizer={"name": "sgd-momentum", "parameter_bytes": 4, "gradient_bytes": 4, "state_bytes": 4},
        space=SearchSpace(
            schedules=schedules,
            recompute=(Recompute.FULL,),
            zero=(0,),
            max_chunks=2,
            memory_headroom=0.0,
            pins=Pins(pp=2, microbatch=1),
        ),
    )
    return Problem(profile, cluster, job, cluster.num_devices)


@pytest.mark.parametrize(
    ("schedule", "peaks"),
    [
        # One layer's forward runs again inside its whole backward, beside two boundaries a layer, or one.
        ("1f1b", (2 * 2 * BOUNDARY + KEPT - BOUNDARY, 2 * BOUNDARY + KEPT - BOUNDARY)),
        # One microbatch of boundaries and one that waits for W on the first rank, two that wait on the last.
        ("zb-h1", (2 * (BOUNDARY + KEPT), 2 * 2 * KEPT)),
        # Three microbatches of a chunk's boundary and one of the other's that waits; both chunks of two wait.
        ("zb-v", (3 * BOUNDARY + KEPT + 6 * BOUNDARY, 2 * 2 * KEPT)),
    ],
)
def test_recomputed_layers_hold_all_their_tensors_until_the_weight_gradient(
    schedule: str, peaks: tuple[float, float]
) -> None:
    plan = solve(_problem((schedule,), 1e9), Limits(gap=0.0)).plan
    assert plan is not None
    assert [peak - 2 * STATES for peak in plan.prediction.peak_memory_bytes] == pytest.approx(peaks)


@pytest.mark.parametrize("name", ["zb-h1", "zb-v"])
@pytest.mark.parametrize(("room", "fits"), [(2 * 2 * KEPT - 1, False), (2 * 2 * KEPT, True)])
def test_what_waits_for_weight_gradients_decides_whether_a_split_schedule_fits(
    name: str, room: float, fits: bool
) -> None:
    problem = _problem(("1f1b", name), room)
    outcome, oracle = solve(problem, Limits(gap=0.0)), best_of_all(problem, problem.candidates())
    assert outcome.plan is not None and oracle is not None
    assert outcome.plan.schedule.name == (name if fits else "1f1b")
    assert outcome.objective_s == pytest.approx(oracle[0], rel=1e-9)


def test_a_layer_that_frees_half_at_its_input_gradient_needs_half_as_much_behind_it() -> None:
    plan = solve(_problem(("zb-h1",), 1e9, freed=0.5), Limits(gap=0.0)).plan
    assert plan is not None
    # The last layer of the second input gradient still has all its tensors while the others hold half.
    assert plan.prediction.peak_memory_bytes[1] - 2 * STATES == pytest.approx((3 * 0.5 + 0.5) * KEPT + 0.5 * KEPT)


def _every_prefix(schedule: Schedule, rank: int, stages: list[tuple[int, int]]) -> np.ndarray:
    """Return microbatches before and after their input gradient behind every action of a rank, [n, 2 * slots]."""
    live, rows = np.zeros((2, len(stages))), []
    for step in schedule.actions(rank):
        for action in step:
            place = stages.index((action.replica, action.stage))
            live[0, place] += {Kind.F: 1, Kind.B: -1, Kind.I: -1, Kind.W: 0}[action.kind]
            live[1, place] += {Kind.F: 0, Kind.B: 0, Kind.I: 1, Kind.W: -1}[action.kind]
            rows.append(live.ravel().copy())
    return np.array(rows)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_the_kept_live_vectors_hold_as_much_as_every_prefix_of_the_order(rule: FamilyRule) -> None:
    draw = np.random.default_rng(7)
    for ranks, count in ((2, 8), (4, 16), (6, 12)):
        for chunks in rule.chunks(3):
            if not rule.fits(ranks, count, chunks):
                continue
            request = ScheduleRequest(ranks, count, num_chunks=chunks, parameters=dict(rule.parameters))
            schedule = generate(rule.name, request)
            layout = layout_of(schedule)
            for rank, slots in enumerate(layout.slots):
                prefixes = _every_prefix(schedule, rank, [(slot.replica, slot.stage) for slot in slots])
                kept = layout.live[rank].reshape(len(layout.live[rank]), -1)
                for size in draw.exponential(size=(20, prefixes.shape[1])) ** 3:
                    assert (kept @ size).max() == pytest.approx((prefixes @ size).max(), rel=1e-12)


def test_logits_that_an_input_gradient_frees_do_not_wait_for_their_weight_gradient():
    profile = profile_factory(
        4,
        activation_bytes=(1e6, 1e6, 1e6, 8e6),
        kinds=("embedding", "block", "head", "loss"),
        freed_at_input_grad=1.0,
        microbatches=(1,),
    )
    space = SearchSpace(pins=Pins(pp=2, dp=1, microbatch=1, schedule="zb-h1"), recompute=(Recompute.NONE,))
    job = TrainingJob(global_batch=8, sequence_length=128, precision="fp32", space=space)
    plan = make_plan(profile, cluster_factory(2), job).plan
    assert plan is not None
    last = plan.prediction.memory[-1]
    assert last.logits == 8e6
    assert last.activations == sum((0.0, 1e6, 1e6, 1e6)[layer] for layer in plan.stages[-1].layer_indices[:-1])
