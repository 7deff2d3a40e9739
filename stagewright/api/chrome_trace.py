"""A timeline in the Chrome trace format: one process for each rank, one thread for each lane."""

from __future__ import annotations

import json

from stagewright.api.resources import Spans

_MICROSECONDS = 1e6


def chrome_trace(spans: Spans) -> str:
    """Return the trace as JSON text; times become microseconds, as the format wants them."""
    events: list[dict[str, object]] = []
    for rank in range(spans.num_ranks):
        events.append({"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}})
        events.append({"ph": "M", "name": "process_sort_index", "pid": rank, "args": {"sort_index": rank}})
    for rank, lane in sorted(set(zip(spans.rank, spans.lane, strict=True))):
        name = spans.lanes[lane]
        events.append({"ph": "M", "name": "thread_name", "pid": rank, "tid": lane, "args": {"name": name}})
    for index, start_s in enumerate(spans.start_s):
        kind = spans.kinds[spans.kind[index]]
        microbatch = spans.microbatch[index]
        events.append(
            {
                "ph": "X",
                "name": f"{spans.stage[index]}{kind}{microbatch if microbatch >= 0 else ''}",
                "cat": kind,
                "pid": spans.rank[index],
                "tid": spans.lane[index],
                "ts": start_s * _MICROSECONDS,
                "dur": (spans.end_s[index] - start_s) * _MICROSECONDS,
                "args": {"stage": spans.stage[index], "microbatch": microbatch, "replica": spans.replica[index]},
            }
        )
    for rank, (times, levels) in enumerate(zip(spans.memory_time_s, spans.memory_bytes, strict=True)):
        for time_s, level in zip(times, levels, strict=True):
            events.append(
                {"ph": "C", "name": "memory", "pid": rank, "ts": time_s * _MICROSECONDS, "args": {"bytes": level}}
            )
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})
