"""The integer form of the bounds: whether ranks that take all they can at a target step hold all layers.

At a target X every rank takes as many layers as its own bound and its memory admit, with the least recomputation
(`recompute_floor`); if layers are left, every completion takes longer than X. For one chunk a rank, ranks fill one after
the other, which is exact because what a rank can reach never falls when it starts later. For several chunks a rank takes
any layers of a class, in any order. Ranks mostly take what the one before took, so that number is tried first.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from stagewright.planner.search.bounds import BOTH_WAYS, CHUNKS, GPIPE, SERIAL, SPLIT, UNIFORM
from stagewright.planner.search.class_prices import ClassPrices
from stagewright.planner.search.recompute_floor import least_extra

Floats = npt.NDArray[np.float64]


@njit(cache=True)
def reaches(
    target_s: float,
    kind: int,
    num_ranks: int,
    num_microbatches: int,
    num_chunks: int,
    hop_s: Floats,
    live: Floats,
    late: Floats,
    prices: ClassPrices,
) -> bool:
    """Tell whether the caps leave a completion of at most `target_s` possible; `live`, `late` [D] are least multiplicities.

    `hop_s` [D - 1] are the least seconds of the hops between neighbouring ranks, zeros where they are not known.
    """
    if kind == BOTH_WAYS:
        return True
    if kind == CHUNKS:
        reached: bool = _reaches_with_chunks(target_s, num_ranks, num_microbatches, num_chunks, live, late, prices)
        return reached
    run_class, run_length = prices.run_class, prices.run_length
    total, layers_left = 0.0, 0
    for run in range(len(run_class)):
        total += run_length[run] * _seconds(run_class[run], prices)
        layers_left += run_length[run]
    pair_s = (3.0 if kind == SPLIT else 2.0) * prices.overhead_s
    head, head_forward, way, way_behind = 0.0, 0.0, 0.0, hop_s.sum()
    run, taken = 0, 0  # next layer: position in its run
    guess = 1
    taken_classes = np.zeros(len(prices.forward_s))
    for rank in range(num_ranks):
        taken_classes[:] = 0.0
        own, own_forward, step, states = pair_s, prices.overhead_s, prices.latency_s[0], 0.0
        most = layers_left - (num_ranks - 1 - rank)
        stage_layers = 0
        while stage_layers < most:
            kinds = np.int64(run_class[run])
            want = min(run_length[run] - taken, most - stage_layers)
            low, high, tries = 0, want, 0
            while low < high:
                middle = next_try(low, high, guess, tries)
                tries += 1
                if _admits(
                    middle,
                    kinds,
                    target_s,
                    kind,
                    rank,
                    num_ranks,
                    num_microbatches,
                    head,
                    head_forward,
                    way,
                    way_behind,
                    total,
                    own,
                    step,
                    states,
                    taken_classes,
                    pair_s,
                    live[rank],
                    late[rank],
                    prices,
                ):
                    low = middle
                else:
                    high = middle - 1
            guess = low
            taken_classes[kinds] += low
            own += low * _seconds(kinds, prices)
            own_forward += low * prices.forward_s[kinds]
            step += low * prices.step_s[kinds]
            states += low * prices.state_bytes[kinds]
            stage_layers += low
            taken += low
            if taken == run_length[run]:
                run, taken = run + 1, 0
            if low < want:
                break
        if stage_layers == 0:
            return False
        layers_left -= stage_layers
        head += own
        head_forward += own_forward
        if rank < num_ranks - 1:
            way += hop_s[rank]
            way_behind -= hop_s[rank]
    return layers_left == 0


@njit(cache=True, no_cpython_wrapper=True, inline="always")
def _seconds(kinds: int, prices: ClassPrices) -> float:
    """Return the seconds of one layer's microbatch without recomputation."""
    return float(prices.forward_s[kinds] + prices.input_grad_s[kinds] + prices.weight_grad_s[kinds])


@njit(cache=True, no_cpython_wrapper=True, inline="always")
def next_try(low: int, high: int, guess: int, tries: int) -> int:
    """Return the number in low + 1 .. high to try next: the guess and its neighbour, then the middle."""
    if tries == 0:
        return min(max(guess, low + 1), high)
    if tries == 1:
        return low + 1 if low >= guess else high
    return (low + high + 1) // 2


