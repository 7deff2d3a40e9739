"""What must run before what on each rank, when an order is to end by a limit.

Letters keep their microbatches in order, so what is known about an action x and a letter y of its rank is two counts: `least`
microbatches of y run before x, and at most `most` could. A node of the exact search is these counts with

    head(x)   no order of the node starts x earlier
    tail(x)   no order of the node ends sooner after the end of x

and it is tightened against a limit L until nothing changes:

    chains        the previous letter of the same microbatch, with its latency
    predecessors  x starts, for every t, at or after t + the work of all known predecessors with head >= t (Jackson). Memory adds
                  anonymous work: when the forwards at or before x hold more than the cap, so many W precede x, whichever they are
    pairs         head(x) + x + y(j) + tail(y(j)) > L   =>   y(j) before x
    memory        at each F, what known actions hold, less all that could be freed, is within the cap: a release without
                  which it is not must come before, a forward with which it is not must come after
    sets          S = {head >= h, tail >= q}: when S and x cannot both run from min head on, x is after S (edge finding)
    transitivity  what is before a predecessor of x is before x

When a rule contradicts, no order of the node ends by L. O(rounds * sum over ranks n (n + 9 v^2)) for n actions and v chunks of a rank.

The rules are those of Carlier and Pinson (1989) and Brucker, Jurisch and Sievers (1994), on counts instead of pairs, with memory added.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from stagewright.planner.schedules.auto.bound import heads_and_tails, mirrored, precedence_graph
from stagewright.planner.schedules.auto.decoder import stages_by_rank
from stagewright.planner.schedules.auto.instance import Flags, Floats, Instance, Ints, Tables

EARLY, LATE = 0, 1  # direction of a path: from the start, or from the end
NUM_DEMANDS = 2  # memory that W gives back, and memory that I gives back


class Node(NamedTuple):
    """Counts, heads and tails of one node; arrays that are changed in place."""

    least: Ints  # [num_actions, columns], microbatches of the column's letter that run before the action
    most: Ints  # the same, that could; of the action's own letter, itself included
    head_s: Floats  # [num_actions]
    tail_s: Floats


class Layout(NamedTuple):
    """The letters of each rank, and which of them take and give back memory.

    `allocated` and `released` [2 directions, 2 demands, num_letters]: with time reversed, W takes what F gives back.
    """

    letters: Ints  # [num_ranks, columns], -1 past the rank's last
    column: Ints  # [num_letters], of each letter on its rank
    allocated: Floats
    released: Floats


def layout_of(instance: Instance) -> Layout:
    """Return the letters of the instance's ranks, by stage."""
    stages = stages_by_rank(instance)
    letters = np.where(stages[:, :, None] >= 0, 3 * stages[:, :, None] + np.arange(3), -1)
    letters = np.ascontiguousarray(letters.reshape(instance.num_ranks, -1), dtype=np.int32)
    column = np.zeros(instance.num_letters, dtype=np.int32)
    for row in letters:
        column[row[row >= 0]] = np.arange(int((row >= 0).sum()))
    forward = precedence_graph(instance)
    backward = mirrored(instance, forward)
    return Layout(
        letters,
        column,
        np.stack((forward.allocated, backward.allocated)),
        np.stack((forward.released, backward.released)),
    )


def root_node(instance: Instance, layout: Layout) -> Node:
    """Return the node with what the relaxed graph already fixes."""
    precedes = precedence_graph(instance).precedes
    head_s, tail_s = heads_and_tails(instance)
    microbatches = instance.num_microbatches
    least = np.zeros((instance.num_actions, layout.letters.shape[1]), dtype=np.int32)
    for letter in range(instance.num_letters):
        own = layout.letters[instance.tables.rank[letter]]
        own = own[own >= 0]
        turns = np.arange(microbatches)[:, None] - precedes[own, letter][None, :] + 1
        turns[:, own == letter] = np.arange(microbatches)[:, None]
        least[letter * microbatches : (letter + 1) * microbatches, : len(own)] = np.maximum(turns, 0)
    node = Node(least, np.full_like(least, microbatches), head_s.ravel().copy(), tail_s.ravel().copy())
    for rank in range(instance.num_ranks):
        is_possible = close(instance.tables, layout, node, rank)
        assert is_possible, "the relaxed graph has no cycle"
    return node


