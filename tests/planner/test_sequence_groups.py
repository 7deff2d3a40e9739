"""Groups of context-parallel devices of different size against groups of one size, and against every grouping."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations_with_replacement, product

import numpy as np
import pytest

from stagewright.planner.catalog import resolve_cluster, resolve_model
from stagewright.planner.documents import TrainingJob
from stagewright.planner.errors import Infeasible, InvalidArgument
from stagewright.planner.sequence_groups import SequenceCosts, group_sequences, sequence_costs, uniform_step_s

JOB = TrainingJob(global_batch=1, sequence_length=32768)


def _least(costs: SequenceCosts, counts: dict[int, int], num_devices: int) -> float:
    """Return the least longest group over every multiset of degrees and every assignment."""
    each = [costs.lengths.index(length) for length, count in counts.items() for _ in range(count)]
    best = float("inf")
    for groups in _groupings(costs.degrees, num_devices):
        for choice in product(range(len(groups)), repeat=len(each)):
            loads = np.zeros(len(groups))
            for length, group in zip(each, choice, strict=True):
                loads[group] += costs.seconds[length, groups[group]]
            best = min(best, float(loads.max()))
    return best + costs.once_s


def _groupings(degrees: tuple[int, ...], num_devices: int) -> Iterator[tuple[int, ...]]:
    for count in range(1, num_devices + 1):
        for groups in combinations_with_replacement(range(len(degrees)), count):
            if sum(degrees[place] for place in groups) == num_devices:
                yield groups


@pytest.mark.parametrize("seed", range(6))
def test_the_programme_equals_every_grouping_and_every_assignment(seed: int) -> None:
    draw = np.random.default_rng(seed)
    work, share = np.sort(draw.uniform(1, 8, 2)), draw.uniform(0.1, 1.0, (2, 2))
    seconds = np.stack((work, work * (0.5 + 0.5 * share[:, 0]), work * (0.25 + 0.75 * share[:, 1])), axis=1)
    seconds[1, 0] = np.inf if seed % 2 else seconds[1, 0]
    costs = SequenceCosts((1024, 4096), (1, 2, 4), seconds, 0.5)
    counts = {1024: 4, 4096: 1}
    found = group_sequences(costs, counts, 4)
    assert found.step_s == pytest.approx(_least(costs, counts, 4), rel=1e-6)
    assert found.bound_s == pytest.approx(found.step_s, rel=1e-6)
    assert sum(group.degree for group in found.groups) <= 4
    assert sum(count for group in found.groups for _, count in group.counts) == 5


def test_one_long_and_many_short_sequences_take_groups_of_their_own_and_beat_every_uniform_degree() -> None:
    """A batch of 32K and 31 times 1K on 8 devices: FlexSP's motivation, and less than half of uniform CP = 8."""
    profile, cluster = resolve_model("llama2-7b"), resolve_cluster("a100-sxm-80g:8x1")
    counts = {32768: 1, 1024: 31}
    costs = sequence_costs(profile, cluster, JOB, list(counts))
    found = group_sequences(costs, counts, 8)
    uniform = {degree: uniform_step_s(costs, counts, 8, degree) for degree in costs.degrees}
    assert found.step_s < 0.5 * uniform[8]
    assert found.step_s < 0.8 * min(uniform.values())
    (long,) = [group for group in found.groups if 32768 in dict(group.counts)]
    assert long.degree > max(group.degree for group in found.groups if group is not long)
    assert found.bound_s == pytest.approx(found.step_s, rel=1e-6)
    assert found.step_s == pytest.approx(max(group.seconds for group in found.groups) + costs.once_s)


def test_a_sequence_that_fits_no_group_and_a_mixed_cluster_are_refused() -> None:
    costs = SequenceCosts((1024,), (1, 2), np.full((1, 2), np.inf), 0.0)
    with pytest.raises(Infeasible, match="1024 tokens fits no group of up to 2"):
        group_sequences(costs, {1024: 1}, 2)
    mixed = resolve_cluster("a100-sxm-80g:8x1+v100-sxm-32g:8x1")
    with pytest.raises(InvalidArgument, match="has 2 groups"):
        sequence_costs(resolve_model("gpt2"), mixed, JOB, [1024])
