"""An order compiled for search: its makespan, its critical paths and its memory as linear forms.

A static order (family, ranks D, microbatches T, chunks v) fixes its action graph, so for stage costs F, I, W [S], hop
seconds H [2 S - 2 or S - 1], and rank tails the makespan is a longest path

    M(x) = max over paths pi of  cF(pi) . F + cI(pi) . I + cW(pi) . W + cH(pi) . H + tail[rank where pi ends]

with integer counts that depend on the order alone. `sweep` gives the value, `trace` one longest path as a *cut*: a
lower bound for every cost vector, tight at the one it was traced at. Cuts are therefore made once an order and hold for
every partition, recomputation, degree and model that shares it.

Hops are told apart by stage boundary (and by replica where an order runs two), because boundaries differ in bytes and
in the link they cross. `Order.hop` is 0 where a dependency stays on its rank, else 1 + replica * (S - 1) + boundary.

Live activations of a rank follow from the order of its own actions, never from times. For each chunk two numbers count:
microbatches whose input gradient has not run, and microbatches that wait for their weight gradient only. `live[rank]`
holds the vectors that no other vector of the rank dominates; the rank's peak is the largest of vector . bytes.

Complexity: O(actions) to compile, to sweep and to trace. Slices, DAGs of stages and R or FILL actions are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from stagewright.planner.errors import InvalidSchedule
from stagewright.planner.schedules.action import Kind
from stagewright.planner.schedules.schedule import KIND, REPLICA, SLICE, STAGE, Schedule, chain_edges
from stagewright.planner.search.copying import copy_into
from stagewright.planner.search.rank_slots import RankSlots
from stagewright.planner.simulation.kernel import CompiledOrder, compile_order

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]

_NEAR = 6  # rows on either side that a mixture is looked for among

_F, _B, _I, _W = int(Kind.F), int(Kind.B), int(Kind.I), int(Kind.W)


class OrderKey(NamedTuple):
    """What an order depends on: costs never enter."""

    family: str
    num_ranks: int
    num_microbatches: int
    num_chunks: int


class Slot(NamedTuple):
    """A virtual stage of one replica that a rank holds."""

    replica: int
    stage: int


@dataclass(frozen=True, eq=False)
class Cut:
    """One path of an order: counts over [F, I, W] of the stages and over hops, and the rank whose tail it ends with."""

    counts: Ints
    hops: Ints
    end_rank: int

    def value(self, costs: Floats, hop_s: Floats, tail_s: Floats) -> float:
        """Return the path's length at `costs` [3, S], `hop_s` [num_hops] and `tail_s` [D]: at most the makespan."""
        return float((self.counts * costs).sum() + self.hops @ hop_s + tail_s[self.end_rank])


@dataclass(frozen=True, eq=False)
class Layout:
    """What a schedule's costs and memory depend on beside its times: who holds what, and how much lives at once.

    Parameters
    ----------
    placement : rank of each stage, one row a replica.
    edges : the stage graph, (from, to) by stage; a chain for most schedules.
    slots : for each rank, what it holds, by replica and stage.
    live : for each rank, float64 [vectors, 2, slots]: microbatches before their input gradient, and between it and W.
    split : input and weight gradients are apart somewhere.
    split_share : share of the backwards whose gradients are apart; every weight gradient of the schedule takes this share
        of the excess of a split backward, so that all of them together take what they do.
    defers : they are apart everywhere.
    """

    placement: Ints
    edges: tuple[tuple[int, int], ...]
    slots: tuple[tuple[Slot, ...], ...]
    live: tuple[Floats, ...]
    split: bool
    split_share: float
    defers: bool

    @property
    def num_stages(self) -> int:
        return int(self.placement.shape[1])

    @property
    def num_replicas(self) -> int:
        return int(self.placement.shape[0])

    @property
    def num_ranks(self) -> int:
        return len(self.slots)

    @property
    def num_hops(self) -> int:
        return self.num_replicas * len(self.edges)

    @cached_property
    def is_chain(self) -> bool:
        """Every stage feeds the next one and no other."""
        return self.edges == chain_edges(self.num_stages)

    @cached_property
    def rank_slots(self) -> RankSlots:
        """What the ranks hold, padded to rectangles."""
        return RankSlots.of([[slot.stage for slot in slots] for slots in self.slots], self.live)

    @cached_property
    def hop_pairs(self) -> Ints:
        """Ranks (from, to) of each hop in the forward direction, int32 [num_hops, 2]."""
        pairs = [(row[source], row[target]) for row in self.placement for source, target in self.edges]
        return np.array(pairs, dtype=np.int32).reshape(-1, 2)