@njit(cache=True)
def tighten(tables: Tables, layout: Layout, node: Node, limit_s: float, changed: Flags) -> bool:
    """Return False when no order of the node ends by `limit_s`; tightens the node in place.

    `changed` [num_ranks] says on which ranks counts, heads or tails have changed since the node was tightened against
    this limit: all of them where it never was.
    """
    num_ranks, columns = layout.letters.shape
    longest = columns * tables.num_microbatches
    is_new = changed.copy()  # heads, tails or counts have changed since the rank's rules
    has_new_heads, has_new_tails = changed.copy(), changed.copy()
    actions = np.empty(longest, dtype=np.int32)
    keys_s, raised_s = np.empty(longest), np.empty(longest)
    members = np.empty((2, columns), dtype=np.int32)
    for rank in range(num_ranks):
        if changed[rank] and not close(tables, layout, node, rank):
            return False
    while True:
        moved = True
        while moved:
            _raise_along_chains(tables, node, EARLY, has_new_heads)
            _raise_along_chains(tables, node, LATE, has_new_tails)
            moved = False
            for rank in range(num_ranks):
                if has_new_heads[rank]:
                    has_new_heads[rank] = False
                    is_new[rank] = True
                    if _raise_by_work(tables, layout, node, rank, EARLY, actions, keys_s, raised_s):
                        has_new_heads[rank] = moved = True
                if has_new_tails[rank]:
                    has_new_tails[rank] = False
                    is_new[rank] = True
                    if _raise_by_work(tables, layout, node, rank, LATE, actions, keys_s, raised_s):
                        has_new_tails[rank] = moved = True
            for letter in range(len(tables.rank)):
                for action in range(letter * tables.num_microbatches, (letter + 1) * tables.num_microbatches):
                    if node.head_s[action] + tables.duration_s[letter] + node.tail_s[action] > limit_s:
                        return False
        if not is_new.any():
            return True
        for rank in range(num_ranks):
            if not is_new[rank]:
                continue
            is_new[rank] = False
            fixed = _fix_pairs(tables, layout, node, rank, limit_s)
            in_memory = _fix_memory(tables, layout, node, rank)
            in_sets = _fix_sets(tables, layout, node, rank, limit_s, actions, keys_s, members)
            if in_memory < 0 or in_sets < 0:
                return False
            if fixed + in_memory + in_sets > 0:
                if not close(tables, layout, node, rank):
                    return False
                has_new_heads[rank] = has_new_tails[rank] = True


@njit(cache=True)
def put_before(tables: Tables, layout: Layout, node: Node, first: int, second: int) -> None:
    """Let `first` run before `second`, of the same rank; the counts are to be closed afterwards."""
    letter = first // tables.num_microbatches
    column = layout.column[letter]
    node.least[second, column] = max(node.least[second, column], first - letter * tables.num_microbatches + 1)


@njit(cache=True)
def close(tables: Tables, layout: Layout, node: Node, rank: int) -> bool:
    """Close the counts of a rank transitively; return False when an action would run before itself."""
    microbatches = tables.num_microbatches
    letters, least, most = layout.letters[rank], node.least, node.most
    columns = 0
    while columns < len(letters) and letters[columns] >= 0:
        columns += 1
    moved = True
    while moved:
        moved = False
        for microbatch in range(microbatches):
            for own in range(columns):
                action = letters[own] * microbatches + microbatch
                for via in range(columns):
                    count = least[action, via]
                    if count == 0:
                        continue
                    source = letters[via] * microbatches + count - 1
                    for column in range(columns):
                        if least[source, column] > least[action, column]:
                            least[action, column] = least[source, column]
                            moved = True
                if least[action, own] > microbatch:
                    return False
    for own in range(columns):
        for column in range(columns):
            count = 0
            for microbatch in range(microbatches):
                action = letters[own] * microbatches + microbatch
                # Microbatches of the column's letter that are not known to come after the action.
                while count < microbatches and least[letters[column] * microbatches + count, own] <= microbatch:
                    count += 1
                most[action, column] = count
    return True


