"""Choices on several node groups at once: shares by speed, and rows priced together that equal what the scorer says one by one."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from stagewright.planner.catalog import resolve_cluster, resolve_model
from stagewright.planner.documents import TrainingJob
from stagewright.planner.search.joined_choice import NUM_DEGREES, JoinedChoices
from stagewright.planner.search.joined_costs import balanced_shares, joined_layer_costs
from stagewright.planner.search.pool_space import PoolSpace
from stagewright.planner.search.pricing import configuration_of
from stagewright.planner.search.problem import Problem


@pytest.mark.parametrize(
    ("counts", "rates", "samples"), [((2, 2), (3.0, 1.0), 8), ((1, 2), (2.5, 1.0), 9), ((4, 1), (1.0, 0.4), 22)]
)
def test_shares_have_the_least_slowest_replica_of_all_whole_ones(counts, rates, samples):
    best = balanced_shares(counts, rates, samples)[0]
    every = [shares for shares in product(range(1, samples), repeat=2) if np.dot(counts, shares) == samples]
    slowest = {shares: max(np.divide(shares, rates)) for shares in every}
    assert slowest[best] == min(slowest.values())


def test_a_microbatch_too_small_for_a_sample_on_each_replica_has_no_shares():
    assert balanced_shares((4, 4), (3.0, 1.0), 7) == []


def test_a_joined_stage_is_as_slow_as_its_slowest_part_and_as_full_as_its_fullest():
    cluster = resolve_cluster("a100-sxm-80g:4x1+v100-sxm-32g:4x1")
    problem = Problem(resolve_model("gpt2"), cluster, TrainingJob(global_batch=32, sequence_length=1024), 8)
    choices = PoolSpace(problem).choices.values()
    joined = next(choice for choice in choices if isinstance(choice, JoinedChoices))
    model, rooms = problem.model(("tp", "cp", "dp", "pp")), [member.room_bytes for member in joined.members]
    rows = joined.priced(8)[0].shape
    uneven = 0
    for row in rows[:: len(rows) // 8]:
        parts, degrees = joined.parts(row), configuration_of(row[:NUM_DEGREES]).degrees
        alone = [joined_layer_costs(model, degrees, parts, told=part) for part in parts]
        whole = joined_layer_costs(model, degrees, parts, room_bytes=rooms)
        for name in ("kept_bytes", "late_bytes", "workspace_bytes", "split_workspace_bytes", "state_bytes"):
            weighed = [getattr(one, name) * min(rooms) / room for one, room in zip(alone, rooms, strict=True)]
            np.testing.assert_allclose(getattr(whole, name), np.maximum(*weighed), rtol=1e-12)
            uneven += bool((getattr(alone[0], name) != getattr(alone[1], name)).any())
        for name in ("forward_s", "weight_grad_s", "recompute_s", "tail_s", "optimizer_s", "cut_bytes", "edge_bytes"):
            np.testing.assert_array_equal(getattr(alone[0], name), getattr(alone[1], name))
            np.testing.assert_array_equal(getattr(alone[0], name), getattr(whole, name))
        tables = [model.shape_table(degrees, part.samples, group=part.group) for part in parts]
        slowest_s = np.maximum(*(table.forward_s for table in tables))  # without what is sent
        assert (whole.forward_s >= slowest_s * (1 - 1e-12)).all()
    assert uneven >= 20


def test_rows_priced_together_are_the_layer_costs_of_the_scorer():
    cluster = resolve_cluster("a100-sxm-80g:4x1+v100-sxm-32g:4x1")
    problem = Problem(resolve_model("gpt2"), cluster, TrainingJob(global_batch=32, sequence_length=1024), 8)
    joined = next(choices for choices in PoolSpace(problem).choices.values() if isinstance(choices, JoinedChoices))
    priced, samples = joined.priced(8)
    first = problem.classes.first
    assert len(priced) > 20
    for row in range(0, len(priced), 7):
        costs = joined.costs(priced.shape[row])
        assert sum(part.num_replicas * part.samples for part in joined.parts(priced.shape[row])) == samples[row]
        for mine, theirs in (
            (priced.forward_s, costs.forward_s[first]),
            (priced.weight_grad_s, costs.weight_grad_s[first]),
            (priced.step_s, costs.step_s[first]),
            (priced.kept_bytes, costs.kept_bytes[:, first]),
            (priced.workspace_bytes, costs.workspace_bytes[:, first]),
            (priced.state_bytes, costs.static_bytes[first]),
        ):
            np.testing.assert_allclose(mine[row], theirs, rtol=1e-12)
