"""Chunked expert layers: the best number of chunks, the best order of messages, priorities."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagewright.planner.cost.expert_pipeline import (
    ExpertLayer,
    Line,
    best_chunks,
    best_order,
    dispatches_first,
    exhaustive_chunks,
    message_orders,
    pipelined_s,
    step_with_gradients_s,
)
from stagewright.planner.errors import InvalidArgument

positive = st.floats(0.01, 10.0)
fixed = st.floats(0.0, 0.5)


def test_one_chunk_is_dispatch_compute_combine():
    layer = ExpertLayer(Line(0.5, 2.0), Line(0.25, 3.0))
    assert layer.seconds(1) == pytest.approx(2.5 + 3.25 + 2.5)


def test_two_chunks_hide_one_dispatch_and_one_combine():
    layer = ExpertLayer(Line(0.0, 2.0), Line(0.0, 2.0))
    # d0 d1 | c0 c1 | k0 k1 with every part 1: 0-1 d0, 1-2 d1/c0, 2-3 c1/k0, 3-4 k1
    assert layer.seconds(2) == pytest.approx(4.0)


@given(fixed, positive, fixed, positive)
def test_the_closed_form_finds_the_best_number_of_chunks(a, x, g, c):
    layer = ExpertLayer(Line(a, x), Line(g, c))
    assert layer.seconds(best_chunks(layer)) == pytest.approx(layer.seconds(exhaustive_chunks(layer)), rel=1e-12)


def test_more_fixed_cost_means_fewer_chunks():
    chosen = [best_chunks(ExpertLayer(Line(cost, 4.0), Line(cost, 4.0))) for cost in (0.001, 0.05, 0.3, 8.0)]
    assert chosen == sorted(chosen, reverse=True)
    assert chosen[0] > 1
    assert chosen[-1] == 1


@given(positive, positive, st.integers(1, 4))
def test_dispatching_first_is_an_optimal_order_of_equal_chunks(x, c, chunks):
    layer = ExpertLayer(Line(0.0, x), Line(0.0, c))
    order, seconds = best_order(layer, chunks)
    assert seconds <= layer.seconds(chunks) + 1e-12
    assert order in set(message_orders(chunks))


def test_all_orders_of_two_chunks():
    orders = list(message_orders(2))
    assert len(orders) == 2
    assert dispatches_first(2) in orders
    layer = ExpertLayer(Line(0.0, 2.0), Line(0.0, 6.0))
    assert best_order(layer, 2)[1] == min(pipelined_s(layer, 2, order) for order in orders)


def test_no_chunks_is_refused():
    with pytest.raises(InvalidArgument, match="chunks is 0"):
        pipelined_s(ExpertLayer(Line(0, 1), Line(0, 1)), 0, ())


def test_exchanges_that_go_first_do_not_wait_for_gradients():
    layers = [(1.0, 2.0, 3.0)] * 4
    first_come = step_with_gradients_s(layers, priority=False)
    urgent = step_with_gradients_s(layers, priority=True, chunk_s=0.25)
    assert urgent < first_come
    compute_only = sum(exchange + compute for exchange, compute, _ in layers)
    assert urgent >= compute_only
    assert urgent >= sum(exchange + reduction for exchange, _, reduction in layers)


@given(
    st.lists(st.tuples(positive, positive, positive), min_size=1, max_size=6),
    st.floats(0.001, 1.0),
)
def test_priority_is_never_later_than_first_come_by_more_than_a_chunk_a_layer(layers, chunk_s):
    first_come = step_with_gradients_s(layers, priority=False)
    urgent = step_with_gradients_s(layers, priority=True, chunk_s=chunk_s)
    assert urgent <= first_come + chunk_s * len(layers) + 1e-9
