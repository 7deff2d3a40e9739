"""The peak of each rank, action by action: what lives beside an action and what the action itself needs at most.

While a forward or a whole backward of stage s runs in its layer l, the rank holds what other units keep, the kept bytes of
the stage's layers up to l, and the workspace of l. So with kept bytes k and workspaces w of the stage's layers

    need_s = max over l of  k_0 + ... + k_l + w_l

An input gradient leaves what waits for the weight gradient, v, behind the layers it has passed:

    need_s = max over l of  k_0 + ... + k_(l-1) + max(k_l, v_l) + w'_l + v_(l+1) + ...

and the peak of a rank is the largest, over its actions, of what other units hold and the action's need. The search takes
the largest sum of live bytes and, apart from it, the largest workspace of any layer of the rank: never less, and more where
the two do not meet, as with recomputation on a rank of several stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stagewright.planner.schedules.action import Kind
from stagewright.planner.schedules.schedule import KIND, SLICE, STAGE, Schedule

Floats = npt.NDArray[np.float64]

_COUNTED = (Kind.F, Kind.B, Kind.I, Kind.W)


@dataclass(frozen=True, eq=False)
class StageBytes:
    """Bytes of each layer of one stage, [layers].

    Parameters
    ----------
    kept : from the forward until the backward; late : between input and weight gradient.
    workspace : highest temporary use; split_workspace : that of an input gradient alone, above the larger of kept and late.
    """

    kept: Floats
    late: Floats
    workspace: Floats
    split_workspace: Floats

    def need(self, kind: Kind, share: float) -> float:
        """Return the most that one unit's action holds, of a unit that is `share` of a microbatch."""
        if not len(self.kept):
            return 0.0
        kept, late = self.kept * share, self.late * share
        if kind is Kind.W:
            return float(late.sum())
        if kind is Kind.I:
            before = np.cumsum(kept) - kept
            behind = late.sum() - np.cumsum(late)
            return float((before + np.maximum(kept, late) + self.split_workspace + behind).max())
        return float((np.cumsum(kept) + self.workspace).max())


def peak_activations(schedule: Schedule, stages: Sequence[StageBytes]) -> Floats | None:
    """Return the most bytes that the actions of each rank hold, [D]; None for actions other than F, B, I and W."""
    counted = {int(kind) for kind in _COUNTED}
    if any(not set(np.unique(order[:, KIND]).tolist()) <= counted for order in schedule.orders):
        return None
    shares = {True: 1.0, False: 1.0 / max(schedule.num_slices, 1)}  # by whether a whole microbatch is meant
    need = {
        (int(kind), stage, whole): each.need(kind, share)
        for stage, each in enumerate(stages)
        for kind in _COUNTED
        for whole, share in shares.items()
    }
    kept = [float(each.kept.sum()) for each in stages]
    late = [float(each.late.sum()) for each in stages]
    peaks = np.zeros(schedule.num_ranks)
    for rank, order in enumerate(schedule.orders):
        live = 0.0
        for kind, stage, slice_index in order[:, [KIND, STAGE, SLICE]].tolist():
            whole = slice_index < 0
            share = shares[whole]
            if kind in (Kind.B, Kind.I):
                live -= kept[stage] * share
            elif kind == Kind.W:
                live -= late[stage] * share
            peaks[rank] = max(peaks[rank], live + need[kind, stage, whole])
            if kind == Kind.F:
                live += kept[stage] * share
            elif kind == Kind.I:
                live += late[stage] * share
    return peaks
