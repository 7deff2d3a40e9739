"""Whole blocks with experts in chunks: near the best order, never behind layers one by one, above the bound."""

from __future__ import annotations

import random
from itertools import pairwise, permutations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagewright.planner.cost.block_pipeline import ExpertBlock, best_flow_chunks, flow_bound_s, flow_s
from stagewright.planner.cost.expert_pipeline import ExpertLayer, Line
from stagewright.planner.errors import InvalidArgument

positive = st.floats(0.05, 10.0)


def _block(attention_s: float, exchange_s: float, experts_s: float, fixed_s: float = 0.0) -> ExpertBlock:
    return ExpertBlock(Line(fixed_s, attention_s), ExpertLayer(Line(fixed_s, exchange_s), Line(fixed_s, experts_s)))


def _fastest_s(block: ExpertBlock, chunks: int) -> float:
    """Return the seconds of one block under the best of all orders of both lanes."""
    parts_s = block.parts_s(chunks)
    tasks = list(product(range(chunks), range(4)))

    def orders(parts: tuple[int, int]) -> list[tuple[tuple[int, int], ...]]:
        mine = [task for task in tasks if task[1] in parts]
        return [
            order
            for order in permutations(mine)
            if all((c, parts[0]) in order[: order.index((c, parts[1]))] for c in range(chunks))
        ]

    best = float("inf")
    for device, link in product(orders((0, 2)), orders((1, 3))):
        before = {after: task for lane in (device, link) for task, after in pairwise(lane)}
        end_s: dict[tuple[int, int], float] = {}
        left = list(tasks)
        while left:
            able = [
                task
                for task in left
                if before.get(task) not in left and (task[1] == 0 or (task[0], task[1] - 1) not in left)
            ]
            if not able:
                break
            for task in able:
                start = max(end_s.get(before.get(task, (-1, -1)), 0.0), end_s.get((task[0], task[1] - 1), 0.0))
                end_s[task] = start + parts_s[task[1]]
                left.remove(task)
        else:
            best = min(best, max(end_s.values()))
    return best


def test_two_chunks_hide_one_exchange_under_the_others_attention():
    # a0 0-1, a1 1-2 beside d0 1-2, c0 2-3 beside d1 2-3, c1 3-4 beside k0 3-4, k1 4-5; apart: 2 + (1 + 1 + 1 + 1)
    block = _block(2.0, 2.0, 2.0)
    assert flow_s(block, 2) == pytest.approx(5.0)
    assert block.separate_s(2) == pytest.approx(6.0)
    assert flow_s(block, 1) == block.separate_s(1) == pytest.approx(8.0)


@pytest.mark.parametrize(("chunks", "seed", "most"), [(2, 0, 1.0), (2, 1, 1.0), (2, 2, 1.0), (3, 3, 1.05)])
def test_the_rules_are_near_the_best_of_all_orders(chunks, seed, most):
    draw = random.Random(seed)
    block = _block(*(draw.uniform(0.2, 4.0) for _ in range(3)), fixed_s=0.05)
    best_s = _fastest_s(block, chunks)
    assert best_s <= flow_s(block, chunks) <= most * best_s * (1 + 1e-12)
    assert flow_bound_s(block, chunks) <= best_s * (1 + 1e-12)


@settings(max_examples=40)
@given(positive, positive, positive, st.integers(1, 6), st.integers(1, 5))
def test_blocks_in_flow_are_never_behind_layers_one_by_one_and_never_below_the_bound(a, x, c, chunks, num_blocks):
    block = _block(a, x, c)
    seconds = flow_s(block, chunks, num_blocks=num_blocks)
    assert flow_bound_s(block, chunks, num_blocks=num_blocks) <= seconds * (1 + 1e-9)
    assert seconds <= num_blocks * block.separate_s(chunks) * (1 + 1e-9)


def test_fixed_costs_make_fewer_chunks_and_many_blocks_near_the_busier_lane():
    chosen = [best_flow_chunks(_block(2.0, 2.0, 2.0, cost), num_blocks=4) for cost in (0.001, 0.05, 0.5, 8.0)]
    assert chosen == sorted(chosen, reverse=True)
    assert chosen[-1] == 2 < chosen[0]  # two chunks still keep both lanes busy
    assert flow_s(_block(2.0, 2.0, 2.0), 4, num_blocks=16) <= 1.05 * 16 * 4.0
    with pytest.raises(InvalidArgument, match="chunks is 0"):
        flow_s(_block(1.0, 1.0, 1.0), 0)
