"""Exact search of small instances: branch and bound over which of two actions of a rank runs first.

A node fixes some pairs. With a limit L, orders that end after L are of no interest, and the node is tightened until nothing changes:

    heads, tails   longest paths, and on each rank the work of all known predecessors, one at a time (Jackson)
    pairs          head(a) + a + b + tail(b) > L   =>   b before a; precedence is kept transitively closed
    sets           for S = {head >= h, tail >= q}: when S and a cannot both run from min head on, a is after S (edge finding)
    memory         at each F, what known actions hold, less all that could be freed, is within the cap;
                   a release without which it is not must come before

A node in which every pair is fixed is an order. Branching takes the pair whose two choices both lie latest, the smaller
first. Running out of nodes without an order within L proves that none exists; the same tightening without branching gives a bound.

Exponential in the worst case, so it stops after a number of nodes; the answer says whether it is proved. It follows Carlier and
Pinson (1989) and Brucker, Jurisch and Sievers (1994), with the memory rule added. Letters keep their microbatches in order (see `word`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from stagewright.planner.schedules.auto.bound import heads_and_tails, precedence_graph, round_up
from stagewright.planner.schedules.auto.decoder import empty_words
from stagewright.planner.schedules.auto.instance import Floats, Instance, Ints, Tables

Order = npt.NDArray[np.int8]  # [num_ranks, n, n]: 1 when the row's action is before the column's, -1 after, 0 open

BEFORE, OPEN, AFTER = 1, 0, -1
MOST_STACK_BYTES = 1 << 28


class Node(NamedTuple):
    """Pairs, heads and tails of one node; arrays that are changed in place."""

    order: Order
    head_s: Floats  # [num_actions]
    tail_s: Floats


class Layout(NamedTuple):
    """Which action is which row of a rank's matrix."""

    action: Ints  # [num_ranks, n], -1 past the rank's last
    row: Ints  # [num_actions]


@dataclass(frozen=True, eq=False)
class Verdict:
    """What the exact search found: an order better than the limit or none, and whether that is all there is."""

    makespan_s: float
    words: Ints | None
    proved: bool
    nodes: int


def improve_exactly(instance: Instance, makespan_s: float, *, nodes: int) -> Verdict:
    """Return the best order below `makespan_s` and whether nothing better exists, within `nodes` nodes."""
    layout = layout_of(instance)
    root = root_node(instance, layout)
    depth = _stack_depth(instance, root)
    if depth < 2:
        return Verdict(makespan_s, None, False, 0)
    words = empty_words(instance)
    best_s, proved, used = _branch(instance.tables, layout, root, makespan_s, instance.tick_s, nodes, depth, words)
    return Verdict(float(best_s), words if best_s < makespan_s else None, bool(proved), int(used))


def raise_bound(instance: Instance, bound_s: float, makespan_s: float, *, probes: int) -> float:
    """Return the largest bound that tightening alone proves, by bisection below a known makespan; at least `bound_s`."""
    layout = layout_of(instance)
    root = root_node(instance, layout)
    tick_s = instance.tick_s

    def is_refuted(limit_s: float) -> bool:
        node = Node(root.order.copy(), root.head_s.copy(), root.tail_s.copy())
        return not tighten(instance.tables, layout, node, limit_s)

    if is_refuted(makespan_s - tick_s):
        return makespan_s
    low_s, high_s = bound_s, makespan_s
    for _ in range(probes - 1):
        if high_s - low_s < max(tick_s, 1e-4 * makespan_s):
            break
        middle_s = (low_s + high_s) / 2
        if is_refuted(middle_s):
            low_s = middle_s
        else:
            high_s = middle_s
    return round_up(instance, low_s)


