"""Schedules as text: the steps of all ranks around one place, and a whole timeline on a time axis.

rank 0 | 0F0  0F1 [0B0] 0F2
rank 1 | 1F0  1B0  1F1  1B1
"""

from __future__ import annotations

import numpy as np

from stagewright.planner.schedules.action import Action, Kind
from stagewright.planner.schedules.schedule import KIND, Schedule, decode
from stagewright.planner.simulation.timeline import COMPUTE_LANE, Timeline


def draw_order(schedule: Schedule, rank: int, index: int, *, before: int = 4, after: int = 4) -> str:
    """Return the rows around `index` of the rank's order, in brackets, and the same places of at most four ranks each side."""
    ranks = range(max(0, rank - 4), min(schedule.num_ranks, rank + 5))
    first = max(0, index - before)
    cells: list[list[str]] = []
    for other in ranks:
        rows = schedule.orders[other][first : index + after + 1].tolist()
        cells.append([f" {decode(row)} " for row in rows])
        if other == rank and index - first < len(cells[-1]):
            cells[-1][index - first] = f"[{cells[-1][index - first].strip()}]"
    columns = max((len(line) for line in cells), default=0)
    widths = [max(len(line[column]) for line in cells if column < len(line)) for column in range(columns)]
    lead = "... " if first else ""
    label = max(len(str(other)) for other in ranks)
    return "\n".join(
        f"rank {other:>{label}} | {lead}"
        + "".join(cell.ljust(width) for cell, width in zip(line, widths, strict=False)).rstrip()
        for other, line in zip(ranks, cells, strict=True)
    )


def draw_timeline(timeline: Timeline, *, most_columns: int = 150) -> list[list[tuple[str, Kind | None]]] | None:
    """Return, for each rank, pieces of text with the kind they belong to (None while idle), all on one time axis.

    A piece is as wide as its span: the kind's letter and the microbatch where they fit. None when even the narrowest
    scale, one column for the shortest span, is wider than `most_columns`.
    """
    compute = np.flatnonzero(timeline.lane == COMPUTE_LANE)
    if not len(compute):
        return []
    seconds = timeline.end_s[compute] - timeline.start_s[compute]
    labels = [_label(decode(row)) for row in timeline.action[compute].tolist()]
    column_s = timeline.makespan_s / most_columns
    if float(seconds.min()) < column_s:
        return None
    widest = float(np.min(seconds / (np.array([len(label) for label in labels]) + 1)))
    column_s = max(column_s, widest)
    origin = float(timeline.start_s.min())
    lines: list[list[tuple[str, Kind | None]]] = [[] for _ in range(timeline.num_ranks)]
    at = [0] * timeline.num_ranks
    for place, label in zip(compute.tolist(), labels, strict=True):
        rank = int(timeline.rank[place])
        first = round((float(timeline.start_s[place]) - origin) / column_s)
        last = round((float(timeline.end_s[place]) - origin) / column_s)
        if first > at[rank]:
            lines[rank].append((" " * (first - at[rank]), None))
        kind = Kind(int(timeline.action[place, KIND]))
        lines[rank].append((label[: last - first].ljust(last - first), kind))
        at[rank] = last
    return lines


def _label(action: Action) -> str:
    return action.kind.name[0] + ("" if action.microbatch < 0 else str(action.microbatch))
