"""The peak of each rank, action by action: what lives beside an action and what the action itself needs at most.

While a forward or a whole backward of stage s runs in its layer l, the rank holds what other units keep, the kept bytes of
the stage's layers up to l, and the workspace of l. So with kept bytes k and workspaces w of the stage's layers

    need_s = max over l of  k_0 + ... + k_l + w_l

An input gradient leaves what waits for the weight gradient, v, behind the layers it has passed:

    need_s = max over l of  k_0 + ... + k_(l-1) + max(k_l, v_l) + w'_l + v_(l+1) + ...

and the peak of a rank is the largest, over its actions, of what other units hold and the action's need. The search takes
the largest sum of live bytes and, apart from it, the largest workspace of any layer of the rank: never less, and more where
the two do not meet, as with recomputation on a rank of several stages.

Where whole gradients come and go under ZeRO-2 and 3, those of a layer g come as its kept bytes go, and what the layer
behind it has scattered, f, is on its way meanwhile:

    need_B = max over l of  k_0 + ... + k_(l-1) + max(max(k_l, g_l) + w_l + f_(l+1), 2 g_l, f_l)

Where ZeRO-3 gathers weights, a layer's own p are whole and so are those of the next one in the direction of the work, which
come in copies c: beside layer l stand p_l + p_(l-1) + c_(l-1) in a backward, p_l + p_(l+1) + c_(l+1) in a forward; and as it
begins, c of its first layer too.

A receive is posted before the action in front of the one that takes it, so its buffer stands beside that action, and
beside all in between where it was posted earlier; a value that another stage of the same rank takes later stands beside
what runs meanwhile. That counts beside backwards: w is the larger of a layer's forward and backward, nearly always the
latter by more than a message.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stagewright.planner.schedules.action import Kind
from stagewright.planner.schedules.schedule import KIND, MICROBATCH, REPLICA, SLICE, STAGE, Schedule

Floats = npt.NDArray[np.float64]

_COUNTED = (Kind.F, Kind.B, Kind.I, Kind.W)


@dataclass(frozen=True, eq=False)
class StageBytes:
    """Bytes of each layer of one stage, [layers].

    Parameters
    ----------
    kept : from the forward until the backward; late : between input and weight gradient.
    workspace : highest temporary use; split_workspace : that of an input gradient alone, above the larger of kept and late.
    gradients : whole ones that a backward makes for a time.
    scattered : gradients on their way while the layer before runs back.
    whole : weights that are gathered for the layer and for the one that runs before or after it; copied : copies in which they
        come. Where a run gathers all at once, `at_once` stand beside every layer in place of both.
    """

    kept: Floats
    late: Floats
    workspace: Floats
    split_workspace: Floats
    gradients: Floats | None = None
    scattered: Floats | None = None
    whole: Floats | None = None
    copied: Floats | None = None
    at_once: float = 0.0

    def need(self, kind: Kind, share: float) -> float:
        """Return the most that one unit's action holds, of a unit that is `share` of a microbatch."""
        if not len(self.kept):
            return 0.0
        kept, late = self.kept * share, self.late * share
        gradients, scattered = (
            np.zeros(len(kept)) if each is None else each for each in (self.gradients, self.scattered)
        )
        before, weights, arriving = np.cumsum(kept) - kept, self._beside(kind), self._arriving(kind)
        if kind is Kind.W:
            return float(max(late.sum(), gradients.sum()) + scattered.max())
        if kind is Kind.B:
            making = np.maximum(kept, gradients) + self.workspace + np.append(scattered[1:], 0.0)
            leaving = np.maximum(2 * gradients, scattered)
            need = before + np.maximum(making, leaving) + weights
            return float(max(need.max(), kept.sum() + arriving))
        if kind is Kind.I:
            behind = late.sum() - np.cumsum(late)
            need = before + np.maximum(kept, late) + self.split_workspace + behind + weights
            return float(max(need.max(), kept.sum() + arriving))
        return float(max((np.cumsum(kept) + self.workspace + weights).max(), arriving))

    def _beside(self, kind: Kind) -> Floats:
        """Return the gathered weights that stand beside each layer, [layers]."""
        if self.whole is None or self.copied is None:
            return np.full(len(self.kept), self.at_once)
        coming = self.whole + self.copied
        return np.asarray(self.whole + (np.append(coming[1:], 0.0) if kind is Kind.F else np.append(0.0, coming[:-1])))

    def _arriving(self, kind: Kind) -> float:
        """Return the gathered weights as a forward or a backward begins, before its first layer computes."""
        if self.whole is None or self.copied is None:
            return 0.0
        coming = self.whole + self.copied
        return float((coming[:2] if kind is Kind.F else coming[-2:]).sum())


