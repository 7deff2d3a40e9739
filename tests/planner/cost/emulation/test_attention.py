"""Split attention on emulated devices: equal to one device's, with the traffic of the formulas."""

import numpy as np
import pytest

from stagewright.planner.cost import context_layouts as ctx
from stagewright.planner.cost.context_layouts import AttentionSizes, TokenOrder
from stagewright.planner.cost.emulation.attention import SplitAttention

LENGTH, FEATURES = 24, 5


def tensors(seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(LENGTH, FEATURES)) for _ in range(4)]


def reference(query, key, value, output_gradient, causal):
    """Plain attention and its gradients by central formulas on one device."""
    scores = query @ key.T / np.sqrt(FEATURES)
    if causal:
        scores = np.where(np.tril(np.ones_like(scores)) > 0, scores, -np.inf)
    p = np.exp(scores - scores.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    dp = output_gradient @ value.T
    ds = p * (dp - (dp * p).sum(axis=1, keepdims=True)) / np.sqrt(FEATURES)
    return p @ value, ds @ key, ds.T @ query, p.T @ output_gradient


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("order", list(TokenOrder))
@pytest.mark.parametrize("degree", [1, 2, 4])
def test_ring_and_burst_give_the_output_and_gradients_of_one_device(causal, order, degree):
    query, key, value, gradient = tensors()
    output, dq, dk, dv = reference(query, key, value, gradient, causal)
    split = SplitAttention(query, key, value, degree, causal=causal, order=order)
    np.testing.assert_allclose(split.ring_forward()[0], output, rtol=1e-10, atol=1e-12)
    for backward in (split.ring_backward, split.burst_backward):
        found, _ = backward(gradient)
        np.testing.assert_allclose(found.query, dq, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(found.key, dk, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(found.value, dv, rtol=1e-10, atol=1e-12)


def test_ring_and_burst_traffic_are_the_formulas():
    query, key, value, gradient = tensors()
    sizes = AttentionSizes(batch=1, sequence=LENGTH, hidden=FEATURES, heads=1)
    for degree in (2, 4, 6):
        split = SplitAttention(query, key, value, degree, causal=False, order=TokenOrder.CONTIGUOUS)
        assert split.ring_forward()[1].most_received == pytest.approx(ctx.ring_traffic(sizes, degree).forward)
        assert split.ring_backward(gradient)[1].most_received == pytest.approx(ctx.ring_traffic(sizes, degree).backward)
        assert split.burst_backward(gradient)[1].most_received == pytest.approx(
            ctx.burst_traffic(sizes, degree).backward
        )


@pytest.mark.parametrize("degree", [2, 3, 4, 6])
def test_helped_causal_attention_gives_the_same_output_in_half_the_steps(degree):
    query, key, value, gradient = tensors()
    output, dq, _, _ = reference(query, key, value, gradient, causal=True)
    split = SplitAttention(query, key, value, degree, causal=True, order=TokenOrder.CONTIGUOUS)
    found, _, steps = split.helped_forward()
    np.testing.assert_allclose(found, output, rtol=1e-10, atol=1e-12)
    assert steps == degree // 2 + 1
    np.testing.assert_allclose(split.burst_backward(gradient)[0].query, dq, rtol=1e-10, atol=1e-12)


def test_striped_and_zig_zag_devices_do_equal_work_with_the_causal_mask():
    for order, spread in ((TokenOrder.ZIG_ZAG, 0), (TokenOrder.STRIPED, LENGTH), (TokenOrder.CONTIGUOUS, 100)):
        parts = ctx_parts(order)
        pairs = [sum(int(position) + 1 for position in part) for part in parts]
        if order is TokenOrder.CONTIGUOUS:
            assert max(pairs) - min(pairs) > spread
        else:
            assert max(pairs) - min(pairs) <= spread


def ctx_parts(order):
    query, key, value, _ = tensors()
    return SplitAttention(query, key, value, 4, causal=True, order=order).parts
