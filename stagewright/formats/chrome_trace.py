"""A timeline as a Chrome trace, which Perfetto and chrome://tracing draw: a process for each rank, a thread for each lane."""

from __future__ import annotations

from stagewright.planner.schedules.schedule import decode
from stagewright.planner.simulation.timeline import LANE_NAMES, Timeline

_COLOURS = {"F": "good", "B": "terrible", "I": "bad", "W": "yellow", "R": "grey"}


def chrome_trace(timeline: Timeline, *, name: str = "") -> dict[str, object]:
    """Return the trace as plain JSON; times in microseconds, live memory as one counter for each rank."""
    events: list[dict[str, object]] = []
    for rank in range(timeline.num_ranks):
        events.append({"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}})
        events.append({"ph": "M", "name": "process_sort_index", "pid": rank, "args": {"sort_index": rank}})
        events += [
            {"ph": "M", "name": "thread_name", "pid": rank, "tid": lane, "args": {"name": lane_name}}
            for lane, lane_name in enumerate(LANE_NAMES)
        ]
    critical = set(timeline.critical_path.tolist())
    columns = (timeline.rank, timeline.lane, timeline.action, timeline.start_s, timeline.end_s)
    for span, (rank, lane, row, start_s, end_s) in enumerate(
        zip(*(column.tolist() for column in columns), strict=True)
    ):
        action = decode(row)
        event: dict[str, object] = {
            "ph": "X",
            "name": str(action),
            "cat": action.kind.name,
            "pid": rank,
            "tid": lane,
            "ts": start_s * 1e6,
            "dur": (end_s - start_s) * 1e6,
            "args": {
                "stage": action.stage,
                "microbatch": action.microbatch,
                "slice": action.slice,
                "replica": action.replica,
                "critical": span in critical,
            },
        }
        if action.kind.name in _COLOURS:
            event["cname"] = _COLOURS[action.kind.name]
        events.append(event)
    for rank, (times, values) in enumerate(zip(timeline.memory_time_s, timeline.memory_bytes, strict=True)):
        events += [
            {"ph": "C", "name": "live memory", "pid": rank, "ts": time * 1e6, "args": {"live": value}}
            for time, value in zip(times.tolist(), values.tolist(), strict=True)
        ]
    return {
        "displayTimeUnit": "ms",
        "otherData": {"name": name, "source": timeline.source, "makespan_s": timeline.makespan_s},
        "traceEvents": events,
    }
