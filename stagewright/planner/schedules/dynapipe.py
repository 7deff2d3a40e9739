"""DynaPipe: microbatches of different size, made for each batch of sequences, and a 1F1B that knows their memory.

*Splitting.* Samples are sorted by length; a microbatch is a run of them, padded to its longest. With t(i, j) seconds and
a(i, j) activations of samples i..j, for a bound t_max

    S(j) = min over i of S(i) + t(i, j)   with t(i, j) <= t_max and a(i, j) <= cap,

and sum + (D - 1) max is minimised over t_max: exact, O(n^2) for each bound.

*Order.* Rank d forwards until D - d microbatches are in flight or the next would not fit its memory, then alternates;
microbatches keep one order on all ranks, so communication planned for it cannot deadlock.

Paper: Jiang et al., DynaPipe: Optimizing Multi-task Training through Dynamic Pipelines, EuroSys 2024.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from stagewright.planner.errors import Infeasible
from stagewright.planner.schedules.action import Action, Kind
from stagewright.planner.schedules.family import ScheduleFamily, ScheduleRequest
from stagewright.planner.schedules.schedule import Schedule, encode, loop_placement
from stagewright.planner.schedules.sizes import check_placement, sizes_of

Floats = npt.NDArray[np.float64]


def dynapipe(request: ScheduleRequest) -> Schedule:
    """Return the memory-aware 1F1B of equal microbatches under the request's cap."""
    return order_under_cap(request, np.ones(request.num_microbatches), request.memory_cap)


def order_under_cap(request: ScheduleRequest, activation: Floats, memory_cap: float | None) -> Schedule:
    """Return the order for microbatches that hold `activation` each, shape [num_microbatches].

    Raises Infeasible when a single microbatch exceeds the cap, with both numbers.
    """
    sizes = sizes_of(request, "dynapipe")
    placement = loop_placement(sizes.num_ranks)
    check_placement(request, placement, "dynapipe")
    cap = np.inf if memory_cap is None else memory_cap
    if activation.max() > cap + 1e-9:
        raise Infeasible(
            f"microbatch {int(activation.argmax())} holds {activation.max():g} activations, the cap is {cap:g}",
            field="memory_cap",
            hint="split the batch under the cap first (split_batch)",
        )
    orders = []
    for rank in range(sizes.num_ranks):
        live, forwarded = 0.0, 0
        actions: list[Action] = []
        for microbatch in range(sizes.num_microbatches):
            while forwarded < sizes.num_microbatches and forwarded - microbatch < sizes.num_ranks - rank:
                if live + activation[forwarded] > cap + 1e-9:
                    break
                live += float(activation[forwarded])
                actions.append(Action(Kind.F, rank, forwarded))
                forwarded += 1
            actions.append(Action(Kind.B, rank, microbatch))
            live -= float(activation[microbatch])
        orders.append(encode(actions))
    return Schedule("dynapipe", sizes.num_microbatches, placement, tuple(orders))


def split_batch(
    lengths: Sequence[int],
    num_ranks: int,
    seconds: Callable[[int, int], float],
    activation: Callable[[int, int], float],
    cap: float,
) -> tuple[tuple[int, ...], ...]:
    """Return microbatches as tuples of sample indices, samples sorted by length.

    `seconds(count, longest)` and `activation(count, longest)` are those of a microbatch of `count` samples padded to
    `longest` on the slowest stage. Raises Infeasible when one sample alone exceeds the cap.
    """
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    count = len(order)
    table = np.full((count + 1, count + 1), np.inf)
    for end in range(1, count + 1):
        longest = lengths[order[end - 1]]
        for begin in range(end):
            if activation(end - begin, longest) <= cap:
                table[begin, end] = seconds(end - begin, longest)
    best, found = np.inf, None
    for bound in np.unique(table[np.isfinite(table)]).tolist():
        total, cuts = _cheapest_split(table, bound)
        if cuts is not None and total + (num_ranks - 1) * bound < best:
            best, found = total + (num_ranks - 1) * bound, cuts
    if found is None:
        raise Infeasible(f"the longest sample ({max(lengths)}) alone exceeds the cap of {cap:g}", field="memory_cap")
    return tuple(tuple(order[begin:end]) for begin, end in found)


def padding_waste(lengths: Sequence[int], microbatches: Sequence[Sequence[int]]) -> float:
    """Return the share of padded tokens that are padding."""
    padded = sum(len(batch) * max(lengths[index] for index in batch) for batch in microbatches)
    return 1.0 - sum(lengths[index] for batch in microbatches for index in batch) / padded


def _cheapest_split(table: Floats, bound: float) -> tuple[float, list[tuple[int, int]] | None]:
    count = len(table) - 1
    least = np.full(count + 1, np.inf)
    before = np.zeros(count + 1, dtype=np.int64)
    least[0] = 0.0
    for end in range(1, count + 1):
        column = np.where(table[:end, end] <= bound, least[:end] + table[:end, end], np.inf)
        before[end] = int(np.argmin(column))
        least[end] = column[before[end]]
    if not np.isfinite(least[count]):
        return np.inf, None
    cuts: list[tuple[int, int]] = []
    end = count
    while end:
        cuts.append((int(before[end]), end))
        end = int(before[end])
    return float(least[count]), cuts[::-1]


FAMILY = ScheduleFamily(
    "dynapipe",
    "Jiang et al., DynaPipe: Optimizing Multi-task Training through Dynamic Pipelines, EuroSys 2024",
    dynapipe,
    takes_cap=True,
)
