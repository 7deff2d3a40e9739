"""Bounds for a whole space at once, before any order is made: they hold for every partition and recomputation.

With t, phi t the seconds of one microbatch over all layers and their forward part, tau the seconds once a step, D ranks,
T microbatches:

    area      (T t + tau) / D                         all work, spread evenly; any order
    layer     T t_l + tau_l                           the longest layer; any order
    uniform   t (T + D - 1) / D                       1F1B with T > D and GPipe: no cut into real-valued stages is better
    rank      t / (1 - q^D),  q = 1 - 1/T             one chunk, full backwards: weighted mean of the path bounds P_r
    split     t / phi' (1 - q^D),  q = 1 - phi / T    one chunk, split backwards, phi' = 1 / phi

P_r: rank r starts after microbatch 0 went through the ranks above, then has T times its own work, and its last backward
goes up again: sum_{s<r} t_s + T t_r <= M. With weights lambda_r = q^(D-1-r) every t_s has the same coefficient, which
gives the rank bound; with split backwards only the forward part of the head counts, which gives the split bound.

`reach` (the caps) is the integer form: at a target X every rank takes as many layers as its own bound and its memory
admit, with the least recomputation a linear relaxation allows; if the layers run out of ranks, every completion takes
longer than X. For one chunk a rank, ranks fill one after the other, which is exact because what a rank can reach never
falls when it starts later. For several chunks a rank takes any layers of a class, in any order.

Papers: P_r as in DAPPLE (Fan et al., PPoPP 2021); the proof of the uniform bound stands in `docs/search.md`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from stagewright.planner.search.memory_fit import least_seconds
from stagewright.planner.search.pricing import NUM_MICROBATCHES, PP, LayerClasses, Priced

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

UNIFORM, FUSED, SPLIT, CHUNKS, GPIPE, SERIAL, BOTH_WAYS = range(7)
LIVE = {"one": 0, "all": 1, "depth": 2, "double": 3, "group": 4}

_MOST_ENUMERATED = 24

KINDS = {
    "uniform": UNIFORM,
    "fused": FUSED,
    "split": SPLIT,
    "chunks": CHUNKS,
    "gpipe": GPIPE,
    "serial": SERIAL,
    "both ways": BOTH_WAYS,
}


def work_bounds(priced: Priced, classes: LayerClasses, overhead_s: float, step_overhead_s: float) -> Floats:
    """Return the larger of the area bound and half the layer bound of each configuration, [n].

    They hold for any order; half, because two replicas share a layer's microbatches.
    """
    ranks = priced.shape[:, PP].astype(np.float64)
    count = priced.shape[:, NUM_MICROBATCHES].astype(np.float64)
    numbers = classes.counts.astype(np.float64)
    each = priced.time_s
    area = count * (each @ numbers / ranks + 2.0 * overhead_s) + priced.step_s @ numbers / ranks
    layer = (0.5 * count[:, None] * each + priced.step_s).max(axis=1) + count * overhead_s
    return np.asarray(np.maximum(area, layer) + priced.latency_s + step_overhead_s)


def memory_possible(priced: Priced, classes: LayerClasses, capacity_bytes: float, levels: Bools) -> Bools:
    """Return which configurations might fit, [n]: all states and one microbatch's activations over all ranks.

    One microbatch is live on all layers at once, when its last forward ends. Rounding is in favour of fitting.
    """
    allowed = np.flatnonzero(levels)
    numbers = classes.counts.astype(np.float64)
    kept = priced.kept_bytes[:, allowed].min(axis=1)
    ranks = priced.shape[:, PP].astype(np.float64)
    total = (priced.state_bytes + kept) @ numbers
    one = (priced.state_bytes + (priced.kept_bytes + priced.workspace_bytes)[:, allowed].min(axis=1)).max(axis=1)
    room = capacity_bytes * (1 + 1e-9)
    return np.asarray((total <= ranks * room) & (one <= room))


def family_bounds(
    priced: Priced,
    classes: LayerClasses,
    rows: Longs,
    kinds: Longs,
    *,
    work_s: Floats,
    overhead_s: float,
    step_overhead_s: float,
) -> Floats:
    """Return a bound for each (configuration row, kind of family), at least the configuration's work bound."""
    ranks_of = priced.shape[:, PP].astype(np.float64)
    count_of = priced.shape[:, NUM_MICROBATCHES].astype(np.float64)
    numbers = classes.counts.astype(np.float64)
    times = priced.time_s
    forward_of = priced.forward_s @ numbers + ranks_of * overhead_s
    each_of = times @ numbers + 2.0 * ranks_of * overhead_s
    layer_of = (count_of[:, None] * times + priced.step_s).max(axis=1) + 2.0 * count_of * overhead_s + step_overhead_s
    ranks, count, forward, each, layer = (
        column[rows] for column in (ranks_of, count_of, forward_of, each_of, layer_of)
    )
    bound = np.where(kinds == BOTH_WAYS, work_s[rows], np.maximum(work_s[rows], layer))
    uniform = (kinds == GPIPE) | ((kinds == UNIFORM) & (count > ranks))
    bound = np.where(uniform, np.maximum(bound, each * (count + ranks - 1) / ranks + step_overhead_s), bound)
    serial = each * count + step_overhead_s
    bound = np.where(kinds == SERIAL, np.maximum(bound, serial), bound)
    fused = (kinds == FUSED) | ((kinds == UNIFORM) & ~uniform)
    rank_bound = each / (1.0 - (1.0 - 1.0 / count) ** ranks)
    bound = np.where(fused, np.maximum(bound, rank_bound + step_overhead_s), bound)
    share = forward / each
    split_bound = each * share / (1.0 - (1.0 - share / count) ** ranks)
    return np.where(kinds == SPLIT, np.maximum(bound, split_bound + step_overhead_s), bound)


