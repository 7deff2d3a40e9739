"""A timeline in columns, as the service stores and sends it, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stagewright.api.resources import Spans

if TYPE_CHECKING:
    from stagewright.planner.simulation.timeline import Timeline


def columns_of(timeline: Timeline, peak_bytes: tuple[float, ...]) -> dict[str, object]:
    """Return a timeline in columns; memory is lifted by what never changes, so that its peak is the predicted one."""
    from stagewright.planner.schedules.action import Kind
    from stagewright.planner.schedules.schedule import KIND, MICROBATCH, REPLICA, SLICE, STAGE
    from stagewright.planner.simulation.timeline import LANE_NAMES

    action = timeline.action
    columns = {"kind": KIND, "stage": STAGE, "microbatch": MICROBATCH, "slice": SLICE, "replica": REPLICA}
    memory = [
        (levels + (peak - levels.max(initial=0.0))).round().tolist()
        for levels, peak in zip(timeline.memory_bytes, peak_bytes, strict=False)
    ]
    return {
        "source": timeline.source,
        "num_ranks": timeline.num_ranks,
        "makespan_s": timeline.makespan_s,
        "lanes": list(LANE_NAMES),
        "kinds": [kind.name for kind in Kind],
        "rank": timeline.rank.tolist(),
        "lane": timeline.lane.tolist(),
        **{name: action[:, column].tolist() for name, column in columns.items()},
        "start_s": timeline.start_s.round(9).tolist(),
        "end_s": timeline.end_s.round(9).tolist(),
        "memory_time_s": [times.round(9).tolist() for times in timeline.memory_time_s],
        "memory_bytes": memory,
        "critical_path": timeline.critical_path.tolist(),
    }


def timeline_of(spans: Spans) -> Timeline:
    """Return the timeline that was put into columns."""
    import numpy as np

    from stagewright.planner.schedules.action import Action, Kind
    from stagewright.planner.schedules.schedule import encode
    from stagewright.planner.simulation.timeline import LANE_NAMES, Timeline

    rows = zip(spans.kind, spans.stage, spans.microbatch, spans.slice, spans.replica, strict=True)
    return Timeline(
        source=spans.source,
        num_ranks=spans.num_ranks,
        rank=np.array(spans.rank, dtype=np.int32),
        lane=np.array([LANE_NAMES.index(spans.lanes[lane]) for lane in spans.lane], dtype=np.int32),
        action=encode(Action(Kind[spans.kinds[kind]], *where) for kind, *where in rows),
        start_s=np.array(spans.start_s),
        end_s=np.array(spans.end_s),
        memory_time_s=tuple(np.array(times) for times in spans.memory_time_s),
        memory_bytes=tuple(np.array(levels) for levels in spans.memory_bytes),
        critical_path=np.array(spans.critical_path, dtype=np.int32),
    )
