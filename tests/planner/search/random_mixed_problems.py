"""Random small planning questions with stages that differ: mixed device groups, or degrees by stage on one kind."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from random import Random

import numpy as np

from stagewright.planner.documents import Recompute, TrainingJob
from stagewright.planner.documents.job import SearchSpace
from stagewright.planner.search.joined_choice import JoinedChoices
from stagewright.planner.search.pool_space import PoolSpace, admitted
from stagewright.planner.search.pricing import AXES, DP, MICROBATCH, PP
from stagewright.planner.search.problem import Problem
from stagewright.planner.search.space import shapes
from stagewright.planner.search.stage_candidate import PoolChoice, StageCandidate
from stagewright.testing.mocked_cluster import cluster_factory, mixed_cluster_factory
from stagewright.testing.mocked_profile import profile_factory

SINGLE_CHUNK = ("1f1b", "gpipe", "dapple-pb", "zb-h1", "zb-h2", "naive")


def random_mixed_problem(seed: int, *, most_layers: int = 5) -> Problem:
    """Return a problem of 2 to `most_layers` layers on two groups of 1 or 2 devices, or on one group of 2 to 4."""
    draw, excess = Random(seed), Random(f"excess of {seed}")
    layers = draw.randint(2, most_layers)
    blocks = draw.random() < 0.5

    edges = None
    if layers >= 4 and draw.random() < 0.5:
        # Two branches that meet in a layer.
        second = draw.randint(1, layers - 2)
        join = draw.randint(second + 1, layers - 1)
        edges = [(i, i + 1) for i in range(layers - 1) if i != second - 1] + [(second - 1, join)]

    def each(low: float, high: float) -> float | list[float]:
        return draw.uniform(low, high) if blocks else [draw.uniform(low, high) for _ in range(layers)]

    profile = profile_factory(
        layers,
        forward_s=each(0.2e-3, 2e-3),
        input_grad_s=each(0.2e-3, 2e-3),
        weight_grad_s=each(0.2e-3, 2e-3),
        split_excess_s=excess.choice([0.0, 0.2e-3]),
        parameters=1_000_000 if blocks else [draw.randint(100_000, 3_000_000) for _ in range(layers)],
        activation_bytes=each(2e6, 12e6),
        output_bytes=each(1e5, 2e6),
        workspace_bytes=draw.choice([0.0, 2e6]),
        optimizer_s=draw.choice([0.0, 1e-4]),
        freed_at_input_grad=draw.choice([0.0, 0.5]),
        tensor_degrees=draw.choice([(1,), (1, 2)]),
        microbatches=(1, 2, 4),
        tied=[(0, layers - 1)] if draw.random() < 0.3 else (),
        edges=edges,
        framework_bytes=draw.choice([0.0, 1e6]),
        step_overhead_s=draw.choice([0.0, 5e-4]),
        action_overhead_s=draw.choice([0.0, 5e-5]),
    )
    need = layers * (16e6 if blocks else 24e6)

    def group(speed: float) -> object:
        return cluster_factory(
            draw.choice([1, 2]),
            draw.choice([1, 1, 2]) if speed == 1.0 else 1,
            memory_bytes=draw.choice([1e9, 1.0, 0.6, 0.4, 0.3]) * need,
            flops=300e12 * speed,
            bytes_per_s=draw.choice([1e9, 1e10]),
            node_bytes_per_s=draw.choice([5e8, 5e9]),
        )

    mixed = draw.random() < 0.7
    cluster = (
        mixed_cluster_factory(
            [group(1.0), group(draw.choice([0.3, 0.5, 0.9]))],  # type: ignore[list-item]
            bytes_per_s=draw.choice([2e8, 2e9]),
        )
        if mixed
        else cluster_factory(draw.choice([2, 4]), 1, memory_bytes=draw.choice([1e9, 0.8, 0.4]) * need)
    )
    job = TrainingJob(
        global_batch=draw.choice([2, 4, 6, 8]),
        sequence_length=128,
        precision="fp32",
        space=SearchSpace(
            schedules=(*sorted(draw.sample(SINGLE_CHUNK, 2)), *(("graphpipe", "distmm")[seed % 2 :] if edges else ())),
            zero=tuple(sorted(draw.sample(range(4), 2))),
            recompute=draw.choice([tuple(Recompute), (Recompute.NONE, Recompute.FULL), (Recompute.NONE,)]),
            per_stage_degrees=not mixed,
        ),
    )
    return Problem(profile, cluster, job, cluster.num_devices)


def all_candidates(space: PoolSpace) -> Iterator[StageCandidate]:
    """Yield every candidate of the declared space, dominated choices included."""
    for skeleton in space.skeletons():
        parts = []
        for pool, count in zip(skeleton.pools, skeleton.ranks, strict=True):
            group = space.choices[pool.group]
            if isinstance(group, JoinedChoices):
                rows, samples = group.shapes(pool.num_devices // count)
                rows = rows[samples == skeleton.samples]
                rows = rows[admitted(rows, skeleton.alike)]
                legal = group.price(rows)[0].shape if len(rows) else rows
                parts.append([PoolChoice(pool, count, group, np.ascontiguousarray(row)) for row in legal])
                continue
            rows = shapes(group.problem.profile, group.problem.job, pool.num_devices // count, group.per_node)
            rows = rows[(rows[:, PP] == 1) & (rows[:, AXES] == 0)]
            rows = rows[rows[:, DP] * rows[:, MICROBATCH] == skeleton.samples]
            rows = rows[admitted(rows, skeleton.alike)]
            rows = group.problem.price_list.without_limit().price(rows).shape if len(rows) else rows
            parts.append([PoolChoice(pool, count, group, np.ascontiguousarray(row)) for row in rows])
        for choices, rule in product(product(*parts), space.rules_for(skeleton)):
            candidate = space.of_choices(skeleton, choices, rule)
            if candidate is not None:
                yield candidate
