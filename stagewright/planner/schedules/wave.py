"""Hanayo's wave pipeline: W waves over the ranks, v = 2 W chunks folded like a W, one copy of the weights.

Stage s runs down the ranks, turns around on the last one without a hop, runs up, turns on the first one, and so on: the
two directions of Chimera without its second replica. Backwards go first, forwards fill; microbatches keep their order.

    rank 0  0F0 0F1 0F2         5F0 5B0 5F1 5B1 5F2 5B2 0B0     0B1     0B2
    rank 1      1F0 1F1 1F2 4F0     4F1 4B0 4F2 4B1 1B0 4B2 1B1     1B2
    rank 2          2F0 3F0 2F1 3F1 2F2 3F2 3B0 2B0 3B1 2B1 3B2 2B2

For T a multiple of D and B = F idle over total is (D - 1) / (2 W T + D - 1), and a rank holds at most min(T, D)
activations; for B = 2 F the same rule gives 0.333 / 0.213 / 0.119 for 1, 2 and 4 waves on 4 ranks with 4 microbatches. A
microbatch sends 2 W (D - 1) messages each way, where a loop over as many chunks sends 2 W D - 1.

Paper: Liu et al., Hanayo: Harnessing Wave-like Pipeline Parallelism for Enhanced Large Model Training Efficiency, SC 2023.
"""

from __future__ import annotations

import numpy as np

from stagewright.planner.schedules.family import ScheduleFamily, ScheduleRequest
from stagewright.planner.schedules.list_scheduling import (
    BACKWARD,
    FORWARD,
    Chains,
    Rule,
    decode,
    loose_rule,
    orders_of,
    requested_chains,
)
from stagewright.planner.schedules.schedule import Schedule, wave_placement
from stagewright.planner.schedules.sizes import check_placement, require, sizes_of


def wave(request: ScheduleRequest) -> Schedule:
    """Return the backward-first order on the waves, at most D activations on a rank."""
    waves = _num_waves(request)
    sizes = sizes_of(request, "wave", default_chunks=2 * waves, least_chunks=2 * waves, most_chunks=2 * waves)
    placement = wave_placement(sizes.num_ranks, sizes.num_chunks)
    check_placement(request, placement, "wave")
    chains = requested_chains(request, sizes, placement, is_split=False)
    rule = backward_first(chains)._replace(cap=np.full(sizes.num_ranks, float(sizes.num_stages)))
    words = decode(chains, rule)
    return Schedule("wave", sizes.num_microbatches, placement, orders_of(chains, words, 1), parameters={"waves": waves})


def backward_first(chains: Chains) -> Rule:
    """Return the rule that takes the oldest backward, else the oldest forward."""
    rule = loose_rule(chains)
    period_s = float(chains.seconds.sum())
    target_s = np.zeros_like(chains.seconds)
    target_s[FORWARD] = period_s * (int(chains.units.max()) * chains.fan + 1)
    target_s[BACKWARD] = 0.0
    return rule._replace(target_s=target_s, period_s=period_s)


def _num_waves(request: ScheduleRequest) -> int:
    chunks = request.num_chunks
    if request.num_waves is None:
        require(
            chunks is None or (chunks % 2 == 0 and chunks >= 2),
            f"wave folds its chunks in pairs: an even number, {chunks} were asked for",
            field="num_chunks",
        )
        return 1 if chunks is None else chunks // 2
    require(request.num_waves >= 1, f"num_waves is {request.num_waves}, it must be at least 1", field="num_waves")
    require(
        chunks is None or chunks == 2 * request.num_waves,
        f"{request.num_waves} waves have {2 * request.num_waves} chunks on a rank, {chunks} were asked for",
        field="num_chunks",
    )
    return request.num_waves


FAMILY = ScheduleFamily(
    "wave",
    "Liu et al., Hanayo: Harnessing Wave-like Pipeline Parallelism for Enhanced Large Model Training Efficiency, SC 2023",
    wave,
    aliases=("hanayo",),
    default_chunks=2,
    constraint="v = 2 W, a wave is a pass down and a pass up the ranks",
)
