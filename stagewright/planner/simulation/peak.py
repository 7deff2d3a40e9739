"""The peak of each rank, action by action: what lives beside an action and what the action itself needs at most.

While a forward or a whole backward of stage s runs in its layer l, the rank holds what other units keep, the kept bytes of
the stage's layers up to l, and the workspace of l. So with kept bytes k and workspaces w of the stage's layers

    need_s = max over l of  k_0 + ... + k_l + w_l

An input gradient leaves what waits for the weight gradient, v, behind the layers it has passed:

    need_s = max over l of  k_0 + ... + k_(l-1) + max(k_l, v_l) + w'_l + v_(l+1) + ...

and the peak of a rank is the largest, over its actions, of what other units hold and the action's need. The search takes
the largest sum of live bytes and, apart from it, the largest workspace of any layer of the rank: never less, and more where
the two do not meet, as with recomputation on a rank of several stages.

Under ZeRO-2 and 3 whole gradients come and go. A layer has some of each kind, in the order in which a backward finishes them:
divided experts, then all else. Those of a kind, g, come as kept bytes go, and leave scattered, f, which is on its way until the
next of any kind leave: with h on its way from before,

    need_B = max over l, kinds of  k_0 + ... + k_(l-1) + max(k_l + w_l + h, g + w_l + h, 2 g, f)

A weight gradient that runs alone finishes those of all layers, and they leave one after the other: r those that are left,

    need_W = max over l, kinds of  r + max(2 g, f)

Where ZeRO-3 gathers weights, a layer's own p are whole and so are those of the next one in the direction of the work, which
arrive in copies c as the layer begins: beside layer l stand p_l + p_(l-1), and c_(l-1) with k_l, in a backward, p_l + p_(l+1) +
c_(l+1) in a forward; and as either begins, c of its first layer too.

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
    gradients : whole ones that a backward makes for a time, by kind, [kinds, layers].
    scattered : what these are on their way, [kinds, layers].
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
        whole, coming = self._beside(kind)
        if kind is Kind.W:
            return max(float(late.sum()), self._leaving())
        if kind is Kind.F:
            return max(float((np.cumsum(kept) + self.workspace + whole + coming).max()), self._arriving(kind))
        before, begun = np.cumsum(kept) - kept, float(kept.sum()) + self._arriving(kind)
        if kind is Kind.I:
            behind = late.sum() - np.cumsum(late)
            need = before + np.maximum(kept + coming, late) + self.split_workspace + behind + whole
            return max(float(need.max()), begun)
        on_its_way = 0.0
        for layer in reversed(range(len(kept))):
            held, workspace = float(before[layer] + whole[layer]), float(self.workspace[layer])
            begun = max(begun, held + float(kept[layer] + coming[layer]) + workspace + on_its_way)
            for gradients, scattered in self._passing(layer):
                begun = max(begun, held + max(gradients + workspace + on_its_way, 2 * gradients, scattered))
                # The most is in front of the first kind: experts are the larger part.
                workspace, on_its_way = 0.0, scattered
        return begun

    def _passing(self, layer: int) -> list[tuple[float, float]]:
        """Return whole and scattered gradients of a layer by kind, of those kinds that it has."""
        if self.gradients is None or self.scattered is None:
            return []
        pairs = zip(self.gradients[:, layer].tolist(), self.scattered[:, layer].tolist(), strict=True)
        return [pair for pair in pairs if pair[0] > 0]

    def _leaving(self) -> float:
        """Return the most that a weight gradient holds of gradients, which leave from the first layer on."""
        if self.gradients is None:
            return 0.0
        left, most = float(self.gradients.sum()), 0.0
        for layer in range(len(self.kept)):
            for gradients, scattered in self._passing(layer):
                left -= gradients
                most = max(most, left + max(2 * gradients, scattered))
        return most

    def _beside(self, kind: Kind) -> tuple[Floats, Floats]:
        """Return the gathered weights beside each layer, and the copies in which those of the next one arrive, [layers] each."""
        if self.whole is None or self.copied is None:
            return np.full(len(self.kept), self.at_once), np.zeros(len(self.kept))
        if kind is Kind.F:
            return self.whole + np.append(self.whole[1:], 0.0), np.append(self.copied[1:], 0.0)
        return self.whole + np.append(0.0, self.whole[:-1]), np.append(0.0, self.copied[:-1])

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
