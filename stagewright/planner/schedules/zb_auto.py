"""The automatic zero-bubble schedule: the best order of F, I and W for given times, latency and memory cap, one chunk.

The heuristic runs the list scheduler over its flags and keeps the best order:

- warm-up: rank d may be ahead of its gradients by D - d forwards (ZB-H1), by 2 (D - d) - 1 (ZB-H2), half-way between, by
  the cap less d, or only by the cap;
- whether a forward or an input gradient goes first when both could;
- how far, in W, a waiting W may delay the forward and the input gradient that come next.

So a W runs where it fills a gap or where the cap of activations, freed at the end of W, leaves nothing else. At a cap of D
activations the order is at least as good as ZB-H1, at 2 D - 1 as ZB-H2, since those are tried as they are. On tiny sizes an
integer programme over the order (`zb_order_ilp`) then proves or improves it, see `parameters`:

- ilp: 1 to solve it whatever the size, 0 never; by default up to 30 actions, where it takes a fraction of a second.

With D = 2, T = 3, I = 2 F = 2 W and a cap of 2 activations (a slot is one F):

    rank 0  F0 F1       I0    W0 F2 I1    W1 I2    W2
    rank 1     F0 I0    W0 F1 I1    F2 I2    W1 W2

Without a cap a rank may hold all T activations. Complexity of the heuristic: one list schedule for each of at most 250
flags, fewer where `effort` says so; no guarantee, though it met the proved bound in all published one-chunk rows.

Paper: Qi et al., Zero Bubble Pipeline Parallelism, ICLR 2024, section 3 (heuristic and ILP).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from stagewright.planner.schedules.descent import Goal, descend
from stagewright.planner.schedules.family import ScheduleFamily, ScheduleRequest
from stagewright.planner.schedules.list_scheduling import (
    BACKWARD,
    EPSILON,
    FORWARD,
    WEIGHT,
    Chains,
    Floats,
    Ints,
    Rule,
    Words,
    chains_of,
    decode,
    ideal_s,
    loose_rule,
    measure,
    orders_of,
    peak_held,
)
from stagewright.planner.schedules.schedule import Schedule, loop_placement
from stagewright.planner.schedules.sizes import Sizes, check_placement, costs_of, effort_of, require, sizes_of
from stagewright.planner.schedules.zb_h1 import one_chunk_words
from stagewright.planner.schedules.zb_order_ilp import solve_order

_SHARES = (0.0, 0.5, 0.25, 0.75, 1.0)  # of W
_DECODING_COST = 16.0  # a decoding takes the time of as many sweeps over its actions
_ILP_ACTIONS = 30
_GOAL = Goal(1.0, 0.5)


def zb_auto(request: ScheduleRequest) -> Schedule:
    """Return the best split order found under the memory cap."""
    sizes = sizes_of(request, "zb-auto")
    placement = loop_placement(sizes.num_ranks)
    check_placement(request, placement, "zb-auto")
    costs = costs_of(request, sizes)
    largest = float(costs.activation.max())
    cap_held = np.inf if request.memory_cap is None else request.memory_cap
    require(
        cap_held >= largest * (1.0 - EPSILON),
        f"the memory cap is {cap_held:g}, one microbatch on one rank holds {largest:g}",
        field="memory_cap",
        hint=f"give a cap of at least {largest:g}",
    )
    unit = max(largest, 1e-300)  # so that EPSILON is small against what is held, in whatever unit
    chains = chains_of(
        placement, costs, sizes.num_microbatches, latency_s=request.latency_s, held=costs.activation / unit
    )
    cap = np.full(sizes.num_ranks, cap_held / unit)
    words = _best_of_flags(chains, cap, _handcrafted(request, sizes, chains, cap), budget=effort_of(request))
    words = _refined(request, chains, words, cap)
    return Schedule("zb-auto", sizes.num_microbatches, placement, orders_of(chains, words, 1))


def _handcrafted(request: ScheduleRequest, sizes: Sizes, chains: Chains, cap: Floats) -> list[Words]:
    """Return ZB-H1's and ZB-H2's words, those that keep the cap."""
    ranks = sizes.num_ranks
    from_end = np.arange(ranks, 0, -1)
    known = [one_chunk_words(request, sizes, from_end, ranks)[1]]
    if sizes.num_microbatches >= 2 * ranks - 1:
        known.append(one_chunk_words(request, sizes, 2 * from_end - 1, 2 * ranks - 1)[1])
    return [words for words in known if (peak_held(chains, words) <= cap + EPSILON).all()]


def _best_of_flags(chains: Chains, cap: Floats, known: list[Words], *, budget: float) -> Words:
    best, best_s = Words(np.zeros(0, dtype=np.int32), np.zeros(1, dtype=np.int64)), np.inf
    for words in known:
        if _GOAL.value_s(measure(chains, words)) < best_s:
            best, best_s = words, _GOAL.value_s(measure(chains, words))
    makespan_s, span_s = ideal_s(chains)
    least_s = _GOAL.makespan_weight * makespan_s + _GOAL.span_weight * span_s
    left = budget
    for rule in _rules(chains, cap):
        words = decode(chains, rule)
        measured = measure(chains, words)
        left -= _DECODING_COST * len(words.letters)
        if _GOAL.value_s(measured) < best_s:
            best, best_s = words, _GOAL.value_s(measured)
        if left < 0.3 * budget or _GOAL.main_s(measured) <= least_s + chains.slack_s:
            break
    return descend(chains, best, cap, _GOAL, moves=int(max(left, 0.0) / len(best.letters)), seed=1)


def _rules(chains: Chains, cap: Floats) -> Iterator[Rule]:
    """Yield the heuristic's flags, the papers' own settings first."""
    loose = loose_rule(chains)
    weight_s = float(chains.seconds[WEIGHT].mean())
    late_s = 4.0 * float(chains.seconds.sum()) * float(chains.units.max())
    for forward, backward in itertools.product(_SHARES, repeat=2):
        for ahead, is_forward_first in itertools.product(_warmups(chains, cap), (True, False)):
            target_s = np.zeros_like(chains.seconds)
            target_s[BACKWARD if is_forward_first else FORWARD] = late_s
            target_s[WEIGHT] = 2.0 * late_s
            tolerance_s = np.zeros_like(chains.seconds)
            tolerance_s[FORWARD], tolerance_s[BACKWARD] = forward * weight_s, backward * weight_s
            yield loose._replace(target_s=target_s, tolerance_s=tolerance_s, cap=cap, ahead=ahead)


def _warmups(chains: Chains, cap: Floats) -> list[Ints]:
    """Return how many forwards each rank may be ahead of its gradients, one vector for each policy."""
    from_end = np.arange(len(cap), 0, -1)
    most = np.minimum(np.where(chains.held > 0, cap / np.maximum(chains.held, 1e-300), np.inf) + 1e-9, chains.units)
    most = np.maximum(most.astype(np.int64), 1)
    policies = [from_end, 2 * from_end - 1, most, -(-3 * from_end // 2), np.maximum(most - most.max() + from_end, 1)]
    policies.append(np.maximum(most - np.arange(len(cap)), 1))
    return [policy.astype(np.int64) for policy in policies]


def _refined(request: ScheduleRequest, chains: Chains, words: Words, cap: Floats) -> Words:
    """Return the integer programme's order where it is asked for, or small, and better."""
    asked = request.parameters.get("ilp")
    measured = measure(chains, words)
    is_proved = measured.makespan_s <= ideal_s(chains)[0] + chains.slack_s
    if asked == 0 or is_proved or (asked is None and len(words.letters) > _ILP_ACTIONS):
        return words
    solved = solve_order(chains, cap, most_s=measured.makespan_s)
    if solved is None or measure(chains, solved).makespan_s >= measured.makespan_s - chains.slack_s:
        return words
    return solved


FAMILY = ScheduleFamily(
    "zb-auto",
    "Qi et al., Zero Bubble Pipeline Parallelism, ICLR 2024",
    zb_auto,
    aliases=("zb", "zb-1p", "zb-2p"),
    split_backward=True,
    improves=True,
    takes_cap=True,
)
