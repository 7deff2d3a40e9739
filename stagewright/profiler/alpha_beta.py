"""Piecewise alpha-beta lines through measured message times.

Problem: given (n_i, t_i), message bytes and seconds, choose breakpoints and for each piece (alpha, beta) so that
t ~ alpha + beta n. Networks change protocol with size, so one line is wrong somewhere by a factor.

Objective: the sum of squared *relative* errors, sum ((alpha + beta n_i - t_i) / t_i)^2, with alpha >= 0 and beta > 0;
absolute errors would see the largest message only. For k pieces the optimum over breakpoints between sorted samples is
the recurrence  E[k][j] = min_i E[k-1][i] + e(i, j),  e(i, j) the error of one line through samples i..j-1: O(k n^2)
fits of two unknowns in closed form. The number of pieces grows while the root-mean-square relative error falls
by a fifth or more for each added piece, and not below half a percent.

Not guaranteed: continuity at the breakpoints (protocols do jump), or any value beyond the last sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stagewright.planner.documents import LinkSegment
from stagewright.planner.errors import InvalidArgument

Floats = npt.NDArray[np.float64]

_MIN_BETA_S_PER_BYTE = 1e-15
_MIN_SAMPLES = 2
_MIN_SAMPLES_OF_A_PIECE = 3
_WORTHWHILE = 0.8
_CLOSE_ENOUGH = 0.005


@dataclass(frozen=True)
class AlphaBetaFit:
    """Segments ascending by `from_bytes` (the first from 0) and their errors over the samples."""

    segments: tuple[LinkSegment, ...]
    rms_relative_error: float
    max_relative_error: float

    def seconds(self, num_bytes: float) -> float:
        """Return the fitted time of one message."""
        segment = max(
            (item for item in self.segments if item.from_bytes <= num_bytes), key=lambda item: item.from_bytes
        )
        return segment.latency_s + num_bytes / segment.bytes_per_s


def fit_alpha_beta(sizes_bytes: Sequence[float], seconds: Sequence[float], *, max_segments: int = 4) -> AlphaBetaFit:
    """Return the piecewise line with the least relative error; several times for one size are merged to their median.

    Raises
    ------
    InvalidArgument : when lengths differ, fewer than two sizes are given, or a time is not positive.
    """
    sizes, times = _medians(sizes_bytes, seconds)
    count = len(sizes)
    lines, errors = _line_of_each_range(sizes, times, min(count, _MIN_SAMPLES_OF_A_PIECE))
    best = np.full((max_segments + 1, count + 1), np.inf)
    before = np.zeros((max_segments + 1, count + 1), dtype=int)
    best[0][0] = 0.0
    for pieces in range(1, max_segments + 1):
        for end in range(1, count + 1):
            totals = best[pieces - 1][:end] + errors[:end, end]
            before[pieces][end] = int(np.argmin(totals))
            best[pieces][end] = totals[before[pieces][end]]
    pieces = 1
    for more in range(2, max_segments + 1):
        is_close = best[pieces][count] <= count * _CLOSE_ENOUGH**2
        if not is_close and best[more][count] < best[pieces][count] * _WORTHWHILE ** (2 * (more - pieces)):
            pieces = more
    segments = _segments(sizes, lines, before, pieces)
    fit = AlphaBetaFit(segments=segments, rms_relative_error=0.0, max_relative_error=0.0)
    relative = np.array([fit.seconds(size) for size in sizes]) / times - 1.0
    return AlphaBetaFit(
        segments=segments,
        rms_relative_error=float(np.sqrt(np.mean(relative**2))),
        max_relative_error=float(np.abs(relative).max()),
    )


def _medians(sizes_bytes: Sequence[float], seconds: Sequence[float]) -> tuple[Floats, Floats]:
    if len(sizes_bytes) != len(seconds):
        raise InvalidArgument(f"{len(sizes_bytes)} sizes but {len(seconds)} times", field="seconds")
    sizes = np.array(sizes_bytes, dtype=float)
    times = np.array(seconds, dtype=float)
    if not (np.isfinite(times).all() and (times > 0).all()):
        raise InvalidArgument(f"every time must be positive, the least is {times.min()}", field="seconds")
    distinct = np.unique(sizes)
    if len(distinct) < _MIN_SAMPLES:
        raise InvalidArgument(
            f"{len(distinct)} distinct sizes, a line needs {_MIN_SAMPLES}",
            field="sizes_bytes",
            hint="measure more sizes",
        )
    return distinct, np.array([np.median(times[sizes == size]) for size in distinct])


def _line_of_each_range(
    sizes: Floats, times: Floats, min_samples: int
) -> tuple[dict[tuple[int, int], tuple[float, float]], Floats]:
    count = len(sizes)
    errors = np.full((count + 1, count + 1), np.inf)
    lines: dict[tuple[int, int], tuple[float, float]] = {}
    for first in range(count):
        for end in range(first + min_samples, count + 1):
            alpha, beta = _line(sizes[first:end], times[first:end])
            lines[first, end] = (alpha, beta)
            relative = (alpha + beta * sizes[first:end]) / times[first:end] - 1.0
            errors[first, end] = float(relative @ relative)
    return lines, errors


def _line(sizes: Floats, times: Floats) -> tuple[float, float]:
    """Weighted least squares with weights 1 / t^2, clamped to alpha >= 0 and beta > 0."""
    ones, slopes = 1.0 / times, sizes / times
    aa, ab, bb = float(ones @ ones), float(ones @ slopes), float(slopes @ slopes)
    a1, b1 = float(ones.sum()), float(slopes.sum())
    determinant = aa * bb - ab * ab
    alpha = (a1 * bb - b1 * ab) / determinant if determinant > 0 else -1.0
    beta = (b1 * aa - a1 * ab) / determinant if determinant > 0 else -1.0
    if beta < _MIN_BETA_S_PER_BYTE:
        return a1 / aa, _MIN_BETA_S_PER_BYTE
    if alpha < 0:
        return 0.0, max(b1 / bb, _MIN_BETA_S_PER_BYTE)
    return alpha, beta


def _segments(
    sizes: Floats, lines: dict[tuple[int, int], tuple[float, float]], before: npt.NDArray[np.int_], pieces: int
) -> tuple[LinkSegment, ...]:
    segments: list[LinkSegment] = []
    end = len(sizes)
    for piece in range(pieces, 0, -1):
        first = int(before[piece][end])
        alpha, beta = lines[first, end]
        from_bytes = float(sizes[first]) if first else 0.0
        segments.append(LinkSegment(from_bytes=from_bytes, latency_s=alpha, bytes_per_s=1.0 / beta))
        end = first
    return tuple(reversed(segments))
