"""Per-layer memory actions: exact choices, offload and swaps."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagewright.planner.cost import memory_actions as mem
from stagewright.planner.cost.memory_actions import ActionKind, LayerAction
from stagewright.planner.errors import Infeasible


def options(kept, recompute_s, copy_s=None):
    found = [LayerAction(ActionKind.KEEP, kept), LayerAction(ActionKind.RECOMPUTE, 0.1 * kept, compute_s=recompute_s)]
    if copy_s is not None:
        found.append(LayerAction(ActionKind.OFFLOAD, 0.1 * kept, copy_s=copy_s))
    return found


def brute_force(layers, cap, num_live, hidden):
    best = None
    for chosen in product(*layers):
        if num_live * sum(action.kept_bytes for action in chosen) <= cap * (1 + 1e-12):
            seconds = sum(action.compute_s for action in chosen) + max(
                0.0, sum(action.copy_s for action in chosen) - hidden
            )
            best = seconds if best is None else min(best, seconds)
    return best


@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6),
    st.integers(1, 3),
    st.floats(0.0, 1.0),
    st.integers(0, 12),
)
def test_the_chosen_actions_are_the_best_of_all(shapes, num_live, tightness, hidden):
    layers = [options(float(kept), float(again), float(copy)) for kept, again, copy in shapes]
    least = num_live * sum(min(action.kept_bytes for action in actions) for actions in layers)
    most = num_live * sum(kept for kept, _, _ in shapes)
    cap = least + tightness * (most - least)
    found = mem.choose_actions(layers, cap_bytes=cap, num_live=num_live, hidden_copy_s=float(hidden))
    assert found.exposed_s == pytest.approx(brute_force(layers, cap, num_live, hidden))
    assert found.kept_bytes <= cap * (1 + 1e-9)


def test_saved_units_of_fourteen_layers_match_brute_force():
    layers = [options(float(5 + 3 * (i % 4)), float(1 + i % 5)) for i in range(14)]
    cap = 3 * sum(actions[0].kept_bytes for actions in layers) * 0.55
    found = mem.choose_actions(layers, cap_bytes=cap, num_live=3)
    assert found.exposed_s == pytest.approx(brute_force(layers, cap, 3, 0.0))


def test_earlier_stages_recompute_more():
    layers = [options(10.0, 1.0) for _ in range(8)]
    exposed = [mem.choose_actions(layers, cap_bytes=200.0, num_live=4 - stage).exposed_s for stage in range(4)]
    assert exposed == sorted(exposed, reverse=True)
    assert exposed[0] > exposed[-1] == 0.0


def test_too_small_a_cap_names_the_least_that_would_do():
    with pytest.raises(Infeasible, match="at least 4 bytes"):
        mem.choose_actions([options(10.0, 1.0)] * 4, cap_bytes=3.0)


def test_copies_are_free_while_compute_hides_them():
    layers = [options(10.0, 5.0, 1.0) for _ in range(4)]
    found = mem.choose_actions(layers, cap_bytes=4.0, hidden_copy_s=4.0)
    assert {action.kind for action in found.actions} == {ActionKind.OFFLOAD}
    assert found.exposed_s == 0.0


def test_a_swap_is_striped_over_the_links_to_several_peers():
    one, two = mem.peer_swap_action(100.0, [10.0]), mem.peer_swap_action(100.0, [10.0, 30.0])
    assert one.copy_s == 20.0
    assert two.copy_s == 5.0
    assert mem.offload_action(100.0, 20.0, 8.0).copy_s == 20.0


def test_room_on_late_stages_is_used_before_anything_is_recomputed():
    links = [[0.0 if a == b else 10.0 for b in range(4)] for a in range(4)]
    swaps, left = mem.spare_memory_swaps([13.0, 11.0, 9.0, 7.0], 10.0, link_bytes_per_s=links)
    assert left == [0.0] * 4
    assert sum(swap.moved_bytes for swap in swaps) == 4.0
    assert all(swap.source < 2 <= swap.target for swap in swaps)
    _, short = mem.spare_memory_swaps([15.0, 12.0, 9.0, 9.0], 10.0, link_bytes_per_s=links)
    assert sum(short) == pytest.approx(7.0 - 2.0)


def test_square_root_segments_need_the_least_memory():
    for layers in (4, 9, 16, 30, 100):
        best = mem.segment_layers(layers)
        assert mem.segmented_memory(layers, best) == min(mem.segmented_memory(layers, k) for k in range(1, layers + 1))
    assert mem.segment_layers(100) == 10


def test_no_plan_goes_below_the_largest_layer():
    assert mem.least_peak_bytes([3.0, 9.0, 4.0]) == 9.0


def test_offload_hides_behind_compute_until_the_lane_is_too_slow():
    forward, backward, moved = [1.0] * 6, [2.0] * 6, [1.0] * 6
    total, exposed = mem.offload_timeline_s(forward, backward, moved, 2.0)
    assert exposed == pytest.approx(1.0), "only the last layer, out and back, is visible"
    assert total == pytest.approx(19.0)
    _, slow = mem.offload_timeline_s(forward, backward, moved, 0.25)
    assert slow > 10
    assert mem.offload_timeline_s(forward, backward, [0.0] * 6, 1.0)[1] == 0.0


def test_an_optimizer_on_the_host_moves_gradients_down_and_weights_up():
    assert mem.optimizer_offload_s(
        10.0, host_bytes_per_s=2.0, gradient_bytes=2.0, parameter_bytes=2.0, host_step_s=1.0
    ) == pytest.approx(21.0)


def test_keeping_attentions_output_spares_one_attention_forward():
    plain = mem.recompute_action(16.0, 5.0)
    spared = mem.recompute_action(16.0, 5.0, saved_bytes=16.0, saved_s=2.0)
    assert spared.compute_s == plain.compute_s - 2.0
    assert spared.kept_bytes == plain.kept_bytes + 16.0
    layers = [[LayerAction(ActionKind.KEEP, 100.0), plain, spared]] * 4
    assert mem.choose_actions(layers, cap_bytes=4 * 32.0).exposed_s == 4 * 3.0
    assert mem.choose_actions(layers, cap_bytes=4 * 16.0).exposed_s == 4 * 5.0


def test_stashed_activations_of_an_asynchronous_pipeline_go_to_the_host():
    # PipeDream: stage d of 4 holds 4 - d minibatches; offload serves the early stages first.
    layers = [options(10.0, 5.0, 2.0) for _ in range(4)]
    moved = []
    for stage in range(4):
        found = mem.choose_actions(layers, cap_bytes=80.0, num_live=4 - stage, hidden_copy_s=8.0)
        moved.append(sum(action.kind is ActionKind.OFFLOAD for action in found.actions))
        assert found.exposed_s == 0.0
    assert moved == sorted(moved, reverse=True)
    assert moved[0] > moved[-1] == 0