@njit(cache=True, nogil=True)
def refine(
    low_s: Floats,
    high_s: float,
    steps: int,
    rows: Longs,
    kinds: Longs,
    live_codes: Longs,
    chunks: Longs,
    replicas: Longs,
    splits: Bools,
    shape: Ints,
    run_class: Ints,
    run_length: Ints,
    forward_s: Floats,
    input_grad_s: Floats,
    weight_grad_s: Floats,
    recompute_s: Floats,
    kept_bytes: Floats,
    late_bytes: Floats,
    workspace_bytes: Floats,
    state_bytes: Floats,
    step_s: Floats,
    latency_s: Floats,
    overhead_s: float,
    levels: Bools,
    capacity_bytes: float,
) -> Floats:
    """Return for each candidate the least target its caps reach, to 2^-steps of the interval; infinity above `high_s`.

    The value returned is one that the caps do *not* reach, hence a bound; `low_s` where even that is reached.
    """
    result = np.empty(len(rows))
    for index in range(len(rows)):
        row = rows[index]
        ranks, count = np.int64(shape[row, 3]), np.int64(shape[row, 10])  # one type, so that callees compile once
        live, late = np.empty(int(ranks)), np.zeros(int(ranks))
        hops = np.zeros(max(int(ranks) - 1, 0))
        for rank in range(ranks):
            live[rank] = _live(live_codes[index], rank, ranks, count)
        low, high = low_s[index], high_s
        reached = False
        for step in range(steps + 1):
            target = high if step == 0 else 0.5 * (low + high)
            if pool_admits(
                target,
                ranks,
                count,
                replicas[index],
                splits[index],
                run_class,
                run_length,
                forward_s[row],
                input_grad_s[row],
                weight_grad_s[row],
                recompute_s[row],
                kept_bytes[row],
                workspace_bytes[row],
                state_bytes[row],
                step_s[row],
                overhead_s,
                levels,
                capacity_bytes,
            ) and reaches(
                target,
                kinds[index],
                ranks,
                count,
                chunks[index],
                run_class,
                run_length,
                forward_s[row],
                input_grad_s[row],
                weight_grad_s[row],
                recompute_s[row],
                kept_bytes[row],
                late_bytes[row],
                workspace_bytes[row],
                state_bytes[row],
                step_s[row],
                latency_s[row],
                overhead_s,
                hops,
                live,
                late,
                levels,
                capacity_bytes,
            ):
                reached, high = True, target
            elif step == 0:
                break
            else:
                low = target
        result[index] = low if reached else np.inf
    return result


