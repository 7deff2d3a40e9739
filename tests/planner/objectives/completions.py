"""Every plan of a small problem, scored one at a time by the simulator: devices, step, peak."""

from __future__ import annotations

from dataclasses import dataclass

from stagewright.planner.documents import Cluster, ModelProfile, TrainingJob
from stagewright.planner.documents.job import SearchSpace
from stagewright.planner.search.brute_force import all_levels, all_partitions
from stagewright.planner.search.problem import Partition, Problem
from stagewright.testing.mocked_cluster import cluster_factory
from stagewright.testing.mocked_profile import profile_factory


@dataclass(frozen=True)
class Completed:
    """One plan's numbers."""

    num_devices: int
    step_s: float
    peak_bytes: float


def every_completion(problem: Problem) -> list[Completed]:
    """Return every partition and recomputation of every candidate that fits, simulated with links that wait."""
    found = []
    for candidate in problem.candidates():
        if not problem.takes(candidate):
            continue
        stages = problem.order(candidate).num_stages
        devices = candidate.configuration.num_ranks * candidate.configuration.degrees.num_devices
        for bounds in all_partitions(problem.profile.num_layers, stages):
            for levels in all_levels(problem.profile.num_layers, problem.levels).tolist():
                partition = Partition(bounds, tuple(levels))
                peak = float(problem.pipeline(candidate, partition).peak_bytes.max())
                if peak <= problem.capacity_bytes * (1 + 1e-12):
                    found.append(Completed(devices, problem.judged_step_s(candidate, partition), peak))
    return found


def small_question(
    seed: int,
    *,
    layers: int = 4,
    devices: int = 3,
    memory_bytes: float = 1e9,
    objective: str = "step-time",
    **job: object,
) -> tuple[ModelProfile, Cluster, TrainingJob]:
    """Return layers that all differ, on a few devices, with three schedules and two levels of recomputation."""
    profile = profile_factory(
        layers,
        jitter=0.5,
        seed=seed,
        parameters=[300_000 * (1 + (seed + index) % 3) for index in range(layers)],
        activation_bytes=[4e6 * (1 + (2 * seed + index) % 4) for index in range(layers)],
        workspace_bytes=1e6,
        microbatches=(1, 2),
    )
    cluster = cluster_factory(devices, memory_bytes=memory_bytes, price_per_hour=2.0, bytes_per_s=5e9)
    space = SearchSpace.model_validate(
        {"schedules": ("1f1b", "zb-h1", "interleaved"), "zero": (0, 1), "recompute": ("none", "full"), "max_chunks": 2}
    )
    return (
        profile,
        cluster,
        TrainingJob.model_validate(
            {
                "global_batch": 4,
                "sequence_length": 128,
                "precision": "fp32",
                "space": space,
                "objective": objective,
                "gap": 0.0,
                **job,
            }
        ),
    )
