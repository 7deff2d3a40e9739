"""Plans of a round of phases: chosen together they cost least, changes between layouts included."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from stagewright.planner.documents import TrainingJob
from stagewright.planner.documents.job import SearchSpace
from stagewright.planner.errors import InvalidArgument
from stagewright.planner.planning import make_plan
from stagewright.planner.post_training import Phase, least_cycle, plan_round, reshard_s
from stagewright.testing.mocked_cluster import cluster_factory
from stagewright.testing.mocked_profile import profile_factory

PROFILE = profile_factory(4, forward_s=1e-3, parameters=50_000_000, activation_bytes=4e6, microbatches=(1, 2, 4))
CLUSTER = cluster_factory(2, 1, bytes_per_s=5e9)


def _job(batch: int, **space: object) -> TrainingJob:
    return TrainingJob(
        global_batch=batch,
        sequence_length=128,
        precision="fp32",
        space=SearchSpace(**{"schedules": ("1f1b",), **space}),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("seed", range(20))
def test_the_cycle_of_choices_is_the_least_of_all(seed: int) -> None:
    draw = np.random.default_rng(seed)
    sizes = draw.integers(1, 5, size=int(draw.integers(1, 5))).tolist()
    costs = [draw.uniform(1, 2, size) for size in sizes]
    changes = [draw.uniform(0, 1, (size, after)) for size, after in zip(sizes, [*sizes[1:], sizes[0]], strict=True)]

    def total(chosen: tuple[int, ...]) -> float:
        after = (*chosen[1:], chosen[0])
        return float(
            sum(cost[at] for cost, at in zip(costs, chosen, strict=True))
            + sum(change[a, b] for change, a, b in zip(changes, chosen, after, strict=True))
        )

    found = tuple(least_cycle(costs, changes))
    assert total(found) == pytest.approx(min(total(chosen) for chosen in product(*map(range, sizes))))


def test_short_phases_share_a_layout_and_long_ones_take_their_own() -> None:
    """Changing the layout costs the same whatever the phases last, so it pays only for long ones."""
    together = _job(16, zero=(0,))
    split = _job(2, zero=(0,), pins={"dp": 1})

    def planned(repeats: int):
        return plan_round(
            [Phase("train", PROFILE, together, repeats), Phase("score", PROFILE, split, repeats)], CLUSTER
        )

    short, long = planned(1), planned(200)
    free = [make_plan(PROFILE, CLUSTER, job).objective_s for job in (together, split)]
    assert long.phase_s == pytest.approx([200 * seconds for seconds in free if seconds is not None])
    assert sum(short.reshard_s) <= sum(long.reshard_s)
    alone = plan_round([Phase("train", PROFILE, together)], CLUSTER)
    assert alone.reshard_s == (0.0,)
    separate = sum(long.phase_s) / 200 + sum(long.reshard_s)
    assert short.round_s <= separate * (1 + 1e-9)


def test_a_layout_that_stays_moves_nothing_and_another_one_moves_weights_over_the_link() -> None:
    whole = make_plan(PROFILE, CLUSTER, _job(16, zero=(0,), pins={"dp": 2})).plan
    cut = make_plan(PROFILE, CLUSTER, _job(16, zero=(0,), pins={"pp": 2})).plan
    assert whole is not None and cut is not None
    assert reshard_s(whole, whole, PROFILE) == 0.0
    assert reshard_s(whole, cut, PROFILE) == 0.0  # every replica holds what a stage needs
    missing = sum(PROFILE.classes[name].parameters for name in PROFILE.layer_classes) * 4
    stage = max(stage.num_layers for stage in cut.stages) / 4
    assert reshard_s(cut, whole, PROFILE) == pytest.approx(stage * missing / 5e9, rel=0.05)


def test_phases_of_other_layers_are_refused() -> None:
    other = profile_factory(5, forward_s=1e-3)
    with pytest.raises(InvalidArgument, match="different layers"):
        plan_round([Phase("a", PROFILE, _job(4)), Phase("b", other, _job(4))], CLUSTER)
