"""Seq1F1B: 1F1B whose unit is a slice of a microbatch's sequence instead of a microbatch.

Rank d forwards D - d + K - 1 slices, then alternates one backward and one forward; the backwards of a microbatch take
its slices in reverse (a partially ordered queue). With D = 2, T = 2, K = 2:

    rank 0  F0.0 F0.1 F1.0      B0.1 F1.1 B0.0      B1.1 B1.0
    rank 1       F0.0 F0.1 B0.1 F1.0 B0.0 F1.1 B1.1 B1.0

With equal slices idle over total is (D - 1) / (K T + D - 1) and rank d holds (D - d + K - 1) / K activations, where
1F1B holds D - d.

Paper: Sun et al., Seq1F1B: Efficient Sequence-Level Pipeline Parallelism for Large Language Model Training, NAACL 2025.
"""

from __future__ import annotations

from stagewright.planner.schedules.family import ScheduleFamily, ScheduleRequest
from stagewright.planner.schedules.orders import alternate
from stagewright.planner.schedules.schedule import Schedule, loop_placement
from stagewright.planner.schedules.sizes import check_placement, sizes_of
from stagewright.planner.schedules.terapipe import sliced_passes


def seq1f1b(request: ScheduleRequest) -> Schedule:
    """Return the 1F1B order over slices."""
    sizes = sizes_of(request, "seq1f1b", sliced=True)
    placement = loop_placement(sizes.num_ranks)
    check_placement(request, placement, "seq1f1b")
    orders = tuple(
        alternate(
            *sliced_passes(rank, sizes.num_microbatches, sizes.num_slices),
            sizes.num_ranks - rank + sizes.num_slices - 1,
        )
        for rank in range(sizes.num_ranks)
    )
    return Schedule("seq1f1b", sizes.num_microbatches, placement, orders, num_slices=sizes.num_slices)


FAMILY = ScheduleFamily(
    "seq1f1b",
    "Sun et al., Seq1F1B: Efficient Sequence-Level Pipeline Parallelism for Large Language Model Training, NAACL 2025",
    seq1f1b,
)
