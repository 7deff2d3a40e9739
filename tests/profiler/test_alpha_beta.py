"""The piecewise alpha-beta fit: exact on exact lines, best among all breakpoints, refuses what is no measurement."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagewright.planner.errors import InvalidArgument
from stagewright.profiler.alpha_beta import fit_alpha_beta

SIZES = [2.0**power for power in range(10, 26)]


def seconds(size, alpha, bytes_per_s):
    return alpha + size / bytes_per_s


def test_one_exact_line_is_found_exactly_and_not_cut():
    fit = fit_alpha_beta(SIZES, [seconds(size, 2e-5, 1e9) for size in SIZES])
    (segment,) = fit.segments
    assert segment.latency_s == pytest.approx(2e-5)
    assert segment.bytes_per_s == pytest.approx(1e9)
    assert fit.max_relative_error < 1e-9


def test_a_protocol_change_is_found_where_it_is():
    times = [seconds(size, 1e-5, 1e9) if size < 2**18 else seconds(size, 1e-4, 8e9) for size in SIZES]
    fit = fit_alpha_beta(SIZES, times)
    assert [segment.from_bytes for segment in fit.segments] == [0.0, 2.0**18]
    assert fit.segments[1].bytes_per_s == pytest.approx(8e9)


def test_latency_is_never_negative_and_bandwidth_never_infinite():
    falling = fit_alpha_beta([1e3, 1e4, 1e5], [3e-5, 2e-5, 1e-5])
    steep = fit_alpha_beta([1e3, 2e3, 4e3], [1e-6, 4e-6, 9e-6])
    for fit in (falling, steep):
        assert all(item.latency_s >= 0 and np.isfinite(item.bytes_per_s) for item in fit.segments)


@given(
    st.lists(st.floats(1e-6, 1e-2), min_size=6, max_size=9),
    st.integers(1, 3),
)
def test_no_other_choice_of_breakpoints_has_a_smaller_error(times, max_segments):
    sizes = SIZES[: len(times)]
    fit = fit_alpha_beta(sizes, times, max_segments=max_segments)
    pieces = len(fit.segments)
    error = np.sum((np.array([fit.seconds(size) for size in sizes]) / times - 1.0) ** 2)
    for cuts in itertools.combinations(range(1, len(sizes)), pieces - 1):
        bounds = [0, *cuts, len(sizes)]
        ranges = list(itertools.pairwise(bounds))
        if any(end - first < 3 for first, end in ranges):
            continue
        other = 0.0
        for first, end in ranges:
            part = fit_alpha_beta(sizes[first:end], times[first:end], max_segments=1)
            other += part.rms_relative_error**2 * (end - first)
        assert error <= other * (1 + 1e-9) + 1e-12


def test_one_size_is_too_few():
    with pytest.raises(InvalidArgument, match="1 distinct sizes, a line needs 2"):
        fit_alpha_beta([8.0, 8.0], [1e-6, 2e-6])


def test_a_time_of_zero_is_refused():
    with pytest.raises(InvalidArgument, match="positive"):
        fit_alpha_beta([8.0, 16.0], [0.0, 2e-6])
