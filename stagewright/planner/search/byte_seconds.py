"""Whether all ranks' time and memory together leave a step possible: an area bound over bytes, for any order of the actions."""

from __future__ import annotations

import numpy as np
from numba import njit

from stagewright.planner.search.class_prices import ClassPrices


@njit(cache=True, no_cpython_wrapper=True)
def pool_admits(
    target_s: float,
    num_ranks: int,
    num_microbatches: int,
    num_replicas: int,
    split: bool,
    prices: ClassPrices,
) -> bool:
    """Tell whether all ranks' time and memory together leave a step of `target_s` possible, in any order.

    A microbatch's activation of layer l lives at least from its forward until its own input gradient, through all
    layers behind it: R_l seconds. So T sum_l kept_l R_l <= target * (bytes of all ranks beside states and workspace).
    Where that fails, layers must be recomputed: first those whose bytes times seconds are most for a second of work.
    """
    runs = len(prices.run_class)
    count = float(num_microbatches)
    work, step, states, largest = 0.0, 0.0, 0.0, 0.0
    for run in range(runs):
        kinds = prices.run_class[run]
        work += prices.run_length[run] * (
            prices.forward_s[kinds] + prices.input_grad_s[kinds] + prices.weight_grad_s[kinds]
        )
        step += prices.run_length[run] * prices.step_s[kinds]
        states += num_replicas * prices.run_length[run] * prices.state_bytes[kinds]
        smallest = np.inf
        for level in range(3):
            if prices.levels[level]:
                smallest = min(smallest, prices.workspace_bytes[level, kinds])
        largest = smallest if run == 0 else min(largest, smallest)
    room = target_s * (num_ranks * (prices.capacity_bytes - largest) - states)
    pair_s = 2.0 * prices.overhead_s * num_ranks
    spare_s = num_ranks * target_s - (count * (work + pair_s) + num_replicas * step)
    slack = 1e-9 * num_ranks * target_s
    if spare_s < -slack:
        return False
    if room < 0.0:
        return False
    # Byte-seconds at the weakest level, then the steps to stronger levels as (run, level pair), each with R falling.
    lowest = 0
    while not prices.levels[lowest]:
        lowest += 1
    needed = -room
    behind = np.zeros(runs)
    each = np.zeros(runs)
    after = 0.0
    for run in range(runs - 1, -1, -1):
        kinds = prices.run_class[run]
        each[run] = (
            prices.forward_s[kinds] + prices.input_grad_s[kinds] + (0.0 if split else prices.weight_grad_s[kinds])
        )
        behind[run] = after
        number = float(prices.run_length[run])
        mean = behind[run] + each[run] * (number + 1.0) / 2.0
        needed += count * number * prices.kept_bytes[lowest, kinds] * mean
        after += number * each[run]
    if needed <= 0.0:
        return True
    # Hull segments of every run; a segment's layers are taken from the front, where R is largest.
    slope = np.empty(2 * runs)
    saved = np.empty(2 * runs)
    owner = np.empty(2 * runs, dtype=np.int64)
    number_of = 0
    for run in range(runs):
        kinds = prices.run_class[run]
        level = lowest
        while True:
            best, target = np.inf, -1
            for high in range(level + 1, 3):
                if prices.levels[high]:
                    gain = prices.kept_bytes[level, kinds] - prices.kept_bytes[high, kinds]
                    if gain > 0.0:
                        price = (prices.recompute_s[high, kinds] - prices.recompute_s[level, kinds]) / gain
                        if price < best:
                            best, target = price, high
            if target < 0:
                break
            slope[number_of] = best
            saved[number_of] = prices.kept_bytes[level, kinds] - prices.kept_bytes[target, kinds]
            owner[number_of] = run
            number_of += 1
            level = target
    taken = np.zeros(number_of)
    seconds = 0.0
    while needed > 0.0:
        best, chosen = np.inf, -1
        for index in range(number_of):
            run = owner[index]
            if taken[index] < prices.run_length[run]:
                residency = behind[run] + each[run] * (prices.run_length[run] - taken[index])
                price = slope[index] / residency
                if price < best:
                    best, chosen = price, index
        if chosen < 0:
            return False
        run = owner[chosen]
        residency = behind[run] + each[run] * (prices.run_length[run] - taken[chosen])
        gain = count * saved[chosen] * residency
        share = min(1.0, needed / gain)
        seconds += share * slope[chosen] * saved[chosen]
        needed -= gain * share
        taken[chosen] += 1.0
        if count * seconds > spare_s + slack:
            return False
    return True