def slots_of(placement: Ints, num_ranks: int) -> tuple[tuple[Slot, ...], ...]:
    """Return the stages that each rank holds, replica by replica."""
    held: list[list[Slot]] = [[] for _ in range(num_ranks)]
    for replica, row in enumerate(placement.tolist()):
        for stage, rank in enumerate(row):
            held[rank].append(Slot(replica, stage))
    return tuple(tuple(slots) for slots in held)


def outline_of(placement: Ints, num_ranks: int, *, split: bool) -> Layout:
    """Return what holds of every order on a placement of a chain of stages.

    When a replica's first microbatch is through its last forward, every stage of the replica holds it.
    """
    slots = slots_of(placement, num_ranks)
    live = tuple(
        np.array(
            [
                [[float(slot.replica == replica) for slot in held], [0.0] * len(held)]
                for replica in range(len(placement))
            ]
        )
        for held in slots
    )
    return Layout(placement, chain_edges(placement.shape[1]), slots, live, split, float(split), split)


def layout_of(schedule: Schedule) -> Layout:
    """Return the layout of a schedule; a slice counts as its share of a microbatch."""
    placement = np.ascontiguousarray(schedule.placement, dtype=np.int32)
    stages = schedule.num_stages
    slots = slots_of(placement, schedule.num_ranks)
    rows = [np.ascontiguousarray(order) for order in schedule.orders]
    live = tuple(
        live_vectors(rows[rank], slots[rank], stages, schedule.num_slices) / schedule.num_slices
        for rank in range(schedule.num_ranks)
    )
    split = any(bool((order[:, KIND] == _W).any()) for order in rows)
    apart, whole = (sum(int((order[:, KIND] == kind).sum()) for order in rows) for kind in (_W, _B))
    share = apart / (apart + whole) if split else 0.0
    return Layout(placement, schedule.edges, slots, live, split, share, split and not whole)


@dataclass(frozen=True, eq=False)
class Order(Layout):
    """An action graph in topological order; node 0 stands for "no predecessor".

    Parameters
    ----------
    before, across : node before this one on its rank, and node on another rank that it waits for; 0 for none.
    hop : index + 1 of the hop that `across` pays, 0 for none.
    code : kind * S + stage with kinds F, B, I, W, or 4 S for nodes without duration.
    last : last node of each rank.
    """

    key: OrderKey
    before: Ints
    across: Ints
    hop: Ints
    code: Ints
    last: Ints
    num_actions: int

    def durations(self, costs: Floats) -> Floats:
        """Return seconds by code for stage costs [3, S] or [batch, 3, S]: F, B, I, W and a zero."""
        forward, input_grad, weight_grad = costs[..., 0, :], costs[..., 1, :], costs[..., 2, :]
        zero = np.zeros((*costs.shape[:-2], 1))
        parts = (forward, input_grad + weight_grad, input_grad, weight_grad, zero)
        return np.ascontiguousarray(np.concatenate(parts, axis=-1))

    def makespan(self, costs: Floats, hop_s: Floats, tail_s: Floats) -> float:
        """Return the seconds until every rank has run its order and its tail."""
        end = np.empty(len(self.before))
        return float(
            sweep(
                self.before, self.across, self.hop, self.code, self.last, self.durations(costs), pad(hop_s), tail_s, end
            )
        )

    def makespans(self, costs: Floats, hop_s: Floats, tail_s: Floats) -> Floats:
        """Return the makespan of each row of costs [n, 3, S], hops [n, num_hops] and tails [n, D]."""
        hops = np.concatenate((np.zeros((len(hop_s), 1)), hop_s), axis=1)
        values: Floats = sweeps(
            self.before, self.across, self.hop, self.code, self.last, self.durations(costs), hops, tail_s
        )
        return values

    def trace(self, costs: Floats, hop_s: Floats, tail_s: Floats) -> tuple[float, Cut]:
        """Return the makespan and one longest path; ties go to the lower rank and to the same rank's predecessor."""
        counts = np.zeros(3 * self.num_stages + self.num_hops + 1, dtype=np.int32)
        end = np.empty(len(self.before))
        value, end_rank = trace(
            self.before,
            self.across,
            self.hop,
            self.code,
            self.last,
            self.durations(costs),
            pad(hop_s),
            tail_s,
            end,
            self.num_stages,
            counts,
        )
        stages = 3 * self.num_stages
        return float(value), Cut(counts[:stages].reshape(3, -1), counts[stages + 1 :], int(end_rank))


