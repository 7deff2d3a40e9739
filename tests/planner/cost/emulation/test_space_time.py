"""Dynamic sequence parallelism on a toy space-time block."""

import numpy as np
import pytest

from stagewright.planner.cost.context_layouts import AttentionSizes, switch_traffic, ulysses_traffic
from stagewright.planner.cost.emulation.space_time import reference_block, switched_block

FRAMES, PATCHES, FEATURES = 4, 8, 6


def tensors():
    rng = np.random.default_rng(3)
    x, gradient = (rng.normal(size=(FRAMES, PATCHES, FEATURES)) for _ in range(2))
    spatial, temporal = (0.3 * rng.normal(size=(FEATURES, FEATURES)) for _ in range(2))
    return x, spatial, temporal, gradient


@pytest.mark.parametrize("degree", [1, 2, 4])
def test_switching_the_split_dimension_changes_no_output_and_no_gradient(degree):
    whole = reference_block(*tensors())
    split = switched_block(*tensors(), degree)
    np.testing.assert_allclose(split.output, whole.output, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(split.spatial_gradient, whole.spatial_gradient, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(split.temporal_gradient, whole.temporal_gradient, rtol=1e-10, atol=1e-12)


def test_the_references_gradient_is_the_slope():
    x, spatial, temporal, gradient = tensors()
    found = reference_block(x, spatial, temporal, gradient).spatial_gradient
    step = 1e-6
    bumped = spatial.copy()
    bumped[2, 3] += step
    up = (reference_block(x, bumped, temporal, gradient).output * gradient).sum()
    down = (reference_block(x, spatial, temporal, gradient).output * gradient).sum()
    assert (up - down) / step == pytest.approx(found[2, 3], rel=1e-3)


def test_four_exchanges_of_x_are_a_quarter_of_what_ulysses_sends():
    degree = 4
    sizes = AttentionSizes(batch=1, sequence=FRAMES * PATCHES, hidden=FEATURES, heads=1)
    received = switched_block(*tensors(), degree).wire.most_received
    assert received == switch_traffic(sizes, degree).total
    assert received / (2 * ulysses_traffic(sizes, degree).total) == pytest.approx(0.25)
