"""What tightening derives holds in every order that ends by the limit; looked at in orders that just do."""

from __future__ import annotations

import numpy as np
import pytest

from stagewright.planner.schedules.auto.annealing import anneal
from stagewright.planner.schedules.auto.climbing import climb_targets
from stagewright.planner.schedules.auto.instance import Flags, Instance
from stagewright.planner.schedules.auto.precedence import Node, layout_of, put_before, root_node, tighten
from stagewright.planner.schedules.auto.sweep import end_times, start_times


def every_rank(instance: Instance) -> Flags:
    return np.ones(instance.num_ranks, dtype=np.bool_)


@pytest.mark.parametrize("seed", range(40))
def test_an_order_that_meets_the_limit_is_never_ruled_out(seed, random_instance):
    rng = np.random.default_rng(seed)
    ranks, microbatches, chunks = int(rng.integers(2, 6)), int(rng.integers(1, 8)), int(rng.integers(1, 4))
    instance = random_instance(rng, ranks, microbatches, chunks, whole=seed % 2 == 0)
    _, words = climb_targets(instance, evaluations=8, seed=seed)
    makespan_s, words, _ = anneal(instance, words, moves=20_000, temperature_s=0.3, bound_s=0.0, seed=seed)
    _, end_s = end_times(instance, words)
    layout = layout_of(instance)
    node = root_node(instance, layout)
    assert tighten(instance.tables, layout, node, makespan_s + instance.time_slack_s, every_rank(instance))
    slack_s = 2 * instance.time_slack_s
    assert (node.head_s <= start_times(instance, end_s) + slack_s).all()
    for rank, length in enumerate(instance.tables.lengths):
        word = words[rank, :length]
        letter = word // microbatches
        for column, own in enumerate(layout.letters[rank]):
            before = np.concatenate(([0], np.cumsum(letter == own)[:-1]))
            itself = letter == own
            assert (node.least[word, column] <= before).all()
            assert (before + itself <= node.most[word, column]).all()


@pytest.mark.parametrize(("cap", "least"), [(2, 349.0), (3, 293.0)])
def test_tightening_refutes_limits_far_below_known_optima(cap, least, uniform_instance):
    instance = uniform_instance(4, 8, 2, "wave", (10, 12, 8), 1.0, cap)
    layout = layout_of(instance)
    assert tighten(instance.tables, layout, root_node(instance, layout), least, every_rank(instance))
    assert not tighten(instance.tables, layout, root_node(instance, layout), 0.92 * least, every_rank(instance))


@pytest.mark.parametrize("seed", range(12))
def test_a_tight_node_needs_only_the_rank_that_a_choice_changes(seed, random_instance):
    rng = np.random.default_rng(seed)
    instance = random_instance(rng, int(rng.integers(2, 5)), int(rng.integers(2, 6)), int(rng.integers(1, 4)))
    limit_s = climb_targets(instance, evaluations=40, seed=seed)[0] + instance.time_slack_s
    layout, root = layout_of(instance), root_node(instance, layout_of(instance))
    assert tighten(instance.tables, layout, root, limit_s, every_rank(instance))
    for first, column in np.argwhere(root.least < root.most)[:: max(1, instance.num_actions // 8)].tolist():
        rank = int(instance.tables.rank[first // instance.num_microbatches])
        second = int(layout.letters[rank, column]) * instance.num_microbatches + int(root.least[first, column])
        if second == first:
            continue
        one, other = (Node(*(values.copy() for values in root)) for _ in range(2))
        put_before(instance.tables, layout, one, first, second)
        put_before(instance.tables, layout, other, first, second)
        only = np.arange(instance.num_ranks) == rank
        is_possible = tighten(instance.tables, layout, one, limit_s, only)
        assert is_possible == tighten(instance.tables, layout, other, limit_s, every_rank(instance))
        if is_possible:
            assert np.array_equal(one.least, other.least)
            assert one.head_s == pytest.approx(other.head_s)
            assert one.tail_s == pytest.approx(other.tail_s)