def pad(hop_s: Floats) -> Floats:
    """Return the hop seconds behind a zero, the entry of dependencies that stay on their rank."""
    return np.concatenate((np.zeros(1), hop_s))


def compile_search_order(schedule: Schedule, key: OrderKey, layout: Layout | None = None) -> Order:
    """Return the order of a schedule; raises InvalidSchedule for slices, stage graphs that are no chain, and deadlocks.

    `layout` is the schedule's, where it is known.
    """
    if schedule.num_slices > 1 or schedule.edges != chain_edges(schedule.num_stages):
        raise InvalidSchedule(
            f"{schedule.name} has {schedule.num_slices} slices and {len(schedule.edges)} edges; the search takes whole "
            "microbatches on a chain of stages",
            field="schedule",
        )
    graph = compile_order(schedule)
    stages = schedule.num_stages
    kind, stage = graph.kind_stage()
    layout = layout_of(schedule) if layout is None else layout
    if ((graph.hop == 1) & (kind < 0)).any():
        raise InvalidSchedule(
            f"{schedule.name} fuses actions that wait for messages; the search takes separate actions", field="schedule"
        )
    code = np.where(kind >= 0, kind * stages + stage, 4 * stages).astype(np.int32)
    return Order(
        placement=layout.placement,
        edges=layout.edges,
        slots=layout.slots,
        live=layout.live,
        split=layout.split,
        split_share=layout.split_share,
        defers=layout.defers,
        key=key,
        before=graph.before,
        across=graph.across,
        hop=_hop_codes(graph, layout.placement),
        code=code,
        last=graph.last,
        num_actions=graph.num_actions,
    )


def _hop_codes(graph: CompiledOrder, placement: Ints) -> Ints:
    """Return 1 + replica * (S - 1) + boundary for nodes that wait for a message, 0 for the others."""
    kind, stage = graph.kind_stage()
    num_stages = placement.shape[1]
    waits = graph.hop == 1
    boundary = np.where(kind == _F, stage - 1, stage)
    source = np.clip(np.where(kind == _F, stage - 1, stage + 1), 0, num_stages - 1)
    code = np.zeros(len(kind), dtype=np.int32)
    for replica in range(len(placement) - 1, -1, -1):
        row = placement[replica]
        from_here = (row[stage] == graph.rank) & (row[source] == graph.rank[graph.across])
        code[waits & from_here] = 1 + replica * (num_stages - 1) + boundary[waits & from_here]
    return code


