"""The peak of each rank, action by action: what lives beside an action and what the action itself needs at most.

While a forward or a whole backward of stage s runs in its layer l, the rank holds what other units keep, the kept bytes of
the stage's layers up to l, and the workspace of l. So with kept bytes k and workspaces w of the stage's layers, of their
forwards or their backwards,

    need_s = max over l of  k_0 + ... + k_l + w_l

An input gradient leaves what waits for the weight gradient, v, behind the layers it has passed, and a weight gradient makes its
products, w'', from the first layer to the last beside what still waits:

    need_s = max over l of  k_0 + ... + k_(l-1) + max(k_l, v_l) + w'_l + v_(l+1) + ...
    need_s = max over l of  v_l + v_(l+1) + ... + w''_l

and the peak of a rank is the largest, over its actions, of what other units hold and the action's need. The search takes
the largest sum of live bytes and, apart from it, the largest workspace of any layer of the rank: never less, and more where
the two do not meet, as with recomputation on a rank of several stages.

Under ZeRO-2 and 3 whole gradients come and go. A layer's backward has phases: one for each kind of its gradients,
divided experts' and all else, up to where the last of that kind is complete, and one behind them. A phase begins with
b bytes beside those that the layers before keep and holds P at most; then its gradients g leave scattered, f, which
is on its way until the next of any kind leave: with h on its way from before, and b' of the next phase,

    need_B = max over l, phases of  k_0 + ... + k_(l-1) + max(k_l + w_l + h, P + h, b' + max(2 g, f))

A weight gradient that runs alone finishes those of all layers whose products wait for it, and they leave one after the
other, divided experts' last: r those that are left,

    need_W = max over l, kinds of  r + max(2 g, f)

and before any leaves it makes those of the first layer first, with the workspace q of a product, beside what an earlier
weight gradient scattered, h, if nothing but weight gradients has run on the rank since:

    need_W = max over l of  h + g_0 + ... + g_(l-1) + max(v_l + w''_l, g_l + q_l) + v_(l+1) + ...

Layers of which nothing waits, such as embeddings and norms, are done in the input gradient. So are gradients that nothing
defers, those of stacks of experts, in a layer of which others wait: where they leave by themselves they do so there, as in
need_B; where they leave with the rest of their layer they stay until a weight gradient of the stage has run, m bytes of
each layer. Those of later units are added to what stays, so that m is held once, beside all that runs on the rank meanwhile:

    need_I += m_(l+1) + ...  where none stay yet,  all of m  where they do

Where ZeRO-3 gathers weights, a layer's own p are whole and so are those of the next one in the direction of the work,
which arrive in copies c: beside layer l stand p_l + p_(l-1) + c_(l-1) in a backward, p_l + p_(l+1) + c_(l+1) in a
forward; and as it begins, with the gradient of its output, c_l too, until it is waited for.

A receive is posted before the action in front of the one that takes it, so its buffer stands beside that action, and
beside all in between where it was posted earlier; a value that another stage of the same rank takes later stands beside
what runs meanwhile. Where the forward's workspace is not told from the backward's that counts beside backwards only, which need
more, nearly always by more than a message. What is sent stands until the rank next takes a message, so beside the weight gradients
in between.

A reduction at the end of an iteration is an action too. Under ZeRO-1 a stage's gradients are reduced as soon as its last backward
is done, beside what other units of the rank keep then, and arrive in bytes that stand until its optimizer steps: beside the rank's
other actions, and the steps of its other stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from stagewright.planner.schedules.action import Kind
from stagewright.planner.schedules.schedule import KIND, MICROBATCH, REPLICA, SLICE, STAGE, Schedule

Floats = npt.NDArray[np.float64]

_COUNTED = (Kind.F, Kind.B, Kind.I, Kind.W)


@dataclass(frozen=True)
class GradientPhase:
    """A part of a layer's backward, in bytes beside what the layers before keep.

    `gradients` leave at its end, and are `scattered` on their way; `begin` is there as it begins, `peak` the most. With
    `by_input` that is at the latest in the input gradient.
    """

    begin: float
    peak: float
    gradients: float = 0.0
    scattered: float = 0.0
    by_input: bool = False


class Reduction(NamedTuple):
    """Bytes in which a stage's gradients arrive as they are reduced once: at most, and from then on until its optimizer steps.

    `stepped` are those that the step makes then.
    """

    most: float
    stays: float
    stepped: float = 0.0


class Behind(NamedTuple):
    """A reduction or a step of one stage, behind so many computations of its rank."""

    position: int
    is_step: bool
    reduction: Reduction


@dataclass(frozen=True, eq=False)
class StageBytes:
    """Bytes of each layer of one stage, [layers].

    Parameters
    ----------
    kept : from the forward until the backward; late : between input and weight gradient.
    workspace : highest temporary use; split_workspace : that of an input gradient alone, above the larger of kept and late.
    forward_workspace : that of the forward, where it is told from a backward's; late_workspace : of a weight gradient alone, above
        what is late.
    phases : of each layer's backward, where it makes gradients for a time.
    staying : gradients that an input gradient makes and a weight gradient sends away.
    beside_product : what the largest product of a weight gradient that waits takes beside itself.
    whole : weights that are gathered for the layer and for the one that runs before or after it; copied : copies in which they
        come. Where a run gathers all at once, `at_once` stand beside every layer in place of both.
    """

    kept: Floats
    late: Floats
    workspace: Floats
    split_workspace: Floats
    phases: tuple[tuple[GradientPhase, ...], ...] = ()
    whole: Floats | None = None
    copied: Floats | None = None
    at_once: float = 0.0
    staying: Floats | None = None
    beside_product: Floats | None = None
    forward_workspace: Floats | None = None
    late_workspace: Floats | None = None

    @property
    def stays(self) -> float:
        """Return the bytes of gradients that stay between an input and a weight gradient."""
        return 0.0 if self.staying is None else float(self.staying.sum())

    def need(self, kind: Kind, share: float, *, is_first: bool = True) -> float:
        """Return the most that one unit's action holds, of a unit that is `share` of a microbatch.

        Unless it `is_first`, gradients of an earlier input gradient stay, and are counted with what lives beside it.
        """
        if not len(self.kept):
            return 0.0
        kept, late = self.kept * share, self.late * share
        if kind is Kind.W:
            return max(self._multiplied(late) + self.stays, self._leaving(), self.made(share))
        before, (whole, coming, arriving) = np.cumsum(kept) - kept, self._beside(kind)
        if kind is Kind.F:
            workspace = self.workspace if self.forward_workspace is None else self.forward_workspace
            return float((before + whole + coming + np.maximum(kept + workspace, arriving)).max())
        work, passed = kept + self.workspace, np.zeros(len(kept))
        if kind is Kind.I:
            work, passed = np.maximum(kept, late) + self.split_workspace, late.sum() - np.cumsum(late)
            if is_first and self.staying is not None:
                passed = passed + self.staying.sum() - np.cumsum(self.staying)
        work = np.maximum(work, kept + arriving)
        most = on_its_way = 0.0
        for layer in reversed(range(len(kept))):
            held = float(before[layer] + whole[layer] + coming[layer] + passed[layer])
            most = max(most, held + float(work[layer]) + on_its_way)
            phases = self._leaving_phases(layer, 0.0 if kind is Kind.B else float(late[layer]))
            less = (1.0 - share) * float(self.kept[layer])
            for phase, following in zip_longest(phases, phases[1:]):
                most = max(most, held + phase.peak - less + on_its_way)
                if phase.gradients and following is not None:
                    most = max(most, held + following.begin + max(2 * phase.gradients, phase.scattered))
                    on_its_way = phase.scattered
        return most

    def _leaving_phases(self, layer: int, late: float) -> tuple[GradientPhase, ...]:
        """Return the phases of a layer's backward whose gradients leave in it, and what is behind them.

        Where `late` bytes wait for a weight gradient they are there in place of the other gradients.
        """
        phases = self.phases[layer] if self.phases else ()
        if not late:
            return phases
        leaving = tuple(phase for phase in phases if phase.by_input)
        rest = phases[len(leaving) :][:1] if leaving else ()
        return (*leaving, *(GradientPhase(each.begin, each.peak - each.gradients + late) for each in rest))

    def _multiplied(self, late: Floats) -> float:
        """Return the most that a weight gradient holds of what is late and its products, which are summed as they are made."""
        waiting = late.sum() - np.cumsum(late) + late
        return float((waiting if self.late_workspace is None else waiting + self.late_workspace).max())

    def made(self, share: float) -> float:
        """Return the most that a weight gradient holds before any gradients leave, where they do."""
        late, most, gradients = self.late * share, 0.0, 0.0
        nothing = np.zeros(len(late))
        beside = nothing if self.beside_product is None else self.beside_product
        products = late + (nothing if self.late_workspace is None else self.late_workspace)
        behind = late.sum() - np.cumsum(late)
        for layer, phases in enumerate(self.phases):
            if late[layer]:
                own = sum(phase.gradients for phase in phases if not phase.by_input)
                most = max(most, gradients + float(behind[layer] + max(products[layer], own + beside[layer])))
                gradients += own
        return most if gradients else 0.0

    @property
    def on_its_way(self) -> float:
        """Return what a weight gradient leaves on its way."""
        waiting = self._waiting()
        return waiting[-1].scattered if waiting else 0.0

    def _waiting(self) -> list[GradientPhase]:
        """Return the phases whose gradients leave in a weight gradient: from the first layer on, divided experts' last."""
        rows = [
            [phase for phase in phases if phase.gradients and not phase.by_input]
            for phases, late in zip(self.phases, self.late.tolist(), strict=False)
            if late
        ]
        return [row[-1] for row in rows if row] + [phase for row in rows for phase in row[:-1]]

    def _leaving(self) -> float:
        """Return the most that a weight gradient holds of gradients while they leave."""
        waiting = self._waiting()
        left, most = sum(phase.gradients for phase in waiting), 0.0
        for phase in waiting:
            left -= phase.gradients
            most = max(most, left + max(2 * phase.gradients, phase.scattered))
        return most

    def _beside(self, kind: Kind) -> tuple[Floats, Floats, Floats]:
        """Return gathered weights beside each layer, copies in which those of the next arrive and in which its own did, [layers] each."""
        nothing = np.zeros(len(self.kept))
        if self.whole is None or self.copied is None:
            return np.full(len(self.kept), self.at_once), nothing, nothing
        if kind is Kind.F:
            beside = self.whole + np.append(self.whole[1:], 0.0) + self.at_once
            return beside, np.append(self.copied[1:], 0.0), self.copied
        return (
            self.whole + np.append(0.0, self.whole[:-1]) + self.at_once,
            np.append(0.0, self.copied[:-1]),
            self.copied + self._gradient_of_output(),
        )

    def _gradient_of_output(self) -> Floats:
        """Return what is there as the backward of each layer begins, beside what it keeps, where that is known, [layers]."""
        if not self.phases:
            return np.zeros(len(self.kept))
        begun = np.array([phases[0].begin if phases else 0.0 for phases in self.phases])
        return np.maximum(begun - self.kept, 0.0)


