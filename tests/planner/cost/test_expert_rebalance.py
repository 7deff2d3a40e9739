"""Hot experts that move inside a node while static ones compute: smaller stragglers, hidden copies, never a longer layer."""

from __future__ import annotations

import numpy as np
import pytest

from stagewright.planner.cost.expert_rebalance import CopyRates, rebalanced
from stagewright.planner.cost.expert_routing import home_placement
from stagewright.planner.errors import InvalidArgument

FAST = CopyRates(token_s=1e-6, token_bytes=2 * 2 * 6144, expert_bytes=3 * 6144 * 2048 * 2.0, copy_bytes_per_s=450e9)
HOME = home_placement(128, 8)


def _routed(seed: int, *, tokens: int = 8 * 8192 * 8) -> np.ndarray:
    """Tokens of 128 experts under a router without a balance loss: popularities spread by a factor of a few."""
    draw = np.random.default_rng(seed)
    return draw.multinomial(tokens, draw.dirichlet(np.full(128, 1.5))).astype(np.float64)


@pytest.mark.parametrize("seed", range(6))
def test_of_128_experts_on_8_devices_the_token_straggler_falls_by_more_than_half(seed: int) -> None:
    """The paper reports 51 to 70 % of the straggler on 128 experts."""
    loads = _routed(seed)
    before = rebalanced(loads, HOME, FAST, devices_per_node=8, dynamic=0)
    after = rebalanced(loads, HOME, FAST, devices_per_node=8, dynamic=4)
    assert before.moved == ()
    assert after.straggler_tokens < 0.49 * before.straggler_tokens
    assert after.loads.sum() == loads.sum()
    assert (after.copy_s <= after.static * FAST.token_s).all()


def test_every_expert_runs_once_inside_its_node_and_loads_are_those_of_the_placement() -> None:
    loads = _routed(3)
    found = rebalanced(loads, HOME, FAST, devices_per_node=4, dynamic=4)
    counted = np.zeros(8)
    for expert, (device,) in enumerate(found.placement):
        assert device // 4 == HOME[expert][0] // 4
        counted[device] += loads[expert]
    assert counted == pytest.approx(found.loads)
    assert {expert for expert in range(128) if found.placement[expert] != HOME[expert]} == set(found.moved)
    assert found.moved


def test_slow_copies_move_nothing_and_a_layer_is_never_longer() -> None:
    slow = CopyRates(FAST.token_s, FAST.token_bytes, FAST.expert_bytes, copy_bytes_per_s=1e9)
    for seed in range(10):
        loads = _routed(seed)
        before = rebalanced(loads, HOME, FAST, devices_per_node=8, dynamic=0)
        assert rebalanced(loads, HOME, slow, devices_per_node=8, dynamic=4).moved == ()
        assert rebalanced(loads, HOME, FAST, devices_per_node=8, dynamic=4).loads.max() <= before.loads.max()


def test_a_case_that_a_hand_can_check() -> None:
    """Loads 9 1 | 1 1: the hot expert stays, since 1 | 11 is longer than 10 | 2."""
    rates = CopyRates(token_s=1.0, token_bytes=0.0, expert_bytes=0.0, copy_bytes_per_s=1.0)
    home = home_placement(4, 2)
    stays = rebalanced([9, 1, 1, 1], home, rates, devices_per_node=2, dynamic=1)
    assert stays.moved == ()
    moves = rebalanced([5, 4, 1, 1], home, rates, devices_per_node=2, dynamic=1)
    assert moves.moved == (0, 2)  # 9 | 2 becomes 4 | 7, and then 5 | 6
    assert moves.loads.tolist() == [5, 6]


def test_an_expert_with_two_homes_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="expert 1 is on 2 devices"):
        rebalanced([1, 1], ((0,), (0, 1)), FAST, devices_per_node=2, dynamic=1)
