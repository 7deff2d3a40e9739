"""Simulated annealing on words: the strongest part of the search.

A move takes an action, mostly a critical one, and inserts it some places earlier or later on its rank, or swaps two.
Letters keep their microbatches in order, F before I before W of a stage, and the prefix memory within the cap; a move
that meets such a wall stops in front of it. It is accepted when the makespan is at most the old one plus T * Exp(1);
equal makespans are accepted, since schedules have wide plateaus. T falls geometrically.

With more than two chunks on a rank, one move in ten exchanges two microbatches wherever they run along the same ranks: of two F, or
two I, of different stages, and of the actions before and after them on their chains, on as many ranks as both visit
together. Under a tight cap such streams cross on every rank, and the exchange on one rank alone makes the order worse. These
moves are timed in full.

The threshold is drawn before the move is timed, so that a bad move is given up early. For each action two longest
paths are kept: `end_s`, from the start through it, and `rest_s`, from it to the end. After a move only ends that change are computed
again, in time order; the first action behind the moved window with end + rest - duration above the threshold ends
the move, because the paths behind the window are those of the old order. So a rejected move costs tens of actions
instead of all of them. A move that closes a cycle makes ends grow until they pass the threshold, and is rejected like any other.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from stagewright.planner.schedules.auto.draw import State, below, exponential, seeded, uniform
from stagewright.planner.schedules.auto.instance import Floats, Instance, Ints, Tables
from stagewright.planner.schedules.auto.sweep import sweep

CRITICAL_SHARE = 0.85  # of moves that take a critical action
SWAP_SHARE = 0.25
CHAIN_SHARE = 0.1  # of moves that flip two microbatches on several ranks at once
CHAIN_CHUNKS = 3  # on a rank; with fewer, too few streams run along the same ranks to pay for it
WHOLE_CHAIN_SHARE = 0.5  # of them that flip wherever it is possible, the others on few ranks
CRITICAL_DRAWS = 24  # random actions looked at for a critical one
COOLING = 20.0  # first over last temperature
FORWARD_STEP, BACKWARD_STEP = 1, -1


def anneal(
    instance: Instance, words: Ints, *, moves: int, temperature_s: float, bound_s: float, seed: int
) -> tuple[float, Ints, int]:
    """Return the best makespan met, its words and the moves made; stops early at `bound_s`."""
    best_words = words.copy()
    best_s, made = anneal_words(
        instance.tables,
        words.copy(),
        best_words,
        moves,
        temperature_s,
        bound_s + instance.time_slack_s,
        seeded(seed),
        instance.time_slack_s,
    )
    return float(best_s), best_words, int(made)


@njit(cache=True)
def anneal_words(
    tables: Tables,
    words: Ints,
    best_words: Ints,
    moves: int,
    temperature_s: float,
    bound_s: float,
    state: State,
    slack_s: float,
) -> tuple[float, int]:
    """Return the best makespan and the moves made; `words` ends as the last order, `best_words` as the best."""
    microbatches = tables.num_microbatches
    num_ranks = len(tables.lengths)
    num_actions = len(tables.rank) * microbatches
    most_chunks = words.shape[1] // (3 * microbatches)
    end_s = np.empty(num_actions)
    makespan_s = sweep(tables, words, end_s)
    best_s = makespan_s
    best_words[:] = words
    if makespan_s == np.inf:
        return best_s, 0
    place = np.empty(num_actions, dtype=np.int32)
    live = np.zeros(words.shape)
    _index(tables, words, place, live)
    rest_s = np.zeros(num_actions)
    mirrored_delay_s = _mirrored_delay(tables)
    log_action = np.empty(8 * num_actions + 64, dtype=np.int32)
    log_value_s = np.empty(8 * num_actions + 64)
    dirty_from = np.empty(num_ranks, dtype=np.int32)
    dirty_to = np.empty(num_ranks, dtype=np.int32)
    key_s = np.empty(num_ranks)
    flips = np.empty((2 * len(tables.rank), 3), dtype=np.int32)
    trial_s = np.empty(num_actions)
    _rests(tables, words, place, mirrored_delay_s, end_s, rest_s)
    cooling = np.log(COOLING)
    chain_share = CHAIN_SHARE if most_chunks >= CHAIN_CHUNKS else 0.0
    now_s = temperature_s
    for move in range(moves):
        if best_s <= bound_s:
            return best_s, move
        if move % 64 == 0:
            now_s = temperature_s * np.exp(-cooling * move / moves)
        rank, source = _draw_action(tables, words, end_s, rest_s, makespan_s - slack_s, state)
        if uniform(state) < chain_share:
            count = _flip_chains(tables, words, place, live, rank, source, flips, state)
            if count == 0:
                continue
            new_s = sweep(tables, words, trial_s)
            if new_s > makespan_s + slack_s + now_s * exponential(state):
                _undo_flips(tables, words, place, live, flips, count)
                continue
            makespan_s = new_s
            end_s[:] = trial_s
            _rests(tables, words, place, mirrored_delay_s, end_s, rest_s)
            if makespan_s < best_s - slack_s:
                best_s = makespan_s
                best_words[:] = words
            continue
        draw = uniform(state)
        reach = 1.6 if draw < 0.5 else (4.0 if draw < 0.8 else 5.0 * most_chunks)
        distance = 1 + int(reach * exponential(state))
        if uniform(state) < 0.5:
            distance = -distance
        swaps = uniform(state) < SWAP_SHARE
        if swaps:
            target = source + distance
            if not _can_swap(
                tables, words[rank], live[rank], tables.cap[rank], rank, min(source, target), max(source, target)
            ):
                continue
        else:
            target = _reach(tables, words[rank], live[rank], tables.cap[rank], rank, source, source + distance)
            if target == source:
                continue
        low, high = min(source, target), max(source, target)
        limit_s = makespan_s + slack_s + now_s * exponential(state)
        last = words[rank, high]
        window_s = end_s[last] - tables.duration_s[last // microbatches]
        _move(words[rank], place, source, target, swaps)
        changed = _propagate(
            tables, words, place, FORWARD_STEP, tables.predecessor, tables.successor, tables.delay_s, tables.delay_s,
            end_s, rest_s, limit_s, rank, low, high, window_s, log_action, log_value_s, dirty_from, dirty_to, key_s,
        )  # fmt: skip
        new_s = 0.0
        if changed >= 0:
            for other in range(num_ranks):
                new_s = max(new_s, end_s[words[other, tables.lengths[other] - 1]])
        if changed < 0 or new_s > limit_s:
            count = -1 - changed if changed < 0 else changed
            for index in range(count - 1, -1, -1):
                end_s[log_action[index]] = log_value_s[index]
            _move(words[rank], place, target, source, swaps)
            continue
        makespan_s = new_s
        _update_live(tables, words[rank], live[rank], low, high)
        _propagate(
            tables, words, place, BACKWARD_STEP, tables.successor, tables.predecessor, mirrored_delay_s, tables.delay_s,
            rest_s, end_s, np.inf, rank, high, low, 0.0, log_action, log_value_s, dirty_from, dirty_to, key_s,
        )  # fmt: skip
        if makespan_s < best_s - slack_s:
            best_s = makespan_s
            best_words[:] = words
    return best_s, moves


@njit(cache=True, no_cpython_wrapper=True)
def _mirrored_delay(tables: Tables) -> Floats:
    """Return, by letter, the latency to its successor."""
    delay_s = np.zeros(len(tables.rank))
    for letter in range(len(tables.rank)):
        if tables.successor[letter] >= 0:
            delay_s[letter] = tables.delay_s[tables.successor[letter]]
    return delay_s


@njit(cache=True)
def _index(tables: Tables, words: Ints, place: Ints, live: Floats) -> None:
    for rank in range(len(tables.lengths)):
        total = 0.0
        for at in range(tables.lengths[rank]):
            action = words[rank, at]
            place[action] = at
            total += tables.held[action // tables.num_microbatches]
            live[rank, at] = total


@njit(cache=True, no_cpython_wrapper=True)
def _rests(tables: Tables, words: Ints, place: Ints, mirrored_delay_s: Floats, end_s: Floats, rest_s: Floats) -> None:
    """Fill the longest paths to the end, in order of falling end time: every successor ends later."""
    microbatches = tables.num_microbatches
    for action in np.argsort(-end_s):
        letter = action // microbatches
        rank, at = tables.rank[letter], place[action]
        after_s = rest_s[words[rank, at + 1]] if at + 1 < tables.lengths[rank] else 0.0
        if tables.successor[letter] >= 0:
            follower = tables.successor[letter] * microbatches + action % microbatches
            after_s = max(after_s, rest_s[follower] + mirrored_delay_s[letter])
        rest_s[action] = after_s + tables.duration_s[letter]


@njit(cache=True, no_cpython_wrapper=True)
def _draw_action(
    tables: Tables, words: Ints, end_s: Floats, rest_s: Floats, critical_s: float, state: State
) -> tuple[int, int]:
    """Return rank and position of a random action, mostly of a critical one."""
    draws = CRITICAL_DRAWS if uniform(state) < CRITICAL_SHARE else 1
    rank, at = 0, 0
    for _ in range(draws):
        rank = below(state, len(tables.lengths))
        at = below(state, tables.lengths[rank])
        action = words[rank, at]
        if end_s[action] + rest_s[action] - tables.duration_s[action // tables.num_microbatches] >= critical_s:
            break
    return rank, at


@njit(cache=True, no_cpython_wrapper=True)
def _must_follow(tables: Tables, first: int, second: int) -> bool:
    """Return whether `second`, of the same rank, depends directly on `first`: same letter, or neighbours on the chain."""
    microbatches = tables.num_microbatches
    first_letter, second_letter = first // microbatches, second // microbatches
    if first_letter == second_letter:
        return True
    return tables.predecessor[second_letter] == first_letter and (
        first - first_letter * microbatches == second - second_letter * microbatches
    )


@njit(cache=True, no_cpython_wrapper=True)
def _reach(tables: Tables, word: Ints, live: Floats, cap: float, rank: int, source: int, target: int) -> int:
    """Return how far towards `target` the action at `source` can be inserted."""
    microbatches = tables.num_microbatches
    action = word[source]
    letter = action // microbatches
    held = tables.held[letter]
    at = source
    if target < source:
        while at > max(target, 0):
            other = word[at - 1]
            before = live[at - 2] if at >= 2 else 0.0
            if _must_follow(tables, other, action):
                break
            if held > 0.0 and (live[at - 1] + held > cap or before + held > cap):
                break
            at -= 1
    else:
        while at < min(target, tables.lengths[rank] - 1):
            if _must_follow(tables, action, word[at + 1]) or (held < 0.0 and live[at + 1] - held > cap):
                break
            at += 1
    return at


@njit(cache=True, no_cpython_wrapper=True)
def _can_swap(tables: Tables, word: Ints, live: Floats, cap: float, rank: int, low: int, high: int) -> bool:
    """Return whether the actions at `low` and `high` may change places."""
    if low < 0 or high >= tables.lengths[rank]:
        return False
    first, second = word[low], word[high]
    change = tables.held[second // tables.num_microbatches] - tables.held[first // tables.num_microbatches]
    if _must_follow(tables, first, second):
        return False
    for at in range(low, high):
        if live[at] + change > cap and change > 0.0:
            return False
        if at > low and (_must_follow(tables, first, word[at]) or _must_follow(tables, word[at], second)):
            return False
    return True


@njit(cache=True)
def _flip_chains(
    tables: Tables, words: Ints, place: Ints, live: Floats, rank: int, source: int, flips: Ints, state: State
) -> int:
    """Exchange the order of two microbatches that run along the same ranks; return the number of ranks' flips.

    The action at `source` and one close to it, both F or both I, change their order, and so do those before and after
    them on their chains, as long as both chains visit the same ranks in the same order. Each flip is a row of `flips`:
    rank, position before and after.
    """
    microbatches = tables.num_microbatches
    other = source + (1 + int(1.6 * exponential(state))) * (1 if uniform(state) < 0.5 else -1)
    if other < 0 or other >= tables.lengths[rank]:
        return 0
    first, second = words[rank, min(source, other)], words[rank, max(source, other)]
    first_letter, second_letter = first // microbatches, second // microbatches
    kind = first_letter % 3
    if kind == 2 or second_letter % 3 != kind or first_letter == second_letter:
        return 0
    first_turn, second_turn = first - first_letter * microbatches, second - second_letter * microbatches
    most = len(flips) if uniform(state) < WHOLE_CHAIN_SHARE else 1 + int(2.0 * exponential(state))
    later_first = uniform(state) < 0.5
    num_letters = len(tables.rank)
    count = 0
    for step in (3, -3):
        offset = 0 if step > 0 else step
        flipped = 0
        while flipped < most and count < len(flips):
            one_letter, two_letter = first_letter + offset, second_letter + offset
            if min(one_letter, two_letter) < 0 or max(one_letter, two_letter) >= num_letters:
                break
            at = tables.rank[one_letter]
            if tables.rank[two_letter] != at:
                break
            one = place[one_letter * microbatches + first_turn]
            two = place[two_letter * microbatches + second_turn]
            if one > two:
                break
            begin, end = (two, one) if later_first else (one, two)
            if _reach(tables, words[at], live[at], tables.cap[at], at, begin, end) != end:
                break
            _move(words[at], place, begin, end, False)
            _update_live(tables, words[at], live[at], min(begin, end), max(begin, end))
            flips[count, 0], flips[count, 1], flips[count, 2] = at, begin, end
            count += 1
            flipped += 1
            offset += step
    return count


@njit(cache=True)
def _undo_flips(tables: Tables, words: Ints, place: Ints, live: Floats, flips: Ints, count: int) -> None:
    for flip in range(count - 1, -1, -1):
        rank, begin, end = flips[flip]
        _move(words[rank], place, end, begin, False)
        _update_live(tables, words[rank], live[rank], min(begin, end), max(begin, end))


@njit(cache=True, no_cpython_wrapper=True)
def _update_live(tables: Tables, word: Ints, live: Floats, low: int, high: int) -> None:
    total = live[low - 1] if low > 0 else 0.0
    for at in range(low, high + 1):
        total += tables.held[word[at] // tables.num_microbatches]
        live[at] = total


@njit(cache=True, no_cpython_wrapper=True)
def _move(word: Ints, place: Ints, source: int, target: int, swaps: bool) -> None:
    """Insert or swap in place; calling it again with source and target exchanged undoes it."""
    action = word[source]
    if swaps:
        word[source] = word[target]
        place[word[source]] = source
    elif target < source:
        for at in range(source, target, -1):
            word[at] = word[at - 1]
            place[word[at]] = at
    else:
        for at in range(source, target):
            word[at] = word[at + 1]
            place[word[at]] = at
    word[target] = action
    place[action] = target


@njit(cache=True, no_cpython_wrapper=True)
def _propagate(
    tables: Tables, words: Ints, place: Ints, step: int, feeder: Ints, fed: Ints, feeder_delay_s: Floats, fed_delay_s: Floats,
    value_s: Floats, other_s: Floats, limit_s: float, moved_rank: int, first: int, last: int, window_s: float,
    log_action: Ints, log_value_s: Floats, dirty_from: Ints, dirty_to: Ints, key_s: Floats,
) -> int:  # fmt: skip
    """Compute again the longest paths that a change of positions `first` to `last` of one rank touches.

    Step 1 computes ends from predecessors, step -1 rests from successors. Returns the number of logged changes, or
    -1 - that number when a path passed the limit.
    """
    microbatches = tables.num_microbatches
    num_ranks = len(tables.lengths)
    key_s[:] = np.inf
    # The action behind the window has another neighbour now, so it is computed again too.
    dirty_from[moved_rank], dirty_to[moved_rank] = first, last + step
    key_s[moved_rank] = -1.0
    logged = 0
    while True:
        rank = 0
        for other in range(1, num_ranks):
            if key_s[other] < key_s[rank]:
                rank = other
        if key_s[rank] == np.inf:
            return logged
        key_s[rank] = np.inf
        next_key_s = key_s.min()
        at, to = dirty_from[rank], dirty_to[rank]
        length = tables.lengths[rank]
        while 0 <= at < length:
            action = words[rank, at]
            letter = action // microbatches
            time_s = value_s[words[rank, at - step]] if 0 <= at - step < length else 0.0
            source = feeder[letter]
            if source >= 0:
                delay_s = feeder_delay_s[letter]
                time_s = max(time_s, value_s[source * microbatches + action - letter * microbatches] + delay_s)
            if time_s > next_key_s:
                dirty_from[rank], dirty_to[rank], key_s[rank] = at, to, time_s
                break
            old_s = value_s[action]
            duration_s = tables.duration_s[letter]
            new_s = time_s + duration_s
            if new_s != old_s:
                if step == FORWARD_STEP:
                    if logged == len(log_action):
                        return -1 - logged
                    log_action[logged], log_value_s[logged] = action, old_s
                    logged += 1
                value_s[action] = new_s
                if new_s > limit_s:
                    return -1 - logged
                behind = at > last if rank == moved_rank else old_s - duration_s >= window_s
                if behind and time_s + other_s[action] > limit_s:
                    return -1 - logged
                target = fed[letter]
                if target >= 0 and tables.rank[target] != rank:
                    neighbour = tables.rank[target]
                    spot = place[target * microbatches + action - letter * microbatches]
                    arrival_s = new_s + fed_delay_s[letter if step < 0 else target]
                    if key_s[neighbour] == np.inf:
                        dirty_from[neighbour] = dirty_to[neighbour] = spot
                    elif step > 0:
                        dirty_from[neighbour] = min(dirty_from[neighbour], spot)
                        dirty_to[neighbour] = max(dirty_to[neighbour], spot)
                    else:
                        dirty_from[neighbour] = max(dirty_from[neighbour], spot)
                        dirty_to[neighbour] = min(dirty_to[neighbour], spot)
                    key_s[neighbour] = min(key_s[neighbour], arrival_s)
                    next_key_s = min(next_key_s, key_s[neighbour])
            elif (at - to) * step >= 0:
                break
            at += step