@njit(cache=True)
def _live(code: int, rank: int, num_ranks: int, num_microbatches: int) -> float:
    """Return the least microbatches every chunk of a rank holds at once, by the code of LIVE."""
    left = num_ranks - rank
    if code == 1:
        return float(num_microbatches)
    if code == 2:
        return float(min(left, num_microbatches))
    if code == 3:
        return float(min(2 * left - 1, num_microbatches))
    if code == 4:
        return float(min(num_ranks, 2 * left - 1, num_microbatches))
    return 1.0


@njit(cache=True)
def reaches(
    target_s: float,
    kind: int,
    num_ranks: int,
    num_microbatches: int,
    num_chunks: int,
    run_class: Ints,
    run_length: Ints,
    forward_s: Floats,
    input_grad_s: Floats,
    weight_grad_s: Floats,
    recompute_s: Floats,
    kept_bytes: Floats,
    late_bytes: Floats,
    workspace_bytes: Floats,
    state_bytes: Floats,
    step_s: Floats,
    latency_s: float,
    overhead_s: float,
    hop_s: Floats,
    live: Floats,
    late: Floats,
    levels: Bools,
    capacity_bytes: float,
) -> bool:
    """Tell whether the caps leave a completion of at most `target_s` possible; `live`, `late` [D] are least multiplicities.

    `hop_s` [D - 1] are the least seconds of the hops between neighbouring ranks, zeros where they are not known.
    """
    if kind == BOTH_WAYS:
        return True
    if kind == CHUNKS:
        reached: bool = _reaches_with_chunks(
            target_s,
            num_ranks,
            num_microbatches,
            num_chunks,
            run_class,
            run_length,
            forward_s,
            input_grad_s,
            weight_grad_s,
            recompute_s,
            kept_bytes,
            late_bytes,
            workspace_bytes,
            state_bytes,
            step_s,
            latency_s,
            overhead_s,
            live,
            late,
            levels,
            capacity_bytes,
        )
        return reached
    runs = len(run_class)
    total = 0.0
    for run in range(runs):
        kinds = run_class[run]
        total += run_length[run] * (forward_s[kinds] + input_grad_s[kinds] + weight_grad_s[kinds])
    layers_left = 0
    for run in range(runs):
        layers_left += run_length[run]
    pair_s = (3.0 if kind == SPLIT else 2.0) * overhead_s
    head, head_forward, way = 0.0, 0.0, 0.0
    run, taken = 0, 0  # next layer: position in its run
    taken_classes = np.zeros(len(forward_s))
    for rank in range(num_ranks):
        way_behind = 0.0
        for index in range(rank, num_ranks - 1):
            way_behind += hop_s[index]
        taken_classes[:] = 0.0
        own, own_forward, step, states = pair_s, overhead_s, latency_s, 0.0
        most = layers_left - (num_ranks - 1 - rank)
        stage_layers = 0
        while stage_layers < most:
            kinds = np.int64(run_class[run])
            want = min(run_length[run] - taken, most - stage_layers)
            low, high = 0, want
            while low < high:
                middle = (low + high + 1) // 2
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
                    forward_s,
                    input_grad_s,
                    weight_grad_s,
                    recompute_s,
                    kept_bytes,
                    late_bytes,
                    workspace_bytes,
                    state_bytes,
                    step_s,
                    pair_s,
                    live[rank],
                    late[rank],
                    levels,
                    capacity_bytes,
                ):
                    low = middle
                else:
                    high = middle - 1
            each = forward_s[kinds] + input_grad_s[kinds] + weight_grad_s[kinds]
            taken_classes[kinds] += low
            own += low * each
            own_forward += low * forward_s[kinds]
            step += low * step_s[kinds]
            states += low * state_bytes[kinds]
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
    return layers_left == 0


