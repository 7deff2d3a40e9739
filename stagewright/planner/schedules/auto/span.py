"""The least longest span of an order, over all valid timings: a maximum cycle mean.

With the optimizer overlapped across iterations a step takes as long as the longest rank span, from a rank's first start to
its last end. Let M[r, q] be the longest path from the start of rank r's first action to the end of rank q's last. Endless
iterations with period P are possible exactly when no cycle of ranks gains: when for each cycle r1 .. rn the mean of
M[r1, r2], M[r2, r3], ... is at most P. By linear-programming duality the largest cycle mean is also the smallest longest span that any timing
of these orders has, so it certifies the span of a left-shifted timing when the two agree.

Karp, A Characterization of the Minimum Cycle Mean in a Digraph, 1978. O(D * actions + D^3).
"""

from __future__ import annotations

import numpy as np

from stagewright.planner.schedules.auto.instance import Floats, Instance, Ints
from stagewright.planner.schedules.auto.sweep import end_times


def least_longest_span(instance: Instance, words: Ints) -> float:
    """Return the smallest longest span, seconds, that any timing of these orders reaches."""
    return maximum_cycle_mean(_rank_paths(instance, words))


def maximum_cycle_mean(weight: Floats) -> float:
    """Return the largest mean weight of a cycle; `weight` [n, n] holds -inf where there is no arc."""
    count = len(weight)
    walks = np.full((count + 1, count), -np.inf)
    walks[0] = 0.0
    for length in range(1, count + 1):
        walks[length] = (walks[length - 1][:, None] + weight).max(axis=0)
    best = -np.inf
    lengths = np.arange(count)
    for node in range(count):
        if np.isfinite(walks[count, node]):
            shorter = walks[:count, node]
            known = np.isfinite(shorter)
            means = (walks[count, node] - shorter[known]) / (count - lengths[known])
            best = max(best, float(means.min()))
    return best


def _rank_paths(instance: Instance, words: Ints) -> Floats:
    """Return M [num_ranks, num_ranks]; -inf where no path leads from one rank's first action to the other's last."""
    tables, microbatches = instance.tables, instance.num_microbatches
    _, end_s = end_times(instance, words)
    by_time = np.argsort(end_s).tolist()
    place = np.zeros(instance.num_actions, dtype=np.int64)
    for rank, length in enumerate(tables.lengths):
        place[words[rank, :length]] = np.arange(length)
    paths = np.full((instance.num_ranks, instance.num_ranks), -np.inf)
    last = [int(words[rank, length - 1]) for rank, length in enumerate(tables.lengths)]
    for rank in range(instance.num_ranks):
        longest = np.full(instance.num_actions, -np.inf)
        first = int(words[rank, 0])
        for action in by_time:
            letter, microbatch = divmod(action, microbatches)
            own, at = int(tables.rank[letter]), int(place[action])
            start_s = 0.0 if action == first else -np.inf
            if at > 0:
                start_s = max(start_s, float(longest[words[own, at - 1]]))
            before = int(tables.predecessor[letter])
            if before >= 0:
                start_s = max(start_s, float(longest[before * microbatches + microbatch] + tables.delay_s[letter]))
            longest[action] = start_s + float(tables.duration_s[letter])
        paths[rank] = longest[last]
    return paths
