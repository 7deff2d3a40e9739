"""How unsteadily a device computes, from the microbatches of a profile.

Each microbatch, forward and backward, is cut at layers' boundaries into pieces of about equal length. With x_t the seconds of the
t-th piece in the order of time over the median of that piece, its jitter is what it differs from its neighbours,

    r_t = x_t / median(x_(t-2), ..., x_(t+2))

so that the speed of the moment is no jitter, be it that of the minute or of a few pieces: of what changes slowly nothing is left, of
pieces that vary by themselves all but 6 % of their deviation, and a rare long piece as it is. Like von Neumann's ratio (the mean
square of successive differences over twice the variance) it tells the one from the other. What is kept of all pieces is their
ratios in equal parts of the sorted row, each by its mean, so that skew and mean stay.

Paper: von Neumann, Distribution of the Ratio of the Mean Square Successive Difference to the Variance, Annals of Mathematical
Statistics 1941.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from stagewright.planner.documents import Jitter

Floats = npt.NDArray[np.float64]

NUM_PIECES = 6  # of a microbatch
NUM_RATIOS = 20
LEAST_MICROBATCHES = 5
_AROUND = 2  # pieces before and after one that tell the speed of its moment


def jitter_of(forward_s: Floats, backward_s: Floats) -> Jitter | None:
    """Return the jitter of microbatches in the order in which they ran, seconds [microbatches, layers]; None of too few."""
    rows = np.concatenate((forward_s, backward_s[:, ::-1]), axis=1)
    totals = rows.sum(axis=1)
    count = len(rows)
    if count < LEAST_MICROBATCHES or (totals <= 0).any():
        return None
    done = np.cumsum(np.median(rows, axis=0))
    cuts = np.searchsorted(done, done[-1] * np.arange(1, NUM_PIECES) / NUM_PIECES) + 1
    begins = np.concatenate(([0], np.unique(cuts[cuts < rows.shape[1]])))
    pieces = np.add.reduceat(rows, begins, axis=1)
    middle = np.median(pieces, axis=0)
    in_time = (pieces[:, middle > 0] / middle[middle > 0]).ravel()
    around = sliding_window_view(np.pad(in_time, _AROUND, mode="reflect"), 2 * _AROUND + 1)
    differing = in_time / np.median(around, axis=1)
    ratios = np.sort(differing / np.median(differing))
    parts = np.array_split(ratios, min(NUM_RATIOS, len(ratios)))
    means = [float(part.mean()) for part in parts]
    if min(means) <= 0:
        return None
    return Jitter(piece_s=float(np.median(pieces)), ratios=tuple(means))
