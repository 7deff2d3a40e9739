"""What candidates of one order cost at least bounds every completion of each of them."""

from __future__ import annotations

import numpy as np
import pytest

from stagewright.planner.catalog import resolve_cluster, resolve_model
from stagewright.planner.documents import TrainingJob
from stagewright.planner.search.closing import Closer
from stagewright.planner.search.incumbent import improve, start
from stagewright.planner.search.joint_search import JointSearch
from stagewright.planner.search.limits import Limits
from stagewright.planner.search.order import OrderKey
from stagewright.planner.search.order_reach import table_caps
from stagewright.planner.search.problem import Problem

FAMILIES = ("1f1b", "chimera", "gems", "interleaved", "zb-v")


@pytest.fixture(scope="module")
def search() -> JointSearch:
    """A search of GPT-2 on 8 devices."""
    cluster = resolve_cluster("a100-sxm-80g:4x2")
    job = TrainingJob(global_batch=32, sequence_length=1024)
    return JointSearch.of(Problem(resolve_model("gpt2"), cluster, job, 8), Limits(gap=0.0))


def _alike(search: JointSearch) -> dict[OrderKey, list[int]]:
    """Return candidates of equal orders, two orders of a family with most of them."""
    alike: dict[OrderKey, list[int]] = {}
    for index in range(search.space.num_candidates):
        alike.setdefault(search.space.key(index), []).append(index)
    found = {key: indices for key, indices in alike.items() if key.num_ranks > 1 and len(indices) > 1}
    ordered = sorted(found, key=lambda key: (key.family, -len(found[key])))
    return {key: found[key] for family in FAMILIES for key in [each for each in ordered if each.family == family][:2]}


def test_least_costs_of_an_order_close_no_candidate_with_a_completion_below_the_target(search: JointSearch) -> None:
    tried: set[str] = set()
    closed = 0
    for key, indices in _alike(search).items():
        least = search.costs.least_of(indices[:8])
        assert least is not None
        completed = []
        for index in indices[:8]:
            costs = search.costs.of(index)
            first = None if costs is None else start(costs)
            if costs is not None and first is not None:
                moved = improve(costs, first.bounds)[0]
                completed.append(min(first.step_s, first.step_s if moved is None else moved.step_s))
        if not completed:
            continue
        tried.add(key.family)
        for share in (0.5, 0.8, 1 + 1e-6, 1.02):
            target_s = share * min(completed)
            reach, ranges = table_caps(least.rank_tables, least.order, key.num_microbatches, target_s)
            proved = not reach or Closer(Limits()).close_light(least, target_s, ranges).reason != "open"
            assert not (proved and share > 1.0)
            closed += proved
    assert tried == set(FAMILIES)
    assert closed >= 10


def test_least_costs_are_those_of_the_cheapest_in_each_second_and_byte(search: JointSearch) -> None:
    for indices in _alike(search).values():
        least = search.costs.least_of(indices[:4])
        each = [search.costs.of(index) for index in indices[:4]]
        assert least is not None
        for name in ("forward_s", "recompute_s", "kept_bytes", "workspace_bytes", "state_bytes", "step_s"):
            values = [getattr(costs.runs, name) for costs in each if costs is not None]
            assert np.array_equal(getattr(least.runs, name), np.min(values, axis=0))
        assert np.array_equal(least.hop_latency_s, np.min([costs.hop_latency_s for costs in each if costs], axis=0))
        assert np.array_equal(least.cut_bytes, np.min([costs.cut_bytes for costs in each if costs], axis=0))