def root_node(instance: Instance, layout: Layout) -> Node:
    """Return the node with what the relaxed graph already fixes."""
    graph = precedence_graph(instance)
    head_s, tail_s = heads_and_tails(instance)
    size = layout.action.shape[1]
    order = np.zeros((instance.num_ranks, size, size), dtype=np.int8)
    microbatches = instance.num_microbatches
    for rank in range(instance.num_ranks):
        own = layout.action[rank][layout.action[rank] >= 0]
        letter, microbatch = own // microbatches, own % microbatches
        before = microbatch[:, None] <= microbatch[None, :] - graph.precedes[np.ix_(letter, letter)]
        np.fill_diagonal(before, False)
        order[rank, : len(own), : len(own)] = before.astype(np.int8) - before.T.astype(np.int8)
    return Node(order, head_s.ravel().copy(), tail_s.ravel().copy())


def layout_of(instance: Instance) -> Layout:
    """Return the rows of the instance: the actions of each rank by number."""
    action = empty_words(instance)
    row = np.zeros(instance.num_actions, dtype=np.int32)
    rank_of = np.repeat(instance.tables.rank, instance.num_microbatches)
    for rank in range(instance.num_ranks):
        own = np.flatnonzero(rank_of == rank)
        action[rank, : len(own)] = own
        row[own] = np.arange(len(own))
    return Layout(action, row)