@njit(cache=True)
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
    forward_s: Floats,
    input_grad_s: Floats,
    weight_grad_s: Floats,
    recompute_s: Floats,
    kept_bytes: Floats,
    late_bytes: Floats,
    workspace_bytes: Floats,
    state_bytes: Floats,
    step_s: Floats,
    pair_s: float,
    live: float,
    late: float,
    levels: Bools,
    capacity_bytes: float,
) -> bool:
    """Tell whether a rank may hold `number` more layers of class `added` beside what it has taken."""
    each = forward_s[added] + input_grad_s[added] + weight_grad_s[added]
    base = own + number * each
    extra = _least_extra(
        number,
        added,
        states + number * state_bytes[added],
        taken,
        recompute_s,
        kept_bytes,
        late_bytes,
        workspace_bytes,
        live,
        late,
        levels,
        capacity_bytes,
    )
    if not np.isfinite(extra):
        return False
    time = base + extra
    tail = step + number * step_s[added]
    slack = target_s * 1e-12
    if head_forward + way + num_microbatches * time + tail > target_s + slack:
        return False
    if kind == SPLIT:
        return True
    if kind == SERIAL:
        return bool(num_microbatches * (total + num_ranks * pair_s + extra) <= target_s + slack)
    if head + 2.0 * way + num_microbatches * time > target_s + slack:
        return False
    whole = total + num_ranks * pair_s
    if kind == GPIPE:
        # Down with T forwards on this rank, up again with T backwards on it.
        if whole + extra + (num_microbatches - 1) * time + 2.0 * (way + way_behind) > target_s + slack:
            return False
    elif kind == UNIFORM and num_microbatches > num_ranks:
        # First forward down, its backward up to this rank, rounds on it, the last forward down, its backward up.
        rest = max(whole - head - base, 0.0)
        rounds = num_microbatches - num_ranks + 1 + rank
        if head + rounds * time + 2.0 * rest + 2.0 * way + 4.0 * way_behind > target_s + slack:
            return False
    return True


@njit(cache=True)
def _least_extra(
    number: int,
    added: int,
    states: float,
    taken: Floats,
    recompute_s: Floats,
    kept_bytes: Floats,
    late_bytes: Floats,
    workspace_bytes: Floats,
    live: float,
    late: float,
    levels: Bools,
    capacity_bytes: float,
) -> float:
    """Return the least recompute seconds with which the layers fit; infinite when they never do."""
    classes = len(taken)
    layers = taken.copy()
    layers[added] += number
    each = np.empty((3, classes))
    floor, highest = 0.0, 0.0
    full = states
    for kinds in range(classes):
        if layers[kinds] <= 0.0:
            continue
        smallest, first = np.inf, True
        for level in range(3):
            if levels[level]:
                smallest = min(smallest, workspace_bytes[level, kinds])
                if first:
                    full += layers[kinds] * (live * kept_bytes[level, kinds] + late * late_bytes[level, kinds])
                    highest = max(highest, workspace_bytes[level, kinds])
                    first = False
        floor = max(floor, smallest)
    if full + highest <= capacity_bytes and levels[0]:
        return 0.0
    number_alike, kind_alike, only_one_kind = 0.0, -1, True
    for kinds in range(classes):
        if layers[kinds] > 0.0 and _has_choice(kinds, recompute_s, kept_bytes, late_bytes, workspace_bytes, levels):
            if kind_alike < 0:
                kind_alike = kinds
            if _alike(kinds, kind_alike, recompute_s, kept_bytes, late_bytes, workspace_bytes):
                number_alike += layers[kinds]
            else:
                only_one_kind = False
    if only_one_kind and kind_alike >= 0 and number_alike <= _MOST_ENUMERATED:
        others = states
        for kinds in range(classes):
            if layers[kinds] > 0.0 and not _alike(
                kinds, kind_alike, recompute_s, kept_bytes, late_bytes, workspace_bytes
            ):
                level = 0
                while not levels[level]:
                    level += 1
                others += layers[kinds] * (live * kept_bytes[level, kinds] + late * late_bytes[level, kinds])
        least: float = _least_integer(
            int(number_alike),
            kind_alike,
            others,
            floor,
            recompute_s,
            kept_bytes,
            late_bytes,
            workspace_bytes,
            live,
            late,
            levels,
            capacity_bytes,
        )
        return least
    # The largest workspace in use is one of the layers': try each as the ceiling, levels above it excluded.
    best, ceiling = np.inf, floor
    while True:
        for kinds in range(classes):
            for level in range(3):
                each[level, kinds] = np.inf
                if levels[level] and layers[kinds] > 0.0 and workspace_bytes[level, kinds] <= ceiling:
                    each[level, kinds] = live * kept_bytes[level, kinds] + late * late_bytes[level, kinds]
        if ceiling + states <= capacity_bytes:
            best = min(best, least_seconds(layers, recompute_s, each, ceiling, capacity_bytes - states))
        higher = np.inf
        for kinds in range(classes):
            for level in range(3):
                if levels[level] and layers[kinds] > 0.0 and workspace_bytes[level, kinds] > ceiling:
                    higher = min(higher, workspace_bytes[level, kinds])
        if best == 0.0 or not np.isfinite(higher) or higher + states > capacity_bytes:
            return float(best)
        ceiling = higher


