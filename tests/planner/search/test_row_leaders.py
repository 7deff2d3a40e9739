"""Links compared level by level lead as links compared pair of ranks by pair of ranks do."""

from __future__ import annotations

import numpy as np
import pytest

from stagewright.planner.catalog import resolve_cluster, resolve_model
from stagewright.planner.documents import TrainingJob
from stagewright.planner.search.dominance import leaders_of
from stagewright.planner.search.pricing import NUM_MICROBATCHES, PP, UNIT, Priced
from stagewright.planner.search.problem import Problem
from stagewright.planner.search.row_leaders import RowLeaders


def _by_pairs(problem: Problem, rows: np.ndarray) -> np.ndarray:
    """Return costs, needs and the lines and sums of all pairs of ranks that may send or sum."""
    priced, found = problem.priced, []
    for row in rows.tolist():
        configuration = priced.configuration(row)
        ranks = configuration.num_ranks
        wiring = problem.wiring_for(configuration, float(priced.cut_bytes[row].max()))
        lines = [wiring.line(rank, (rank + 1) % ranks) for rank in range(ranks if ranks > 1 else 0)]
        latency = 2.0 * wiring.sum_s(0, ranks - 1, UNIT) - wiring.sum_s(0, ranks - 1, 2.0 * UNIT)
        links = [line.latency_s for line in lines] + [1.0 / line.bytes_per_s for line in lines]
        links += [max(latency, 0.0), wiring.sum_s(0, ranks - 1, UNIT) - latency]
        ties = [seconds.ravel() for _, _, seconds in problem.tie_seconds(configuration)]
        own = [np.ravel(getattr(priced, name)[row]) for name in Priced.__dataclass_fields__ if name != "shape"]
        found.append(np.concatenate([*own, links, *ties]))
    return np.array(found)


@pytest.mark.parametrize(("model", "cluster"), [("gpt2", "a100-sxm-80g:4x4"), ("llama2-7b", "a100-sxm-80g:8x2")])
def test_links_by_level_lead_as_links_by_pair(model: str, cluster: str) -> None:
    machines = resolve_cluster(cluster)
    job = TrainingJob(global_batch=32, sequence_length=1024)
    problem = Problem(resolve_model(model), machines, job, machines.num_devices, only_counts=(machines.num_devices,))
    priced = problem.priced
    leading = RowLeaders(problem, priced).of(np.arange(len(priced)))
    followers = (leading != np.arange(len(priced))).sum()
    assert 0.2 * len(priced) < followers < len(priced)
    sizes = priced.shape[:, [PP, NUM_MICROBATCHES]]
    for ranks, count in ((2, 2), (4, 4), (4, 8), (8, 4)):
        rows = np.flatnonzero((sizes == (ranks, count)).all(axis=1))
        expected = leaders_of(_by_pairs(problem, rows))
        np.testing.assert_array_equal(leading[rows] == rows, expected == np.arange(len(rows)))
        assert len(rows) >= 10
