"""DualPipe: two replicas in opposite directions, the forward of one overlapped with the backward of the other.

Rank d and rank D - 1 - d hold the same two stages, so their orders mirror each other. Let h be the distance to the
nearer end, H = D / 2, n = T / 2 microbatches in each direction; `f`, `b`, `i`, `w` run the direction that enters at the
nearer end, capitals the other one, [xy] is a fused pair:

    1  2 (H - h - 1) x      f
    2  h + 1         x      f F
    3  H - h - 1     x      I W F
    4  n - D + h + 1 x      [fB] [Fb]      (the middle ranks run the first f and B apart)
    5  H - h - 1     x      B [Fb]
    6  h + 1         x      B b            (the second half only I and i)
    7  H - h - 1     x      W i
    8  h + 1         x      W

With a fused pair of duration F&B the idle time of a rank is (D/2 - 1) (F&B + F_B - 3 W), where F_B is a full backward,
and a rank holds D + 1 activations; each rank holds two stages' parameters. Executed as separate actions the same order
idles (D/2 - 1) (F + I - W). `parameters["fused"] = 0` leaves the pairs unfused.

With D = 2, T = 4 and every action in its own slot (a full backward and a fused pair take more):

    rank 0  0F0   1:1F1 0F2   1:1B1       1:1F3 0B0         1:1B3       0I2   0W2
    rank 1  1:0F1 1F0   1:0F3 1B0         1F2   1:0B1       1B2         1:0I3 1:0W3

Paper: DeepSeek-AI, DeepSeek-V3 Technical Report, 2024, section 3.2.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from stagewright.planner.schedules.action import Kind
from stagewright.planner.schedules.family import ScheduleFamily, ScheduleRequest
from stagewright.planner.schedules.gems import opposite_placement
from stagewright.planner.schedules.orders import Ints, order_of
from stagewright.planner.schedules.schedule import FUSED, Schedule
from stagewright.planner.schedules.sizes import check_placement, require, sizes_of

_LETTERS = {"F": Kind.F, "B": Kind.B, "I": Kind.I, "W": Kind.W}


def dualpipe(request: ScheduleRequest) -> Schedule:
    """Return the bidirectional order with fused pairs."""
    sizes = sizes_of(request, "dualpipe")
    ranks, microbatches = sizes.num_ranks, sizes.num_microbatches
    require(ranks % 2 == 0, f"dualpipe mirrors its ranks: an even number of ranks, {ranks} is odd", field="num_ranks")
    require(
        microbatches % 2 == 0,
        f"dualpipe splits its microbatches over 2 directions: an even number, {microbatches} is odd",
        field="num_microbatches",
    )
    require(
        microbatches >= 2 * ranks,
        f"dualpipe fills both directions with at least 2 D = {2 * ranks} microbatches for {ranks} ranks, "
        f"{microbatches} were asked for",
        field="num_microbatches",
    )
    placement = opposite_placement(ranks)
    check_placement(request, placement, "dualpipe")
    fused = bool(request.parameters.get("fused", 1))
    half = ranks // 2
    orders = []
    for rank in range(ranks):
        near_end = min(rank, ranks - 1 - rank)
        steps = two_way_steps(near_end, half, microbatches // 2, fused=fused)
        replica = steps.direction if rank < half else 1 - steps.direction
        stage = np.where(replica == 0, rank, ranks - 1 - rank).astype(np.int32)
        order = order_of(steps.kind, stage, 2 * steps.microbatch + replica, replica=replica)
        order[:, FUSED] = steps.fused
        orders.append(order)
    return Schedule("dualpipe", microbatches, placement, tuple(orders), parameters={"fused": int(fused)})


@dataclass(frozen=True, eq=False)
class TwoWaySteps:
    """One rank's actions over two directions, columns of equal length; microbatches are counted in each direction."""

    kind: Ints
    direction: Ints
    microbatch: Ints
    fused: Ints


def two_way_steps(position: int, half: int, count: int, *, fused: bool) -> TwoWaySteps:
    """Return the eight phases for position h of H = `half`, with n = `count` microbatches in each direction."""
    text = "".join(pattern * repeats for pattern, repeats in _phases(position, half, count))
    codes = np.frombuffer(text.encode(), dtype=np.uint8)
    opens, letters = codes == ord("["), (codes != ord("[")) & (codes != ord("]"))
    is_first_of_pair = np.roll(opens, 1)[letters] & fused
    upper = codes[letters] & ~np.uint8(32)
    kind = np.zeros(len(upper), dtype=np.int32)
    for letter, value in _LETTERS.items():
        kind[upper == ord(letter)] = int(value)
    direction = (codes[letters] < ord("a")).astype(np.int32)
    return TwoWaySteps(kind, *_number(kind, direction), is_first_of_pair.astype(np.int32))


def _phases(position: int, half: int, count: int) -> Iterator[tuple[str, int]]:
    ramp, width, steady = half - position - 1, position + 1, count - 2 * half + position + 1
    yield "f", 2 * ramp
    yield "fF", width
    yield "IWF", ramp
    first = "fB[Fb]" if ramp == 0 else "[fB][Fb]"
    yield first, 1
    yield "[fB][Fb]", steady - 1
    yield "B[Fb]", ramp
    yield from _cool_down(width)
    yield "Wi", ramp
    yield "W", width


def _cool_down(width: int) -> Iterator[tuple[str, int]]:
    """Phase 6: `width` pairs of backwards, of which the later half leaves its weight gradients for phases 7 and 8."""
    full = width // 2
    yield "Bb", full
    yield ("Bi" if width % 2 else "Ii"), 1
    yield "Ii", width - full - 1


def _number(kind: Ints, direction: Ints) -> tuple[Ints, Ints]:
    """Return direction and microbatch; the k-th W belongs to the k-th I of the rank, in whichever direction that was."""
    direction = direction.copy()
    microbatch = np.zeros(len(kind), dtype=np.int32)
    for way in (0, 1):
        for members in ((Kind.F,), (Kind.B, Kind.I)):
            chosen = np.isin(kind, members) & (direction == way)
            microbatch[chosen] = np.arange(np.count_nonzero(chosen))
    split, deferred = np.flatnonzero(kind == Kind.I), np.flatnonzero(kind == Kind.W)
    direction[deferred], microbatch[deferred] = direction[split], microbatch[split]
    return direction, microbatch


FAMILY = ScheduleFamily(
    "dualpipe",
    "DeepSeek-AI, DeepSeek-V3 Technical Report, 2024",
    dualpipe,
    split_backward=True,
    num_replicas=2,
    constraint="D is even, because ranks mirror each other; T is even and at least 2 D, which fills both directions",
)
