"""Mixed devices on links that differ: dynamic programme, integer programme and brute force agree."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from stagewright.planner.errors import InvalidArgument
from stagewright.planner.search.brute_force import all_partitions
from stagewright.planner.search.device_assignment import Assignment, AssignmentProblem, assign, bottleneck_s
from stagewright.planner.search.device_assignment_ip import assign_by_programme


def _random(seed: int, *, most_layers: int = 8) -> AssignmentProblem:
    draw = np.random.default_rng(seed)
    devices, layers = int(draw.integers(1, 5)), int(draw.integers(2, most_layers + 1))
    layer_bytes = draw.uniform(1.0, 3.0, layers)
    return AssignmentProblem(
        time_s=draw.uniform(0.5, 2.0, layers)[None, :] * draw.choice([1.0, 0.5, 2.0], devices)[:, None],
        layer_bytes=layer_bytes,
        memory_bytes=layer_bytes.sum() * draw.choice([0.2, 0.5, 1.0], devices),
        boundary_bytes=draw.uniform(0.1, 1.0, layers),
        link_s_per_byte=draw.choice([0.1, 1.0, 6.0], (devices, devices)),
    )


def _brute_force(problem: AssignmentProblem) -> float | None:
    best = float("inf")
    for count in range(1, min(problem.num_devices, problem.num_layers) + 1):
        for order in permutations(range(problem.num_devices), count):
            for bounds in all_partitions(problem.num_layers, count):
                stages = tuple(zip(order, bounds, bounds[1:], strict=False))
                best = min(best, bottleneck_s(problem, stages))
    return best if np.isfinite(best) else None


def _check(problem: AssignmentProblem, found: Assignment | None, oracle: float | None) -> None:
    assert (found is None) == (oracle is None)
    if found is not None and oracle is not None:
        assert found.bottleneck_s == pytest.approx(oracle, rel=1e-9)
        assert bottleneck_s(problem, found.stages) == pytest.approx(found.bottleneck_s, rel=1e-9)
        assert found.bound_s == pytest.approx(oracle, rel=1e-6)


def test_programme_over_sets_equals_brute_force_on_eight_layers_and_four_mixed_devices() -> None:
    for seed in range(60):
        problem = _random(seed)
        _check(problem, assign(problem), _brute_force(problem))


def test_integer_programme_equals_brute_force_on_small_instances() -> None:
    for seed in range(12):
        problem = _random(seed, most_layers=6)
        _check(problem, assign_by_programme(problem), _brute_force(problem))


def test_swapping_a_slow_link_changes_the_placement() -> None:
    fast, slow = 0.1, 100.0
    links = np.full((3, 3), fast)
    links[0, 1] = links[1, 0] = slow

    def order(link: np.ndarray) -> list[int]:
        found = assign(
            AssignmentProblem(np.ones((3, 6)), np.ones(6), np.full(3, 2.0), np.full(6, 1.0), link),
        )
        assert found is not None
        assert found.bottleneck_s == pytest.approx(2.0)
        return [device for device, _, _ in found.stages]

    assert order(links)[1] == 2
    swapped = np.full((3, 3), fast)
    swapped[0, 2] = swapped[2, 0] = slow
    assert order(swapped)[1] == 1


def test_too_many_devices_are_refused_with_both_numbers() -> None:
    problem = AssignmentProblem(np.ones((15, 2)), np.ones(2), np.ones(15), np.ones(2), np.ones((15, 15)))
    with pytest.raises(InvalidArgument, match=r"15 devices .* at most 14"):
        assign(problem)
