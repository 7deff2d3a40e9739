"""The roofline: efficiency curves, launch time, the dtypes a device has."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagewright.planner.cost.roofline import Curve, Roofline, peak_flops
from stagewright.planner.documents.cluster import Device, EfficiencyPoint
from stagewright.planner.errors import InvalidArgument

POINTS = (
    EfficiencyPoint(size=1e6, share=0.2),
    EfficiencyPoint(size=1e8, share=0.6),
    EfficiencyPoint(size=1e9, share=0.7),
)


def device(**more):
    values = {
        "name": "toy",
        "memory_bytes": 1e9,
        "memory_bytes_per_s": 1e12,
        "flops": {"bf16": 1e14, "fp32": 1e13},
        **more,
    }
    return Device(**values)


def test_a_curve_passes_through_its_points_and_is_flat_outside():
    curve = Curve.of(POINTS)
    assert [curve(point.size) for point in POINTS] == pytest.approx([0.2, 0.6, 0.7])
    assert (curve(1.0), curve(1e15)) == (0.2, 0.7)
    assert curve(1e7) == pytest.approx(0.4), "halfway in the logarithm"
    assert Curve.of(())(123.0) == 1.0


@given(st.floats(1.0, 1e12), st.floats(1.0, 1e12))
def test_larger_operations_are_at_least_as_efficient(first, second):
    curve = Curve.of(POINTS)
    assert (curve(first) <= curve(second) + 1e-12) == (first <= second or math.isclose(curve(first), curve(second)))


def test_time_is_the_slower_of_compute_and_memory_after_the_launch():
    roofline = Roofline.of(device(launch_s=1e-6), "bf16")
    assert roofline.seconds("matmul", 1e14, 0.0) == pytest.approx(1.0 + 1e-6)
    assert roofline.seconds("matmul", 1e14, 2e12) == pytest.approx(2.0 + 1e-6)
    assert roofline.seconds("vector", 0.0, 1e12) == pytest.approx(1.0 + 1e-6)
    assert roofline.seconds("vector", 0.0, 0.0) == 0.0, "what does nothing is not launched"


def test_a_grouped_product_is_as_efficient_as_one_group():
    roofline = Roofline.of(device(matmul_efficiency=POINTS), "bf16")
    assert roofline.seconds("matmul", 1e9, 0.0) < roofline.seconds("matmul", 1e9, 0.0, num_groups=1000)


def test_a_device_without_a_dtype_uses_the_next_wider_one():
    assert peak_flops(device(), "fp8") == 1e14
    assert peak_flops(device(flops={"fp16": 5e13}), "bf16") == 5e13
    assert peak_flops(device(), "fp32") == 1e13
    with pytest.raises(InvalidArgument, match="toy has no rate for fp64, only for bf16, fp32"):
        peak_flops(device(), "fp64")
