"""Exact search of small instances: branch and bound over which of two actions of a rank runs first.

A node is what is known to run before what (see `precedence`), tightened against a limit L: orders that end after L are of no
interest. A node in which nothing is open is an order. Branching takes the pair whose two choices both lie latest, the smaller
first. Running out of nodes without an order within L proves that none exists; the same tightening without branching gives a bound.

Exponential in the worst case, so it stops after a number of nodes; the answer says whether it is proved.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit

from stagewright.planner.schedules.auto.bound import round_up
from stagewright.planner.schedules.auto.decoder import empty_words
from stagewright.planner.schedules.auto.instance import Instance, Ints, Tables
from stagewright.planner.schedules.auto.precedence import Layout, Node, layout_of, put_before, root_node, tighten

MOST_STACK_BYTES = 1 << 28


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
    depth = _stack_depth(root)
    words = empty_words(instance)
    best_s, proved, used = _branch(instance.tables, layout, root, makespan_s, instance.tick_s, nodes, depth, words)
    return Verdict(float(best_s), words if best_s < makespan_s else None, bool(proved), int(used))


def raise_bound(instance: Instance, bound_s: float, makespan_s: float, *, probes: int) -> float:
    """Return the largest bound that tightening alone proves, by bisection below a known makespan; at least `bound_s`."""
    layout = layout_of(instance)
    tick_s = instance.tick_s
    # Tightened against the least limit that was not refuted; what holds by a limit holds by any smaller one.
    known = root_node(instance, layout)

    def is_refuted(limit_s: float) -> bool:
        nonlocal known
        node = Node(known.least.copy(), known.most.copy(), known.head_s.copy(), known.tail_s.copy())
        if not tighten(instance.tables, layout, node, limit_s, np.ones(instance.num_ranks, dtype=np.bool_)):
            return True
        known = node
        return False

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


def _stack_depth(root: Node) -> int:
    """Return how many nodes the stack may hold: one for each choice, as far as memory allows."""
    choices = int((root.most - root.least).sum()) // 2
    return max(2, min(choices + 2, MOST_STACK_BYTES // sum(values.nbytes for values in root)))


@njit(cache=True)
def _branch(
    tables: Tables, layout: Layout, root: Node, best_s: float, tick_s: float, nodes: int, depth: int, words: Ints
) -> tuple[float, bool, int]:
    """Return the best makespan, whether the search was exhaustive, and the nodes used; `words` is overwritten when better."""
    num_actions, columns = root.least.shape
    least = np.zeros((depth, num_actions, columns), dtype=np.int32)
    most = np.zeros((depth, num_actions, columns), dtype=np.int32)
    heads_s, tails_s = np.zeros((depth, num_actions)), np.zeros((depth, num_actions))
    choices = np.zeros((depth, 2), dtype=np.int32)  # first and second of the choice that is left; -1 when none
    limits_s = np.full(depth, np.inf)  # that the node was tightened against
    changed = np.ones(len(tables.lengths), dtype=np.bool_)
    least[0], most[0], heads_s[0], tails_s[0] = root.least, root.most, root.head_s, root.tail_s
    level, used, is_complete, is_fresh = 0, 0, True, True
    while level >= 0:
        node = Node(least[level], most[level], heads_s[level], tails_s[level])
        if not is_fresh:
            # Back here: take the choice that is left, or go up.
            first, second = choices[level, 0], choices[level, 1]
            if first < 0:
                level -= 1
                continue
            choices[level, 0] = -1
            put_before(tables, layout, node, first, second)
            changed[:] = best_s - tick_s < limits_s[level]
            changed[tables.rank[second // tables.num_microbatches]] = True
        if used == nodes:
            return best_s, False, used
        used += 1
        is_fresh = False
        if not tighten(tables, layout, node, best_s - tick_s, changed):
            level -= 1
            continue
        limits_s[level] = best_s - tick_s
        first, second = _most_critical_pair(tables, layout, node)
        if first < 0:
            best_s = min(best_s, _write_order(tables, layout, node, words))
            level -= 1
            continue
        if level + 1 == depth:
            is_complete = False
            level -= 1
            continue
        choices[level, 0], choices[level, 1] = second, first
        level += 1
        least[level], most[level], heads_s[level], tails_s[level] = node.least, node.most, node.head_s, node.tail_s
        put_before(tables, layout, Node(least[level], most[level], heads_s[level], tails_s[level]), first, second)
        changed[:] = False
        changed[tables.rank[second // tables.num_microbatches]] = True
        is_fresh = True
    return best_s, is_complete, used


@njit(cache=True, no_cpython_wrapper=True)
def _most_critical_pair(tables: Tables, layout: Layout, node: Node) -> tuple[int, int]:
    """Return first and second of the open pair whose better choice ends latest; -1 when nothing is open."""
    best_first, best_second = -1, -1
    best_s, best_sum_s = -np.inf, -np.inf
    microbatches = tables.num_microbatches
    for letters in layout.letters:
        for own_column in range(len(letters)):
            own = letters[own_column]
            if own < 0:
                break
            for column in range(own_column + 1, len(letters)):
                letter = letters[column]
                if letter < 0:
                    break
                both_s = tables.duration_s[own] + tables.duration_s[letter]
                for one in range(own * microbatches, (own + 1) * microbatches):
                    for turn in range(node.least[one, column], node.most[one, column]):
                        two = letter * microbatches + turn
                        ahead_s = node.head_s[one] + both_s + node.tail_s[two]
                        behind_s = node.head_s[two] + both_s + node.tail_s[one]
                        least_s = min(ahead_s, behind_s)
                        if least_s > best_s or (least_s == best_s and ahead_s + behind_s > best_sum_s):
                            best_s, best_sum_s = least_s, ahead_s + behind_s
                            best_first, best_second = (one, two) if ahead_s <= behind_s else (two, one)
    return best_first, best_second


@njit(cache=True, no_cpython_wrapper=True)
def _write_order(tables: Tables, layout: Layout, node: Node, words: Ints) -> float:
    """Write the order of a node in which nothing is open; return its makespan, which its heads already are."""
    makespan_s = 0.0
    microbatches = tables.num_microbatches
    for rank in range(len(tables.lengths)):
        for letter in layout.letters[rank]:
            if letter < 0:
                break
            for action in range(letter * microbatches, (letter + 1) * microbatches):
                words[rank, node.least[action].sum()] = action
                makespan_s = max(makespan_s, node.head_s[action] + tables.duration_s[letter])
    return makespan_s