@njit(cache=True)
def _has_choice(
    kinds: int, recompute_s: Floats, kept_bytes: Floats, late_bytes: Floats, workspace_bytes: Floats, levels: Bools
) -> bool:
    """Tell whether the allowed levels of a class differ in anything."""
    first = -1
    for level in range(3):
        if levels[level]:
            if first < 0:
                first = level
            elif (
                recompute_s[level, kinds] != recompute_s[first, kinds]
                or kept_bytes[level, kinds] != kept_bytes[first, kinds]
                or late_bytes[level, kinds] != late_bytes[first, kinds]
                or workspace_bytes[level, kinds] != workspace_bytes[first, kinds]
            ):
                return True
    return False


@njit(cache=True)
def _alike(
    first: int, second: int, recompute_s: Floats, kept_bytes: Floats, late_bytes: Floats, workspace_bytes: Floats
) -> bool:
    """Tell whether two classes cost the same at every level."""
    for level in range(3):
        if (
            recompute_s[level, first] != recompute_s[level, second]
            or kept_bytes[level, first] != kept_bytes[level, second]
            or late_bytes[level, first] != late_bytes[level, second]
            or workspace_bytes[level, first] != workspace_bytes[level, second]
        ):
            return False
    return True


@njit(cache=True)
def _least_integer(
    number: int,
    kinds: int,
    fixed: float,
    floor: float,
    recompute_s: Floats,
    kept_bytes: Floats,
    late_bytes: Floats,
    workspace_bytes: Floats,
    live: float,
    late: float,
    levels: Bools,
    capacity_bytes: float,
) -> float:
    """Return the least recompute seconds of `number` equal layers beside `fixed` bytes, by trying every split."""
    best = np.inf
    for full in range(number + 1):
        if full > 0 and not levels[2]:
            break
        for half in range(number - full + 1):
            if half > 0 and not levels[1]:
                break
            none = number - full - half
            if none > 0 and not levels[0]:
                continue
            used, seconds, workspace = fixed, 0.0, floor
            for level, count in ((0, none), (1, half), (2, full)):
                if count > 0:
                    used += count * (live * kept_bytes[level, kinds] + late * late_bytes[level, kinds])
                    seconds += count * recompute_s[level, kinds]
                    workspace = max(workspace, workspace_bytes[level, kinds])
            if seconds < best and used + workspace <= capacity_bytes:
                best = seconds
    return best


