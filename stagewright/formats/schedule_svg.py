"""A timeline as an SVG picture: a row of coloured actions for each rank, idle time hatched, live memory under it.

Forwards, backwards, input and weight gradients have their own colours and carry their microbatch's number where it fits;
the second replica of a stage, and later chunks of a rank, are drawn darker. The critical path is underlined. One file,
no scripts, no fonts to fetch; the same timeline gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from xml.sax.saxutils import escape

import numpy as np

from stagewright.planner.errors import NotExpressible
from stagewright.planner.schedules.action import Action, Kind
from stagewright.planner.schedules.schedule import decode
from stagewright.planner.simulation.timeline import COMPUTE_LANE, Timeline

MOST_SPANS = 50_000
FILLS = {
    Kind.F: "#7db7e8",
    Kind.B: "#7fc97f",
    Kind.I: "#8fd3b6",
    Kind.W: "#f2b56b",
    Kind.R: "#c9c9c9",
    Kind.OPT: "#b39ddb",
    Kind.FILL: "#e8d77d",
}
NAMES = {
    Kind.F: "forward",
    Kind.B: "backward",
    Kind.I: "input gradient",
    Kind.W: "weight gradient",
    Kind.R: "recompute",
    Kind.OPT: "optimizer",
    Kind.FILL: "filler",
}
_ROW, _GAP, _LEFT, _TOP, _MEMORY = 22, 4, 64, 40, 90


def schedule_svg(timeline: Timeline, *, title: str, width: int = 1280) -> str:
    """Return the picture as SVG text; raises NotExpressible beyond MOST_SPANS spans."""
    compute = np.flatnonzero(timeline.lane == COMPUTE_LANE)
    if len(compute) > MOST_SPANS:
        raise NotExpressible(
            f"{len(compute)} actions are too many for a picture, it holds {MOST_SPANS}",
            field="svg",
            hint="draw fewer microbatches, or write a trace with --trace",
        )
    grid = timeline.num_ranks * (_ROW + _GAP)
    has_memory = bool(timeline.memory_bytes)
    height = _TOP + grid + 46 + (_MEMORY + 30 if has_memory else 0)
    scale = (width - _LEFT - 16) / max(timeline.makespan_s, 1e-300)
    origin = float(timeline.start_s.min()) if len(timeline.start_s) else 0.0
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="ui-sans-serif, Helvetica, Arial, sans-serif" font-size="11">',
        '<defs><pattern id="idle" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        '<rect width="6" height="6" fill="#f4f4f4"/><line x1="0" y1="0" x2="0" y2="6" stroke="#dddddd" stroke-width="2"/>'
        "</pattern></defs>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="{_LEFT}" y="22" font-size="14" font-weight="600">{escape(title)}</text>',
    ]
    parts += _rows(timeline.num_ranks, width)
    parts += _spans(timeline, compute, origin, scale)
    parts += _axis(timeline.makespan_s, scale, _TOP + grid, width)
    if has_memory:
        parts += _memory(timeline, origin, scale, _TOP + grid + 40, width)
    parts += _legend(timeline, compute, width)
    parts.append("</svg>")
    return "\n".join(parts) + "\n"


def _rows(num_ranks: int, width: int) -> Iterator[str]:
    for rank in range(num_ranks):
        y = _TOP + rank * (_ROW + _GAP)
        yield f'<text x="{_LEFT - 8}" y="{y + 15}" text-anchor="end">rank {rank}</text>'
        yield f'<rect x="{_LEFT}" y="{y}" width="{width - _LEFT - 16}" height="{_ROW}" fill="url(#idle)"/>'


def _spans(
    timeline: Timeline, compute: np.ndarray[tuple[int], np.dtype[np.int64]], origin: float, scale: float
) -> Iterator[str]:
    critical = set(timeline.critical_path.tolist())
    first_stage: dict[tuple[int, int], int] = {}
    for span in compute.tolist():
        rank, action = int(timeline.rank[span]), decode(timeline.action[span].tolist())
        key = (rank, action.replica)
        first_stage[key] = min(action.stage, first_stage.get(key, action.stage))
    for span in compute.tolist():
        rank, action = int(timeline.rank[span]), decode(timeline.action[span].tolist())
        x = _LEFT + (float(timeline.start_s[span]) - origin) * scale
        size = (float(timeline.end_s[span]) - float(timeline.start_s[span])) * scale
        y = _TOP + rank * (_ROW + _GAP)
        darker = action.replica > 0 or action.stage > first_stage[rank, action.replica]
        fill = _darker(FILLS.get(action.kind, "#bbbbbb")) if darker else FILLS.get(action.kind, "#bbbbbb")
        times = f"{float(timeline.start_s[span]):.6g} to {float(timeline.end_s[span]):.6g} s"
        yield (
            f'<g><title>{action} on rank {rank}, {times}</title><rect x="{x:.2f}" y="{y}" width="{size:.2f}" '
            f'height="{_ROW}" fill="{fill}" stroke="#ffffff" stroke-width="{0.6 if size > 3 else 0}"/>'
        )
        label = _label(action)
        if size >= 6.5 * len(label) + 2:
            yield f'<text x="{x + size / 2:.2f}" y="{y + 15}" text-anchor="middle">{label}</text>'
        if span in critical:
            yield f'<rect x="{x:.2f}" y="{y + _ROW}" width="{size:.2f}" height="2" fill="#c0392b"/>'
        yield "</g>"


def _label(action: Action) -> str:
    if action.microbatch < 0:
        return "O" if action.kind is Kind.OPT else ""
    return str(action.microbatch) if action.slice < 0 else f"{action.microbatch}.{action.slice}"


def _darker(colour: str) -> str:
    channels = [int(colour[place : place + 2], 16) * 82 // 100 for place in (1, 3, 5)]
    return "#" + "".join(f"{channel:02x}" for channel in channels)


def _axis(makespan_s: float, scale: float, y: float, width: int) -> Iterator[str]:
    yield f'<line x1="{_LEFT}" y1="{y + 4}" x2="{width - 16}" y2="{y + 4}" stroke="#888888"/>'
    step = _round_step(makespan_s / 10)
    for tick in range(int(makespan_s / step + 1e-9) + 1) if step > 0 else ():
        x = _LEFT + tick * step * scale
        yield f'<line x1="{x:.2f}" y1="{y + 4}" x2="{x:.2f}" y2="{y + 8}" stroke="#888888"/>'
        yield f'<text x="{x:.2f}" y="{y + 20}" text-anchor="middle" fill="#555555">{tick * step:.4g} s</text>'


def _round_step(value: float) -> float:
    if value <= 0:
        return 0.0
    power = 10.0 ** np.floor(np.log10(value))
    return float(next(factor * power for factor in (1, 2, 5, 10) if factor * power >= value * (1 - 1e-9)))


def _memory(timeline: Timeline, origin: float, scale: float, y: float, width: int) -> Iterator[str]:
    """Draw the live memory of each rank as a step line, on one scale, with the highest peak written at its level."""
    peaks = timeline.peak_memory()
    top = float(peaks.max(initial=0.0)) or 1.0
    base = y + _MEMORY
    end = _LEFT + timeline.makespan_s * scale
    yield f'<text x="{_LEFT - 8}" y="{y + 10}" text-anchor="end">live</text>'
    yield f'<line x1="{_LEFT}" y1="{base}" x2="{width - 16}" y2="{base}" stroke="#888888"/>'
    yield f'<line x1="{_LEFT}" y1="{y}" x2="{width - 16}" y2="{y}" stroke="#eeeeee"/>'
    yield f'<text x="{_LEFT - 8}" y="{y + 24}" text-anchor="end" fill="#555555">{top:.4g}</text>'
    for rank, (times, values) in enumerate(zip(timeline.memory_time_s, timeline.memory_bytes, strict=True)):
        hue = 210 + 150 * rank / max(timeline.num_ranks - 1, 1)
        points, level = [], base
        for time, value in zip(times.tolist(), values.tolist(), strict=True):
            x = _LEFT + (time - origin) * scale
            points.append(f"{x:.2f},{level:.2f}")
            level = base - value / top * _MEMORY
            points.append(f"{x:.2f},{level:.2f}")
        points.append(f"{end:.2f},{level:.2f}")
        yield (
            f'<polyline fill="none" stroke="hsl({hue:.0f},55%,45%)" stroke-width="1.3" points="{" ".join(points)}">'
            f"<title>rank {rank}: peak {float(peaks[rank]):.6g}</title></polyline>"
        )


def _legend(timeline: Timeline, compute: np.ndarray[tuple[int], np.dtype[np.int64]], width: int) -> Iterator[str]:
    kinds = [Kind(int(kind)) for kind in np.unique(timeline.action[compute, 0])]
    x = width - 16.0
    for kind in reversed(kinds):
        name = NAMES.get(kind, kind.name.lower())
        x -= 6.2 * len(name) + 26
        yield f'<rect x="{x:.1f}" y="12" width="12" height="12" fill="{FILLS.get(kind, "#bbbbbb")}"/>'
        yield f'<text x="{x + 16:.1f}" y="22">{name}</text>'
    idle = f"idle {timeline.bubble_over_total:.1%} of all rank time"
    x -= 6.2 * len(idle) + 26
    yield f'<rect x="{x:.1f}" y="12" width="12" height="12" fill="url(#idle)" stroke="#dddddd"/>'
    yield f'<text x="{x + 16:.1f}" y="22">{escape(idle)}</text>'