def _stack_depth(instance: Instance, root: Node) -> int:
    open_pairs = int((root.order == OPEN).sum() - root.order.shape[0] * root.order.shape[1]) // 2
    size = root.order.nbytes + root.head_s.nbytes + root.tail_s.nbytes
    depth = min(open_pairs + 2, MOST_STACK_BYTES // size)
    return depth if instance.num_actions > 0 else 0


@njit(cache=True)
def _branch(
    tables: Tables, layout: Layout, root: Node, best_s: float, tick_s: float, nodes: int, depth: int, words: Ints
) -> tuple[float, bool, int]:
    """Return the best makespan, whether the search was exhaustive, and the nodes used; `words` is overwritten when better."""
    num_ranks, size = layout.action.shape
    orders = np.zeros((depth, num_ranks, size, size), dtype=np.int8)
    heads_s = np.zeros((depth, len(root.head_s)))
    tails_s = np.zeros((depth, len(root.tail_s)))
    pairs = np.zeros((depth, 3), dtype=np.int32)  # rank, first, second of the choice that is left; rank -1 when none
    orders[0], heads_s[0], tails_s[0] = root.order, root.head_s, root.tail_s
    level = 0
    used = 0
    complete = True
    fresh = True
    while level >= 0:
        node = Node(orders[level], heads_s[level], tails_s[level])
        if not fresh:
            # Back here: take the choice that is left, or go up.
            if pairs[level, 0] < 0:
                level -= 1
                continue
            rank, first, second = pairs[level, 0], pairs[level, 1], pairs[level, 2]
            pairs[level, 0] = -1
            if not _fix(node.order[rank], first, second):
                level -= 1
                continue
        if used == nodes:
            return best_s, False, used
        used += 1
        if not tighten(tables, layout, node, best_s - tick_s):
            level -= 1
            fresh = False
            continue
        rank, first, second = _most_critical_pair(tables, layout, node)
        if rank < 0:
            makespan_s = _write_order(tables, layout, node, words)
            best_s = min(best_s, makespan_s)
            level -= 1
            fresh = False
            continue
        if level + 1 == depth:
            complete = False
            level -= 1
            fresh = False
            continue
        pairs[level, 0], pairs[level, 1], pairs[level, 2] = rank, second, first
        level += 1
        orders[level], heads_s[level], tails_s[level] = node.order, node.head_s, node.tail_s
        fresh = True
        if not _fix(orders[level, rank], first, second):
            level -= 1
            fresh = False
    return best_s, complete, used


@njit(cache=True)
def tighten(tables: Tables, layout: Layout, node: Node, limit_s: float) -> bool:
    """Return False when no order of the node ends by `limit_s`; tightens the node in place."""
    num_ranks, size = layout.action.shape
    by_head = np.empty((num_ranks, size), dtype=np.int32)
    by_tail = np.empty((num_ranks, size), dtype=np.int32)
    for rank in range(num_ranks):
        by_head[rank] = np.arange(size)
        by_tail[rank] = np.arange(size)
    changed = True
    while changed:
        changed = False
        moved = True
        while moved:
            moved = _chain_heads(tables, node)
            for rank in range(num_ranks):
                length = tables.lengths[rank]
                _sort(by_head[rank], layout.action[rank], node.head_s, length)
                _sort(by_tail[rank], layout.action[rank], node.tail_s, length)
                moved |= _rank_paths(
                    tables, layout.action[rank], node.order[rank], node.head_s, by_head[rank], length, AFTER
                )
                moved |= _rank_paths(
                    tables, layout.action[rank], node.order[rank], node.tail_s, by_tail[rank], length, BEFORE
                )
        for action in range(len(node.head_s)):
            duration_s = tables.duration_s[action // tables.num_microbatches]
            if node.head_s[action] + duration_s + node.tail_s[action] > limit_s:
                return False
        for rank in range(num_ranks):
            length = tables.lengths[rank]
            pairs = _fix_pairs(tables, layout.action[rank], node, rank, length, limit_s)
            memory = _fix_memory(tables, layout, node.order[rank], rank, length)
            sets = _fix_sets(tables, layout.action[rank], node, rank, by_head[rank], length, limit_s)
            if pairs < 0 or memory < 0 or sets < 0:
                return False
            changed |= pairs + memory + sets > 0
    return True


@njit(cache=True)
def _sort(rows: Ints, actions: Ints, keys_s: Floats, length: int) -> None:
    """Sort rows by key, smallest first; insertion, since the order changes little between calls."""
    for at in range(1, length):
        row = rows[at]
        key_s = keys_s[actions[row]]
        spot = at
        while spot > 0 and keys_s[actions[rows[spot - 1]]] > key_s:
            rows[spot] = rows[spot - 1]
            spot -= 1
        rows[spot] = row


@njit(cache=True)
def _chain_heads(tables: Tables, node: Node) -> bool:
    """Raise heads and tails along the chains; return whether any rose."""
    microbatches = tables.num_microbatches
    num_stages = len(tables.rank) // 3
    moved = False
    for step in range(3 * num_stages):
        if step < num_stages:
            letter = 3 * step
        elif step < 2 * num_stages:
            letter = 3 * (2 * num_stages - 1 - step) + 1
        else:
            letter = 3 * (step - 2 * num_stages) + 2
        before = tables.predecessor[letter]
        if before < 0:
            continue
        lag_s = tables.duration_s[before] + tables.delay_s[letter]
        for microbatch in range(microbatches):
            source, target = before * microbatches + microbatch, letter * microbatches + microbatch
            if node.head_s[source] + lag_s > node.head_s[target]:
                node.head_s[target] = node.head_s[source] + lag_s
                moved = True
    for step in range(3 * num_stages - 1, -1, -1):
        if step < num_stages:
            letter = 3 * step
        elif step < 2 * num_stages:
            letter = 3 * (2 * num_stages - 1 - step) + 1
        else:
            letter = 3 * (step - 2 * num_stages) + 2
        before = tables.predecessor[letter]
        if before < 0:
            continue
        lag_s = tables.duration_s[letter] + tables.delay_s[letter]
        for microbatch in range(microbatches):
            source, target = before * microbatches + microbatch, letter * microbatches + microbatch
            if node.tail_s[target] + lag_s > node.tail_s[source]:
                node.tail_s[source] = node.tail_s[target] + lag_s
                moved = True
    return moved


@njit(cache=True)
def _rank_paths(
    tables: Tables, actions: Ints, order: Order, values_s: Floats, by_value: Ints, length: int, side: int
) -> bool:
    """Raise heads (side AFTER) or tails (side BEFORE) by the work of the rows on the other side, run one at a time."""
    # The work of the others is added up in the order of their values, so new values wait until all rows are done.
    raised_s = np.empty(length)
    for row in range(length):
        time_s = -np.inf
        for at in range(length):
            other = by_value[at]
            if order[row, other] == side:
                action = actions[other]
                time_s = max(time_s, values_s[action]) + tables.duration_s[action // tables.num_microbatches]
        raised_s[row] = time_s
    moved = False
    for row in range(length):
        if raised_s[row] > values_s[actions[row]]:
            values_s[actions[row]] = raised_s[row]
            moved = True
    return moved


@njit(cache=True)
def _fix(order: Order, first: int, second: int) -> bool:
    """Put `first` before `second` and close transitively; return False on a contradiction."""
    if order[first, second] == BEFORE:
        return True
    if order[first, second] == AFTER:
        return False
    size = order.shape[0]
    for row in range(size):
        if row == first or order[row, first] == BEFORE:
            for column in range(size):
                if column == second or order[second, column] == BEFORE:
                    if order[row, column] == AFTER or row == column:
                        return False
                    order[row, column] = BEFORE
                    order[column, row] = AFTER
    return True


@njit(cache=True)
def _fix_pairs(tables: Tables, actions: Ints, node: Node, rank: int, length: int, limit_s: float) -> int:
    """Return how many pairs the limit fixed, -1 on a contradiction."""
    order = node.order[rank]
    fixed = 0
    for first in range(length):
        one = actions[first]
        for second in range(first + 1, length):
            if order[first, second] != OPEN:
                continue
            two = actions[second]
            both_s = (
                tables.duration_s[one // tables.num_microbatches] + tables.duration_s[two // tables.num_microbatches]
            )
            if node.head_s[one] + both_s + node.tail_s[two] > limit_s:
                fixed += 1
                if not _fix(order, second, first):
                    return -1
            elif node.head_s[two] + both_s + node.tail_s[one] > limit_s:
                fixed += 1
                if not _fix(order, first, second):
                    return -1
    return fixed


@njit(cache=True)
def _fix_memory(tables: Tables, layout: Layout, order: Order, rank: int, length: int) -> int:
    """Return how many pairs the cap fixed, -1 when some F cannot fit."""
    cap = tables.cap[rank]
    if cap == np.inf:
        return 0
    microbatches = tables.num_microbatches
    actions = layout.action[rank]
    fixed = 0
    for row in range(length):
        if (actions[row] // microbatches) % 3 != 0:
            continue
        # Least memory at this F: known forwards, less each release that is not known to come later.
        least = 0.0
        for other in range(length):
            letter = actions[other] // microbatches
            if letter % 3 != 0 or not (other == row or order[other, row] == BEFORE):
                continue
            least += tables.held[letter]
            for kind in range(1, 3):
                release = layout.row[actions[other] + kind * microbatches]
                if other != row and order[release, row] != AFTER:
                    least += tables.held[letter + kind]
        if least > cap:
            return -1
        for other in range(length):
            letter = actions[other] // microbatches
            if letter % 3 != 0 or other == row:
                continue
            if order[other, row] == BEFORE:
                for kind in range(1, 3):
                    release = layout.row[actions[other] + kind * microbatches]
                    if order[release, row] == OPEN and least - tables.held[letter + kind] > cap:
                        fixed += 1
                        if not _fix(order, release, row):
                            return -1
            elif order[other, row] == OPEN:
                added = tables.held[letter]
                for kind in range(1, 3):
                    if order[layout.row[actions[other] + kind * microbatches], row] != AFTER:
                        added += tables.held[letter + kind]
                if least + added > cap:
                    fixed += 1
                    if not _fix(order, row, other):
                        return -1
    return fixed


@njit(cache=True)
def _fix_sets(tables: Tables, actions: Ints, node: Node, rank: int, by_head: Ints, length: int, limit_s: float) -> int:
    """Return how many pairs edge finding fixed, -1 when a set of actions does not fit its window."""
    order = node.order[rank]
    microbatches = tables.num_microbatches
    fixed = 0
    for last in range(length):
        least_tail_s = node.tail_s[actions[last]]
        work_s = 0.0
        for at in range(length - 1, -1, -1):
            action = actions[by_head[at]]
            if node.tail_s[action] < least_tail_s:
                continue
            work_s += tables.duration_s[action // microbatches]
            from_s = node.head_s[action]
            if from_s + work_s + least_tail_s > limit_s:
                return -1
            # The set is all rows from here on in `by_head` with enough tail; try every action outside it.
            for row in range(length):
                outside = actions[row]
                duration_s = tables.duration_s[outside // microbatches]
                if node.head_s[outside] >= from_s and node.tail_s[outside] >= least_tail_s:
                    continue
                total_s = work_s + duration_s
                if min(from_s, node.head_s[outside]) + total_s + least_tail_s > limit_s:
                    fixed += _fix_all(node, order, actions, row, by_head, at, length, least_tail_s, True)
                elif from_s + total_s + min(least_tail_s, node.tail_s[outside]) > limit_s:
                    fixed += _fix_all(node, order, actions, row, by_head, at, length, least_tail_s, False)
                if fixed < 0:
                    return -1
    return fixed


@njit(cache=True)
def _fix_all(
    node: Node,
    order: Order,
    actions: Ints,
    row: int,
    by_head: Ints,
    at: int,
    length: int,
    least_tail_s: float,
    after: bool,
) -> int:
    """Put `row` behind, or in front of, all of the set; return how many pairs that fixed, far below 0 on a contradiction."""
    fixed = 0
    for spot in range(at, length):
        member = by_head[spot]
        if member == row or node.tail_s[actions[member]] < least_tail_s:
            continue
        first, second = (member, row) if after else (row, member)
        if order[first, second] != BEFORE:
            fixed += 1
            if not _fix(order, first, second):
                return -(1 << 30)
    return fixed


@njit(cache=True)
def _most_critical_pair(tables: Tables, layout: Layout, node: Node) -> tuple[int, int, int]:
    """Return rank, first and second of the open pair whose better choice ends latest; rank -1 when all are fixed."""
    best_rank, best_first, best_second = -1, -1, -1
    best_s, best_sum_s = -np.inf, -np.inf
    microbatches = tables.num_microbatches
    for rank in range(len(tables.lengths)):
        for first in range(tables.lengths[rank]):
            one = layout.action[rank, first]
            for second in range(first + 1, tables.lengths[rank]):
                if node.order[rank, first, second] != OPEN:
                    continue
                two = layout.action[rank, second]
                both_s = tables.duration_s[one // microbatches] + tables.duration_s[two // microbatches]
                ahead_s = node.head_s[one] + both_s + node.tail_s[two]
                behind_s = node.head_s[two] + both_s + node.tail_s[one]
                least_s = min(ahead_s, behind_s)
                if least_s > best_s or (least_s == best_s and ahead_s + behind_s > best_sum_s):
                    best_s, best_sum_s, best_rank = least_s, ahead_s + behind_s, rank
                    best_first, best_second = (first, second) if ahead_s <= behind_s else (second, first)
    return best_rank, best_first, best_second


@njit(cache=True)
def _write_order(tables: Tables, layout: Layout, node: Node, words: Ints) -> float:
    """Write the order of a node without open pairs; return its makespan, which its heads already are."""
    makespan_s = 0.0
    for rank in range(len(tables.lengths)):
        length = tables.lengths[rank]
        for row in range(length):
            place = 0
            for other in range(length):
                place += node.order[rank, other, row] == BEFORE
            action = layout.action[rank, row]
            words[rank, place] = action
            makespan_s = max(makespan_s, node.head_s[action] + tables.duration_s[action // tables.num_microbatches])
    return makespan_s
