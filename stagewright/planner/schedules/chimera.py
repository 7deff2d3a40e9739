"""Chimera: f pairs of model replicas in opposite directions share the ranks, so that one fills the bubbles of the other.

Pair i runs its down replica from rank i D / f on and its up replica the other way round; microbatch m belongs to
replica m mod 2 f. A replica's stage s has at most min(D / (2 f), D - s) microbatches in flight, or D - s where that is
shorter for the costs, a rank at most D, and each rank merges the 2 f orders by time (`1:` marks the up replica):

    rank 0  0F0   0F2         1:3F1 1:3B1 1:3F3 1:3B3 0B0         0B2
    rank 1        1F0   1:2F1 1F2   1:2F3 1:2B1 1B0   1:2B3 1B2
    rank 2        1:1F1 2F0   1:1F3 2F2   2B0   1:1B1 2B2   1:1B3
    rank 3  1:0F1 1:0F3       3F0   3B0   3F2   3B2   1:0B1       1:0B3

For T a multiple of D and B = F the merge has no conflict: idle over total is (D/f - 2) / (2 T + D/f - 2), for one pair
(D - 2) / (2 T + D - 2). A rank holds D/2 + 1 activations at the ends and D in the middle (f = 1), and the weights of
2 f stages.
When B = 2 F and T > D, forwards leave holes between the basic units; three ways to go on, `parameters["variant"]`:

- concatenation: the units follow each other directly and the list scheduler merges them;
- doubling: a forward takes two microbatches at once and so as long as a backward, at twice the activations;
- halving: a backward takes half a microbatch (two slices of the batch), at the activations of concatenation.

All three reach (D - 2) / (3 T / 2 + D - 2) for B = 2 F here, or less. By default the best for the costs is taken: doubling
only where it saves 5 % of the makespan, because it doubles the memory, and halving only when it is asked for or when
doubling passes the memory cap, because the costs do not tell what half a microbatch loses in efficiency.

Paper: Li and Hoefler, Chimera: Efficiently Training Large-Scale Neural Networks with Bidirectional Pipelines, SC 2021.
"""

from __future__ import annotations

import itertools

import numpy as np

from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.schedules.family import ScheduleFamily, ScheduleRequest
from stagewright.planner.schedules.list_scheduling import (
    BACKWARD,
    FORWARD,
    Chains,
    Words,
    decode,
    measure,
    orders_of,
    requested_chains,
)
from stagewright.planner.schedules.peak import peak_activations
from stagewright.planner.schedules.schedule import KIND, MICROBATCH, REPLICA, SLICE, Orders, Schedule
from stagewright.planner.schedules.sizes import (
    Placement,
    Sizes,
    check_placement,
    costs_of,
    effort_of,
    require,
    sizes_of,
)
from stagewright.planner.schedules.wave import backward_first

CONCATENATION, DOUBLING, HALVING = VARIANTS = ("concatenation", "doubling", "halving")
_WORTH_IT = 0.05  # share of the makespan that a costlier variant must save
_DECODING_COST = 16.0  # a decoding takes the time of as many sweeps over its actions
_SHARES = (0.0, 0.5, 1.0)  # how long a rank waits for a backward, in forwards


def chimera(request: ScheduleRequest) -> Schedule:
    """Return the merged order of 2 f replicas, in the asked or the best variant."""
    sizes = sizes_of(request, "chimera")
    pairs = int(request.parameters.get("pairs", 1))
    _check(sizes, pairs)
    placement = bidirectional_placement(sizes.num_ranks, pairs)
    check_placement(request, placement, "chimera")
    best: tuple[tuple[bool, float], Schedule] | None = None
    for variant in _variants(request, sizes, pairs):
        words, chains, makespan_s = _merge(request, sizes, placement, variant)
        schedule = _assemble(sizes, placement, variant, pairs, orders_of(chains, words, 2 * pairs))
        value = (not _fits(schedule, request, costs_of(request, sizes)), makespan_s)
        if (
            best is None
            or value[0] < best[0][0]
            or (value[0] == best[0][0] and value[1] < best[0][1] * (1.0 - _WORTH_IT))
        ):
            best = value, schedule
    assert best is not None, "there is at least one variant"
    return best[1]


