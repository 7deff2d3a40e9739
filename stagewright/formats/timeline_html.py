"""Timelines as one HTML file that needs no network: predicted above measured, with memory under each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources

from stagewright.planner.schedules.schedule import decode, step_text
from stagewright.planner.simulation.timeline import LANE_NAMES, Timeline

MAX_SPANS = 200_000


def timeline_html(
    panels: Sequence[tuple[str, Timeline]],
    *,
    title: str,
    facts: Mapping[str, str],
    memory_limit_bytes: float | None = None,
) -> str:
    """Return a page that draws each (heading, timeline) under the other on one time axis, with memory by rank.

    `facts` are printed as a short table above the charts. Only the first MAX_SPANS spans of a timeline are drawn.
    """
    data = {
        "title": title,
        "facts": [[name, value] for name, value in facts.items()],
        "limit": memory_limit_bytes,
        "panels": [timeline_object(heading, timeline) for heading, timeline in panels],
    }
    template = resources.files("stagewright.formats").joinpath("templates/timeline.html").read_text(encoding="utf-8")
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("</", "<\\/")
    return template.replace("/*DATA*/null", text)


def timeline_object(heading: str, timeline: Timeline) -> dict[str, object]:
    """Return a timeline as plain JSON: spans as [rank, lane, kind, text, start_s, end_s], memory as step functions."""
    count = min(len(timeline.start_s), MAX_SPANS)
    origin = float(timeline.start_s.min()) if count else 0.0
    spans = []
    for index in range(count):
        action = decode(timeline.action[index].tolist())
        start, end = float(timeline.start_s[index]) - origin, float(timeline.end_s[index]) - origin
        lane = LANE_NAMES[int(timeline.lane[index])]
        spans.append([int(timeline.rank[index]), lane, action.kind.name, step_text((action,)), start, end])
    memory = [
        [[float(time) - origin, float(size)] for time, size in zip(times, sizes, strict=True)]
        for times, sizes in zip(timeline.memory_time_s, timeline.memory_bytes, strict=True)
    ]
    return {
        "heading": heading,
        "source": timeline.source,
        "ranks": timeline.num_ranks,
        "makespan": timeline.makespan_s,
        "spans": spans,
        "memory": memory,
    }