@njit(cache=True, no_cpython_wrapper=True)
def _admits(
    number: int,
    added: int,
    target_s: float,
    kind: int,
    rank: int,
    num_ranks: int,
    num_microbatches: int,
    head: float,
    head_forward: float,
    way: float,
    way_behind: float,
    total: float,
    own: float,
    step: float,
    states: float,
    taken: Floats,
    pair_s: float,
    live: float,
    late: float,
    prices: ClassPrices,
) -> bool:
    """Tell whether a rank may hold `number` more layers of class `added` beside what it has taken."""
    base = own + number * _seconds(added, prices)
    tail = step + number * prices.step_s[added]
    whole = total + num_ranks * pair_s
    limit = target_s + target_s * 1e-12
    extra = 0.0
    for is_known in (False, True):  # without recomputation, then with the least that fits
        if is_known:
            extra = least_extra(number, added, states + number * prices.state_bytes[added], taken, live, late, prices)
            if extra == 0.0:
                break
            if not np.isfinite(extra):
                return False
        time = base + extra
        if head_forward + way + num_microbatches * time + tail > limit:
            return False
        if kind == SPLIT:
            continue
        if kind == SERIAL:
            if num_microbatches * (whole + extra) > limit:
                return False
            continue
        if head + 2.0 * way + num_microbatches * time > limit:
            return False
        if kind == GPIPE:
            # Down with T forwards on this rank, up again with T backwards on it.
            if whole + extra + (num_microbatches - 1) * time + 2.0 * (way + way_behind) > limit:
                return False
        elif kind == UNIFORM and num_microbatches > num_ranks:
            # First forward down, its backward up to this rank, rounds on it, the last forward down, its backward up.
            rest = max(whole - head - base, 0.0)
            rounds = num_microbatches - num_ranks + 1 + rank
            if head + rounds * time + 2.0 * rest + 2.0 * way + 4.0 * way_behind > limit:
                return False
    return True


@njit(cache=True, no_cpython_wrapper=True)
def _reaches_with_chunks(
    target_s: float,
    num_ranks: int,
    num_microbatches: int,
    num_chunks: int,
    live: Floats,
    late: Floats,
    prices: ClassPrices,
) -> bool:
    """Caps for ranks that hold several chunks: no class may have more layers than all ranks together can hold of it."""
    classes = len(prices.forward_s)
    counts = np.zeros(classes)
    for run in range(len(prices.run_class)):
        counts[prices.run_class[run]] += prices.run_length[run]
    bulk = int(np.argmax(counts))
    caps = np.zeros(num_ranks)
    no_other = bulk - bulk - 1
    guess = int(counts[bulk]) // num_ranks + 1
    total = 0.0
    for rank in range(num_ranks):
        if rank > 0 and live[rank] == live[rank - 1] and late[rank] == late[rank - 1]:
            caps[rank] = caps[rank - 1]
        else:
            caps[rank] = _chunk_cap(
                target_s,
                bulk,
                no_other,
                counts[bulk],
                guess,
                num_microbatches,
                num_chunks,
                live[rank],
                late[rank],
                prices,
            )
            guess = int(caps[rank])
        total += caps[rank]
    if total < counts[bulk]:
        return False
    for single in range(classes):
        if single == bulk or counts[single] < 1.0:
            continue
        most = -np.inf
        for rank in range(num_ranks):
            if rank > 0 and live[rank] == live[rank - 1] and late[rank] == late[rank - 1]:
                continue
            beside = _chunk_cap(
                target_s,
                bulk,
                single,
                counts[bulk],
                int(caps[rank]),
                num_microbatches,
                num_chunks,
                live[rank],
                late[rank],
                prices,
            )
            if beside >= 0.0:
                most = max(most, total - caps[rank] + beside)
            if most >= counts[bulk]:
                break
        if most < counts[bulk]:
            return False
    return True


@njit(cache=True, no_cpython_wrapper=True)
def _chunk_cap(
    target_s: float,
    bulk: int,
    single: int,
    most: float,
    guess: int,
    num_microbatches: int,
    num_chunks: int,
    live: float,
    late: float,
    prices: ClassPrices,
) -> float:
    """Return how many layers of class `bulk` a rank can hold beside one of class `single` (-1: none); -1 when not even 0."""
    each = _seconds(bulk, prices)
    beside = np.zeros(len(prices.forward_s))
    fixed, step, states = num_chunks * 2.0 * prices.overhead_s, prices.latency_s[0], 0.0
    if single >= 0:
        beside[single] = 1.0
        fixed += _seconds(single, prices)
        step += prices.step_s[single]
        states += prices.state_bytes[single]
    limit = target_s * (1.0 + 1e-12)
    low, high, tries = -1, int(most), 0
    if each > 0.0 and np.isfinite(limit):
        in_time = (limit - step - num_microbatches * fixed) / (num_microbatches * each + prices.step_s[bulk])
        high = max(min(high, int(in_time + 1e-9)), -1)
    while low < high:
        middle = next_try(low, high, guess, tries)
        tries += 1
        extra = least_extra(middle, bulk, states + middle * prices.state_bytes[bulk], beside, live, late, prices)
        own = num_microbatches * (fixed + middle * each + extra) + step + middle * prices.step_s[bulk]
        if own <= limit:
            low = middle
        else:
            high = middle - 1
    return float(low)
