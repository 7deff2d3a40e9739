"""ZB-H2: warm-up forwards until the first gradient arrives, so that no rank idles inside its span.

Rank d forwards 2 (D - d) - 1 microbatches before its first I and holds up to 2 D - 1 activations:

    rank 0  F0 F1 F2 F3 F4 I0 W0 I1 W1 I2 W2 I3 W3 I4 W4
    rank 1     F0 F1 F2 I0 F3 I1 F4 I2 W0 I3 W1 I4 W2 W3 W4
    rank 2        F0 I0 F1 I1 F2 I2 F3 I3 F4 I4 W0 W1 W2 W3 W4

The longest rank span has a bubble of (D - 1) (F + I - 2 W), none with equal times; the makespan keeps the skew of D - 1
forwards, which the optimizer hides only when it steps rank by rank. T must be at least 2 D - 1 to fill the warm-up.
The places of the W follow the costs and the latency (`weight_placement`); the order of F and I is fixed.

Paper: Qi et al., Zero Bubble Pipeline Parallelism, ICLR 2024, section 2.3.
"""

from __future__ import annotations

import numpy as np

from stagewright.planner.schedules.family import ScheduleFamily, ScheduleRequest
from stagewright.planner.schedules.schedule import Schedule
from stagewright.planner.schedules.sizes import require, sizes_of
from stagewright.planner.schedules.zb_h1 import one_chunk


def zb_h2(request: ScheduleRequest) -> Schedule:
    """Return the order with 2 (D - d) - 1 warm-up forwards on rank d and the W placed by cost."""
    sizes = sizes_of(request, "zb-h2")
    most = 2 * sizes.num_ranks - 1
    require(
        sizes.num_microbatches >= most,
        f"zb-h2 warms up with 2 D - 1 = {most} microbatches on {sizes.num_ranks} ranks, "
        f"{sizes.num_microbatches} were asked for",
        field="num_microbatches",
        hint=f"take at least {most} microbatches, or zb-h1",
    )
    return one_chunk(request, sizes, "zb-h2", 2 * (sizes.num_ranks - np.arange(sizes.num_ranks)) - 1, most)


FAMILY = ScheduleFamily(
    "zb-h2",
    "Qi et al., Zero Bubble Pipeline Parallelism, ICLR 2024",
    zb_h2,
    split_backward=True,
    constraint="T is at least 2 D - 1, the warm-up of the first rank",
    improves=True,
    fixed_order=True,
)