@njit(cache=True, no_cpython_wrapper=True)
def _raise_along_chains(tables: Tables, node: Node, direction: int, is_new: np.ndarray) -> None:
    """Raise heads (EARLY) or tails (LATE) along the chains, and mark the ranks where one rose."""
    microbatches = tables.num_microbatches
    num_stages = len(tables.rank) // 3
    values_s = node.head_s if direction == EARLY else node.tail_s
    for place in range(3 * num_stages):
        later = _letter_in_chain(place if direction == EARLY else 3 * num_stages - 1 - place, num_stages)
        earlier = tables.predecessor[later]
        if earlier < 0:
            continue
        source, target = (earlier, later) if direction == EARLY else (later, earlier)
        lag_s = tables.duration_s[source] + tables.delay_s[later]
        for microbatch in range(microbatches):
            time_s = values_s[source * microbatches + microbatch] + lag_s
            if time_s > values_s[target * microbatches + microbatch]:
                values_s[target * microbatches + microbatch] = time_s
                is_new[tables.rank[target]] = True


@njit(cache=True, no_cpython_wrapper=True)
def _letter_in_chain(step: int, num_stages: int) -> int:
    """Return the letter of this place in F_0 .. F_{S-1}, I_{S-1} .. I_0, W."""
    if step < num_stages:
        return 3 * step
    if step < 2 * num_stages:
        return 3 * (2 * num_stages - 1 - step) + 1
    return 3 * (step - 2 * num_stages) + 2


@njit(cache=True, no_cpython_wrapper=True)
def _by_value(tables: Tables, layout: Layout, rank: int, values_s: Floats, actions: Ints, keys_s: Floats) -> int:
    """Write a rank's actions and their values, largest value first; return how many there are."""
    microbatches = tables.num_microbatches
    count = 0
    for letter in layout.letters[rank]:
        if letter < 0:
            break
        for action in range(letter * microbatches, (letter + 1) * microbatches):
            actions[count], keys_s[count] = action, -values_s[action]
            count += 1
    order = np.argsort(keys_s[:count])
    actions[:count] = actions[:count][order]
    for at in range(count):
        keys_s[at] = values_s[actions[at]]
    return count