def peak_activations(
    schedule: Schedule,
    stages: Sequence[StageBytes],
    beside: Sequence[Floats] | None = None,
    reducing: Sequence[Sequence[Behind]] | None = None,
) -> Floats | None:
    """Return the most bytes that the actions of each rank hold, [D]; None for actions other than F, B, I and W.

    `beside` holds what lies on its way beside each action of each rank (`message_bytes_beside`), `reducing` the reductions and
    steps of each rank (`reductions_behind`).
    """
    counted = {int(kind) for kind in _COUNTED}
    if any(not set(np.unique(order[:, KIND]).tolist()) <= counted for order in schedule.orders):
        return None
    shares = {True: 1.0, False: 1.0 / max(schedule.num_slices, 1)}  # by whether a whole microbatch is meant
    need = {
        (int(kind), stage, whole, is_first): each.need(kind, share, is_first=is_first)
        for stage, each in enumerate(stages)
        for kind in _COUNTED
        for whole, share in shares.items()
        for is_first in (True, False)
    }
    kept = [float(each.kept.sum()) for each in stages]
    late = [float(each.late.sum()) for each in stages]
    stays = [each.stays for each in stages]
    made = {(stage, whole): each.made(share) for stage, each in enumerate(stages) for whole, share in shares.items()}
    on_its_way = [each.on_its_way for each in stages]
    peaks = np.zeros(schedule.num_ranks)
    for rank, order in enumerate(schedule.orders):
        live, with_gradients = 0.0, set[int]()  # stages of which some stay
        scattered = reduced = 0.0
        behind = list(reducing[rank]) if reducing is not None else []
        waiting = np.zeros(len(order)) if beside is None else beside[rank]
        for position, ((kind, stage, slice_index), more) in enumerate(
            zip(order[:, [KIND, STAGE, SLICE]].tolist(), waiting.tolist(), strict=True)
        ):
            whole = slice_index < 0
            share = shares[whole]
            if kind in (Kind.B, Kind.I):
                live -= kept[stage] * share
            elif kind == Kind.W:
                live -= late[stage] * share
                with_gradients.discard(stage)
            staying = sum(stays[other] for other in with_gradients)
            is_first = stage not in with_gradients
            needed = need[kind, stage, whole, is_first]
            if kind == Kind.W:
                needed = max(needed, scattered + made[stage, whole])
            scattered = on_its_way[stage] if kind == Kind.W else 0.0
            more = 0.0 if kind == Kind.F and stages[stage].forward_workspace is None else more
            peaks[rank] = max(peaks[rank], live + staying + more + needed + reduced)
            if kind == Kind.F:
                live += kept[stage] * share
            elif kind == Kind.I:
                live += late[stage] * share
                with_gradients.add(stage)
            while behind and behind[0].position == position + 1:
                each = behind.pop(0)
                if each.is_step:
                    reduced -= each.reduction.stays
                    peaks[rank] = max(peaks[rank], live + reduced + each.reduction.stepped)
                else:
                    peaks[rank] = max(peaks[rank], live + reduced + each.reduction.most)
                    reduced += each.reduction.stays
    return peaks


