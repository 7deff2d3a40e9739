"""The caps never deny a completion that exists, and short orders' live vectors stand for long ones'."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from stagewright.planner.errors import InvalidArgument, InvalidSchedule
from stagewright.planner.schedules.family import ScheduleRequest
from stagewright.planner.schedules.registry import generate
from stagewright.planner.search.brute_force import best_completion
from stagewright.planner.search.caps import order_caps
from stagewright.planner.search.joint_search import JointSearch
from stagewright.planner.search.limits import Limits
from stagewright.planner.search.order import Layout, layout_of, outline_of
from stagewright.planner.search.order_store import opening_of
from stagewright.planner.search.space import RULES, FamilyRule

sys.path.insert(0, str(Path(__file__).parent))

from random_problems import random_problem


def _check_caps(seeds: range) -> tuple[int, int]:
    """Check the candidates of some problems; return how many completions were allowed and how many targets denied."""
    allowed = denied = 0
    for seed in seeds:
        problem = random_problem(seed, most_layers=5)
        search = JointSearch.of(problem, Limits())
        if not len(problem.priced):
            continue
        for index in range(search.space.num_candidates):
            costs = search.costs.of(index)
            if costs is None:
                continue
            count = costs.order.key.num_microbatches
            oracle = best_completion(problem, search.space.candidate(index))
            if oracle is None:
                continue
            step_s, partition = oracle
            reach, caps = order_caps(costs.rank_tables, count, step_s)
            assert reach, (seed, search.space.candidate(index).summary)
            of_class = problem.classes.run_class
            bulk = of_class == of_class[costs.bulk_run]
            layers = costs.layers_of(partition.bounds)[:, bulk].sum(axis=1)
            for rank, slots in enumerate(costs.order.slots):
                assert sum(layers[slot.stage] for slot in slots) <= caps[rank]
            allowed += 1
            denied += not order_caps(costs.rank_tables, count, 0.6 * step_s)[0]
    return allowed, denied


def test_the_best_simulated_completion_is_within_the_caps_at_its_own_step() -> None:
    allowed, denied = _check_caps(range(12))
    assert allowed >= 8 and denied >= 5


@pytest.mark.soak
def test_the_best_simulated_completion_is_within_the_caps_on_two_hundred_problems() -> None:
    allowed, denied = _check_caps(range(2000, 2200))
    assert allowed >= 500 and denied >= 50


def _layout(rule: FamilyRule, ranks: int, count: int, chunks: int, *, opens: bool = False) -> Layout | None:
    try:
        request = ScheduleRequest(ranks, count, num_chunks=chunks, parameters=dict(rule.parameters))
        schedule = generate(rule.name, request)
        return layout_of(opening_of(schedule) if opens else schedule)
    except (InvalidArgument, InvalidSchedule):
        return None


def _are_covered(own: np.ndarray, others: np.ndarray, sizes: np.ndarray) -> bool:
    """Whether the others hold at least as much at any sizes of what is kept and what is late."""
    most = [(sizes @ vectors.reshape(len(vectors), -1).T).max(axis=1) for vectors in (own, others)]
    return bool((most[0] <= most[1] * (1 + 1e-12)).all())


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_live_vectors_of_four_rounds_are_covered_by_those_of_more(rule: FamilyRule) -> None:
    checked, draw = 0, np.random.default_rng(5)
    for ranks in (2, 3, 4, 6, 8):
        for chunks in rule.chunks(4):
            for rest in range(min(ranks, 3)):
                short = 4 * ranks + rest
                for count in (short + 2 * ranks, short + 7 * ranks):
                    if not (rule.fits(ranks, short, chunks) and rule.fits(ranks, count, chunks)):
                        continue
                    few = _layout(rule, ranks, short, chunks, opens=not rule.steady)
                    many = _layout(rule, ranks, count, chunks)
                    if few is None or many is None:
                        continue
                    for own, others in zip(few.live, many.live, strict=True):
                        sizes = draw.exponential(size=(60, own[0].size)) ** 3
                        assert _are_covered(own, others, sizes)
                        checked += 1
    assert checked >= 8


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.placement is not None], ids=lambda rule: rule.name)
def test_an_outline_holds_what_every_order_of_the_placement_holds(rule: FamilyRule) -> None:
    assert rule.placement is not None
    checked = 0
    for ranks in (2, 4, 6, 8):
        outline = outline_of(rule.placement(ranks), ranks, split=rule.split)
        for count in (2, ranks, 3 * ranks):
            layout = _layout(rule, ranks, count, 1)
            assert layout is not None and (layout.placement == outline.placement).all()
            assert layout.slots == outline.slots and layout.edges == outline.edges and layout.split == outline.split
            for own, others in zip(outline.live, layout.live, strict=True):
                assert all((others >= vector).all(axis=(1, 2)).any() for vector in own)
                checked += len(own)
    assert checked == 2 * 3 * (2 + 4 + 6 + 8)