@njit(cache=True, no_cpython_wrapper=True)
def _raise_by_work(
    tables: Tables,
    layout: Layout,
    node: Node,
    rank: int,
    direction: int,
    actions: Ints,
    keys_s: Floats,
    raised_s: Floats,
) -> bool:
    """Raise a rank's heads (EARLY) or tails (LATE) by the work before or after each action; return whether any rose."""
    microbatches = tables.num_microbatches
    values_s = node.head_s if direction == EARLY else node.tail_s
    letters, column_of, duration_s = layout.letters[rank], layout.column, tables.duration_s
    least, most = node.least, node.most
    allocated, released = layout.allocated[direction], layout.released[direction]
    count = _by_value(tables, layout, rank, values_s, actions, keys_s)
    shortest_s, largest = np.full(NUM_DEMANDS, np.inf), np.zeros(NUM_DEMANDS)
    for letter in letters:
        for demand in range(NUM_DEMANDS):
            if letter >= 0 and released[demand, letter] > 0.0:
                shortest_s[demand] = min(shortest_s[demand], duration_s[letter])
                largest[demand] = max(largest[demand], released[demand, letter])
    missing, unseen = np.zeros(NUM_DEMANDS, dtype=np.int64), np.zeros(NUM_DEMANDS, dtype=np.int64)
    is_capped = tables.cap[rank] < np.inf
    for spot in range(count):
        action = actions[spot]
        own = action // microbatches
        total_s = 0.0
        missing[:] = 0
        for column in range(len(letters)):
            if letters[column] < 0:
                break
            known = least[action, column] if direction == EARLY else microbatches - most[action, column]
            total_s += known * duration_s[letters[column]]
        if is_capped:
            for demand in range(NUM_DEMANDS):
                over, unseen[demand] = allocated[demand, own] - tables.cap[rank], 0
                for column in range(len(letters)):
                    letter = letters[column]
                    if letter < 0:
                        break
                    known = least[action, column] if direction == EARLY else microbatches - most[action, column]
                    over += known * (allocated[demand, letter] - released[demand, letter])
                    if released[demand, letter] > 0.0 and letter != own:
                        unseen[demand] += most[action, column] - least[action, column]
                if largest[demand] > 0.0 and over > 0.0:
                    missing[demand] = np.int64(np.ceil(over / largest[demand] - 1e-6))
                    total_s += missing[demand] * shortest_s[demand]
        best_s, work_s = values_s[action], 0.0
        for at in range(count):
            key_s = keys_s[at]
            if key_s + total_s <= best_s:
                break
            other = actions[at]
            letter = other // microbatches
            turn = other - letter * microbatches
            column = column_of[letter]
            if direction == EARLY:
                is_known = turn < least[action, column]
                is_open = not is_known and turn < most[action, column]
            else:
                is_known = turn >= most[action, column]
                is_open = not is_known and turn >= least[action, column]
            if is_known:
                work_s += duration_s[letter]
            elif is_open and letter != own and is_capped:
                for demand in range(NUM_DEMANDS):
                    if released[demand, letter] > 0.0:
                        unseen[demand] -= 1
            sum_s = work_s
            for demand in range(NUM_DEMANDS):
                # Open releases with a smaller value could be over by then.
                if missing[demand] > max(0, unseen[demand]):
                    sum_s += (missing[demand] - unseen[demand]) * shortest_s[demand]
            if sum_s > 0.0:
                best_s = max(best_s, key_s + sum_s)
        raised_s[spot] = best_s
    moved = False
    for spot in range(count):
        # `values_s` stays as it is until all are done: the work is added up in the order of the old values.
        if raised_s[spot] > values_s[actions[spot]]:
            values_s[actions[spot]] = raised_s[spot]
            moved = True
    return moved


@njit(cache=True, no_cpython_wrapper=True)
def _fix_pairs(tables: Tables, layout: Layout, node: Node, rank: int, limit_s: float) -> int:
    """Return how many counts the limit raised."""
    microbatches, letters = tables.num_microbatches, layout.letters[rank]
    fixed = 0
    for own in letters:
        if own < 0:
            break
        for action in range(own * microbatches, (own + 1) * microbatches):
            from_s = node.head_s[action] + tables.duration_s[own]
            for column in range(len(letters)):
                letter = letters[column]
                if letter < 0 or letter == own:
                    continue
                turn = node.least[action, column]
                room_s = limit_s - from_s - tables.duration_s[letter]
                while turn < node.most[action, column] and node.tail_s[letter * microbatches + turn] > room_s:
                    turn += 1
                if turn > node.least[action, column]:
                    node.least[action, column] = turn
                    fixed += 1
    return fixed


@njit(cache=True, no_cpython_wrapper=True)
def _fix_memory(tables: Tables, layout: Layout, node: Node, rank: int) -> int:
    """Return how many counts the cap raised, -1 when some F cannot fit."""
    cap = tables.cap[rank]
    if cap == np.inf:
        return 0
    microbatches, letters, held = tables.num_microbatches, layout.letters[rank], tables.held
    least, most = node.least, node.most
    fixed = 0
    for own in letters:
        if own < 0:
            break
        if own % 3 != 0:
            continue
        for action in range(own * microbatches, (own + 1) * microbatches):
            # Least memory at this F: known forwards, less each release of them that is not known to come later.
            live = held[own]
            for column in range(0, len(letters), 3):
                letter = letters[column]
                if letter < 0:
                    break
                entered = least[action, column]
                live += held[letter] * entered
                for kind in range(1, 3):
                    live += held[letter + kind] * min(entered, most[action, column + kind])
            if live > cap:
                return -1
            room = cap - live
            for column in range(0, len(letters), 3):
                letter = letters[column]
                if letter < 0:
                    break
                entered = least[action, column]
                for kind in range(1, 3):
                    freed = -held[letter + kind]
                    if freed > 0.0:
                        count = min(entered, most[action, column + kind])
                        needed = count - int(np.floor(room / freed + 1e-9))
                        if needed > least[action, column + kind]:
                            least[action, column + kind] = needed
                            fixed += 1
                if letter == own:
                    continue
                added = 0.0
                for turn in range(entered, most[action, column]):
                    added += held[letter]
                    for kind in range(1, 3):
                        if turn < most[action, column + kind]:
                            added += held[letter + kind]
                    if added > room:
                        other = letter * microbatches + turn
                        before = action - own * microbatches + 1
                        if before > least[other, layout.column[own]]:
                            least[other, layout.column[own]] = before
                            fixed += 1
                        break
    return fixed