def reductions_behind(lowered: Schedule, reductions: Sequence[Reduction]) -> list[list[Behind]]:
    """Return for each rank the reductions and steps of its stages, in their order.

    Where a rank holds a stage of several replicas its gradients are reduced, and it steps, with the last of them.
    """
    compute = {int(kind) for kind in _COUNTED}
    found = []
    for order in lowered.orders:
        last: dict[tuple[bool, int], int] = {}
        position = 0
        for kind, stage in order[:, [KIND, STAGE]].tolist():
            position += kind in compute
            if kind in (Kind.REDUCE_GRAD, Kind.OPT):
                last.pop((kind == Kind.OPT, stage), None)
                last[kind == Kind.OPT, stage] = position
        found.append([Behind(at, is_step, reductions[stage]) for (is_step, stage), at in last.items()])
    return found


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
    position, sent = 0, 0.0
    for kind, replica, stage, microbatch, slice_index in rows:
        if kind == Kind.W:
            _hold(change, position, position + 1, sent)
        elif kind in compute:
            sent = 0.0
        is_back, is_receive = kind in (Kind.B, Kind.I, Kind.RECV_B), kind in receives
        ends = at_source if is_back == is_receive else at_target
        share = 1.0 if slice_index < 0 else 1.0 / max(lowered.num_slices, 1)
        for other, size in ends.get(stage, ()) if is_receive or (kind in compute and kind != Kind.W) else ():
            is_here = place[replica][stage] == place[replica][other]
            if is_receive != is_here:  # a receive from another rank, or what is handed over on this one
                first = max(position - 1, 0) if is_receive else position + 1
                taker = (is_back, replica, stage if is_receive else other, microbatch, slice_index)
                _hold(change, first, taken.get(taker, 0), size * share)
            elif not is_receive:
                sent += size * share
        position += kind in compute
    return np.cumsum(change)[:-1]


def _hold(change: Floats, first: int, end: int, size: float) -> None:
    """Add bytes to the computations from `first` to `end` - 1."""
    if end > first:
        change[first] += size
        change[end] -= size
