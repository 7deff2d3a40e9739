"""A proved lower bound on the makespan of any order on a placement, under its caps.

It holds for every schedule, since some optimal one runs the microbatches of each letter in order (see `word`); with several copies of
the model, for every schedule that deals the microbatches evenly to them. Four families:

**Relaxed graph.** Arcs y(k - lag) -> x(k) that every such schedule obeys. Chain arcs and first-in-first-out arcs; memory
arcs of each chain, with a_s the activation of stage s, share_s what I frees of it, P_s the sum of a over stages up to s of the rank, A the cap:

    F(s, k) after I(s, k - q)      q = floor(A / P_s)                        else q + 1 microbatches hold P_s each
    F(s, k) after F(last, k - q)   q = floor((A - P_last + P_s) / P_s)       else, once the oldest enters its last chunk ...
    F(s, k) after W(s, k - q)      q = floor((A - a_s) / ((1 - share_s) a_s)) + 1

The arcs do not depend on k, so precedence is a matrix of least lags, D[y, x] = min over paths (Floyd-Warshall on letters):
y(k - D) and all before it precede x(k).

**Sets.** On its rank x starts, for every t, at or after t + the work of all predecessors y with head(y) >= t. Memory adds anonymous
work: if the forwards at or before x hold b more than the cap, W's worth b precede x; those beyond the known ones cost at
least the shortest W each (and I likewise), less those that could run before t. Tails are heads of the mirrored graph, with F and W exchanged.

**One machine.** min head + work + min tail over the sets {head >= h, tail >= q} of a rank (Carlier and Pinson, 1989).

**Area.** Each activation lives at least along its own chain; live memory is at most A, and ramps up and down one action at a time.

O(rounds * sum over ranks (actions of a rank)^2 + letters^3). Not tight under small caps with several chunks.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from stagewright.planner.schedules.auto.decoder import stages_by_rank
from stagewright.planner.schedules.auto.instance import Floats, Instance, Ints, make_instance
from stagewright.planner.schedules.costs import StageCosts

ROUNDS = 3  # of arcs and sets in turn
MOST_SET_WORK = 4e8  # steps of the set bound; larger instances run fewer rounds

_NEVER = 1 << 28


class Graph(NamedTuple):
    """Letters, arcs and memory demands of one direction of time; the mirrored graph bounds tails.

    `source`, `target`, `lag`, `weight_s` are the arcs; weights run from the start of the source to the start of the target.
    A demand says: what known actions allocate beyond the cap, actions of the releasing kind must have freed.
    """

    num_microbatches: int
    rank: Ints
    duration_s: Floats
    order: Ints  # letters, every lag-0 arc forwards
    source: Ints
    target: Ints
    lag: Ints
    weight_s: Floats
    precedes: Ints  # least lag [from, to]
    cap: Floats
    allocated: Floats  # [2, num_letters], by demand
    released: Floats  # [2, num_letters]; 0 for kinds that do not release


def any_order_bound(
    costs: StageCosts,
    placement: npt.NDArray[np.int32],
    *,
    num_ranks: int,
    num_microbatches: int,
    latency_s: float = 0.0,
    memory_cap: float | Floats | None = None,
) -> float:
    """Return seconds below which no order on this placement ends; Infeasible when one microbatch exceeds the cap.

    A placement [copies, stages] stands for orders that deal the microbatches evenly to the copies.
    """
    return lower_bound(
        make_instance(
            costs,
            placement,
            num_ranks=num_ranks,
            num_microbatches=num_microbatches,
            latency_s=latency_s,
            memory_cap=memory_cap,
        )
    )


def lower_bound(instance: Instance, *, rounds: int = ROUNDS) -> float:
    """Return the proved lower bound of the instance, seconds; without `rounds` of the set bound it takes a fraction of the time."""
    head_s, tail_s = heads_and_tails(instance, rounds=rounds)
    chain_s = float((head_s + tail_s + instance.tables.duration_s[:, None]).max())
    machines_s = max(_machine_bound(instance, head_s, tail_s, rank) for rank in range(instance.num_ranks))
    return round_up(instance, max(chain_s, machines_s, _area_bound(instance, head_s, tail_s)))


def round_up(instance: Instance, bound_s: float) -> float:
    """Return the least possible makespan at or above a bound, when all makespans are multiples of one tick."""
    measure_s = instance.measure_s
    return bound_s if measure_s is None else measure_s * float(np.ceil(bound_s / measure_s - 1e-6))


def heads_and_tails(instance: Instance, *, rounds: int = ROUNDS) -> tuple[Floats, Floats]:
    """Return, [num_letters, num_microbatches], the earliest start and the least time from end to the schedule's end."""
    forward = precedence_graph(instance)
    mirror = mirrored(instance, forward)
    stages = stages_by_rank(instance)
    longest = int(instance.tables.lengths.max())
    set_work = float((instance.tables.lengths.astype(np.float64) ** 2).sum())
    rounds = int(min(rounds, MOST_SET_WORK // (2 * set_work)))
    tail_s = _heads(mirror, stages, rounds, longest)[:, ::-1]
    return _heads(forward, stages, rounds, longest), np.ascontiguousarray(tail_s)


def precedence_graph(instance: Instance) -> Graph:
    """Return the relaxed graph of the instance."""
    tables, letters = instance.tables, instance.num_letters
    arcs = [(int(before), letter, 0) for letter, before in enumerate(tables.predecessor) if before >= 0]
    arcs += [(letter, letter, 1) for letter in range(letters)]
    arcs += [arc for rank in range(instance.num_ranks) for arc in _memory_arcs(instance, rank)]
    source, target, lag = (np.array(column, dtype=np.int32) for column in zip(*arcs, strict=True))
    weight_s = tables.duration_s[source] + np.where(tables.predecessor[target] == source, tables.delay_s[target], 0.0)
    stages = np.arange(instance.num_stages, dtype=np.int32)
    activation, share = instance.costs.activation, instance.costs.freed_at_input_grad
    kept = activation * (1.0 - share)
    allocated, released = np.zeros((2, letters)), np.zeros((2, letters))
    allocated[0, 0::3], released[0, 2::3] = kept, kept
    allocated[1, 0::3], released[1, 1::3] = activation, activation
    return Graph(
        instance.num_microbatches, tables.rank, tables.duration_s,
        np.concatenate((3 * stages, 3 * stages[::-1] + 1, 3 * stages + 2)).astype(np.int32),
        source, target, lag, weight_s, _least_lags(letters, source, target, lag), tables.cap, allocated, released,
    )  # fmt: skip


def mirrored(instance: Instance, graph: Graph) -> Graph:
    """Return the graph with time reversed: microbatch k becomes T - 1 - k, W allocates and F releases."""
    activation, share = instance.costs.activation, instance.costs.freed_at_input_grad
    allocated, released = np.zeros_like(graph.allocated), np.zeros_like(graph.released)
    allocated[:, 2::3] = activation * (1.0 - share)
    allocated[:, 1::3] = activation * share
    released[0, 0::3] = activation
    released[1, 1::3] = activation
    duration_s = graph.duration_s
    return graph._replace(
        order=graph.order[::-1].copy(),
        source=graph.target,
        target=graph.source,
        weight_s=graph.weight_s - duration_s[graph.source] + duration_s[graph.target],
        precedes=np.ascontiguousarray(graph.precedes.T),
        allocated=allocated,
        released=released,
    )


def _memory_arcs(instance: Instance, rank: int) -> list[tuple[int, int, int]]:
    cap = float(instance.tables.cap[rank])
    if not np.isfinite(cap):
        return []
    in_chain = instance.num_stages // instance.num_chains
    arcs: list[tuple[int, int, int]] = []
    for first in range(0, instance.num_stages, in_chain):
        own = first + np.flatnonzero(instance.placement[first : first + in_chain] == rank)
        arcs += _memory_arcs_of_chain(instance, own, cap)
    return arcs


def _memory_arcs_of_chain(instance: Instance, own: npt.NDArray[np.int64], cap: float) -> list[tuple[int, int, int]]:
    """Return the arcs between the chain's stages `own` of one rank, as if no other chain took memory."""
    activation = instance.costs.activation
    total = float(activation[own].sum())
    arcs: list[tuple[int, int, int]] = []
    held = 0.0
    for stage in own.tolist():
        held += float(activation[stage])
        kept = float(activation[stage] * (1.0 - instance.costs.freed_at_input_grad[stage]))
        if held <= 0.0:
            continue
        lags = [(3 * stage + 1, cap // held), (3 * int(own[-1]), (cap - total + held) // held)]
        if kept > 0.0:
            lags.append((3 * stage + 2, (cap - float(activation[stage])) // kept + 1))
        arcs += [(letter, 3 * stage, int(lag)) for letter, lag in lags if 1 <= lag < instance.num_microbatches]
    return arcs


@njit(cache=True)
def _least_lags(num_letters: int, source: Ints, target: Ints, lag: Ints) -> Ints:
    least = np.full((num_letters, num_letters), _NEVER, dtype=np.int32)
    for arc in range(len(source)):
        least[source[arc], target[arc]] = min(least[source[arc], target[arc]], lag[arc])
    for via in range(num_letters):
        for start in range(num_letters):
            first = least[start, via]
            if first < _NEVER:
                for end in range(num_letters):
                    if first + least[via, end] < least[start, end]:
                        least[start, end] = first + least[via, end]
    return least


@njit(cache=True)
def _heads(graph: Graph, stages: Ints, rounds: int, longest: int) -> Floats:
    """Return the earliest starts [num_letters, num_microbatches] after `rounds` of the set bound."""
    head_s = np.zeros((len(graph.rank), graph.num_microbatches))
    by_target = np.argsort(graph.target, kind="mergesort")
    first_arc = np.searchsorted(graph.target[by_target], np.arange(len(graph.rank) + 1))
    _relax(graph, by_target, first_arc, head_s)
    for _ in range(rounds):
        before = head_s.sum()
        for rank in range(len(graph.cap)):
            _raise_by_sets(graph, stages[rank], rank, longest, head_s)
        _relax(graph, by_target, first_arc, head_s)
        if head_s.sum() <= before:
            break
    return head_s


@njit(cache=True, no_cpython_wrapper=True)
def _relax(graph: Graph, by_target: npt.NDArray[np.int64], first_arc: npt.NDArray[np.int64], head_s: Floats) -> None:
    for microbatch in range(graph.num_microbatches):
        for letter in graph.order:
            for arc in by_target[first_arc[letter] : first_arc[letter + 1]]:
                before = microbatch - graph.lag[arc]
                if before >= 0:
                    start_s = head_s[graph.source[arc], before] + graph.weight_s[arc]
                    head_s[letter, microbatch] = max(head_s[letter, microbatch], start_s)


@njit(cache=True, no_cpython_wrapper=True)
def _raise_by_sets(graph: Graph, stages: Ints, rank: int, longest: int, head_s: Floats) -> None:
    """Raise the heads of one rank by the set bound."""
    microbatches = graph.num_microbatches
    letter_of = np.empty(longest, dtype=np.int32)
    microbatch_of = np.empty(longest, dtype=np.int32)
    keys = np.empty(longest)
    least_s = np.full(2, np.inf)
    largest = np.zeros(2)
    total_releases = np.zeros(2, dtype=np.int64)
    count = 0
    for stage in stages:
        if stage < 0:
            continue
        for letter in range(3 * stage, 3 * stage + 3):
            for demand in range(2):
                if graph.released[demand, letter] > 0.0:
                    least_s[demand] = min(least_s[demand], graph.duration_s[letter])
                    largest[demand] = max(largest[demand], graph.released[demand, letter])
                    total_releases[demand] += microbatches
            for microbatch in range(microbatches):
                letter_of[count], microbatch_of[count] = letter, microbatch
                keys[count] = -head_s[letter, microbatch]
                count += 1
    by_head = np.argsort(keys[:count])
    missing = np.zeros(2, dtype=np.int64)
    unseen = np.zeros(2, dtype=np.int64)
    for index in range(count):
        letter, microbatch = letter_of[index], microbatch_of[index]
        for demand in range(2):
            over = -graph.cap[rank]
            freed = 0.0
            known = 0
            for stage in stages:
                if stage < 0:
                    continue
                for other in range(3 * stage, 3 * stage + 3):
                    ahead = max(0, microbatch - graph.precedes[other, letter] + 1)
                    over += graph.allocated[demand, other] * (ahead + (1 if other == letter else 0))
                    if graph.released[demand, other] > 0.0:
                        freed += graph.released[demand, other] * ahead
                        known += ahead
            missing[demand] = 0
            if largest[demand] > 0.0 and over - freed > 0.0:
                missing[demand] = np.int64(np.ceil((over - freed) / largest[demand] - 1e-6))
            unseen[demand] = total_releases[demand] - known
        work_s = 0.0
        best_s = head_s[letter, microbatch]
        for at in by_head:
            other, turn = letter_of[at], microbatch_of[at]
            if turn <= microbatch - graph.precedes[other, letter]:
                work_s += graph.duration_s[other]
            else:
                for demand in range(2):
                    if graph.released[demand, other] > 0.0:
                        unseen[demand] -= 1
            total_s = work_s
            for demand in range(2):
                # Releases with a head below the threshold could be over by then.
                if missing[demand] > unseen[demand]:
                    total_s += (missing[demand] - unseen[demand]) * least_s[demand]
            if total_s > 0.0:
                best_s = max(best_s, total_s - keys[at])
        head_s[letter, microbatch] = best_s


@njit(cache=True)
def _one_machine(head_s: Floats, duration_s: Floats, tail_s: Floats) -> float:
    """Return max over h, q of h + work of {head >= h, tail >= q} + q."""
    by_head = np.argsort(-head_s)
    best_s = 0.0
    for least_tail_s in np.unique(tail_s):
        work_s = 0.0
        for at in by_head:
            if tail_s[at] >= least_tail_s:
                work_s += duration_s[at]
                best_s = max(best_s, head_s[at] + work_s + least_tail_s)
    return best_s


def _machine_bound(instance: Instance, head_s: Floats, tail_s: Floats, rank: int) -> float:
    own = instance.tables.rank == rank
    duration_s = np.repeat(instance.tables.duration_s[own], instance.num_microbatches)
    return float(_one_machine(head_s[own].ravel(), duration_s, tail_s[own].ravel()))


def _area_bound(instance: Instance, head_s: Floats, tail_s: Floats) -> float:
    """Return the largest bound over ranks from live memory over time."""
    tables, costs = instance.tables, instance.costs
    chain = tables.duration_s[0::3] + tables.duration_s[1::3] + tables.delay_s[0::3] + tables.delay_s[1::3]
    # From the start of F_s to the end of I_s: the chain from s on, without the hop into F_s.
    chain = chain.reshape(instance.num_chains, -1)
    through_s = np.cumsum(chain[:, ::-1], axis=1)[:, ::-1].ravel() - tables.delay_s[0::3]
    kept = 1.0 - costs.freed_at_input_grad
    area = costs.activation * (through_s + kept * tables.duration_s[2::3])
    best_s = 0.0
    for rank in range(instance.num_ranks):
        own = np.flatnonzero(instance.placement == rank)
        largest = float(costs.activation[own].max())
        cap = float(tables.cap[rank])
        if not np.isfinite(cap) or largest <= 0.0:
            continue
        if np.ptp(costs.activation[own]) == 0.0 and not costs.freed_at_input_grad[own].any():
            cap = (cap // largest) * largest
        first_s, last_s = float(head_s[3 * own].min()), float(tail_s[3 * own + 2].min())
        total = instance.num_microbatches * float(area[own].sum())
        ups_s = float(tables.duration_s[3 * own].min())
        downs_s = 0.0 if costs.freed_at_input_grad[own].any() else float(tables.duration_s[3 * own + 2].min())
        best_s = max(best_s, first_s + _shortest_hold(total, cap, largest, (ups_s, downs_s)) + last_s)
    return best_s


def _shortest_hold(area: float, cap: float, largest: float, ramps_s: tuple[float, float]) -> float:
    """Return the least time in which a memory of `cap` can hold `area`, when it fills and empties in steps of `largest`.

    Each ramp costs sum over j of (cap - j * largest) * step, as long as there is time for both ramps in full.
    """
    lost = float(np.maximum(0.0, cap - largest * np.arange(1, int(cap / largest) + 2)).sum())
    shortest_s = area / cap
    for step_s in (sum(ramps_s), max(ramps_s)):
        candidate_s = (area + lost * step_s) / cap
        if candidate_s >= (cap / largest + 1.0) * step_s:
            shortest_s = max(shortest_s, candidate_s)
    return shortest_s