def bidirectional_placement(num_ranks: int, num_pairs: int = 1) -> Placement:
    """Return the ranks of the stages of each replica, down and up in turn, shape [2 f, D]."""
    stage = np.arange(num_ranks, dtype=np.int32)
    downs = [(stage + pair * num_ranks // num_pairs) % num_ranks for pair in range(num_pairs)]
    return np.stack([row for down in downs for row in (down, down[::-1])]).astype(np.int32)


def _check(sizes: Sizes, pairs: int) -> None:
    ranks, microbatches = sizes.num_ranks, sizes.num_microbatches
    require(
        ranks % 2 == 0,
        f"chimera runs its replicas in opposite directions over an even number of ranks, {ranks} is odd",
        field="num_ranks",
        hint=f"take {ranks - 1} or {ranks + 1} ranks, or wave",
    )
    require(
        pairs >= 1 and (ranks // 2) % pairs == 0,
        f"the pairs of replicas divide half the ranks: {ranks // 2} is no multiple of {pairs}",
        field="pairs",
    )
    require(
        microbatches % (2 * pairs) == 0,
        f"chimera deals its microbatches to {2 * pairs} replicas, {microbatches} is no multiple of {2 * pairs}",
        field="num_microbatches",
        hint=f"take {-(-microbatches // (2 * pairs)) * 2 * pairs} microbatches",
    )


def _variants(request: ScheduleRequest, sizes: Sizes, pairs: int) -> list[str]:
    """Return the variants to compare; the asked one alone, if any."""
    asked = request.parameters.get("variant")
    can_double = sizes.num_microbatches % (4 * pairs) == 0
    if asked is None:
        if sizes.num_microbatches <= sizes.num_ranks:
            return [CONCATENATION]
        doubled = 2.0 * float(costs_of(request, sizes).activation.max()) * sizes.num_ranks
        if can_double and (request.memory_cap is None or doubled <= request.memory_cap):
            return [CONCATENATION, DOUBLING]
        return [CONCATENATION] if request.memory_cap is None else [CONCATENATION, HALVING]
    require(asked in VARIANTS, f"chimera's variant is one of {', '.join(VARIANTS)}, not {asked!r}", field="variant")
    require(
        asked != DOUBLING or can_double,
        f"chimera with forward doubling takes microbatches in pairs on {2 * pairs} replicas, "
        f"{sizes.num_microbatches} is no multiple of {4 * pairs}",
        field="num_microbatches",
    )
    return [str(asked)]


def _merge(request: ScheduleRequest, sizes: Sizes, placement: Placement, variant: str) -> tuple[Words, Chains, float]:
    """Return the best merged words over the list scheduler's rules, in units of the variant, with their makespan."""
    replicas = len(placement)
    single = requested_chains(request, sizes, placement, is_split=False)
    chains = single
    if variant == DOUBLING:
        seconds = single.seconds * np.array([2.0, 1.0, 1.0])[:, None]
        chains = single._replace(seconds=seconds, units=single.units // 2, fan=2)
    elif variant == HALVING:
        chains = single._replace(seconds=single.seconds * np.array([1.0, 0.5, 0.5])[:, None], fan=2)
    stage = np.tile(np.arange(sizes.num_stages), replicas)
    in_flight = sizes.num_ranks - stage
    limits = np.maximum(1, np.minimum(sizes.num_ranks // replicas, in_flight)), in_flight
    first = backward_first(chains)._replace(cap=np.full(sizes.num_ranks, float(sizes.num_ranks)))
    best: tuple[Words, float] | None = None
    budget = effort_of(request)
    for ahead, is_forward_first, share in itertools.product(limits, (False, True), _SHARES):
        target_s = first.target_s[[BACKWARD, FORWARD, 2]] if is_forward_first else first.target_s
        tolerance_s = np.zeros_like(chains.seconds)
        tolerance_s[FORWARD if is_forward_first else BACKWARD] = share * chains.seconds[FORWARD]
        words = decode(chains, first._replace(target_s=target_s, tolerance_s=tolerance_s, ahead=ahead))
        if variant == DOUBLING:
            makespan_s = measure(single, _in_pairs(words, len(single.rank))).makespan_s
        else:
            makespan_s = measure(chains, words).makespan_s
        if best is None or makespan_s < best[1] - chains.slack_s:
            best = words, makespan_s
        budget -= _DECODING_COST * len(words.letters)
        if budget <= 0.0:
            break
    assert best is not None
    return best[0], chains, best[1]


def _in_pairs(words: Words, num_positions: int) -> Words:
    """Return the words over single microbatches of words whose forwards take two."""
    times = np.where(words.letters < num_positions, 2, 1)
    offset = np.concatenate([[0], np.cumsum(times)])[words.offset]
    return Words(np.repeat(words.letters, times), offset)


def _assemble(sizes: Sizes, placement: Placement, variant: str, pairs: int, orders: tuple[Orders, ...]) -> Schedule:
    """Return the schedule whose units are spelled out as microbatches, or as halves of them."""
    if variant != CONCATENATION:
        orders = tuple(_expand(order, len(placement), is_doubling=variant == DOUBLING) for order in orders)
    return Schedule(
        "chimera",
        sizes.num_microbatches,
        placement,
        orders,
        num_slices=2 if variant == HALVING else 1,
        parameters={"pairs": pairs, "variant": variant},
    )


def _expand(order: Orders, replicas: int, *, is_doubling: bool) -> Orders:
    """Return the order with each forward unit as two actions."""
    is_forward = order[:, KIND] == 0
    rows = np.repeat(order, np.where(is_forward, 2, 1), axis=0)
    is_forward = rows[:, KIND] == 0
    half = np.zeros(len(rows), dtype=np.int32)
    half[is_forward] = np.arange(np.count_nonzero(is_forward)) % 2
    unit = (rows[:, MICROBATCH] - rows[:, REPLICA]) // replicas
    if is_doubling:
        unit = np.where(is_forward, 2 * unit + half, unit)
    else:
        rows[:, SLICE] = np.where(is_forward, half, 1 - unit % 2)
        unit = np.where(is_forward, unit, unit // 2)
    rows[:, MICROBATCH] = unit * replicas + rows[:, REPLICA]
    return rows


def _fits(schedule: Schedule, request: ScheduleRequest, costs: StageCosts) -> bool:
    if request.memory_cap is None:
        return True
    return bool((peak_activations(schedule, costs) <= request.memory_cap * (1.0 + 1e-9)).all())


FAMILY = ScheduleFamily(
    "chimera",
    "Li and Hoefler, Chimera: Efficiently Training Large-Scale Neural Networks with Bidirectional Pipelines, SC 2021",
    chimera,
    num_replicas=2,
    constraint="D is even, because replicas run in opposite directions; T is a multiple of the replicas, who share it",
    improves=True,
    takes_cap=True,
)
