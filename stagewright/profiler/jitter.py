"""How unsteadily a device computes, from the microbatches of a profile.

Each microbatch, forward and backward, is cut at layers' boundaries into pieces of about equal length. A piece's seconds over
the median of that piece tell its jitter, once the speed of the moment is taken off: the median of the microbatches around it.
What is kept of all pieces is their ratios in equal parts of the sorted row, each by its mean, so that skew and mean stay.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from stagewright.planner.documents import Jitter

Floats = npt.NDArray[np.float64]

NUM_PIECES = 6  # of a microbatch
NUM_RATIOS = 20
LEAST_MICROBATCHES = 5
_AROUND = 2  # microbatches before and after one that tell the speed of its moment


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
    speed = np.array([np.median(totals[max(k - _AROUND, 0) : k + _AROUND + 1]) for k in range(count)])
    relative = pieces / speed[:, None]
    middle = np.median(relative, axis=0)
    ratios = np.sort((relative[:, middle > 0] / middle[middle > 0]).ravel())
    parts = np.array_split(ratios, min(NUM_RATIOS, len(ratios)))
    means = [float(part.mean()) for part in parts]
    if min(means) <= 0:
        return None
    return Jitter(piece_s=float(np.median(pieces)), ratios=tuple(means))
