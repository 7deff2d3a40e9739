"""Which pieces of a sequence a device has between layers, where stages divide sequences unlike.

The sequence is cut into so many equal pieces that every stage's devices hold whole ones. Context parallelism gives a device
those of its place in the plan's layout: one behind the other (contiguous), every cp-th position (striped), or one from
either end (zigzag); between blocks sequence parallelism gives it 1 / tp of them, in their order. Pieces ascend on every
device, so that what two devices share lies in one order on both.
"""

from __future__ import annotations

from functools import lru_cache
from math import lcm

from stagewright.modeling.context_attention import Layout, positions_of
from stagewright.planner.documents.plan import Degrees, Plan
from stagewright.planner.errors import InvalidArgument


def context_layout(plan: Plan) -> Layout:
    """Return how context parallelism lays sequences over its devices; raises InvalidArgument for a name that is no layout."""
    layout = str(plan.schedule.parameters.get("context_layout", "contiguous"))
    if layout not in ("contiguous", "striped", "zigzag"):
        raise InvalidArgument(
            f"there is no context layout {layout!r}",
            field="schedule.parameters.context_layout",
            hint="contiguous, striped or zigzag",
        )
    return layout


def num_pieces(plan: Plan) -> int:
    """Return into how many equal pieces a plan's stages cut sequences.

    Raises InvalidArgument where context-parallel stages cut them into pieces that the job's sequences do not divide into.
    """
    layout, length = context_layout(plan), plan.job.sequence_length
    parts = lcm(*(_parts(stage.degrees, layout) for stage in plan.stages))
    if all(stage.degrees.cp == 1 for stage in plan.stages):
        return parts
    if length % parts:
        raise InvalidArgument(
            f"a sequence of {length} does not divide into {parts} parts, as stages with cp "
            f"{[stage.degrees.cp for stage in plan.stages]} cut it",
            field="stages.degrees.cp",
            hint="pad the sequence, or plan with equal degrees for all stages",
        )
    return length if layout == "striped" else parts


def _parts(degrees: Degrees, layout: Layout) -> int:
    mirrored = 2 if layout == "zigzag" and degrees.cp > 1 else 1
    return degrees.cp * mirrored * (degrees.tp if degrees.sp else 1)


@lru_cache(maxsize=1024)
def pieces_held(degrees: Degrees, cp: int, tp: int, total: int, layout: Layout, *, is_split: bool) -> tuple[int, ...]:
    """Return which of `total` pieces a device at these places has; `is_split` where sequence parallelism divides sequences."""
    pieces = tuple(positions_of(cp, degrees.cp, total, layout).tolist()) if degrees.cp > 1 else tuple(range(total))
    if not (is_split and degrees.sp):
        return pieces
    each = len(pieces) // degrees.tp
    return pieces[tp * each : (tp + 1) * each]