@njit(cache=True, no_cpython_wrapper=True)
def _fix_sets(
    tables: Tables,
    layout: Layout,
    node: Node,
    rank: int,
    limit_s: float,
    actions: Ints,
    keys_s: Floats,
    members: Ints,
) -> int:
    """Return how many counts edge finding raised, -1 when a set of actions does not fit its window."""
    microbatches = tables.num_microbatches
    head_s, tail_s, duration_s = node.head_s, node.tail_s, tables.duration_s
    count = _by_value(tables, layout, rank, head_s, actions, keys_s)
    longest_s = 0.0
    for letter in layout.letters[rank]:
        if letter >= 0:
            longest_s = max(longest_s, duration_s[letter])
    fixed = 0
    for last in range(count):
        least_tail_s = tail_s[actions[last]]
        work_s = 0.0
        for at in range(count):
            action = actions[at]
            if tail_s[action] < least_tail_s:
                continue
            work_s += duration_s[action // microbatches]
            from_s = keys_s[at]
            slack_s = limit_s - from_s - work_s - least_tail_s
            if slack_s < 0.0:
                return -1
            if slack_s < longest_s:
                fixed += _fix_around(
                    tables, layout, node, rank, limit_s, actions[:count], at, work_s, from_s, least_tail_s, members
                )
    return fixed


@njit(cache=True, no_cpython_wrapper=True)
def _fix_around(
    tables: Tables,
    layout: Layout,
    node: Node,
    rank: int,
    limit_s: float,
    actions: Ints,
    at: int,
    work_s: float,
    from_s: float,
    least_tail_s: float,
    members: Ints,
) -> int:
    """Put actions in front of or behind the set of the first `at` + 1 with at least that tail; return how many counts rose."""
    microbatches = tables.num_microbatches
    head_s, tail_s = node.head_s, node.tail_s
    members[0], members[1] = microbatches, -1  # first and last microbatch of each column in the set
    for spot in range(at + 1):
        if tail_s[actions[spot]] >= least_tail_s:
            letter = actions[spot] // microbatches
            column, turn = layout.column[letter], actions[spot] - letter * microbatches
            members[0, column] = min(members[0, column], turn)
            members[1, column] = max(members[1, column], turn)
    fixed = 0
    for spot in range(len(actions)):
        outside = actions[spot]
        is_member = spot <= at and tail_s[outside] >= least_tail_s
        if is_member:
            continue
        letter = outside // microbatches
        total_s = work_s + tables.duration_s[letter]
        if min(from_s, head_s[outside]) + total_s + least_tail_s > limit_s:
            for column in range(members.shape[1]):
                if members[1, column] >= node.least[outside, column]:
                    node.least[outside, column] = members[1, column] + 1
                    fixed += 1
        elif from_s + total_s + min(least_tail_s, tail_s[outside]) > limit_s:
            before = outside - letter * microbatches + 1
            own = layout.column[letter]
            for column in range(members.shape[1]):
                if members[0, column] < microbatches:
                    other = layout.letters[rank, column] * microbatches + members[0, column]
                    if before > node.least[other, own]:
                        node.least[other, own] = before
                        fixed += 1
    return fixed
