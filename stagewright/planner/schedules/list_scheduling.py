"""List scheduling of pipelines: chains of virtual stages on ranks, orders as words, a decoder that cannot deadlock.

**Chains.** Replica q runs stages 0..S-1 one after the other; (q, s) is *position* p = q S + s. A position has `units`
forwards and `fan` backwards for each forward (1 except for Chimera's doubled forwards). With split backwards a unit
takes F, I and W; otherwise W is part of I.

**Words.** With equal microbatches some optimal order runs the units of every (kind, position) in order, because
relabelling the k-th start as unit k keeps every dependency. So a rank's order is a word over *letters*
kind * P + p, and the unit of a letter is the number of times it came before.

**The decoder.** A letter's k-th occurrence has the target time target[kind, p] + k * period. Again and again every rank
looks at its candidates, the letters whose predecessors are scheduled; among those that can start within
tolerance[kind, p] of its earliest candidate it takes the smallest target; the rank whose choice starts first commits.
All list heuristics are points of this space: -inf for I is "backward first", +inf for W is "W fills gaps".

Admission of a forward under the memory cap A_r is the banker's rule: after it, going through the rank's units in
flight from oldest to youngest, what the unit still needs there is at most the free room plus what older units hold.
The empty state satisfies it when A_r holds one unit; only forwards consume and they are checked; and the globally
oldest unfinished unit is always admissible, so the decoder never deadlocks, whatever the targets.

Complexity: O(N (D + v)) for N actions, about 5 million actions a second. Optimality is not guaranteed.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from stagewright.planner.schedules.action import Kind
from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.schedules.family import ScheduleRequest
from stagewright.planner.schedules.schedule import KIND, MICROBATCH, REPLICA, SLICE, STAGE, Orders
from stagewright.planner.schedules.sizes import Sizes, costs_of

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Letters = npt.NDArray[np.int32]
Flags = npt.NDArray[np.bool_]

FORWARD, BACKWARD, WEIGHT = 0, 1, 2  # kinds of letters; BACKWARD is I when split and B otherwise
EPSILON = 1e-9  # relative to one microbatch on one rank, see `chains_of`


class Chains(NamedTuple):
    """The work of a schedule; arrays over positions, [P] unless told.

    Parameters
    ----------
    rank : rank of each position.
    is_entry, is_exit : first and last position of its replica.
    seconds : [3, P], F, I (all of B when not split) and W of one forward or backward unit.
    units : forward units of each position.
    fan : backward units of one forward unit.
    held : activation of one forward unit, freed at the end of its last W, or of its last backward when not split.
    latency_s : one hop between two ranks.
    is_split : W are letters of their own.
    member, first_member : positions sorted by rank, those of rank r at first_member[r]..first_member[r + 1].
    slack_s : two times closer than this are equal.
    """

    rank: Ints
    is_entry: Flags
    is_exit: Flags
    seconds: Floats
    units: Ints
    fan: int
    held: Floats
    latency_s: float
    is_split: bool
    member: Ints
    first_member: Ints
    slack_s: float


class Words(NamedTuple):
    """The orders of all ranks, one after the other: letters [N], and where each rank's begin, [D + 1]."""

    letters: Letters
    offset: Ints


class Rule(NamedTuple):
    """What the decoder prefers, see the module.

    Parameters
    ----------
    target_s, tolerance_s : [3, P].
    period_s : seconds between targets of successive units.
    cap : [D], most held activation.
    ahead : [P], most forward units that have not had their last backward.
    """

    target_s: Floats
    tolerance_s: Floats
    period_s: float
    cap: Floats
    ahead: Ints


class Measure(NamedTuple):
    """Seconds from 0 to the last end, longest rank span, and mean end of all actions; infinite for a deadlock."""

    makespan_s: float
    longest_span_s: float
    mean_end_s: float


