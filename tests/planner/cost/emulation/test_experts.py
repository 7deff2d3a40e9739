"""A mixture of experts on emulated devices: three ways to the same outputs and gradients."""

import numpy as np
import pytest

from stagewright.planner.cost import expert_routing as moe
from stagewright.planner.cost.emulation.experts import Mixture

TOKENS, HIDDEN, FFN, EXPERTS, TOP_K, DEVICES = 32, 6, 10, 8, 2, 4


def mixture(hot=False):
    rng = np.random.default_rng(5)
    routes = np.array([rng.choice(EXPERTS, TOP_K, replace=False) for _ in range(TOKENS)])
    if hot:
        routes[:, 0] = 0
        routes[:, 1] = rng.integers(1, EXPERTS, TOKENS)
    return Mixture(
        rng.normal(size=(TOKENS, HIDDEN)),
        rng.normal(size=(EXPERTS, HIDDEN, FFN)),
        rng.normal(size=(EXPERTS, FFN, HIDDEN)),
        routes,
        rng.uniform(size=(TOKENS, TOP_K)),
        DEVICES,
    ), rng.normal(size=(TOKENS, HIDDEN))


def assert_equal(found, expected):
    for name in ("output", "up_gradient", "down_gradient"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-12, atol=1e-12)


def test_tokens_experts_and_shadows_give_one_result():
    layer, gradient = mixture()
    expected = layer.reference(gradient)
    assert_equal(layer.tokens_travel(gradient), expected)
    assert_equal(layer.experts_travel(gradient), expected)
    assert_equal(layer.tokens_travel(gradient, shadowed=(0, 3)), expected)


def test_the_references_gradient_is_the_slope():
    layer, gradient = mixture()
    found = layer.reference(gradient)
    step = 1e-6
    before = (found.output * gradient).sum()
    layer.up[2, 1, 3] += step
    after = (layer.reference(gradient).output * gradient).sum()
    assert (after - before) / step == pytest.approx(found.up_gradient[2, 1, 3], rel=1e-4, abs=1e-6)


def test_received_rows_are_the_traffic_matrix_and_a_count_an_expert():
    layer, gradient = mixture()
    counts = np.zeros((DEVICES, EXPERTS))
    for token, experts in enumerate(layer.routes):
        for expert in experts:
            counts[layer.token_device(token), expert] += 1
    matrix = moe.traffic_matrix(counts, moe.home_placement(EXPERTS, DEVICES), token_bytes=HIDDEN)
    sent_numbers = (DEVICES - 1) * EXPERTS // DEVICES
    for device, received in enumerate(layer.tokens_travel(gradient).wire.received):
        assert received == 2 * (matrix[:, device].sum() + matrix[device].sum()) + sent_numbers


def test_shadowing_a_hot_expert_relieves_its_device():
    layer, gradient = mixture(hot=True)
    plain, shadowed = layer.tokens_travel(gradient), layer.tokens_travel(gradient, shadowed=(0,))
    assert_equal(shadowed, layer.reference(gradient))
    away = sum(layer.token_device(token) != 0 for token in range(TOKENS))
    weights = 2 * HIDDEN * FFN
    # Rows both ways, twice, against weights and gradients to and from each other device.
    assert plain.wire.received[0] - shadowed.wire.received[0] == 2 * away * HIDDEN - (DEVICES - 1) * weights


def test_moving_experts_pays_with_many_tokens_and_small_experts():
    layer, gradient = mixture()
    few = max(layer.tokens_travel(gradient).wire.received)
    experts = max(layer.experts_travel(gradient).wire.received)
    assert few < experts
    assert moe.moves_experts(1e6, HIDDEN, top_k=TOP_K, degree=DEVICES, remote_experts=6, ffn_size=FFN)