@njit(cache=True)
def pool_admits(
    target_s: float,
    num_ranks: int,
    num_microbatches: int,
    num_replicas: int,
    split: bool,
    run_class: Ints,
    run_length: Ints,
    forward_s: Floats,
    input_grad_s: Floats,
    weight_grad_s: Floats,
    recompute_s: Floats,
    kept_bytes: Floats,
    workspace_bytes: Floats,
    state_bytes: Floats,
    step_s: Floats,
    overhead_s: float,
    levels: Bools,
    capacity_bytes: float,
) -> bool:
    """Tell whether all ranks' time and memory together leave a step of `target_s` possible, in any order.

    A microbatch's activation of layer l lives at least from its forward until its own input gradient, through all
    layers behind it: R_l seconds. So T sum_l kept_l R_l <= target * (bytes of all ranks beside states and workspace).
    Where that fails, layers must be recomputed: first those whose bytes times seconds are most for a second of work.
    """
    runs = len(run_class)
    count = float(num_microbatches)
    work, step, states, largest = 0.0, 0.0, 0.0, 0.0
    for run in range(runs):
        kinds = run_class[run]
        work += run_length[run] * (forward_s[kinds] + input_grad_s[kinds] + weight_grad_s[kinds])
        step += run_length[run] * step_s[kinds]
        states += num_replicas * run_length[run] * state_bytes[kinds]
        smallest = np.inf
        for level in range(3):
            if levels[level]:
                smallest = min(smallest, workspace_bytes[level, kinds])
        largest = smallest if run == 0 else min(largest, smallest)
    room = target_s * (num_ranks * (capacity_bytes - largest) - states)
    pair_s = 2.0 * overhead_s * num_ranks
    spare_s = num_ranks * target_s - (count * (work + pair_s) + num_replicas * step)
    slack = 1e-9 * num_ranks * target_s
    if spare_s < -slack:
        return False
    if room < 0.0:
        return False
    # Byte-seconds at the weakest level, then the steps to stronger levels as (run, level pair), each with R falling.
    lowest = 0
    while not levels[lowest]:
        lowest += 1
    needed = -room
    behind = np.zeros(runs)
    each = np.zeros(runs)
    after = 0.0
    for run in range(runs - 1, -1, -1):
        kinds = run_class[run]
        each[run] = forward_s[kinds] + input_grad_s[kinds] + (0.0 if split else weight_grad_s[kinds])
        behind[run] = after
        number = float(run_length[run])
        mean = behind[run] + each[run] * (number + 1.0) / 2.0
        needed += count * number * kept_bytes[lowest, kinds] * mean
        after += number * each[run]
    if needed <= 0.0:
        return True
    # Hull segments of every run; a segment's layers are taken from the front, where R is largest.
    slope = np.empty(2 * runs)
    saved = np.empty(2 * runs)
    owner = np.empty(2 * runs, dtype=np.int64)
    number_of = 0
    for run in range(runs):
        kinds = run_class[run]
        level = lowest
        while True:
            best, target = np.inf, -1
            for high in range(level + 1, 3):
                if levels[high]:
                    gain = kept_bytes[level, kinds] - kept_bytes[high, kinds]
                    if gain > 0.0:
                        price = (recompute_s[high, kinds] - recompute_s[level, kinds]) / gain
                        if price < best:
                            best, target = price, high
            if target < 0:
                break
            slope[number_of] = best
            saved[number_of] = kept_bytes[level, kinds] - kept_bytes[target, kinds]
            owner[number_of] = run
            number_of += 1
            level = target
    taken = np.zeros(number_of)
    seconds = 0.0
    while needed > 0.0:
        best, chosen = np.inf, -1
        for index in range(number_of):
            run = owner[index]
            if taken[index] < run_length[run]:
                residency = behind[run] + each[run] * (run_length[run] - taken[index])
                price = slope[index] / residency
                if price < best:
                    best, chosen = price, index
        if chosen < 0:
            return False
        run = owner[chosen]
        residency = behind[run] + each[run] * (run_length[run] - taken[chosen])
        gain = count * saved[chosen] * residency
        share = min(1.0, needed / gain)
        seconds += share * slope[chosen] * saved[chosen]
        needed -= gain * share
        taken[chosen] += 1.0
        if count * seconds > spare_s + slack:
            return False
    return True