def live_vectors(order: Ints, slots: tuple[Slot, ...], num_stages: int, num_slices: int) -> Ints:
    """Return the non-dominated vectors of live slices of one rank, int32 [vectors, 2, slots]."""
    position = np.full(2 * num_stages if not slots else (1 + max(s.replica for s in slots)) * num_stages, -1, np.int32)
    for index, slot in enumerate(slots):
        position[slot.replica * num_stages + slot.stage] = index
    vectors, splits = _peaks(order, position, num_stages, num_slices, len(slots))
    vectors = vectors[non_dominated(vectors)]
    if splits:
        # Where an input gradient only gives bytes back, (a, a + b) decides; what that leaves stays as it is.
        both = vectors.copy()
        both[:, len(slots) :] += both[:, : len(slots)]
        vectors = vectors[_not_between(vectors, non_dominated(both))]
    return np.ascontiguousarray(vectors.reshape(-1, 2, len(slots)))


@njit(cache=True)
def _peaks(order: Ints, position: Ints, num_stages: int, num_slices: int, num_slots: int) -> tuple[Ints, bool]:
    """Return the live vectors where live bytes can peak, and whether there are I: at each F or I that no F follows.

    What waits for a weight gradient may be more than what the forward kept (recomputation keeps little), so an input
    gradient may add bytes; a forward always does. `position` is the slot of each replica's stages.
    """
    live = np.zeros(2 * num_slots, dtype=np.int32)
    found = np.empty((len(order), 2 * num_slots), dtype=np.int32)
    row, splits, is_peak = 0, False, False
    for index in range(len(order)):
        kind = order[index, KIND]
        if kind > _W:
            continue
        if is_peak and kind != _F:
            copy_into(found[row], live)
            row += 1
        cell = position[order[index, REPLICA] * num_stages + order[index, STAGE]]
        amount = num_slices if order[index, SLICE] < 0 else 1
        if kind == _F:
            live[cell] += amount
        elif kind in (_B, _I):
            live[cell] -= amount
        if kind == _I:
            live[num_slots + cell] += amount
            splits = True
        elif kind == _W:
            live[num_slots + cell] -= amount
        is_peak = kind in (_F, _I)
    if is_peak:
        copy_into(found[row], live)
        row += 1
    return found[:row].copy(), splits


def non_dominated(vectors: Ints) -> npt.NDArray[np.bool_]:
    """Return which rows no other row is at least everywhere; of equal rows the first stays."""
    # By falling sums: what comes later covers nothing before it. What covers often comes first.
    stays: npt.NDArray[np.bool_] = _non_dominated(vectors, np.argsort(-vectors.sum(axis=1), kind="stable"))
    return stays


