"""Varuna's opportunistic order: a rank never waits while something it may run is ready, and a ready backward comes first.

Fixed orders such as 1F1B let a rank wait for the action whose turn it is. Here a rank takes the backward that is ready,
else the next forward that is, under the memory cap; the order is made for the given costs and latency, and says so by
changing with them. With D = 3, T = 6 and a latency of one forward, rank 0 forwards on where 1F1B would wait:

    1f1b    F0 F1 F2             B0 F3       B1 F4 ...
    varuna  F0 F1 F2 F3 F4 F5    B0    B1    B2 ...

Varuna recomputes, so that a microbatch that is under way holds its input alone, and admits as many as memory allows:
`request.memory_cap`, in activations of a rank, without limit when None. Its recomputation is part of the backward here, while
Varuna starts it before the gradient arrives. At run time Varuna also leaves this order when messages are late; a plan's
order is followed as it is.

Paper: Athlur et al., Varuna: Scalable, Low-cost Training of Massive Deep Learning Models, EuroSys 2022.
"""

from __future__ import annotations

import numpy as np

from stagewright.planner.schedules.family import ScheduleFamily, ScheduleRequest
from stagewright.planner.schedules.list_scheduling import BACKWARD, decode, loose_rule, orders_of, requested_chains
from stagewright.planner.schedules.schedule import Schedule, loop_placement
from stagewright.planner.schedules.sizes import check_placement, require, sizes_of


def varuna(request: ScheduleRequest) -> Schedule:
    """Return the work-conserving order for the request's costs, backwards first."""
    sizes = sizes_of(request, "varuna")
    placement = loop_placement(sizes.num_ranks)
    check_placement(request, placement, "varuna")
    chains = requested_chains(request, sizes, placement, is_split=False, counts_chunks=False)
    rule = loose_rule(chains)
    targets = rule.target_s.copy()
    targets[BACKWARD] = -np.inf
    most = np.inf if request.memory_cap is None else request.memory_cap
    least = float(chains.held.max())
    require(
        most >= least,
        f"a microbatch holds {least:g} on one rank, the cap is {most:g}",
        field="memory_cap",
        hint=f"give a cap of at least {least:g}",
    )
    words = decode(chains, rule._replace(target_s=targets, cap=np.full(sizes.num_ranks, most)))
    return Schedule("varuna", sizes.num_microbatches, placement, orders_of(chains, words, 1))


FAMILY = ScheduleFamily(
    "varuna",
    "Athlur et al., Varuna: Scalable, Low-cost Training of Massive Deep Learning Models, EuroSys 2022",
    varuna,
    takes_cap=True,
)