@njit(cache=True)
def _reaches_with_chunks(
    target_s: float,
    num_ranks: int,
    num_microbatches: int,
    num_chunks: int,
    run_class: Ints,
    run_length: Ints,
    forward_s: Floats,
    input_grad_s: Floats,
    weight_grad_s: Floats,
    recompute_s: Floats,
    kept_bytes: Floats,
    late_bytes: Floats,
    workspace_bytes: Floats,
    state_bytes: Floats,
    step_s: Floats,
    latency_s: float,
    overhead_s: float,
    live: Floats,
    late: Floats,
    levels: Bools,
    capacity_bytes: float,
) -> bool:
    """Caps for ranks that hold several chunks: no class may have more layers than all ranks together can hold of it."""
    classes = len(forward_s)
    counts = np.zeros(classes)
    for run in range(len(run_class)):
        counts[run_class[run]] += run_length[run]
    bulk = int(np.argmax(counts))
    caps = np.zeros(num_ranks)
    no_other = bulk - bulk - 1
    for rank in range(num_ranks):
        caps[rank] = _chunk_cap(
            target_s,
            bulk,
            no_other,
            counts[bulk],
            num_microbatches,
            num_chunks,
            forward_s,
            input_grad_s,
            weight_grad_s,
            recompute_s,
            kept_bytes,
            late_bytes,
            workspace_bytes,
            state_bytes,
            step_s,
            latency_s,
            overhead_s,
            live[rank],
            late[rank],
            levels,
            capacity_bytes,
        )
    total = caps.sum()
    if total < counts[bulk]:
        return False
    for single in range(classes):
        if single == bulk or counts[single] < 1.0:
            continue
        most = -np.inf
        for rank in range(num_ranks):
            beside = _chunk_cap(
                target_s,
                bulk,
                single,
                counts[bulk],
                num_microbatches,
                num_chunks,
                forward_s,
                input_grad_s,
                weight_grad_s,
                recompute_s,
                kept_bytes,
                late_bytes,
                workspace_bytes,
                state_bytes,
                step_s,
                latency_s,
                overhead_s,
                live[rank],
                late[rank],
                levels,
                capacity_bytes,
            )
            if beside >= 0.0:
                most = max(most, total - caps[rank] + beside)
            if most >= counts[bulk]:
                break
        if most < counts[bulk]:
            return False
    return True


@njit(cache=True)
def _chunk_cap(
    target_s: float,
    bulk: int,
    single: int,
    most: float,
    num_microbatches: int,
    num_chunks: int,
    forward_s: Floats,
    input_grad_s: Floats,
    weight_grad_s: Floats,
    recompute_s: Floats,
    kept_bytes: Floats,
    late_bytes: Floats,
    workspace_bytes: Floats,
    state_bytes: Floats,
    step_s: Floats,
    latency_s: float,
    overhead_s: float,
    live: float,
    late: float,
    levels: Bools,
    capacity_bytes: float,
) -> float:
    """Return how many layers of class `bulk` a rank can hold beside one of class `single` (-1: none); -1 when not even 0."""
    each = forward_s[bulk] + input_grad_s[bulk] + weight_grad_s[bulk]
    beside = np.zeros(len(forward_s))
    fixed, step, states = num_chunks * 2.0 * overhead_s, latency_s, 0.0
    if single >= 0:
        beside[single] = 1.0
        fixed += forward_s[single] + input_grad_s[single] + weight_grad_s[single]
        step += step_s[single]
        states += state_bytes[single]
    limit = target_s * (1.0 + 1e-12)
    low, high = -1, int(most)
    if each > 0.0 and np.isfinite(limit):
        high = max(
            min(high, int((limit - step - num_microbatches * fixed) / (num_microbatches * each + step_s[bulk]) + 1e-9)),
            -1,
        )
    while low < high:
        middle = (low + high + 1) // 2
        extra = _least_extra(
            middle,
            bulk,
            states + middle * state_bytes[bulk],
            beside,
            recompute_s,
            kept_bytes,
            late_bytes,
            workspace_bytes,
            live,
            late,
            levels,
            capacity_bytes,
        )
        own = num_microbatches * (fixed + middle * each + extra) + step + middle * step_s[bulk]
        if own <= limit:
            low = middle
        else:
            high = middle - 1
    return float(low)
