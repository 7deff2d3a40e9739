"""Random small planning questions for the oracle tests: few layers, few devices, memory that often binds."""

from __future__ import annotations

from collections.abc import Iterable
from random import Random

from stagewright.planner.documents import Recompute, TrainingJob
from stagewright.planner.documents.job import Pins, SearchSpace
from stagewright.planner.schedules.registry import families
from stagewright.planner.search.brute_force import best_completion
from stagewright.planner.search.caps import order_caps
from stagewright.planner.search.joint_search import JointSearch
from stagewright.planner.search.limits import Limits
from stagewright.planner.search.problem import Problem
from stagewright.planner.search.space import RULES
from stagewright.testing.mocked_cluster import cluster_factory
from stagewright.testing.mocked_profile import profile_factory


def random_problem(seed: int, *, most_layers: int = 6, num_schedules: int = 3) -> Problem:
    """Return a problem of 2 to `most_layers` layers on 1 to 4 devices with a random part of the space."""
    draw, excess = Random(seed), Random(f"excess of {seed}")
    layers = draw.randint(2, most_layers)
    blocks = draw.random() < 0.5
    profile = profile_factory(
        layers,
        forward_s=1e-3 if blocks else [draw.uniform(0.2e-3, 2e-3) for _ in range(layers)],
        input_grad_s=1.1e-3 if blocks else [draw.uniform(0.2e-3, 2e-3) for _ in range(layers)],
        weight_grad_s=0.9e-3 if blocks else [draw.uniform(0.2e-3, 2e-3) for _ in range(layers)],
        split_excess_s=excess.choice([0.0, 0.2e-3]) if blocks else [excess.uniform(0.0, 0.4e-3) for _ in range(layers)],
        parameters=1_000_000 if blocks else [draw.randint(100_000, 3_000_000) for _ in range(layers)],
        activation_bytes=8e6 if blocks else [draw.uniform(2e6, 12e6) for _ in range(layers)],
        output_bytes=1e6 if blocks else [draw.uniform(1e5, 2e6) for _ in range(layers)],
        workspace_bytes=draw.choice([0.0, 2e6]),
        optimizer_s=draw.choice([0.0, 1e-4]),
        freed_at_input_grad=draw.choice([0.0, 0.5]),
        tensor_degrees=draw.choice([(1,), (1, 2)]),
        microbatches=(1, 2, 4),
        tied=[(0, layers - 1)] if not blocks and draw.random() < 0.3 else (),
        framework_bytes=draw.choice([0.0, 1e6]),
        step_overhead_s=draw.choice([0.0, 5e-4]),
        action_overhead_s=draw.choice([0.0, 5e-5]),
    )
    nodes = draw.choice([(1, 1), (2, 1), (3, 1), (4, 1), (2, 2)])
    cluster = cluster_factory(
        *nodes,
        memory_bytes=draw.choice([1e9, 1.0, 0.8, 0.6, 0.5, 0.4, 0.3]) * layers * (16e6 if blocks else 24e6),
        bytes_per_s=draw.choice([1e9, 1e10]),
        node_bytes_per_s=draw.choice([5e8, 5e9]),
    )
    names = {row.name for row in families()} & {rule.name for rule in RULES}
    job = TrainingJob(
        global_batch=draw.choice([2, 4, 6, 8]),
        sequence_length=128,
        precision="fp32",
        space=SearchSpace(
            schedules=tuple(sorted(draw.sample(sorted(names), num_schedules))),
            zero=tuple(sorted(draw.sample(range(4), 2))),
            recompute=draw.choice([tuple(Recompute), (Recompute.NONE, Recompute.FULL), (Recompute.NONE,)]),
            max_chunks=3,
            pins=Pins(microbatch=draw.choice([None, None, 1])),
        ),
    )
    return Problem(profile, cluster, job, cluster.num_devices)


def solved_candidates(seeds: Iterable[int]):
    """Yield each candidate with its costs, its least step and the layers that its ranks may hold at that step."""
    for seed in seeds:
        problem = random_problem(seed, most_layers=6)
        search = JointSearch.of(problem, Limits(gap=0.0))
        for index in range(search.space.num_candidates if len(problem.priced) else 0):
            costs = search.costs.of(index)
            oracle = None if costs is None else best_completion(problem, search.space.candidate(index))
            if costs is None or oracle is None:
                continue
            number = int(costs.classes.counts.max()) * costs.order.num_replicas
            _, caps = order_caps(costs.rank_tables, costs.order.key.num_microbatches, oracle[0] * (1 + 1e-6))
            yield seed, search, index, costs, oracle[0], ((number - (caps.sum() - caps)).clip(min=0), caps)