@njit(cache=True)
def _non_dominated(vectors: Ints, by_sum: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    count, width = vectors.shape
    keep = np.zeros(count, dtype=np.bool_)
    kept = np.empty(count, dtype=np.int64)
    num_kept = 0
    for index in by_sum:
        dominated = False
        for place in range(num_kept):
            if _covers(vectors[kept[place]], vectors[index], width):
                dominated = True
                kept[place], kept[place // 2] = kept[place // 2], kept[place]
                break
        if not dominated:
            keep[index] = True
            kept[num_kept] = index
            num_kept += 1
    return keep


@njit(cache=True)
def _not_between(vectors: Ints, stays: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Return which rows to keep: those that stay, and those that no mixture of two kept rows near them covers.

    Bytes are linear in the vector, so the fuller one of the two holds at least what the mixture holds. While a queue of
    weight gradients fills or drains, vectors lie on a line, and its ends remain.
    """
    count, width = vectors.shape
    keep = np.ones(count, dtype=np.bool_)
    for index in range(count):
        if stays[index]:
            continue
        earlier = index - 1
        for _ in range(_NEAR):
            while earlier >= 0 and not keep[earlier]:
                earlier -= 1
            later = index + 1
            if earlier >= 0:
                while later < count and later <= index + _NEAR and keep[index]:
                    keep[index] = not _mixture_covers(vectors[earlier], vectors[later], vectors[index], width)
                    later += 1
            earlier -= 1
    return keep


@njit(cache=True, no_cpython_wrapper=True, inline="always")
def _mixture_covers(first: Ints, second: Ints, less: Ints, width: int) -> bool:
    """Tell whether x first + (1 - x) second is at least `less` everywhere for some x in [0, 1]."""
    low, high = 0.0, 1.0
    for cell in range(width):
        slope, need = first[cell] - second[cell], less[cell] - second[cell]
        if slope > 0:
            low = max(low, need / slope)
        elif slope < 0:
            high = min(high, need / slope)
        elif need > 0:
            return False
    return low <= high


@njit(cache=True, no_cpython_wrapper=True, inline="always")
def _covers(more: Ints, less: Ints, width: int) -> bool:
    for cell in range(width):  # noqa: SIM110 (compiled)
        if more[cell] < less[cell]:
            return False
    return True


@njit(cache=True)
def sweep(
    before: Ints,
    across: Ints,
    hop: Ints,
    code: Ints,
    last: Ints,
    duration: Floats,
    hop_s: Floats,
    tail_s: Floats,
    end: Floats,
) -> float:
    """Fill `end` with end times and return the makespan; `hop_s` starts with the zero of `pad`."""
    end[0] = 0.0
    for node in range(1, len(before)):
        # Without a sign, an index is not looked at for counting from the end: a third of the time.
        arrival = end[np.uint32(across[node])] + hop_s[np.uint32(hop[node])]
        ready = end[np.uint32(before[node])]
        end[node] = (arrival if arrival > ready else ready) + duration[np.uint32(code[node])]
    value = 0.0
    for rank in range(len(last)):
        if last[rank] > 0:
            value = max(value, end[last[rank]] + tail_s[rank])
    return value


@njit(cache=True)
def sweeps(
    before: Ints, across: Ints, hop: Ints, code: Ints, last: Ints, duration: Floats, hop_s: Floats, tail_s: Floats
) -> Floats:
    """Return the makespan of each row of durations, hops and tails."""
    values = np.empty(len(duration))
    end = np.empty(len(before))
    for index in range(len(duration)):
        values[index] = sweep(before, across, hop, code, last, duration[index], hop_s[index], tail_s[index], end)
    return values


@njit(cache=True)
def trace(
    before: Ints,
    across: Ints,
    hop: Ints,
    code: Ints,
    last: Ints,
    duration: Floats,
    hop_s: Floats,
    tail_s: Floats,
    end: Floats,
    num_stages: int,
    counts: Ints,
) -> tuple[float, int]:
    """Add one longest path to `counts` [F, I, W, pad, hops]; return the makespan and the rank where the path ends."""
    value = sweep(before, across, hop, code, last, duration, hop_s, tail_s, end)
    return value, trace_back(before, across, hop, code, last, hop_s, tail_s, end, num_stages, counts)


@njit(cache=True, no_cpython_wrapper=True)
def trace_back(
    before: Ints,
    across: Ints,
    hop: Ints,
    code: Ints,
    last: Ints,
    hop_s: Floats,
    tail_s: Floats,
    end: Floats,
    num_stages: int,
    counts: Ints,
) -> int:
    """Add a longest path of swept end times to `counts` [F, I, W, pad, hops]; return the rank where it ends."""
    end_rank, value = 0, -np.inf
    for rank in range(len(last)):
        if last[rank] > 0 and end[last[rank]] + tail_s[rank] > value:
            end_rank, value = rank, end[last[rank]] + tail_s[rank]
    node = last[end_rank]
    while node > 0:
        what = code[node]
        if what < num_stages:
            counts[what] += 1
        elif what < 2 * num_stages:
            counts[what] += 1
            counts[what + num_stages] += 1
        elif what < 4 * num_stages:
            counts[what - num_stages] += 1
        if end[across[node]] + hop_s[hop[node]] > end[before[node]]:
            counts[3 * num_stages + hop[node]] += 1
            node = across[node]
        else:
            node = before[node]
    return end_rank