def chains_of(
    placement: npt.NDArray[np.int32],
    costs: StageCosts,
    num_microbatches: int,
    *,
    latency_s: float = 0.0,
    is_split: bool = True,
    held: Floats | None = None,
) -> Chains:
    """Return the chains of a placement [replicas, stages]; microbatch m belongs to replica m mod replicas.

    `held` [stages] replaces the costs' activations, where a family counts chunks instead.
    """
    replicas, stages = placement.shape
    rank = placement.ravel().astype(np.int64)
    num_ranks = int(rank.max()) + 1
    stage = np.tile(np.arange(stages), replicas)
    replica = np.repeat(np.arange(replicas), stages)
    backward_s = costs.input_grad_s if is_split else costs.input_grad_s + costs.weight_grad_s
    weight_s = costs.weight_grad_s if is_split else np.zeros(stages)
    counts = np.bincount(rank, minlength=num_ranks)
    work_s = float((costs.forward_s + backward_s + weight_s).sum())
    return Chains(
        rank,
        stage == 0,
        stage == stages - 1,
        np.stack([costs.forward_s, backward_s, weight_s])[:, stage],
        ((num_microbatches - replica + replicas - 1) // replicas).astype(np.int64),
        1,
        (costs.activation if held is None else held)[stage].astype(np.float64),
        float(latency_s),
        is_split,
        np.argsort(rank, kind="stable").astype(np.int64),
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        EPSILON * work_s,
    )


def requested_chains(
    request: ScheduleRequest,
    sizes: Sizes,
    placement: npt.NDArray[np.int32],
    *,
    is_split: bool = True,
    counts_chunks: bool = True,
) -> Chains:
    """Return the chains of a request on a placement, with every activation counted 1 or held as the costs say."""
    return chains_of(
        placement,
        costs_of(request, sizes),
        sizes.num_microbatches,
        latency_s=request.latency_s,
        is_split=is_split,
        held=np.ones(sizes.num_stages) if counts_chunks else None,
    )


def loose_rule(chains: Chains) -> Rule:
    """Return a rule without targets, tolerances or limits, to be narrowed with `_replace`."""
    num_ranks, positions = len(chains.first_member) - 1, len(chains.rank)
    zeros = np.zeros((3, positions))
    return Rule(zeros, zeros, 0.0, np.full(num_ranks, np.inf), np.full(positions, np.iinfo(np.int64).max))


def decode(chains: Chains, rule: Rule) -> Words:
    """Return the words that the rule makes; cut to nothing where the limits admit no letter before the end."""
    # Tables lie in memory as those of the chains do, or the function below would be compiled for each way they may lie.
    target_s, tolerance_s = np.asfortranarray(rule.target_s), np.asfortranarray(rule.tolerance_s)
    words: Words = _decode(chains, rule._replace(target_s=target_s, tolerance_s=tolerance_s))
    return words


@njit(cache=True)
def _decode(chains: Chains, rule: Rule) -> Words:
    # Fields are local: a call that takes a tuple of arrays counts references for each of them.
    rank_of, is_entry, is_exit, seconds = chains.rank, chains.is_entry, chains.is_exit, chains.seconds
    fan, latency_s, held, units, slack_s = chains.fan, chains.latency_s, chains.held, chains.units, chains.slack_s
    member, first_member, is_split = chains.member, chains.first_member, chains.is_split
    target_s, tolerance_s, period_s = rule.target_s, rule.tolerance_s, rule.period_s
    cap, ahead = rule.cap, rule.ahead
    positions, num_ranks = len(rank_of), len(first_member) - 1
    last = WEIGHT if is_split else BACKWARD
    offset = word_offsets(chains)
    letters = np.empty(offset[num_ranks], dtype=np.int32)
    at = offset[:-1].copy()
    forward_end_s, backward_end_s = end_tables(chains)
    done = np.zeros((3, positions), dtype=np.int64)
    free_s, live = np.zeros(num_ranks), np.zeros(num_ranks)
    choice, choice_start_s = np.full(num_ranks, -1), np.full(num_ranks, np.inf)
    earliest_s = np.empty((3, positions))
    # The rank that starts next is the root of a tree of minima, where ties go to the left; only what changed goes up.
    width = 1
    while width < num_ranks:
        width *= 2
    first = np.full(2 * width, -1, dtype=np.int64)
    stale, num_stale = np.arange(num_ranks), num_ranks
    is_stale = np.ones(num_ranks, dtype=np.bool_)
    for _ in range(offset[num_ranks]):
        for place in range(num_stale):
            other = stale[place]
            is_stale[other] = False
            soonest_s = np.inf
            for index in range(first_member[other], first_member[other + 1]):
                position = member[index]
                unit = done[FORWARD, position]
                earliest_s[FORWARD, position] = np.inf
                if unit < units[position] and (is_entry[position] or done[FORWARD, position - 1] > unit):
                    arrival_s = free_s[other]
                    if not is_entry[position]:
                        hop_s = latency_s if rank_of[position - 1] != other else 0.0
                        arrival_s = max(arrival_s, forward_end_s[position - 1, unit] + hop_s)
                    if (
                        unit - done[BACKWARD, position] // fan < ahead[position]
                        and live[other] + held[position] <= cap[other] + EPSILON
                        and _keeps_bankers_rule(
                            position, cap[other] - live[other], first_member[other], first_member[other + 1],
                            member, done, done[last], fan, held, units,
                        )
                    ):  # fmt: skip
                        earliest_s[FORWARD, position] = arrival_s
                        soonest_s = min(soonest_s, arrival_s)
                unit = done[BACKWARD, position]
                earliest_s[BACKWARD, position] = np.inf
                if unit < done[FORWARD, position] * fan and (is_exit[position] or done[BACKWARD, position + 1] > unit):
                    arrival_s = max(free_s[other], forward_end_s[position, unit // fan])
                    if not is_exit[position]:
                        hop_s = latency_s if rank_of[position + 1] != other else 0.0
                        arrival_s = max(arrival_s, backward_end_s[position + 1, unit] + hop_s)
                    earliest_s[BACKWARD, position] = arrival_s
                    soonest_s = min(soonest_s, arrival_s)
                earliest_s[WEIGHT, position] = np.inf
                if is_split and done[WEIGHT, position] < unit:
                    earliest_s[WEIGHT, position] = free_s[other]
                    soonest_s = free_s[other]
            choice[other], choice_start_s[other], best_s = -1, np.inf, np.inf
            if soonest_s < np.inf:
                for index in range(first_member[other], first_member[other + 1]):
                    position = member[index]
                    for kind in range(3):
                        begin_s = earliest_s[kind, position]
                        if begin_s < np.inf and begin_s <= soonest_s + tolerance_s[kind, position] + slack_s:
                            wish_s = target_s[kind, position] + done[kind, position] * period_s
                            is_first = choice[other] < 0 or wish_s < best_s
                            if is_first or (wish_s == best_s and begin_s < choice_start_s[other]):
                                choice[other], best_s = kind * positions + position, wish_s
                                choice_start_s[other] = begin_s
            node = width + other
            first[node] = other if choice[other] >= 0 else -1
            while node > 1:
                node //= 2
                left, right = first[2 * node], first[2 * node + 1]
                takes_right = left < 0 or (right >= 0 and choice_start_s[right] < choice_start_s[left] - slack_s)
                first[node] = right if takes_right else left
        num_stale = 0
        rank = first[1]
        if rank < 0:
            return Words(letters[:0].copy(), np.zeros(num_ranks + 1, dtype=np.int64))
        letter = choice[rank]
        kind = letter // positions
        position = letter - kind * positions
        unit = done[kind, position]
        letters[at[rank]] = letter
        at[rank] += 1
        end_s = choice_start_s[rank] + seconds[kind, position]
        free_s[rank] = end_s
        num_stale = _mark(rank, stale, num_stale, is_stale)
        done[kind, position] = unit + 1
        if kind == FORWARD:
            forward_end_s[position, unit] = end_s
            live[rank] += held[position]
            if not is_exit[position]:
                num_stale = _mark(rank_of[position + 1], stale, num_stale, is_stale)
        elif kind == BACKWARD:
            backward_end_s[position, unit] = end_s
            if not is_entry[position]:
                num_stale = _mark(rank_of[position - 1], stale, num_stale, is_stale)
        if kind == last:
            live[rank] -= held[position] / fan
    return Words(letters, offset)


@njit(cache=True, no_cpython_wrapper=True, inline="always")
def _mark(rank: int, stale: Ints, num_stale: int, is_stale: npt.NDArray[np.bool_]) -> int:
    """Add a rank to those to look at again, once; return how many there are."""
    if is_stale[rank]:
        return num_stale
    is_stale[rank] = True
    stale[num_stale] = rank
    return num_stale + 1


@njit(cache=True, no_cpython_wrapper=True)
def _keeps_bankers_rule(
    position: int, room: float, low: int, high: int, member: Ints, done: Ints, freed: Ints, fan: int, held: Floats,
    units: Ints,
) -> bool:  # fmt: skip
    """Return whether, after a forward at `position`, every unit in flight on the rank can still be forwarded to its end."""
    if high - low == 1 or room == np.inf:
        return True
    oldest, youngest = np.iinfo(np.int64).max, 0
    for index in range(low, high):
        other = member[index]
        oldest = min(oldest, freed[other] // fan)
        youngest = max(youngest, done[FORWARD, other] + (1 if other == position else 0))
    room -= held[position]
    most = 0.0
    for index in range(low, high):
        most += held[member[index]]
    if most <= room + EPSILON:
        return True  # no unit needs more
    for unit in range(oldest, youngest):
        need, hold = 0.0, 0.0
        for index in range(low, high):
            other = member[index]
            if done[FORWARD, other] + (1 if other == position else 0) <= unit:
                need += held[other] if unit < units[other] else 0.0
            elif freed[other] // fan <= unit:
                hold += held[other]
        if need > room + EPSILON:
            return False
        room += hold
    return True


@njit(cache=True)
def measure(chains: Chains, words: Words) -> Measure:
    """Return the times of the words when every action starts as soon as it can."""
    forward_end_s, backward_end_s = end_tables(chains)
    done = np.zeros((3, len(chains.rank)), dtype=np.int64)
    count = len(words.letters)
    start_s, ready_s = np.empty(count), np.empty(count)
    measured: Measure = sweep(
        chains, words.letters, words.offset, done, forward_end_s, backward_end_s, start_s, ready_s
    )
    return measured


@njit(cache=True, no_cpython_wrapper=True)
def sweep(
    chains: Chains, letters: Letters, offset: Ints, done: Ints, forward_end_s: Floats, backward_end_s: Floats,
    start_s: Floats, ready_s: Floats,
) -> Measure:  # fmt: skip
    """Time the letters into `start_s`, with the arrival of their inputs in `ready_s`; the rest is scratch space."""
    # The fields are local and the arrivals written out: a call that takes a tuple of arrays counts references for each.
    rank_of, is_entry, is_exit, seconds = chains.rank, chains.is_entry, chains.is_exit, chains.seconds
    fan, latency_s = chains.fan, chains.latency_s
    positions, num_ranks = len(rank_of), len(offset) - 1
    done[:] = 0
    at, free_s = offset[:-1].copy(), np.zeros(num_ranks)
    waiting, is_waiting = np.arange(num_ranks - 1, -1, -1), np.ones(num_ranks, dtype=np.bool_)
    num_waiting, num_done, total_s = num_ranks, 0, 0.0
    while num_waiting > 0:
        num_waiting -= 1
        rank = waiting[num_waiting]
        is_waiting[rank] = False
        index, time_s = at[rank], free_s[rank]
        while index < offset[rank + 1]:
            letter = letters[index]
            kind = letter // positions
            position = letter - kind * positions
            unit = done[kind, position]
            arrival_s, wakes = 0.0, -1
            if kind == FORWARD:
                if not is_entry[position]:
                    if done[FORWARD, position - 1] <= unit:
                        break
                    arrival_s = forward_end_s[position - 1, unit]
                    if rank_of[position - 1] != rank:
                        arrival_s += latency_s
                if not is_exit[position]:
                    wakes = rank_of[position + 1]
            elif kind == BACKWARD:
                forward_unit = unit if fan == 1 else unit // fan
                if done[FORWARD, position] <= forward_unit:
                    break
                arrival_s = forward_end_s[position, forward_unit]
                if not is_exit[position]:
                    if done[BACKWARD, position + 1] <= unit:
                        break
                    gradient_s = backward_end_s[position + 1, unit]
                    if rank_of[position + 1] != rank:
                        gradient_s += latency_s
                    arrival_s = max(arrival_s, gradient_s)
                if not is_entry[position]:
                    wakes = rank_of[position - 1]
            else:
                if done[BACKWARD, position] <= unit:
                    break
                arrival_s = backward_end_s[position, unit]
            ready_s[index] = arrival_s
            start_s[index] = max(arrival_s, time_s)
            time_s = start_s[index] + seconds[kind, position]
            if kind == FORWARD:
                forward_end_s[position, unit] = time_s
            elif kind == BACKWARD:
                backward_end_s[position, unit] = time_s
            total_s += time_s
            done[kind, position] = unit + 1
            index += 1
            num_done += 1
            if wakes >= 0 and wakes != rank and not is_waiting[wakes]:
                waiting[num_waiting] = wakes
                num_waiting += 1
                is_waiting[wakes] = True
        at[rank], free_s[rank] = index, time_s
    if num_done < len(letters):
        return Measure(np.inf, np.inf, np.inf)
    span_s = 0.0
    for rank in range(num_ranks):
        if offset[rank + 1] > offset[rank]:
            span_s = max(span_s, free_s[rank] - start_s[offset[rank]])
    return Measure(free_s.max(), span_s, total_s / max(num_done, 1))


@njit(cache=True, no_cpython_wrapper=True)
def end_tables(chains: Chains) -> tuple[Floats, Floats]:
    most, positions = chains.units.max(), len(chains.rank)
    return np.zeros((positions, most)), np.zeros((positions, most * chains.fan))


@njit(cache=True, no_cpython_wrapper=True)
def word_offsets(chains: Chains) -> Ints:
    kinds = 3 if chains.is_split else 2
    offset = np.zeros(len(chains.first_member), dtype=np.int64)
    for position in range(len(chains.rank)):
        offset[chains.rank[position] + 1] += chains.units[position] * (1 + (kinds - 1) * chains.fan)
    return np.cumsum(offset)


def peak_held(chains: Chains, words: Words) -> Floats:
    """Return the most that each rank holds, in the unit of `held`, [D]."""
    kind, position = np.divmod(words.letters, len(chains.rank))
    freed = WEIGHT if chains.is_split else BACKWARD
    sign = np.where(kind == FORWARD, 1.0, np.where(kind == freed, -1.0 / chains.fan, 0.0))
    change = sign * chains.held[position]
    return np.array([np.cumsum(change[low:high]).max(initial=0.0) for low, high in itertools.pairwise(words.offset)])


def ideal_s(chains: Chains) -> tuple[float, float]:
    """Return lower bounds of makespan and longest span: a rank's work, and for the makespan what comes before it."""
    num_ranks = len(chains.first_member) - 1
    per_unit_s = chains.seconds[FORWARD] + chains.fan * (chains.seconds[BACKWARD] + chains.seconds[WEIGHT])
    work_s = np.bincount(chains.rank, weights=per_unit_s * chains.units, minlength=num_ranks)
    head_s = np.full(num_ranks, np.inf)
    so_far_s = 0.0
    for position, rank in enumerate(chains.rank):
        if chains.is_entry[position]:
            so_far_s = 0.0
        elif rank != chains.rank[position - 1]:
            so_far_s += chains.latency_s
        head_s[rank] = min(head_s[rank], so_far_s)
        so_far_s += chains.seconds[FORWARD, position]
    return float((head_s + work_s)[work_s > 0].max()), float(work_s.max())


def orders_of(chains: Chains, words: Words, num_replicas: int) -> tuple[Orders, ...]:
    """Return the order arrays of the words; unit k of replica q is microbatch k * replicas + q."""
    rows = _rows(words.letters, words.offset, len(chains.rank), num_replicas, chains.is_split)
    return tuple(np.split(rows, words.offset[1:-1]))


_LETTER_KIND = np.array([int(Kind.F), int(Kind.B), int(Kind.W)], dtype=np.int32)
_SPLIT_BACKWARD = int(Kind.I)


@njit(cache=True)
def _rows(letters: Letters, offset: Ints, positions: int, num_replicas: int, is_split: bool) -> Orders:
    rows = np.zeros((len(letters), 6), dtype=np.int32)
    stages = positions // num_replicas
    done = np.zeros(3 * positions, dtype=np.int64)
    for index in range(len(letters)):
        letter = letters[index]
        kind, position = letter // positions, letter % positions
        replica = position // stages
        rows[index, KIND] = _SPLIT_BACKWARD if kind == BACKWARD and is_split else _LETTER_KIND[kind]
        rows[index, REPLICA] = replica
        rows[index, STAGE] = position % stages
        rows[index, MICROBATCH] = done[letter] * num_replicas + replica
        rows[index, SLICE] = -1
        done[letter] += 1
    return rows