def peak_activations(
    schedule: Schedule, stages: Sequence[StageBytes], beside: Sequence[Floats] | None = None
) -> Floats | None:
    """Return the most bytes that the actions of each rank hold, [D]; None for actions other than F, B, I and W.

    `beside` holds what lies on its way beside each action of each rank (`message_bytes_beside`).
    """
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
        waiting = np.zeros(len(order)) if beside is None else np.where(order[:, KIND] == Kind.F, 0.0, beside[rank])
        for (kind, stage, slice_index), more in zip(
            order[:, [KIND, STAGE, SLICE]].tolist(), waiting.tolist(), strict=True
        ):
            whole = slice_index < 0
            share = shares[whole]
            if kind in (Kind.B, Kind.I):
                live -= kept[stage] * share
            elif kind == Kind.W:
                live -= late[stage] * share
            peaks[rank] = max(peaks[rank], live + more + need[kind, stage, whole])
            if kind == Kind.F:
                live += kept[stage] * share
            elif kind == Kind.I:
                live += late[stage] * share
    return peaks


def message_bytes_beside(lowered: Schedule, message_bytes: Floats) -> list[Floats]:
    """Return for each rank the bytes of messages that lie there for later actions while each computation runs, [actions].

    `message_bytes` are those of a microbatch over each edge of the stage graph, [num_edges].
    """
    sizes = np.broadcast_to(np.asarray(message_bytes, dtype=np.float64), (len(lowered.edges),)).tolist()
    edges = list(zip(lowered.edges, sizes, strict=True))
    return [_beside(lowered, rank, edges) for rank in range(lowered.num_ranks)]


def _beside(lowered: Schedule, rank: int, edges: Sequence[tuple[tuple[int, int], float]]) -> Floats:
    columns = [KIND, REPLICA, STAGE, MICROBATCH, SLICE]
    place, rows = lowered.placement.tolist(), lowered.orders[rank][:, columns].tolist()
    compute, receives = {int(kind) for kind in _COUNTED}, (Kind.RECV_F, Kind.RECV_B)
    at_source: dict[int, list[tuple[int, float]]] = {}  # by stage: the other ends of its edges, and what they carry
    at_target: dict[int, list[tuple[int, float]]] = {}
    for (source, target), size in edges:
        at_source.setdefault(source, []).append((target, size))
        at_target.setdefault(target, []).append((source, size))
    taken: dict[tuple[bool, int, int, int, int], int] = {}  # by direction and unit: which computation takes it
    position = 0
    for kind, *unit in rows:
        if kind in compute:
            if kind != Kind.W:
                taken[kind != Kind.F, *unit] = position
            position += 1
    change = np.zeros(position + 1)
    position = 0
    for kind, replica, stage, microbatch, slice_index in rows:
        is_back, is_receive = kind in (Kind.B, Kind.I, Kind.RECV_B), kind in receives
        ends = at_source if is_back == is_receive else at_target
        share = 1.0 if slice_index < 0 else 1.0 / max(lowered.num_slices, 1)
        for other, size in ends.get(stage, ()) if is_receive or (kind in compute and kind != Kind.W) else ():
            is_here = place[replica][stage] == place[replica][other]
            if is_receive != is_here:  # a receive from another rank, or what is handed over on this one
                first = max(position - 1, 0) if is_receive else position + 1
                taker = (is_back, replica, stage if is_receive else other, microbatch, slice_index)
                _hold(change, first, taken.get(taker, 0), size * share)
        position += kind in compute
    return np.cumsum(change)[:-1]


def _hold(change: Floats, first: int, end: int, size: float) -> None:
    """Add bytes to the computations from `first` to `end` - 1."""
    if end > first:
        change[first] += size
        change[end] -= size
